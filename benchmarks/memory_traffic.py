"""What the algorithms and their passes must move between CPU and memory, and what the paper says of it."""

from typing import NamedTuple

from benchmarks.cases import Case


class Traffic(NamedTuple):
    """Elements read and written for each of a row's."""

    reads: int
    writes: int

    @property
    def elements(self) -> int:
        """Moved for each of a row's."""
        return self.reads + self.writes


TRAFFIC = {
    "max": Traffic(1, 0),
    "sum_exp": Traffic(1, 0),
    "exp_store": Traffic(1, 1),
    "scale": Traffic(2, 1),
    "extended_sum": Traffic(1, 0),
    "extended_write": Traffic(1, 1),
}
"""Of the passes of ``native.pass_into``. What a plain store reads before it writes is not counted, as in the
paper. ``scale`` reads x beside what was kept; the paper's reads only that."""

LOOP_TRAFFIC = {
    "memory: read": Traffic(1, 0),
    "memory: copy": Traffic(1, 1),
    "memory: non-temporal copy": Traffic(1, 1),
    "memory: scale": Traffic(1, 1),
}
"""Of the loops of ``benchmarks.memory``."""

PASSES_OF = {
    "three_pass_recompute": ("max", "sum_exp", "extended_write"),
    "three_pass_reload": ("max", "exp_store", "scale"),
    "two_pass": ("extended_sum", "extended_write"),
    "two_pass_reload": ("exp_store", "scale"),
}
"""The passes of each algorithm. In the last, pass 1 moves what ``exp_store`` does."""

ELEMENTS_MOVED = {
    **{algorithm: sum(TRAFFIC[name].elements for name in passes) for algorithm, passes in PASSES_OF.items()},
    **{name: traffic.elements for name, traffic in (TRAFFIC | LOOP_TRAFFIC).items()},
}
"""By each algorithm, pass and loop, for each element of a row."""

PAPER_ELEMENTS_MOVED = {"three_pass_recompute": 4, "three_pass_reload": 5, "two_pass": 3}
"""The same by the paper's algorithms."""

PAPER_BEST_OVER_TWO_PASS = {"avx512": 1.28, "avx2": 1.18}
"""The best three-pass algorithm's time over the two-pass algorithm's, out of cache, at most, on Skylake-X."""


def gigabytes_per_second(name: str, case: Case, seconds: float) -> float | None:
    """At which an algorithm, a pass or a loop moves what it must; None if that depends, as for ``auto``."""
    moved = ELEMENTS_MOVED.get(name)
    return None if moved is None else moved * case.bytes / seconds / 1e9
