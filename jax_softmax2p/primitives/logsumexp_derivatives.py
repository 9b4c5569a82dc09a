"""What the derivatives of logsumexp have in common, as primitives.

Their operands are x, the logsumexp as hi and lo, labels (an empty array where there are none), and t, a
tangent or cotangent, in which they are linear; then those of ``primitives.operands``. With z the logits they
are made of p = e^(z - hi - lo).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p.primitives import registration
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits
from jax_softmax2p.primitives.operands import OperandSpec

PARAMS = ("axis", "spec", "implementation")

NUM_LEADING_OPERANDS = 4
"""How many there are between x and those of ``primitives.operands``."""

NO_LABELS = (0,)
"""The shape of an array of labels that are not there."""


def no_labels() -> jax.Array:
    """What stands for labels that are not there."""
    return jnp.zeros(NO_LABELS, jnp.int32)


def attributes(*, spec: OperandSpec, **_) -> dict[str, Any]:
    """Those of the FFI targets, from the primitives' parameters."""
    return spec.attributes()


def bind(primitive: Primitive, *operands: Any, **params: Any) -> Any:
    """Applies the primitive."""
    return primitive.bind(*registration.with_common_varying_axes(*operands), **params)


def define_rules(
    primitive: Primitive,
    transposed: Primitive,
    of_change: Callable[..., jax.Array],
    abstract_eval: Callable[..., Any],
) -> None:
    """Registers everything but the lowering.

    Args:
      transposed: the primitive that is the transpose in t.
      of_change: by how much the result changes with z - hi - lo: of_change(change, *operands, **params).
      abstract_eval: the result's abstract value, from those of the operands.
    """

    def jvp(primals, tangents, **params):
        terms = []
        change = _change_of_log(primals, tangents, params["spec"], params["axis"])
        if change is not None:
            terms.append(of_change(change, *primals, **params))
        if not isinstance(tangents[4], ad.Zero):
            terms.append(bind(primitive, *primals[:4], tangents[4], *primals[5:], **params))
        return bind(primitive, *primals, **params), sum(terms[1:], terms[0])

    def transpose(cotangent, x, hi, lo, labels, t, *operands, **params):
        assert ad.is_undefined_primal(t), "linear in t alone"
        if isinstance(cotangent, ad.Zero):
            of_t: Any = ad.Zero(t.aval)
        else:
            of_t = bind(transposed, x, hi, lo, labels, cotangent, *operands, **params)
        return [None, None, None, None, of_t, *(None for _ in operands)]

    def batch(operands, dims, **params):
        batched = registration.batch_logits(operands, dims, num_leading_operands=NUM_LEADING_OPERANDS)
        if operands[3].shape == NO_LABELS:
            batched[3] = operands[3]
        return bind(primitive, *batched, **params), 0

    registration.define_eager_evaluation(primitive, PARAMS)
    primitive.def_abstract_eval(lambda *avals, **params: abstract_eval(*avals).update(weak_type=False))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch


def _change_of_log(primals: Any, tangents: Any, spec: OperandSpec, axis: int) -> jax.Array | None:
    """By how much z - hi - lo changes, None if it does not."""
    x, x_dot = primals[0], tangents[0]
    named, named_dots = spec.named(primals), spec.named(tangents)
    wide = primals[1].dtype
    parts = []
    dots = [x_dot, *(named_dots[name] for name in named_dots if name != "where")]
    if any(not isinstance(dot, ad.Zero) for dot in dots):
        parts.append(tangent_of_logits(x, x_dot, named, named_dots, spec).astype(wide))
    parts += [-jnp.expand_dims(dot, axis) for dot in tangents[1:3] if not isinstance(dot, ad.Zero)]
    return sum(parts[1:], parts[0]) if parts else None
