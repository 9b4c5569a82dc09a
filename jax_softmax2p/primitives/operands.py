"""What the primitives take: logits, that is x with what is applied to it on the way into a kernel.

The operands of such a primitive are x, then those that its own definition names, then, as its parameter
``spec`` tells, scale, bias and where: of x's rank, and of size 1 wherever they broadcast. The logits are
scale·x + bias; positions where a mask or the band is False take no part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

FLAGS = {"scale": 1, "bias": 2, "where": 4}
"""The operands in their order, and what the FFI targets call them."""


Limits = tuple[int | None, int | None]
"""Of a band: how many elements before a row's number, and after it, take part; None for no limit."""


class OperandSpec(NamedTuple):
    """Which of scale, bias and where follow x, and the band, if there is one."""

    names: tuple[str, ...] = ()
    band: Limits | None = None

    def named(self, operands: Sequence[Any]) -> dict[str, Any]:
        """The last operands of a primitive, by name."""
        count = len(self.names)
        return dict(zip(self.names, operands[len(operands) - count :] if count else (), strict=True))

    def attributes(self) -> dict[str, np.int64]:
        """What the FFI targets want to know."""
        before, after = self.band or (None, None)
        limits = {"before": -1 if before is None else before, "after": -1 if after is None else after}
        flags = sum(FLAGS[name] for name in self.names)
        return {"operands": np.int64(flags)} | {name: np.int64(limit) for name, limit in limits.items()}


def operand_mask(
    shape: tuple[int, ...],
    where: Array | None,
    band: Limits | None,
    first_row: Array | int = 0,
    first_column: Array | int = 0,
) -> Any:
    """The mask and the band as one boolean array that broadcasts to ``shape``; None if there is neither.

    Of an array that is part of a larger one, the band counts rows and columns from the first ones given.
    """
    if band is None:
        return where
    rows = jax.lax.broadcasted_iota(jnp.int32, shape[-2:], 0) + first_row
    columns = jax.lax.broadcasted_iota(jnp.int32, shape[-2:], 1) + first_column
    inside = jnp.ones(shape[-2:], bool)
    largest = int(jnp.iinfo(jnp.int32).max) // 2
    if band[0] is not None:
        inside &= columns >= rows - min(band[0], largest)
    if band[1] is not None:
        inside &= columns <= rows + min(band[1], largest)
    inside = inside.reshape((1,) * (len(shape) - 2) + inside.shape)
    return inside if where is None else where & inside
