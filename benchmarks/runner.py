"""A table: backends that take turns on each of some cases, ratios of what they need, goals for these."""

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
from benchmarks.workers import Elsewhere, Worker

NOTEWORTHY = 0.1
"""Cores that others keep busy."""

TOLERANCES = {"float32": 1e-2, "bfloat16": 0.1}
"""Relative, and wide: torch is off by 3e-4 in one row of 2^26, and jax.nn by 0.03 in bfloat16."""

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric mean": statistics.geometric_mean,
    "minimum": min,
    "maximum": max,
}
"""Of ratios. The greatest should stay below its target, the others above."""


SLOW = 0.5
"""Seconds from which on a call counts as slow: it has few turns."""


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
      sweeps: how often all cases of a table are gone through, with new processes.
      rounds: turns of each backend in each.
      few: turns of a slow one.
      seconds: for all its turns in one case.
      elements: the largest case.
    """

    sweeps: int
    rounds: int
    few: int
    seconds: float
    elements: float = float("inf")


class Ratio(NamedTuple):
    """What the best of ``above`` needs over what ``below`` does, ``net_of`` taken from both."""

    name: str
    above: tuple[str, ...]
    below: str
    net_of: str | None = None

    def needs(self) -> set[str]:
        """Which backends it is of."""
        return {*self.above, self.below} | ({self.net_of} if self.net_of else set())

    def of(self, medians: Mapping[str, float]) -> float:
        """Its value."""
        off = medians[self.net_of] if self.net_of else 0.0
        return (min(medians[name] for name in self.above) - off) / (medians[self.below] - off)


class Goal(NamedTuple):
    """A target for one of :data:`STATISTICS`."""

    statistic: str
    target: float


class Summary(NamedTuple):
    """Goals for a ratio over those cases that ``among`` picks."""

    ratio: Ratio
    goals: tuple[Goal, ...]
    note: str = ""
    among: Callable[[Case], bool] = lambda case: True


Samples = dict[str, list[float]]


class Table(NamedTuple):
    """What is measured together, and what of it is said in the end.

    Attributes:
      title: its heading.
      cases: a row each.
      backends: what makes them, or those of another installation.
      ratios: of what was measured.
      summaries: of the ratios.
      quantity: what is measured, one of :data:`MEASURES`.
      name: what plots know it by, if there is one of it.
      isa: whose kernels it is about, if not about several.
      keeps_memory: whether backends, where they are timed, keep the memory of results for the next, see
        ``workers``.
      derive: figures that are not ratios within a row.
    """

    title: str
    cases: tuple[Case, ...]
    backends: tuple[Callable[[], Backend] | Elsewhere, ...]
    ratios: tuple[Ratio, ...] = ()
    summaries: tuple[Summary, ...] = ()
    quantity: str = "seconds"
    name: str = ""
    isa: str = ""
    keeps_memory: bool = True
    derive: Callable[[Sequence[Row]], list[Figure]] = lambda rows: []

    def within(self, effort: Effort, only: str) -> "Table":
        """Those cases whose names contain ``only`` and that are not too large."""
        cases = (case for case in self.cases if only in case.name and case.elements <= effort.elements)
        return self._replace(cases=tuple(cases))

    def sweeps(self, effort: Effort) -> int:
        """How often its cases are gone through: times differ by chance, sizes and errors hardly."""
        return effort.sweeps if self.quantity == "seconds" else 1


def run_table(table: Table, effort: Effort, progress: Progress) -> Result:
    """Measures and prints a table."""
    progress.write(f"\n{table.title}")
    run = _Run(table, effort, progress)
    for _ in range(table.sweeps(effort) - 1):
        for _ in run.sweep():
            progress.advance()
    lines, rows = None, []
    for case in run.sweep():
        lines = lines or _Lines(table, run, progress)
        row = Row(case, run.samples[case], {})
        row = row._replace(ratios={ratio.name: ratio.of(row.medians) for ratio in run.ratios})
        lines.write(row)
        rows.append(row)
        progress.advance()
    others = run.cores_used_by_others()
    if others is not None and others > NOTEWORTHY:
        progress.write(
            f"  other processes kept {others:.2f} cores busy meanwhile: no figure for several threads counts"
        )
    figures = [figure for summary in table.summaries for figure in _summarise(summary, rows)]
    figures += table.derive(rows)
    for sentence in sentences(figures):
        progress.write(f"  {sentence}")
    return Result(table.title, table.name, table.quantity, table.isa, rows, figures, others)


class _Run:
    """Sweeps over a table's cases, each with processes of its own, and what was measured in them.

    How fast a process is has an element of chance, such as where its memory lies, and a neighbour may be busy
    for seconds: neither shall decide a row.
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
        """Measures every case, and yields it then, unless this system does not tell what is asked for."""
        with contextlib.ExitStack() as stack:
            keeps_memory = self._table.keeps_memory and self._table.quantity == "seconds"
            factories = self._table.backends
            workers = [stack.enter_context(Worker(factory, keeps_memory)) for factory in factories]
            self._workers += workers
            backends, computing = self._able(workers)
            self.backends = list(backends)
            self.ratios = [ratio for ratio in self._table.ratios if ratio.needs() <= backends.keys()]
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
        """Since the beginning, on average."""
        return self._load.cores()

    def _able(self, workers: Sequence[Worker]) -> tuple[dict[str, Worker], set[str]]:
        """Those that can run here, by name, and which of them compute; says once why others cannot."""
        able, computing = {}, set()
        for worker in workers:
            try:
                name, computes = worker.introduce()
            except ImportError as error:
                if str(error) not in self._missing:
                    self._progress.write(f"  left out: {error}")
                self._missing.add(str(error))
                continue
            able[name] = worker
            if computes:
                computing.add(name)
        return able, computing


