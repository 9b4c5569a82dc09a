"""What the paper claims, and whether it holds here."""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.memory_traffic import PAPER_BEST_OVER_TWO_PASS, gigabytes_per_second
from benchmarks.results import Results, Row

SPEED_OF_MEMORY = 0.8
"""A pass that moves memory at this part of what a plain loop does counts as bound by it."""

LOOPS_LIKE = {
    "max": "memory: read",
    "sum_exp": "memory: read",
    "exp_store": "memory: copy",
    "scale": "memory: scale",
    "extended_sum": "memory: read",
    "extended_write": "memory: non-temporal copy",
}
"""For each pass, the loop that reads and stores in the same way."""

THREE_PASS = ("three_pass_recompute", "three_pass_reload")


class Claim(NamedTuple):
    """What the paper says, what was measured here, and whether that is the same."""

    says: str
    here: str
    holds: bool


def claims(results: Results) -> Iterator[Claim]:
    """Those about which something was measured."""
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
        says = f"{isa}: out of cache, two passes are faster on all threads, too, with as long a row for each"
        yield from _advantage(says, rows, True)


def _advantage(says: str, rows: Sequence[Row], faster: bool) -> Iterator[Claim]:
    """That two passes are faster than the best three, or are not, on average."""
    if rows:
        ratios = [_best_over_two_pass(row.medians) for row in rows]
        mean = statistics.geometric_mean(ratios)
        here = (
            f"{mean:.2f}×" if len(rows) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}×, mean {mean:.2f}×"
        )
        yield Claim(says, here, (mean > 1) == faster)


def _best_over_two_pass(medians: dict[str, float]) -> float:
    return min(medians[name] for name in THREE_PASS) / medians["two_pass"]


def _bound_by_memory(isa: str, row: Row) -> Iterator[Claim]:
    speeds = {name: gigabytes_per_second(name, row.case, median) for name, median in row.medians.items()}
    parts = {name: _part(speeds, name) for name in LOOPS_LIKE}
    here = ", ".join(f"{name} {part:.0%}" for name, part in parts.items() if part is not None)
    if here:
        says = f"{isa}: out of cache, memory bounds every pass (its part of the speed of a loop like it)"
        yield Claim(says, here, all(part is None or part >= SPEED_OF_MEMORY for part in parts.values()))


def _part(speeds: dict[str, float | None], name: str) -> float | None:
    speed, loop = speeds.get(name), speeds.get(LOOPS_LIKE[name])
    return None if speed is None or loop is None else speed / loop
