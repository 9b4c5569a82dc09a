"""softmax_p: softmax of logits along one axis. Its derivative is the primitive of softmax_jacobian.py."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import collectives, registration
from jax_softmax2p.primitives.logsumexp import logsumexp, logsumexp_vjp
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits
from jax_softmax2p.primitives.operands import OperandSpec
from jax_softmax2p.primitives.softmax_jacobian import softmax_jacobian

softmax_p = Primitive("softmax2p")


def softmax(x: jax.Array, *operands: jax.Array, **params: Any) -> jax.Array:
    """Softmax of logits of an inexact dtype.

    Args:
      x: and the operands: see ``primitives.operands``.
      params: axis (negative), spec, algorithm, implementation, and in_place: that x, and the tangent or
        cotangent of the result, are not needed afterwards, so that results may take their memory.
    """
    return softmax_p.bind(*registration.with_common_varying_axes(x, *operands), **params)


def softmax_abstract_eval(x, *operands, **params):
    return x.update(weak_type=False)


def softmax_jvp_rule(primals, tangents, *, spec: OperandSpec, algorithm, in_place, **params):
    y = softmax(*primals, spec=spec, algorithm=algorithm, in_place=in_place, **params)
    t = tangent_of_logits(primals[0], tangents[0], spec.named(primals), spec.named(tangents), spec)
    return y, softmax_jacobian(y, t, reuses=1 if in_place else None, **params)


def softmax_batch_rule(operands, dims, **params):
    return softmax(*registration.batch_logits(operands, dims), **params), 0


def softmax_from_lse(x, hi, lo, *operands, **params: Any) -> jax.Array:
    """e^(logits - hi - lo), and NaN throughout rows in which that is no softmax."""
    factor = jnp.where(jnp.isfinite(hi), 1, jnp.nan).astype(hi.dtype)
    return logsumexp_vjp(x, hi, lo, no_labels(), factor, *operands, **params)


def _across_devices(names, x, *operands, algorithm, in_place, **params):
    hi, lo = collectives.reduce_lse(*logsumexp(x, *operands, **params), names)
    return softmax_from_lse(x, hi, lo, *operands, **params)


def softmax_attributes(*, spec: OperandSpec, algorithm, **_):
    return {"algorithm": algorithm} | spec.attributes()


registration.define_eager_evaluation(
    softmax_p, ("axis", "spec", "algorithm", "implementation", "in_place"), in_place=False
)
softmax_p.def_abstract_eval(softmax_abstract_eval)
ad.primitive_jvps[softmax_p] = softmax_jvp_rule
batching.primitive_batchers[softmax_p] = softmax_batch_rule
registration.define_lowerings(
    softmax_p,
    native.SOFTMAX_TARGET,
    reference.softmax,
    softmax_attributes,
    sharded_rule=_across_devices,
    reused=lambda *, in_place, **_: 0 if in_place else None,
)
