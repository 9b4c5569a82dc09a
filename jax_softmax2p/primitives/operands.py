"""The operands that primitives have in common: x, and what is applied to it on the way to its logits.

The operands of such a primitive are x, then those that its own definition names (its leading operands are x
and these), then, as its parameter ``spec`` tells, scale, bias and where: of x's rank, and of size 1 wherever
they broadcast. The logits are scale·x + bias; positions where ``where`` or the band is False take no part.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from jax_softmax2p.reference import ScaleBiasMask
from jax_softmax2p.scalars import as_index

Array = jax.Array
T = TypeVar("T")

Tangent = Array | ad.Zero
"""A tangent or cotangent, as rules get them."""

OPERAND_FLAGS = {"scale": 1, "bias": 2, "where": 4}
"""The operands after the leading ones in their order, with their bits in the FFI attribute ``operands``."""

_MAX_BAND = int(np.iinfo(np.int32).max) // 2
"""No array has so many rows or columns, so that limits beyond need not be told apart, and int32 suffices."""


# A pytree without leaves, so that it goes through jit in the place of an array.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Band:
    """A mask for ``where`` that needs no array: of row i, the elements from i - before to i + after.

    Rows are counted by the last dimension but one, elements by the last, which must be the softmax's axis.
    ``Band()`` is the causal mask of attention, ``Band(before=w - 1)`` one with a window of w.
    What is masked is not computed.

    Attributes:
      before: how many elements before the i-th take part; None for all.
      after: how many after it; None for all.

    Raises:
      ValueError: a limit is neither None nor an integer from 0 on.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> jax_softmax2p.softmax(jnp.zeros((2, 2)), where=jax_softmax2p.Band()).tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """

    before: int | None = None
    after: int | None = 0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            limit = getattr(self, name)
            number = as_index(limit)
            if limit is not None and (number is None or number < 0):
                raise ValueError(f"{name} must be None or an integer from 0 on, got {limit!r}")
            object.__setattr__(self, name, number)


def band_columns(band: Band, rows: range, num_columns: int) -> range:
    """The columns, of ``num_columns``, that the band lets through in any of these rows, not empty."""
    start = 0 if band.before is None else min(num_columns, max(0, rows.start - band.before))
    stop = num_columns if band.after is None else max(0, min(num_columns, rows.stop + band.after))
    return range(start, max(start, stop))


def shift_band(band: Band, first_row: int, first_column: int) -> Band | None:
    """The band of the array that begins at this row and column; None where that is no Band."""
    shift = first_row - first_column
    if (band.before is not None and band.before < shift) or (band.after is not None and band.after < -shift):
        return None
    return Band(
        None if band.before is None else band.before - shift,
        None if band.after is None else band.after + shift,
    )


def band_mask(band: Band, rows: Array, columns: Array) -> Array:
    """Where the band is True, for arrays of integers of rows and columns, whose shapes broadcast together."""
    mask = jnp.ones(jnp.broadcast_shapes(rows.shape, columns.shape), bool)
    if band.before is not None:
        mask &= columns >= rows - min(band.before, _MAX_BAND)
    if band.after is not None:
        mask &= columns <= rows + min(band.after, _MAX_BAND)
    return mask


def operand_mask(
    shape: tuple[int, ...],
    where: Array | None,
    band: Band | None,
    first_row: Array | int = 0,
    first_column: Array | int = 0,
) -> Array | None:
    """The mask and the band as one boolean array that broadcasts to ``shape``; None if there is neither.

    Args:
      shape: of x.
      where: the operand, or None.
      band: of the primitive, or None.
      first_row: of an array that is a shard of a larger one, where it begins there, from which the band
        counts.
      first_column: as first_row.
    """
    if band is None:
        return where
    rows = jax.lax.broadcasted_iota(jnp.int32, shape[-2:], 0) + first_row
    columns = jax.lax.broadcasted_iota(jnp.int32, shape[-2:], 1) + first_column
    mask = band_mask(band, rows, columns).reshape((1,) * (len(shape) - 2) + shape[-2:])
    return mask if where is None else where & mask


class OperandSpec(NamedTuple):
    """The parameter ``spec`` of a primitive: what follows its leading operands.

    Attributes:
      names: which of scale, bias and where there are, in this order.
      band: another mask, or None.
    """

    names: tuple[str, ...] = ()
    band: Band | None = None

    def leading(self, operands: Sequence[T]) -> Sequence[T]:
        """The leading operands, of all of the primitive's."""
        return operands[: len(operands) - len(self.names)]

    def unpack(self, operands: Sequence[T]) -> ScaleBiasMask[T]:
        """Scale, bias and where, of a primitive's operands or tangents, with or without leading ones."""
        first = len(operands) - len(self.names)
        return ScaleBiasMask(**dict(zip(self.names, operands[first:], strict=True)))

    def unpack_with_band(self, operands: Sequence[Array]) -> ScaleBiasMask[Array]:
        """The same from all of the primitive's operands, x first, with the band merged into the mask."""
        unpacked = self.unpack(operands)
        if self.band is None:
            return unpacked
        return unpacked._replace(where=operand_mask(operands[0].shape, unpacked.where, self.band))

    def band_to_mask(
        self, operands: Sequence[Array], first_row: Array | int, first_column: Array | int
    ) -> tuple[tuple[Array, ...], "OperandSpec"]:
        """All operands of the primitive, and their spec, with the band merged into the mask.

        Args:
          operands: all of the primitive's.
          first_row: as in :func:`operand_mask`.
          first_column: as in :func:`operand_mask`.
        """
        if self.band is None:
            return tuple(operands), self
        scale, bias, where = self.unpack(operands)
        where = operand_mask(operands[0].shape, where, self.band, first_row, first_column)
        named = ScaleBiasMask(scale, bias, where)._asdict()
        present = {name: operand for name, operand in named.items() if operand is not None}
        return (*self.leading(operands), *present.values()), OperandSpec(tuple(present))

    def ffi_attributes(self) -> dict[str, np.int64]:
        """The attributes of the FFI targets that say the same. A limit of -1 is none."""
        operands = np.int64(sum(OPERAND_FLAGS[name] for name in self.names))
        return {"operands": operands} | limits_of_band(self.band)


