"""The memory traffic that algorithms and passes need, by this package and by the paper."""

from typing import NamedTuple

from benchmarks.cases import Case


class Traffic(NamedTuple):
    """Elements read and written for each element of a row."""

    reads: int
    writes: int

    @property
    def elements(self) -> int:
        """Elements moved for each element of a row."""
        return self.reads + self.writes


TRAFFIC = {
    "max": Traffic(1, 0),
    "sum_exp": Traffic(1, 0),
    "exp_store": Traffic(1, 1),
    "scale": Traffic(1, 1),
    "extended_sum": Traffic(1, 0),
    "extended_write": Traffic(1, 1),
}
"""The traffic of the passes of ``native.pass_into``. As in the paper, the line that a plain store reads
before it writes is not counted. Without AVX2 ``scale`` reads x, too, beside what was stored."""

LOOP_TRAFFIC = {
    "memory: read": Traffic(1, 0),
    "memory: copy": Traffic(1, 1),
    "memory: non-temporal copy": Traffic(1, 1),
    "memory: scale": Traffic(1, 1),
}
"""The traffic of the loops of ``benchmarks.memory``."""

PASSES_OF = {
    "three_pass_recompute": ("max", "sum_exp", "extended_write"),
    "three_pass_reload": ("max", "exp_store", "scale"),
    "two_pass": ("extended_sum", "extended_write"),
    "two_pass_reload": ("exp_store", "scale"),
}
"""The passes of each algorithm. Pass 1 of two_pass_reload has the traffic of ``exp_store``."""

ELEMENTS_MOVED = {
    **{algorithm: sum(TRAFFIC[name].elements for name in passes) for algorithm, passes in PASSES_OF.items()},
    **{name: traffic.elements for name, traffic in (TRAFFIC | LOOP_TRAFFIC).items()},
}
"""Elements moved for each element of a row, by algorithm, pass and loop."""

PAPER_ELEMENTS_MOVED = {"three_pass_recompute": 4, "three_pass_reload": 5, "two_pass": 3}
"""The same for the paper's algorithms."""

PAPER_BEST_OVER_TWO_PASS = {"avx512": 1.28, "avx2": 1.18}
"""The paper's largest ratio of the best three-pass algorithm's time to the two-pass algorithm's, out of
cache, on Skylake-X, by instruction set."""


def gigabytes_per_second(name: str, case: Case, seconds: float) -> float | None:
    """The bandwidth of an algorithm, pass or loop; None if its traffic is not fixed, as that of ``auto``."""
    moved = ELEMENTS_MOVED.get(name)
    return None if moved is None else moved * case.bytes / seconds / 1e9
