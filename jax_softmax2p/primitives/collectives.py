"""Rows that are sharded among devices: their lse, and what each shard has to know of its place.

These functions run on every device, inside shard_map or the like. ``axis_names`` are the mesh axes over which
rows are sharded, in their order.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_softmax2p import jax_compat
from jax_softmax2p.exact_sums import two_sum_error
from jax_softmax2p.reference import Lse

Array = jax.Array
AxisNames = str | Sequence[str]


def as_axis_names(entry: AxisNames | None) -> tuple[str, ...]:
    """Axes of a mesh, from an entry of a PartitionSpec or from what users pass as axis_name."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def check_derivatives(x: Array, axis_names: tuple[str, ...]) -> None:
    """Raises ValueError where JAX would get reverse-mode derivatives of sums over shards wrong."""
    if jax_compat.differentiates_unchecked_collectives():
        return
    checked = jax_compat.varying_axes(jax_compat.as_varying(x, axis_names))
    if jax_compat.inside_shard_map(axis_names) and not checked:
        raise ValueError("axis_name needs jax.shard_map(..., check_vma=True), or jax from 0.10 on")


def reduce_lse(lse: Lse, axis_names: tuple[str, ...]) -> Lse:
    """The lse of whole rows from those of their shards: two all-reduces, of one number a row and of two.

    As exact as hi + lo is: it approximates e^(z + rest) by e^z·(1 + rest), with rest below an ULP of z. The 1
    that is in the term of the largest shard is not added, lest it swallow the others.
    """
    largest = _or_zero(jax.lax.pmax(lse.hi, axis_names))
    z, rest = subtract_max(lse, largest)
    terms = jnp.exp(z)
    is_largest = lse.hi == largest
    correction = jnp.where(jnp.isfinite(terms), terms, 0) * rest
    others = jnp.where(is_largest, jnp.expm1(z), terms) + correction
    count, others = jax.lax.psum(jnp.stack([is_largest.astype(others.dtype), others]), axis_names)
    return add_max(largest, jnp.log1p((count - 1) + others))


def finite_max(hi: Array) -> Array:
    """The largest lse along the first axis, to which others are relative; 0 where it is not finite."""
    return _or_zero(jnp.max(hi, 0))


def subtract_max(lse: Lse, largest: Array) -> Lse:
    """lse - largest, with no error but that of its lo. A result that is not finite has a lo of 0."""
    difference, error = _two_sum(lse.hi, -largest)
    hi, lo = _two_sum(difference, error + lse.lo)
    finite = jnp.isfinite(difference)
    return Lse(jnp.where(finite, hi, difference), jnp.where(finite, lo, 0))


def add_max(largest: Array, hi: Array, lo: Array | float = 0.0) -> Lse:
    """Largest + hi + lo: the inverse of :func:`subtract_max`."""
    total, error = _two_sum(largest, hi)
    sum_hi, sum_lo = _two_sum(total, error + lo)
    finite = jnp.isfinite(total)
    return Lse(jnp.where(finite, sum_hi, total), jnp.where(finite, sum_lo, 0))


def shard_index(axis_names: tuple[str, ...]) -> Array:
    """Which of the shards this device has."""
    return jax.lax.axis_index(axis_names)


def num_shards(axis_names: tuple[str, ...] | None) -> int:
    """How many shards a row has; 1 where it is not sharded."""
    return jax.lax.psum(1, axis_names) if axis_names else 1


def local_labels(labels: Array, size: int, axis_names: tuple[str, ...]) -> Array:
    """Labels of whole rows as labels of this shard.

    Args:
      labels: int32, from 0 to the size of the whole row, which stands for no class.
      size: how many elements of the row the shard has.
      axis_names: the mesh axes over which rows are sharded.

    Returns:
      int32 array of the labels' shape: their place in the shard, or ``size`` where they are not in it.
    """
    local = labels - shard_index(axis_names) * size
    return jnp.where((local >= 0) & (local < size), local, size)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b exactly, as its rounding and what that leaves."""
    total = a + b
    return total, two_sum_error(a, b, total)


def _or_zero(largest: Array) -> Array:
    return jnp.where(jnp.isfinite(largest), largest, 0)
