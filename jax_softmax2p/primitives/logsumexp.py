"""logsumexp_p: log(sum(exp(logits))) along one axis.

It has two results, hi and lo of the lse. The derivative of a large one is recomputed from x and this pair, by
the primitives of logsumexp_derivatives.py, so nothing of x's size is kept for it. That of a small one keeps
the softmax.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import ad
from jax.sharding import PartitionSpec

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import collectives, thresholds
from jax_softmax2p.primitives.logsumexp_derivatives import (
    PARAMS,
    jvp_of_kept,
    logsumexp_jvp,
    lse_attributes,
    no_labels,
)
from jax_softmax2p.primitives.mask_to_zero import tangent_from_operands
from jax_softmax2p.primitives.operands import OperandSpec, Tangent, move_batch_to_front, reference_rule
from jax_softmax2p.primitives.registration import NativeLowering, bind, define_primitive
from jax_softmax2p.primitives.thresholds import Operation
from jax_softmax2p.reference import Lse, compute_dtype

Array = jax.Array


def logsumexp(
    x: Array,
    *operands: Array,
    exact: bool = False,
    zero_at_minus_infinity: bool = False,
    for_derivative: Operation | None = None,
    **params: Any,
) -> Lse:
    """The lse of the logits' rows: of x's shape without the axis, in the dtype that x is computed in.

    hi is within 2 ULP, or 1 ULP of the row's largest logit, whichever is more, and hi + lo good to 2^-42 in
    float32, where it is native.

    Args:
      x: of an inexact dtype.
      operands: those of ``spec``, see ``primitives.operands``.
      exact: as in :func:`reference.logsumexp`, if that runs.
      zero_at_minus_infinity: whether the derivative of rows of nothing but -inf is 0 rather than NaN.
      for_derivative: which derivative is computed as well, which decides from which size on it is native, and
        is as in :func:`reference.logsumexp`.
      params: axis (negative), spec, implementation.
    """
    params |= {"exact": exact, "zero_at_minus_infinity": zero_at_minus_infinity}
    return Lse(*bind(logsumexp_p, x, *operands, for_derivative=for_derivative, **params))


def keeps_derivative(
    x: Array, operation: Operation, *, axis: int, spec: OperandSpec, implementation: Any, **_: Any
) -> bool:
    """Whether the derivative in x is kept, a softmax or what a loss makes of it, so that it is products that
    XLA fuses.

    A large one is rather recomputed, by the native derivatives. It may be a loop in which this runs.

    Args:
      x: the logits before the operands.
      operation: a derivative.
      axis: a parameter of the primitives, as the others.
      spec: as axis.
      implementation: as axis.
    """
    if implementation is not None or {"scale", "bias"} & set(spec.names) or x.dtype != compute_dtype(x.dtype):
        return False
    has_sizes = all(isinstance(size, int) for size in x.shape)  # Not symbolic ones, as in exported programs.
    return has_sizes and thresholds.keeps_derivative(operation, x.shape, axis)


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
    primals: Sequence[Array],
    tangents: Sequence[Tangent],
    *,
    exact: bool,
    zero_at_minus_infinity: bool,
    for_derivative: Operation | None,
    **params: Any,
) -> tuple[Lse, tuple[Array, ad.Zero]]:
    """The whole derivative is that of hi."""
    x, *operands = primals
    operation: Operation = "derivative of logsumexp"
    lse = logsumexp(
        *primals,
        exact=exact,
        zero_at_minus_infinity=zero_at_minus_infinity,
        for_derivative=operation,
        **params,
    )
    t = tangent_from_operands(primals, tangents, params["spec"])
    if zero_at_minus_infinity:
        # e^(-inf - 0) is 0, e^(-inf + inf) NaN, as are derivatives that are kept: those are made of x alone.
        hi = jnp.where(lse.hi == -jnp.inf, 0, lse.hi)
        hi_dot = logsumexp_jvp(x, hi, lse.lo, no_labels(), t, *operands, **params)
    elif keeps_derivative(x, operation, **params):
        hi_dot = jvp_of_kept(x, lse, no_labels(), t, *operands, **params)
    else:
        hi_dot = logsumexp_jvp(x, *lse, no_labels(), t, *operands, **params)
    return lse, (hi_dot, ad.Zero(jax.typeof(lse.lo).to_tangent_aval()))


def logsumexp_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Lse, tuple[int, int]]:
    """One more dimension at the front."""
    return logsumexp(*move_batch_to_front(operands, dims), **params), (0, 0)


def logsumexp_sharded_rule(axis_names: tuple[str, ...], *operands: Array, **params: Any) -> Lse:
    """Two all-reduces, of one number a row and of two."""
    return collectives.reduce_lse(logsumexp(*operands, **params), axis_names)


def combine_shards(lse: Lse, *, implementation: Any, **_: Any) -> Lse:
    """The lse of whole rows from those of their shards, which lie along the first axis.

    As exact as hi + lo is: it approximates e^(z + rest) by e^z·(1 + rest), with rest below an ULP of z.
    """
    params = {"axis": -lse.hi.ndim, "spec": OperandSpec(), "implementation": implementation}
    largest = collectives.finite_max(lse.hi)
    z, rest = collectives.subtract_max(lse, largest)
    total = logsumexp(z, exact=True, **params)
    weighted = logsumexp_jvp(z, *total, no_labels(), rest, **params)
    return collectives.add_max(largest, total.hi, total.lo + weighted)


logsumexp_p = define_primitive(
    "softmax2p_logsumexp",
    params=(*PARAMS, "exact", "zero_at_minus_infinity", "for_derivative"),
    multiple_results=True,
    abstract_eval=logsumexp_abstract_eval,
    jvp_rule=logsumexp_jvp_rule,
    batch_rule=logsumexp_batch_rule,
    lowering=NativeLowering(
        operation="logsumexp",
        target=native.LOGSUMEXP_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.logsumexp, "exact", "zero_at_minus_infinity", "for_derivative"),
        sharded_rule=logsumexp_sharded_rule,
    ),
)
