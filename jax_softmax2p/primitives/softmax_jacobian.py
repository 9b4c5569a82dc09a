"""J(y, t) = y·(t - <y, t>): the Jacobian of softmax at its output y, applied to t.

J is symmetric, so one primitive is both softmax's JVP and its VJP: as a function of t it is its own
transpose. Its own JVP in y brings the higher orders.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.interpreters import ad

from jax_softmax2p import jax_compat, native, reference
from jax_softmax2p.primitives.operands import Tangent, move_batch_to_front
from jax_softmax2p.primitives.registration import NativeLowering, bind, define_primitive

Array = jax.Array


def softmax_jacobian(y: Array, t: Array, **params: Any) -> Array:
    """J(y, t), for y and t of one shape and dtype, within 4 ULP of the row's largest entry in float32.

    Args:
      y: a softmax.
      t: its tangent or cotangent.
      params: axis (negative), implementation, and reuses: None, or which of the operands, 0 or 1, is
        probably not needed afterwards, so that the result may take its memory.
    """
    return bind(softmax_jacobian_p, y, t, **params)


def softmax_jacobian_abstract_eval(y: ShapedArray, t: ShapedArray, **_: Any) -> ShapedArray:
    """Of t's shape and dtype, which must be y's."""
    if y.shape != t.shape or y.dtype != t.dtype:
        raise TypeError(f"y and t must agree, got {y.str_short()} and {t.str_short()}")
    return t.update(weak_type=False)


def softmax_jacobian_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, axis: int, **params: Any
) -> tuple[Array, Tangent]:
    """It is linear in t; its derivative in y is left to jax.numpy."""
    (y, t), (y_dot, t_dot) = primals, tangents
    terms: list[Array] = []
    if not isinstance(y_dot, ad.Zero):
        terms.append(reference.softmax_jacobian_derivative(y, t, y_dot, axis=axis))
    if not isinstance(t_dot, ad.Zero):
        terms.append(softmax_jacobian(y, t_dot, axis=axis, **params))
    return softmax_jacobian(y, t, axis=axis, **params), sum(terms[1:], terms[0])


def softmax_jacobian_transpose_rule(
    cotangent: Tangent, y: Array, t: ad.UndefinedPrimal, **params: Any
) -> list[Tangent | None]:
    """J is symmetric. In most programs this is the only use of the cotangent, whose memory the result takes.

    y is needed for the loss, too, and XLA does not order that before the gradient. But memory of arguments is
    never taken: a cotangent that is one would be copied.
    """
    assert not ad.is_undefined_primal(y), "linear in t alone"
    if isinstance(cotangent, ad.Zero):
        return [None, ad.Zero(t.aval)]
    reuses = 0 if jax_compat.is_argument(cotangent) else 1
    return [None, softmax_jacobian(y, cotangent, **(params | {"reuses": reuses}))]


def softmax_jacobian_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Array, int]:
    """Both operands are batched."""
    return softmax_jacobian(*move_batch_to_front(operands, dims, num_leading_operands=2), **params), 0


def softmax_jacobian_reference(y: Array, t: Array, *, axis: int, **_: Any) -> Array:
    """The same in jax.numpy."""
    return reference.softmax_jacobian(y, t, axis=axis)


def softmax_jacobian_sharded_rule(
    axis_names: tuple[str, ...], y: Array, t: Array, *, axis: int, **_: Any
) -> Array:
    """One all-reduce of one number a row, <y, t>."""
    return reference.softmax_jacobian(
        y, t, axis=axis, reduce_shards=lambda dot: jax.lax.psum(dot, axis_names)
    )


def softmax_jacobian_reused_operand(
    avals: Sequence[ShapedArray], *, reuses: int | None, **_: Any
) -> int | None:
    """As the parameter says."""
    return reuses


softmax_jacobian_p = define_primitive(
    "softmax2p_jacobian",
    params=("axis", "implementation", "reuses"),
    eager_params={"reuses": None},
    abstract_eval=softmax_jacobian_abstract_eval,
    jvp_rule=softmax_jacobian_jvp_rule,
    transpose_rule=softmax_jacobian_transpose_rule,
    batch_rule=softmax_jacobian_batch_rule,
    lowering=NativeLowering(
        operation="derivative of softmax",
        target=native.SOFTMAX_JACOBIAN_TARGET,
        reference=softmax_jacobian_reference,
        sharded_rule=softmax_jacobian_sharded_rule,
        reused_operand=softmax_jacobian_reused_operand,
    ),
)
