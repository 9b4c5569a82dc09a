"""J(y, t) = y·(t - <y, t>): the Jacobian of softmax at its output y, applied to t.

J is symmetric, so one primitive is both softmax's JVP and its VJP: as a function of t it is its own
transpose. Its own JVP in y brings the higher orders.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import registration

softmax_jacobian_p = Primitive("softmax2p_jacobian")


def softmax_jacobian(y: jax.Array, t: jax.Array, **params: Any) -> jax.Array:
    """J(y, t), for y and t of one shape and dtype.

    Args:
      y: a softmax.
      t: its tangent or cotangent.
      params: axis (negative), implementation, and reuses: None, or which of the operands, 0 or 1, is not
        needed afterwards, so that the result may take its memory.
    """
    return softmax_jacobian_p.bind(*registration.with_common_varying_axes(y, t), **params)


def softmax_jacobian_abstract_eval(y, t, **params):
    if y.shape != t.shape or y.dtype != t.dtype:
        raise TypeError(f"y and t must agree, got {y.str_short()} and {t.str_short()}")
    return t.update(weak_type=False)


def softmax_jacobian_jvp_in_y(y_dot, _, y, t, *, axis, **params):
    return reference.softmax_jacobian_derivative(y, t, y_dot, axis)


def softmax_jacobian_jvp_in_t(t_dot, _, y, t, **params):
    return softmax_jacobian(y, t_dot, **params)


def softmax_jacobian_transpose_rule(cotangent, y, t, **params):
    assert not ad.is_undefined_primal(y), "linear in t alone"
    if isinstance(cotangent, ad.Zero):
        return [None, ad.Zero(t.aval)]
    # In most programs this is the last use of y.
    reuses = 0 if params["reuses"] is None else params["reuses"]
    return [None, softmax_jacobian(y, cotangent, **(params | {"reuses": reuses}))]


def softmax_jacobian_batch_rule(operands, dims, **params):
    return softmax_jacobian(*registration.batch_logits(operands, dims, num_leading_operands=1), **params), 0


def _across_devices(names, y, t, *, axis, **params):
    return reference.softmax_jacobian(y, t, axis, total=lambda dot: jax.lax.psum(dot, names))


registration.define_eager_evaluation(softmax_jacobian_p, ("axis", "implementation", "reuses"), reuses=None)
softmax_jacobian_p.def_abstract_eval(softmax_jacobian_abstract_eval)
ad.defjvp2(softmax_jacobian_p, softmax_jacobian_jvp_in_y, softmax_jacobian_jvp_in_t)
ad.primitive_transposes[softmax_jacobian_p] = softmax_jacobian_transpose_rule
batching.primitive_batchers[softmax_jacobian_p] = softmax_jacobian_batch_rule
registration.define_lowerings(
    softmax_jacobian_p,
    native.SOFTMAX_JACOBIAN_TARGET,
    reference.softmax_jacobian,
    lambda **_: {},
    sharded_rule=_across_devices,
    reused=lambda *, reuses, **_: reuses,
)
