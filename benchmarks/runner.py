"""Runs a table: its backends take turns on every case, and ratios of their times are compared with goals."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.backends import Backend
from benchmarks.cases import Case
from benchmarks.formatting import cells, sentences
from benchmarks.machine_load import LoadMonitor
from benchmarks.progress import Progress
from benchmarks.results import Figure, Result, Row
from benchmarks.workers import InstalledBackend, Worker

NOTEWORTHY_CORES = 0.1
"""A table says so if other processes used more cores than this on average."""

TOLERANCES = {"float32": 1e-2, "bfloat16": 0.1}
"""Relative differences between backends, by dtype. They are wide because torch is off by 3e-4 in one row of
2^26, and jax.nn by 0.03 in bfloat16; the tests say how exact ours is."""

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric mean": statistics.geometric_mean,
    "minimum": min,
    "maximum": max,
}
"""Statistics of ratios. The maximum should stay below its target, the others above theirs."""

SLOW_SECONDS = 0.5
"""A call that takes longer is measured in few rounds."""


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
      sweeps: how many times all cases of a table are measured, each time with new processes.
      rounds: the turns of each backend in a case of a sweep.
      slow_rounds: the turns of a backend whose calls are slow.
      seconds: how long all turns of a backend in a case last together.
      max_elements: larger cases are left out.
    """

    sweeps: int
    rounds: int
    slow_rounds: int
    seconds: float
    max_elements: float = float("inf")


class Ratio(NamedTuple):
    """The ratio of the best numerator's time to the denominator's.

    Attributes:
      name: the heading of its column.
      numerators: the names of backends, of which the fastest counts.
      denominator: the name of a backend.
      overhead: the name of a backend whose time is subtracted from both.
      least: smaller values count as this one, because differences below it do not matter.
    """

    name: str
    numerators: tuple[str, ...]
    denominator: str
    overhead: str | None = None
    least: float = float("-inf")

    def backends(self) -> set[str]:
        """The names of all backends that it needs."""
        return {*self.numerators, self.denominator} | ({self.overhead} if self.overhead else set())

    def value(self, medians: Mapping[str, float]) -> float:
        """The ratio, from the median time of each backend."""
        overhead = medians[self.overhead] if self.overhead else 0.0
        best = min(medians[name] for name in self.numerators)
        above, below = (max(x - overhead, self.least) for x in (best, medians[self.denominator]))
        return above / below


class Goal(NamedTuple):
    """A target for one of :data:`STATISTICS`."""

    statistic: str
    target: float


class Summary(NamedTuple):
    """Goals for a ratio, over the cases for which ``includes`` is true."""

    ratio: Ratio
    goals: tuple[Goal, ...]
    note: str = ""
    includes: Callable[[Case], bool] = lambda case: True


Samples = dict[str, list[float]]


class Table(NamedTuple):
    """Cases and the backends that are compared in them.

    Attributes:
      title: the heading.
      cases: one for each row.
      backends: functions that make them, or backends of another installation.
      ratios: the columns beside the measurements.
      summaries: what is said of the ratios below the table.
      quantity: what is measured, one of :data:`MEASURES`.
      name: the name by which plots find the table, if there is a plot of it.
      isa: the instruction set whose kernels are measured, if it is a single one.
      keeps_memory: whether processes that are timed keep the memory of results for later ones, see
        ``workers``.
      derive: computes further figures from the rows.
    """

    title: str
    cases: tuple[Case, ...]
    backends: tuple[Callable[[], Backend] | InstalledBackend, ...]
    ratios: tuple[Ratio, ...] = ()
    summaries: tuple[Summary, ...] = ()
    quantity: str = "seconds"
    name: str = ""
    isa: str = ""
    keeps_memory: bool = True
    derive: Callable[[Sequence[Row]], list[Figure]] = lambda rows: []

    def select(self, effort: Effort, only: str) -> "Table":
        """The table with those cases whose names contain ``only`` and that are not too large."""
        cases = (case for case in self.cases if only in case.name and case.elements <= effort.max_elements)
        return self._replace(cases=tuple(cases))

    def sweeps(self, effort: Effort) -> int:
        """The number of sweeps over its cases: chance changes times, but hardly sizes and errors."""
        return effort.sweeps if self.quantity == "seconds" else 1


