"""What the algorithms and their passes must move between CPU and memory, and what the paper says of it."""

from typing import NamedTuple

import numpy as np


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
    "read": Traffic(1, 0),
    "copy": Traffic(1, 1),
    "non-temporal copy": Traffic(1, 1),
    "scale": Traffic(1, 1),
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
    algorithm: sum(TRAFFIC[name].elements for name in passes) for algorithm, passes in PASSES_OF.items()
}
"""By each algorithm, for each element of a row."""

PAPER_ELEMENTS_MOVED = {"three_pass_recompute": 4, "three_pass_reload": 5, "two_pass": 3}
"""The same by the paper's algorithms."""

PAPER_BEST_OVER_TWO_PASS = {"avx512": 1.28, "avx2": 1.18}
"""The best three-pass algorithm's time over the two-pass algorithm's, out of cache, at most, on Skylake-X."""


def bytes_per_second(elements_moved: float, elements: int, seconds: float, dtype: str = "float32") -> float:
    """Of an algorithm or a pass that moves so much for each element of a row of ``elements``."""
    return elements_moved * elements * np.dtype(dtype).itemsize / seconds
