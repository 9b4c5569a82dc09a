"""The claims of arXiv 2001.04438, and whether they hold in a run."""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.memory_traffic import PAPER_BEST_OVER_TWO_PASS, gigabytes_per_second
from benchmarks.results import Results, Row

MEMORY_BOUND_FRACTION = 0.8
"""A pass counts as bound by memory if it reaches this fraction of the bandwidth of a plain loop."""

LOOP_OF_PASS = {
    "max": "memory: read",
    "sum_exp": "memory: read",
    "exp_store": "memory: copy",
    "scale": "memory: scale",
    "extended_sum": "memory: read",
    "extended_write": "memory: non-temporal copy",
}
"""The loop that reads and stores in the same way, by pass."""

THREE_PASS = ("three_pass_recompute", "three_pass_reload")


class Claim(NamedTuple):
    """A claim of the paper, what was measured in its place, and whether that agrees."""

    text: str
    measured: str
    holds: bool


def claims(results: Results) -> Iterator[Claim]:
    """Yields the claims about which something was measured."""
    caches = list(results.caches.values())
    for table in results.tables("algorithms"):
        up_to = PAPER_BEST_OVER_TWO_PASS.get(table.isa)
        bound = f" by up to {up_to}×" if up_to else ""
        far = [row for row in table.rows if row.case.bytes > caches[-1]]
        near = [row for row in table.rows if row.case.bytes <= caches[-2]]
        yield from _advantage(
            f"{table.isa}: out of cache, two passes are faster than three{bound}", far, True
        )
        yield from _advantage(f"{table.isa}: in the first caches, they are not", near, False)
    for table in results.tables("passes"):
        yield from _bound_by_memory(table.isa, table.rows[-1])
    most_threads = {table.isa: table.rows for table in results.tables("threads")}
    for isa, rows in most_threads.items():
        text = f"{isa}: out of cache, two passes are faster on all threads, too, with as long a row for each"
        yield from _advantage(text, rows, True)


def _advantage(text: str, rows: Sequence[Row], faster: bool) -> Iterator[Claim]:
    """The claim that two passes are faster than the best three on average, or that they are not."""
    if rows:
        ratios = [_best_over_two_pass(row.medians) for row in rows]
        mean = statistics.geometric_mean(ratios)
        measured = (
            f"{mean:.2f}×" if len(rows) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}×, mean {mean:.2f}×"
        )
        yield Claim(text, measured, (mean > 1) == faster)


def _best_over_two_pass(medians: dict[str, float]) -> float:
    return min(medians[name] for name in THREE_PASS) / medians["two_pass"]


def _bound_by_memory(isa: str, row: Row) -> Iterator[Claim]:
    speeds = {name: gigabytes_per_second(name, row.case, median) for name, median in row.medians.items()}
    fractions = {name: fraction for name in LOOP_OF_PASS if (fraction := _fraction(speeds, name)) is not None}
    if fractions:
        text = f"{isa}: out of cache, memory bounds every pass (fraction of the bandwidth of a loop like it)"
        measured = ", ".join(f"{name} {fraction:.0%}" for name, fraction in fractions.items())
        yield Claim(text, measured, min(fractions.values()) >= MEMORY_BOUND_FRACTION)


def _fraction(speeds: dict[str, float | None], name: str) -> float | None:
    """The bandwidth of a pass over that of the loop like it."""
    speed, loop = speeds.get(name), speeds.get(LOOP_OF_PASS[name])
    return None if speed is None or loop is None else speed / loop