def run_table(table: Table, effort: Effort, progress: Progress) -> Result:
    """Measures and prints a table."""
    progress.write(f"\n{table.title}")
    run = _Run(table, effort, progress)
    for _ in range(table.sweeps(effort) - 1):
        for _ in run.sweep():
            progress.advance()
    writer, rows = None, []
    for case in run.sweep():
        writer = writer or _TableWriter(table, run, progress)
        row = Row(case, run.samples[case], {})
        row = row._replace(ratios={ratio.name: ratio.value(row.medians) for ratio in run.ratios})
        writer.write(row)
        rows.append(row)
        progress.advance()
    others = run.cores_used_by_others()
    if others is not None and others > NOTEWORTHY_CORES:
        progress.write(
            f"  other processes kept {others:.2f} cores busy meanwhile: no figure for several threads counts"
        )
    figures = [figure for summary in table.summaries for figure in _summarise(summary, rows)]
    figures += table.derive(rows)
    for sentence in sentences(figures):
        progress.write(f"  {sentence}")
    return Result(table.title, table.name, table.quantity, table.isa, rows, figures, others)


class _Run:
    """The samples of a table, from several sweeps over its cases, each with new processes.

    How fast a process is depends on chance, such as where its memory lies, and other processes may be busy
    for seconds. With several sweeps neither decides a row.
    """

    def __init__(self, table: Table, effort: Effort, progress: Progress):
        self._table, self._effort, self._progress = table, effort, progress
        self._missing: set[str] = set()
        self._workers: list[Worker] = []
        self._load = LoadMonitor(lambda: sum(worker.cpu_seconds for worker in self._workers))
        self.backends: list[str] = []
        self.ratios: list[Ratio] = []
        self.samples: dict[Case, Samples] = {}

    def sweep(self) -> Iterator[Case]:
        """Measures every case and yields it, unless this system does not tell the quantity."""
        with contextlib.ExitStack() as stack:
            keeps_memory = self._table.keeps_memory and self._table.quantity == "seconds"
            factories = self._table.backends
            workers = [stack.enter_context(Worker(factory, keeps_memory)) for factory in factories]
            self._workers += workers
            backends, computing = self._available(workers)
            self.backends = list(backends)
            self.ratios = [ratio for ratio in self._table.ratios if ratio.backends() <= backends.keys()]
            for case in self._table.cases:
                self._progress.begin(case.name)
                new = measure(case, backends, computing, self._table.quantity, self._effort)
                if not new:
                    self._progress.write(f"  left out: this system does not tell {self._table.quantity}")
                    break
                old = self.samples.get(case, {})
                self.samples[case] = {name: old.get(name, []) + values for name, values in new.items()}
                yield case

    def cores_used_by_others(self) -> float | None:
        """The average since the beginning; None where the system does not tell."""
        return self._load.cores_used_by_others()

    def _available(self, workers: Sequence[Worker]) -> tuple[dict[str, Worker], set[str]]:
        """The workers that can run here, by name, and the names of those that compute the case.

        Says once why the others cannot.
        """
        available, computing = {}, set()
        for worker in workers:
            try:
                name, computes = worker.introduce()
            except ImportError as error:
                if str(error) not in self._missing:
                    self._progress.write(f"  left out: {error}")
                self._missing.add(str(error))
                continue
            available[name] = worker
            if computes:
                computing.add(name)
        return available, computing


