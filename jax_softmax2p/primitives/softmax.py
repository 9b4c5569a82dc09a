"""softmax_p: softmax of logits along one axis. Its derivative is the primitive of softmax_jacobian.py."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from jax_softmax2p import native, reference
from jax_softmax2p.primitives.collectives import reduce_lse
from jax_softmax2p.primitives.logsumexp import logsumexp
from jax_softmax2p.primitives.logsumexp_derivatives import logsumexp_vjp, no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_from_operands
from jax_softmax2p.primitives.operands import OperandSpec, Tangent, move_batch_to_front, reference_rule
from jax_softmax2p.primitives.registration import NativeLowering, bind, define_primitive
from jax_softmax2p.primitives.softmax_jacobian import softmax_jacobian
from jax_softmax2p.reference import Lse

Array = jax.Array


def softmax(x: Array, *operands: Array, **params: Any) -> Array:
    """Softmax of logits, of x's shape and dtype; within 2 ULP in float32, and 4 in float64, where it is
    native.

    Args:
      x: of an inexact dtype.
      operands: those of ``spec``, see ``primitives.operands``.
      params: axis (negative), spec, algorithm, implementation, and in_place: that x, and the tangent or
        cotangent of the result, are not needed afterwards, so that results may take their memory.
    """
    return bind(softmax_p, x, *operands, **params)


def softmax_from_lse(x: Array, lse: Lse, *operands: Array, **params: Any) -> Array:
    """e^(logits - lse), of x's shape and dtype, and NaN throughout rows in which that is no softmax.

    Args:
      x: as in :func:`softmax`.
      lse: of whole rows, of which x may be a shard.
      operands: as in :func:`softmax`.
      params: axis, spec, implementation.
    """
    factor = jnp.where(jnp.isfinite(lse.hi), 1, jnp.nan).astype(lse.hi.dtype)
    return logsumexp_vjp(x, *lse, no_labels(), factor, *operands, **params)


def softmax_abstract_eval(x: ShapedArray, *operands: ShapedArray, **_: Any) -> ShapedArray:
    """Of x's shape and dtype."""
    return x.update(weak_type=False)


def softmax_jvp_rule(
    primals: Sequence[Array],
    tangents: Sequence[Tangent],
    *,
    spec: OperandSpec,
    algorithm: str,
    in_place: bool,
    **params: Any,
) -> tuple[Array, Array]:
    """J(y, t), for the tangent t of the logits."""
    y = softmax(*primals, spec=spec, algorithm=algorithm, in_place=in_place, **params)
    t = tangent_from_operands(primals, tangents, spec)
    return y, softmax_jacobian(y, t, reuses=1 if in_place else None, **params)


def softmax_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Array, int]:
    """One more dimension at the front."""
    return softmax(*move_batch_to_front(operands, dims), **params), 0


def softmax_sharded_rule(
    axis_names: tuple[str, ...], x: Array, *operands: Array, algorithm: str, in_place: bool, **params: Any
) -> Array:
    """Two all-reduces, of one number a row and of two, for the lse of whole rows."""
    lse = reduce_lse(logsumexp(x, *operands, **params), axis_names)
    return softmax_from_lse(x, lse, *operands, **params)


def softmax_attributes(*, spec: OperandSpec, algorithm: str, **_: Any) -> dict[str, Any]:
    """Those of the FFI target."""
    return {"algorithm": algorithm} | spec.ffi_attributes()


def softmax_reused_operand(avals: Sequence[ShapedArray], *, in_place: bool, **_: Any) -> int | None:
    """The result takes x's memory where x is not needed afterwards."""
    return 0 if in_place else None


softmax_p = define_primitive(
    "softmax2p",
    params=("axis", "spec", "algorithm", "implementation", "in_place"),
    eager_params={"in_place": False},
    abstract_eval=softmax_abstract_eval,
    jvp_rule=softmax_jvp_rule,
    batch_rule=softmax_batch_rule,
    lowering=NativeLowering(
        operation="softmax",
        target=native.SOFTMAX_TARGET,
        attributes=softmax_attributes,
        reference=reference_rule(reference.softmax),
        sharded_rule=softmax_sharded_rule,
        reused_operand=softmax_reused_operand,
    ),
)
