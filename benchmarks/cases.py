"""The case table: one line a case."""

from typing import NamedTuple


class Case(NamedTuple):
    """Softmax over the last axis, in jit."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As it appears in tables."""
        return f"({','.join(map(str, self.shape))}) {self.dtype}"


CASES = (
    Case((1, 1024)),
    Case((64, 64)),
    Case((128, 1024)),
    Case((1024, 1024)),
    Case((49152, 512)),
    Case((256, 32000)),
    Case((64, 128256)),
    Case((1, 2**20)),
    Case((1, 2**24)),
    Case((1, 2**26)),
)

SMALL_CALL = Case((1, 1024))
"""Where the cost of a call is held against that of jit(x + 1)."""