def measure(
    case: Case, backends: Mapping[str, Worker], computing: set[str], quantity: str, effort: Effort
) -> Samples:
    """Checks that the backends' results agree, then measures the quantity."""
    prepared = {name: backend.prepare(case) for name, backend in backends.items()}
    results = {name: prepared[name].result for name in prepared if name in computing}
    if quantity != "ULP":  # There, the difference is what is measured.
        _check(results, TOLERANCES[case.dtype])
    outputs = {name: one.outputs for name, one in prepared.items()}
    return MEASURES[quantity](backends, outputs, effort)


def _seconds(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    """Seconds for each output of a backend, one sample for each of its turns."""
    calls: dict[str, int] = {}
    samples: Samples = {}
    for name, backend in backends.items():
        once = backend.seconds_per_call(1)
        samples[name] = [once / outputs[name]] if once > SLOW_SECONDS else []
        if not samples[name]:
            once = min(once, backend.seconds_per_call(1))
        calls[name] = max(1, round(effort.seconds / effort.rounds / max(once, 1e-7)))
    rounds = {name: effort.slow_rounds if samples[name] else effort.rounds for name in backends}
    for _ in range(effort.rounds):
        for name, backend in backends.items():
            if len(samples[name]) < rounds[name]:
                samples[name].append(backend.seconds_per_call(calls[name]) / outputs[name])
    return samples


def _peak_bytes(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    samples: Samples = {}
    for name, backend in backends.items():
        peaks = [backend.peak_bytes() for _ in range(effort.slow_rounds)]
        samples[name] = [float(peak) for peak in peaks if peak is not None]
    return samples if all(samples.values()) else {}


def _temporary_bytes(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    sizes = {name: backend.temporary_bytes() for name, backend in backends.items()}
    known = {name: [float(size)] for name, size in sizes.items() if size is not None}
    return known if known.keys() == sizes.keys() else {}


def _ulp_errors(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    return {name: [backend.ulp_error()] for name, backend in backends.items()}


MEASURES: dict[str, Callable[[Mapping[str, Worker], Mapping[str, int], Effort], Samples]] = {
    "seconds": _seconds,
    "bytes": _peak_bytes,
    "temporaries": _temporary_bytes,
    "ULP": _ulp_errors,
}
"""Functions that measure a case, by quantity. Each quantity has an entry in ``formatting.QUANTITIES``."""


def _check(results: Mapping[str, np.ndarray | None], tolerance: float) -> None:
    """Raises AssertionError unless all results agree."""
    expected = None
    for name, result in results.items():
        assert result is not None
        expected = result if expected is None else expected
        atol = tolerance * 0.02 * np.abs(expected).max()  # Gradients are differences that come near 0.
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=atol, err_msg=name)


def _summarise(summary: Summary, rows: Sequence[Row]) -> list[Figure]:
    name = summary.ratio.name
    values = [row.ratios[name] for row in rows if name in row.ratios and summary.includes(row.case)]
    if not values:
        return []
    figures = []
    for statistic, target in summary.goals:
        value = STATISTICS[statistic](values)
        met = value <= target if statistic == "maximum" else value >= target
        figures.append(Figure(f"{name}{summary.note}", statistic, value, target, met))
    return figures


class _TableWriter:
    """Writes a table line by line, as it is measured."""

    def __init__(self, table: Table, run: _Run, progress: Progress):
        self._quantity, self._backends, self._progress = table.quantity, run.backends, progress
        self._ratios = [ratio.name for ratio in run.ratios]
        columns = [*self._backends, *self._ratios]
        self._widths = [max(10, len(column)) for column in columns]
        self._first_width = max([40, *(len(case.name) for case in table.cases)])
        self._write("case", columns)

    def write(self, row: Row) -> None:
        self._write(row.case.name, cells(row, self._quantity, self._backends, self._ratios))

    def _write(self, first: str, columns: Sequence[str]) -> None:
        texts = (f"{column:>{width}}" for column, width in zip(columns, self._widths, strict=True))
        self._progress.write(f"{first:>{self._first_width}}  {'  '.join(texts)}")
