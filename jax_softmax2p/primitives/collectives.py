"""Rows whose parts lie on several devices: their logsumexp, and what each part has to know of its place.

These functions run on every device, inside shard_map or the like. ``names`` are the mesh axes over which rows
are divided, in their order.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_softmax2p.primitives.operands import OperandSpec, operand_mask

Array = jax.Array
Names = str | Sequence[str]


def names_of(part: Names | None) -> tuple[str, ...]:
    """Axes of a mesh, as an entry of a PartitionSpec or an axis_name gives them."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes along which JAX knows x to differ."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())  # jax < 0.10: vma


def as_varying(x: Array, names: Names) -> Array:
    """x as an array that may differ along mesh axes, where JAX keeps track of that."""
    own, wanted = varying_axes(x), names_of(names)
    missing = tuple(name for name in wanted if name not in own)
    if not missing or not _inside_shard_map(missing):
        return x
    if not hasattr(jax.lax, "pcast"):  # jax < 0.9
        return jax.lax.pvary(x, missing)  # type: ignore[attr-defined]
    return jax.lax.pcast(x, missing, to="varying")


def check_derivatives(x: Array, names: Names) -> None:
    """Raises ValueError where JAX would get reverse-mode derivatives of sums over parts wrong.

    Before 0.10 it follows the rules of checked programs in derivatives of unchecked ones.
    """
    if jax.__version_info__ >= (0, 10):
        return
    if _inside_shard_map(names) and not varying_axes(as_varying(x, names)):
        raise ValueError("axis_name needs jax.shard_map(..., check_vma=True), or jax from 0.10 on")


def gather(x: Array, names: Names) -> Array:
    """The arrays of all parts along a new first axis, which JAX knows to be the same everywhere."""
    if not _inside_shard_map(names):
        return jax.lax.all_gather(x, names)
    x = as_varying(x, names)
    if jax.__version_info__ < (0, 10):
        from jax._src.lax.parallel import all_gather_invariant  # It had no public name yet.

        return all_gather_invariant(x, names)
    return jax.lax.all_gather(x, names, to="invarying")


def reduce_lse(hi: Array, lo: Array, names: Names) -> tuple[Array, Array]:
    """The logsumexp of whole rows from those of their parts: two all-reduces of one number a row."""
    largest = _finite(jax.lax.pmax(hi, names))
    z, rest = relative(hi, lo, largest)
    terms = jnp.exp(z)
    return plus(largest, jnp.log(jax.lax.psum(terms + terms * rest, names)))


def relative(hi: Array, lo: Array, largest: Array) -> tuple[Array, Array]:
    """hi + lo - largest, as its rounding and the rest."""
    difference, error = _two_sum(hi, -largest)
    rounded, rest = _two_sum(difference, error + lo)
    finite = jnp.isfinite(difference)
    return jnp.where(finite, rounded, difference), jnp.where(finite, rest, 0)


def plus(largest: Array, log: Array, rest: Array | float = 0.0) -> tuple[Array, Array]:
    """largest + log + rest, as its rounding and the rest."""
    total, error = _two_sum(largest, log)
    hi, lo = _two_sum(total, error + rest)
    finite = jnp.isfinite(total)
    return jnp.where(finite, hi, total), jnp.where(finite, lo, 0)


def largest_of(hi: Array) -> Array:
    """The largest logsumexp along the first axis, to which others are relative; 0 where it is not finite."""
    return _finite(jnp.max(hi, 0))


def shard_index(names: Names) -> Array:
    """Which of the parts this device has."""
    return jax.lax.axis_index(names)


def local_labels(labels: Array, size: int, names: Names) -> Array:
    """Where labels of whole rows lie in this part of ``size`` elements; ``size`` if it does not have them."""
    whole = size * jax.lax.psum(1, names)
    local = jnp.where(labels < 0, labels + whole, labels) - shard_index(names).astype(labels.dtype) * size
    return jnp.where((local >= 0) & (local < size), local, size)


def with_mask(
    operands: Sequence[Array], spec: OperandSpec, first_row: Array | int, first_column: Array | int
) -> tuple[tuple[Array, ...], OperandSpec]:
    """The operands of a primitive with the band as a mask, for rows and columns that count from these."""
    if spec.band is None:
        return tuple(operands), spec
    own = operands[: len(operands) - len(spec.names)]
    named = spec.named(operands)
    where = operand_mask(operands[0].shape, named.pop("where", None), spec.band, first_row, first_column)
    return (*own, *named.values(), where), OperandSpec((*named, "where"))


def _two_sum(a: Array, b: Any) -> tuple[Array, Array]:
    """a + b exactly, as its rounding and the rest (Knuth's TwoSum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _finite(largest: Array) -> Array:
    return jnp.where(jnp.isfinite(largest), largest, 0)


def _inside_shard_map(names: Names) -> bool:
    """Or else under a vmap with an axis_name."""
    return set(names_of(names)) <= set(jax.sharding.get_abstract_mesh().manual_axes)