def limits_of_band(band: Band | None) -> dict[str, np.int64]:
    """The limits as attributes of FFI targets. One of -1 is none."""
    limit = lambda x: np.int64(-1 if x is None else min(x, _MAX_BAND))
    return {"before": limit(band and band.before), "after": limit(band and band.after)}


def fix_others(
    function: Callable[..., Any], operands: Sequence[Any], varying: Sequence[int]
) -> Callable[..., Any]:
    """The function of the operands at the places ``varying`` alone, the others being what they are here."""

    def call(*values: Any) -> Any:
        replaced = dict(zip(varying, values, strict=True))
        return function(*(replaced.get(i, x) for i, x in enumerate(operands)))

    return call


def reference_rule(function: Callable[..., Any], *param_names: str) -> Callable[..., Any]:
    """A function of ``reference`` as one of a primitive's operands and parameters.

    Args:
      function: function(*leading operands, ScaleBiasMask, axis=, ...).
      param_names: the primitive's parameters that the function takes besides.
    """

    def rule(*operands: Array, axis: int, spec: OperandSpec, **params: Any) -> Any:
        chosen = {name: params[name] for name in param_names}
        return function(*spec.leading(operands), spec.unpack_with_band(operands), axis=axis, **chosen)

    return rule


def move_batch_to_front(
    operands: Sequence[Array], dims: Sequence[int | None], num_leading_operands: int = 1
) -> list[Array]:
    """The operands of a primitive with their batch dimension at the front, as batching rules want them.

    Scale, bias and where get a dimension of size 1 there if they are not batched; the leading operands are
    repeated. As a primitive's axis counts from the end, it stays what it is.

    Args:
      operands: all of the primitive's.
      dims: the batch dimension of each, or None.
      num_leading_operands: how many of the operands, x included, do not broadcast.
    """
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    batched = []
    for i, (x, dim) in enumerate(zip(operands, dims, strict=True)):
        if dim is not None:
            batched.append(jnp.moveaxis(x, dim, 0))
        elif i < num_leading_operands:
            batched.append(jnp.broadcast_to(x, (size, *x.shape)))
        else:
            batched.append(jnp.expand_dims(x, 0))
    return batched
