"""A table: contenders that take turns on each of some cases, ratios of their times, and goals for these."""

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders import Contender
from benchmarks.neighbours import Neighbours
from benchmarks.workers import Worker

NOTEWORTHY = 0.1
"""Cores that others keep busy."""

TOLERANCES = {"float32": 1e-2, "bfloat16": 0.1}
"""Relative, and wide: torch is off by 3e-4 in one row of 2^26, and jax.nn by 0.03 in bfloat16."""

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric mean": statistics.geometric_mean,
    "least": min,
    "greatest": max,
}
"""Of ratios. The greatest should stay below its target, the others above."""


class Effort(NamedTuple):
    """How long to measure: turns of each contender, and seconds for all its turns in one case."""

    rounds: int
    seconds: float


class Ratio(NamedTuple):
    """The time of the fastest of ``above`` over that of ``below``, ``net_of`` taken from both."""

    name: str
    above: tuple[str, ...]
    below: str
    net_of: str | None = None

    def needs(self) -> set[str]:
        """Which contenders it is of."""
        return {*self.above, self.below} | ({self.net_of} if self.net_of else set())

    def of(self, times: dict[str, float]) -> float:
        """Its value."""
        off = times[self.net_of] if self.net_of else 0.0
        return (min(times[name] for name in self.above) - off) / (times[self.below] - off)


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


class Table(NamedTuple):
    """What is measured together, and what of it is said in the end."""

    title: str
    cases: tuple[Case, ...]
    contenders: tuple[Callable[[], Contender], ...]
    ratios: tuple[Ratio, ...]
    summaries: tuple[Summary, ...]


class Row(NamedTuple):
    """What was measured in one case."""

    case: Case
    seconds: dict[str, float]
    ratios: dict[str, float]


def run_table(table: Table, effort: Effort, only: str = "") -> dict[str, Any] | None:
    """Measures and prints a table.

    Args:
      table: which one.
      effort: for how long.
      only: a part of the names of the cases to run.

    Returns:
      The figures, or None if there is no such case.
    """
    cases = [case for case in table.cases if only in case.name]
    if not cases:
        return None
    print(f"\n{table.title}")
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(factory)) for factory in table.contenders]
        contenders, computing = _able(workers)
        ratios = [ratio for ratio in table.ratios if ratio.needs() <= contenders.keys()]
        columns = [*contenders, *(ratio.name for ratio in ratios)]
        widths = [max(10, len(column)) for column in columns]
        _print_line("case", columns, widths)
        rows = []
        neighbours = Neighbours(lambda: sum(worker.cpu_seconds for worker in workers))
        for case in cases:
            seconds = run_case(case, contenders, computing, effort)
            row = Row(case, seconds, {ratio.name: ratio.of(seconds) for ratio in ratios})
            times = [_duration(seconds[name]) for name in contenders]
            _print_line(case.name, [*times, *(f"{value:.2f}×" for value in row.ratios.values())], widths)
            rows.append(row)
        others = neighbours.cores()
    if others is not None and others > NOTEWORTHY:
        print(
            f"  other processes kept {others:.2f} cores busy meanwhile: no figure for several threads counts"
        )
    figures = [figure for summary in table.summaries for figure in _summarise(summary, rows)]
    return {
        "title": table.title,
        "rows": [row._asdict() | {"case": row.case.name} for row in rows],
        "figures": figures,
        "cores_used_by_others": others,
    }


def run_case(
    case: Case, contenders: Mapping[str, Worker], computing: set[str], effort: Effort
) -> dict[str, float]:
    """Compares the contenders' results and times them in turn: seconds a call, the median, by name."""
    results = {name: contender.prepare(case) for name, contender in contenders.items()}
    _check({name: results[name] for name in results if name in computing}, TOLERANCES[case.dtype])
    calls = {}
    for name, contender in contenders.items():
        once = min(contender.seconds_per_call(1) for _ in range(2))
        calls[name] = max(1, round(effort.seconds / effort.rounds / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(effort.rounds):
        for name, contender in contenders.items():
            times[name].append(contender.seconds_per_call(calls[name]))
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def _able(workers: Sequence[Worker]) -> tuple[dict[str, Worker], set[str]]:
    """Those that can run here, by name, and which of them compute the cases; says why others cannot."""
    able, computing = {}, set()
    for worker in workers:
        try:
            name, computes = worker.introduce()
        except ImportError as error:
            print(f"  left out: {error}")
            continue
        able[name] = worker
        if computes:
            computing.add(name)
    return able, computing


def _check(results: Mapping[str, np.ndarray], tolerance: float) -> None:
    """That all results are the same; how exact each is, the tests say."""
    expected = None
    for name, result in results.items():
        expected = result if expected is None else expected
        least = tolerance * 0.02 * np.abs(expected).max()  # Differences come near 0.
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=least, err_msg=name)


def _summarise(summary: Summary, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Prints the line of a summary, if there is anything to say, and returns its figures."""
    name = summary.ratio.name
    values = [row.ratios[name] for row in rows if name in row.ratios and summary.among(row.case)]
    if not values:
        return []
    label = f"{name}{summary.note}"
    figures, texts = [], []
    for statistic, target in summary.goals:
        value = STATISTICS[statistic](values)
        met = value <= target if statistic == "greatest" else value >= target
        figures.append({"of": label, "statistic": statistic, "value": value, "target": target, "met": met})
        said = f"{statistic} {value:.2f}" if len(values) > 1 or len(summary.goals) > 1 else f"{value:.2f}"
        bound = "at most " if statistic == "greatest" else ""
        texts.append(f"{said} (target {bound}{target}{'' if met else ', missed'})")
    print(f"  {label}: {', '.join(texts)}", flush=True)
    return figures


def _print_line(first: str, columns: Sequence[str], widths: Sequence[int]) -> None:
    cells = (f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
    print(f"{first:>40}  {'  '.join(cells)}", flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
