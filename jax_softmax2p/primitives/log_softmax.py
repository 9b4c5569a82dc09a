"""log_softmax_p: the logarithm of the softmax of logits along one axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import common, logits
from jax_softmax2p.primitives.logits import Given

log_softmax_p = Primitive("softmax2p_log_softmax")


def log_softmax(x: jax.Array, *operands: jax.Array, **params: Any) -> jax.Array:
    """The logarithm of the softmax of logits of an inexact dtype.

    Args:
      x: and the operands: see ``primitives.logits``.
      params: axis (negative), given, implementation.
    """
    return log_softmax_p.bind(*common.with_common_varying_axes(x, *operands), **params)


def _abstract_eval(x, *operands, axis, given, implementation):
    return x.update(weak_type=False)


def _jvp(primals, tangents, *, axis, given: Given, implementation):
    y = log_softmax(*primals, axis=axis, given=given, implementation=implementation)
    t = logits.tangent(primals[0], tangents[0], given.named(primals), given.named(tangents), given)
    mask = logits.mask_of(y.shape, given.named(primals).get("where"), given.band)
    wide = common.compute_dtype(y.dtype)
    # e^y is 0 where y is masked: -inf. Of a row that is masked throughout nothing else is left.
    p = jnp.exp(y.astype(wide))
    t = t.astype(wide)
    y_dot = (t - jnp.sum(p * t, axis, keepdims=True)).astype(y.dtype)
    return y, y_dot if mask is None else jnp.where(mask, y_dot, 0)


def _batch(operands, dims, **params):
    return log_softmax(*common.batch_logits(operands, dims), **params), 0


common.define_eager_evaluation(log_softmax_p, ("axis", "given", "implementation"))
log_softmax_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[log_softmax_p] = _jvp
batching.primitive_batchers[log_softmax_p] = _batch
common.define_lowerings(
    log_softmax_p,
    native.LOG_SOFTMAX_TARGET,
    reference.log_softmax,
    lambda *, axis, given: given.attributes(),
)
