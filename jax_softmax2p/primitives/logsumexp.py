"""logsumexp_p: log(sum(exp(logits))) along one axis, and the two primitives of which its derivative is made.

It has two results, hi and lo of the lse. A derivative is recomputed from x and this pair, so nothing of x's
size is kept for it.

logsumexp_jvp_p and logsumexp_vjp_p are linear, in t and in factor, and each other's transposes:

    logsumexp_jvp(t) = sum(p·t) - t[label]        logsumexp_vjp(factor) = factor·(p - one_hot(label))

Without labels they lack the second term. See ``primitives.logsumexp_derivatives``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import ad
from jax.sharding import PartitionSpec

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.logsumexp_derivatives import (
    PARAMS,
    define_lse_derivative,
    lse_attributes,
    no_labels,
)
from jax_softmax2p.primitives.mask_to_zero import tangent_from_operands
from jax_softmax2p.primitives.operands import OperandSpec, Tangent, move_batch_to_front, reference_rule
from jax_softmax2p.primitives.registration import NativeLowering, bind, define_primitive
from jax_softmax2p.reference import Lse, compute_dtype

Array = jax.Array


def logsumexp(x: Array, *operands: Array, **params: Any) -> Lse:
    """The lse of the logits' rows: of x's shape without the axis, in the dtype that x is computed in.

    hi is within 2 ULP, or 1 ULP of the row's largest logit, whichever is more, and hi + lo good to 2^-42 in
    float32, where it is native.

    Args:
      x: of an inexact dtype.
      operands: those of ``spec``, see ``primitives.operands``.
      params: axis (negative), spec, implementation.
    """
    return Lse(*bind(logsumexp_p, x, *operands, **params))


def logsumexp_jvp(
    x: Array, hi: Array, lo: Array, labels: Array, t: Array, *operands: Array, **params: Any
) -> Array:
    """The derivative of the lse along t, minus t at the labels; of hi's shape and dtype.

    Args:
      x: as in :func:`logsumexp`.
      hi: of the lse, and lo.
      lo: as hi.
      labels: int32 of hi's shape, from 0 to the size of the axis, which stands for no class; or
        :func:`no_labels`.
      t: a tangent of the logits, of x's shape and dtype.
      operands: as in :func:`logsumexp`.
      params: as in :func:`logsumexp`.
    """
    return bind(logsumexp_jvp_p, x, hi, lo, labels, t, *operands, **params)


def logsumexp_vjp(
    x: Array, hi: Array, lo: Array, labels: Array, factor: Array, *operands: Array, **params: Any
) -> Array:
    """The transpose of :func:`logsumexp_jvp`, of x's shape and dtype, for a factor of hi's."""
    return bind(logsumexp_vjp_p, x, hi, lo, labels, factor, *operands, **params)


def combine_shards(lse: Lse, *, implementation: Any, **_: Any) -> Lse:
    """The lse of whole rows from those of their shards, which lie along the first axis.

    As exact as hi + lo is: it approximates e^(z + rest) by e^z·(1 + rest), with rest below an ULP of z.
    """
    params = {"axis": -lse.hi.ndim, "spec": OperandSpec(), "implementation": implementation}
    largest = collectives.finite_max(lse.hi)
    z, rest = collectives.subtract_max(lse, largest)
    total = logsumexp(z, **params)
    weighted = logsumexp_jvp(z, *total, no_labels(), rest, **params)
    return collectives.add_max(largest, total.hi, total.lo + weighted)


def lse_aval(x: ShapedArray, axis: int) -> ShapedArray:
    """The abstract value of hi and of lo, from that of x."""
    shape = tuple(size for i, size in enumerate(x.shape) if i != axis % x.ndim)
    partition = [entry for i, entry in enumerate(x.sharding.spec) if i != axis % x.ndim]
    sharding = x.sharding.update(spec=PartitionSpec(*partition))
    dtype: np.dtype = compute_dtype(x.dtype)
    return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def logsumexp_abstract_eval(
    x: ShapedArray, *operands: ShapedArray, axis: int, **_: Any
) -> tuple[ShapedArray, ShapedArray]:
    """Two of rows."""
    aval = lse_aval(x, axis)
    return aval, aval


def logsumexp_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, spec: OperandSpec, **params: Any
) -> tuple[Lse, tuple[Array, ad.Zero]]:
    """The whole derivative is that of hi."""
    x, *operands = primals
    lse = logsumexp(*primals, spec=spec, **params)
    t = tangent_from_operands(primals, tangents, spec)
    hi_dot = logsumexp_jvp(x, *lse, no_labels(), t, *operands, spec=spec, **params)
    return lse, (hi_dot, ad.Zero(jax.typeof(lse.lo).to_tangent_aval()))


def logsumexp_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Lse, tuple[int, int]]:
    """One more dimension at the front."""
    return logsumexp(*move_batch_to_front(operands, dims), **params), (0, 0)


def logsumexp_sharded_rule(axis_names: tuple[str, ...], *operands: Array, **params: Any) -> Lse:
    """Two all-reduces of one number a row."""
    return collectives.reduce_lse(logsumexp(*operands, **params), axis_names)


def logsumexp_jvp_change(
    change: Array, x: Array, hi: Array, lo: Array, labels: Array, t: Array, *operands: Array, **params: Any
) -> Array:
    """sum(p·change·t): the labels' term does not change."""
    changed = (change * t.astype(change.dtype)).astype(x.dtype)
    return logsumexp_jvp(x, hi, lo, no_labels(), changed, *operands, **params)


