"""Softmax along one axis."""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import common
from jax_softmax2p.primitives.softmax_jacobian import softmax_jacobian

softmax_p = Primitive("softmax2p")


def softmax(x: jax.Array, *, axis: int, algorithm: str, implementation: str | None) -> jax.Array:
    """Softmax of an inexact array along the negative ``axis``."""
    return softmax_p.bind(x, axis=axis, algorithm=algorithm, implementation=implementation)


def _abstract_eval(x, *, axis, algorithm, implementation):
    return x.update(weak_type=False)


def _jvp(x_dot, y, x, *, axis, algorithm, implementation):
    return softmax_jacobian(y, x_dot, axis=axis, implementation=implementation)


def _batch(operands, dims, **params):
    (x,), (dim,) = operands, dims
    # The axis counts from the end: a batch dimension at the front leaves it as it is.
    return softmax_p.bind(jnp.moveaxis(x, dim, 0), **params), 0


common.define_eager_evaluation(softmax_p, ("axis", "algorithm", "implementation"))
softmax_p.def_abstract_eval(_abstract_eval)
ad.defjvp2(softmax_p, _jvp)
batching.primitive_batchers[softmax_p] = _batch
common.define_lowerings(softmax_p, native.SOFTMAX_TARGET, reference.softmax, attributes=("axis", "algorithm"))