def measure(
    case: Case, backends: Mapping[str, Worker], computing: set[str], quantity: str, effort: Effort
) -> Samples:
    """Compares the backends' results, then measures."""
    prepared = {name: backend.prepare(case) for name, backend in backends.items()}
    results = {name: prepared[name].result for name in prepared if name in computing}
    if quantity != "ULP":  # Which is about how much they differ.
        _check(results, TOLERANCES[case.dtype])
    outputs = {name: one.outputs for name, one in prepared.items()}
    return MEASURES[quantity](backends, outputs, effort)


def _seconds(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    """Seconds for an output of a backend, as often as it has a turn."""
    calls: dict[str, int] = {}
    samples: Samples = {}
    for name, backend in backends.items():
        once = backend.seconds_per_call(1)
        samples[name] = [once / outputs[name]] if once > SLOW else []
        if not samples[name]:
            once = min(once, backend.seconds_per_call(1))
        calls[name] = max(1, round(effort.seconds / effort.rounds / max(once, 1e-7)))
    rounds = {name: effort.few if samples[name] else effort.rounds for name in backends}
    for _ in range(effort.rounds):
        for name, backend in backends.items():
            if len(samples[name]) < rounds[name]:
                samples[name].append(backend.seconds_per_call(calls[name]) / outputs[name])
    return samples


def _peak_bytes(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    samples: Samples = {}
    for name, backend in backends.items():
        peaks = [backend.peak_bytes() for _ in range(effort.few)]
        samples[name] = [float(peak) for peak in peaks if peak is not None]
    return samples if all(samples.values()) else {}


def _ulp_errors(backends: Mapping[str, Worker], outputs: Mapping[str, int], effort: Effort) -> Samples:
    return {name: [backend.ulp_error()] for name, backend in backends.items()}


MEASURES: dict[str, Callable[[Mapping[str, Worker], Mapping[str, int], Effort], Samples]] = {
    "seconds": _seconds,
    "bytes": _peak_bytes,
    "ULP": _ulp_errors,
}
"""By quantity. Each has an entry in ``formatting.QUANTITIES``."""


def _check(results: Mapping[str, np.ndarray | None], tolerance: float) -> None:
    """That all results are the same; how exact each is, the tests say."""
    expected = None
    for name, result in results.items():
        assert result is not None
        expected = result if expected is None else expected
        least = tolerance * 0.02 * np.abs(expected).max()  # Differences come near 0.
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=least, err_msg=name)


def _summarise(summary: Summary, rows: Sequence[Row]) -> list[Figure]:
    name = summary.ratio.name
    values = [row.ratios[name] for row in rows if name in row.ratios and summary.among(row.case)]
    if not values:
        return []
    figures = []
    for statistic, target in summary.goals:
        value = STATISTICS[statistic](values)
        met = value <= target if statistic == "maximum" else value >= target
        figures.append(Figure(f"{name}{summary.note}", statistic, value, target, met))
    return figures


class _Lines:
    """Writes a table line by line, as it is measured."""

    def __init__(self, table: Table, run: _Run, progress: Progress):
        self._quantity, self._backends, self._progress = table.quantity, run.backends, progress
        self._ratios = [ratio.name for ratio in run.ratios]
        columns = [*self._backends, *self._ratios]
        self._widths = [max(10, len(column)) for column in columns]
        self._write("case", columns)

    def write(self, row: Row) -> None:
        self._write(row.case.name, cells(row, self._quantity, self._backends, self._ratios))

    def _write(self, first: str, columns: Sequence[str]) -> None:
        texts = (f"{column:>{width}}" for column, width in zip(columns, self._widths, strict=True))
        self._progress.write(f"{first:>40}  {'  '.join(texts)}")