def logsumexp_jvp_sharded_rule(
    axis_names: tuple[str, ...],
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    *operands: Array,
    **params: Any,
) -> Array:
    """One all-reduce of one number a row; each shard has the labels that lie in it."""
    labels = collectives.local_labels(labels, x.shape[params["axis"]], axis_names)
    return jax.lax.psum(logsumexp_jvp(x, hi, lo, labels, t, *operands, **params), axis_names)


def logsumexp_vjp_change(
    change: Array,
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    *operands: Array,
    **params: Any,
) -> Array:
    """factor·p·change: the labels' term does not change."""
    weights = logsumexp_vjp(x, hi, lo, no_labels(), factor, *operands, **params)
    return (weights * change).astype(x.dtype)


def logsumexp_vjp_sharded_rule(
    axis_names: tuple[str, ...],
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    *operands: Array,
    **params: Any,
) -> Array:
    """No communication; each shard has the labels that lie in it."""
    labels = collectives.local_labels(labels, x.shape[params["axis"]], axis_names)
    return logsumexp_vjp(x, hi, lo, labels, factor, *operands, **params)


logsumexp_p = define_primitive(
    "softmax2p_logsumexp",
    params=PARAMS,
    multiple_results=True,
    abstract_eval=logsumexp_abstract_eval,
    jvp_rule=logsumexp_jvp_rule,
    batch_rule=logsumexp_batch_rule,
    lowering=NativeLowering(
        target=native.LOG_SUM_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.logsumexp),
        sharded_rule=logsumexp_sharded_rule,
    ),
)

logsumexp_jvp_p = define_lse_derivative(
    "softmax2p_logsumexp_jvp",
    apply=logsumexp_jvp,
    transposed=logsumexp_vjp,
    change_rule=logsumexp_jvp_change,
    abstract_eval=lambda x, hi, *_: hi,
    lowering=NativeLowering(
        target=native.LOG_SUM_JVP_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.logsumexp_jvp),
        sharded_rule=logsumexp_jvp_sharded_rule,
    ),
)

logsumexp_vjp_p = define_lse_derivative(
    "softmax2p_logsumexp_vjp",
    apply=logsumexp_vjp,
    transposed=logsumexp_jvp,
    change_rule=logsumexp_vjp_change,
    abstract_eval=lambda x, *_: x,
    lowering=NativeLowering(
        target=native.LOG_SUM_VJP_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.logsumexp_vjp),
        sharded_rule=logsumexp_vjp_sharded_rule,
    ),
)
