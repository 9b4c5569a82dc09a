"""mask_to_zero_p: an array with 0 where logits are masked; and tangents of logits, which have that.

As a select it would have JAX keep an array of zeros for the backward pass, and of a band its mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_softmax2p.primitives import operands, registration

mask_to_zero_p = Primitive("softmax2p_mask_to_zero")


def mask_to_zero(t: jax.Array, where: jax.Array | None, band: operands.Limits | None) -> jax.Array:
    """t, and 0 where the mask or the band is False: both as ``primitives.operands`` has them."""
    if where is None and band is None:
        return t
    masks = [] if where is None else [where]
    return mask_to_zero_p.bind(*registration.with_common_varying_axes(t, *masks), band=band)


def tangent_of_logits(
    x: jax.Array, x_dot: Any, operands: dict[str, Any], tangents: dict[str, Any], spec: operands.OperandSpec
) -> jax.Array:
    """The tangent of the logits, of x's shape and dtype, 0 where they are masked.

    Args:
      x: as the primitive takes it.
      x_dot: its tangent, an array or a symbolic zero.
      operands: by name.
      tangents: by name, arrays or symbolic zeros; that of ``where`` does not matter.
      spec: the primitive's parameter.
    """
    where = operands.get("where")
    terms = []
    if not isinstance(x_dot, ad.Zero):
        terms.append(x_dot * operands["scale"] if "scale" in operands else x_dot)
    scale_dot, bias_dot = tangents.get("scale"), tangents.get("bias")
    if scale_dot is not None and not isinstance(scale_dot, ad.Zero):
        # 0 times what is masked there would be NaN, where it is.
        terms.append(mask_to_zero(x, where, spec.band) * scale_dot)
    if bias_dot is not None and not isinstance(bias_dot, ad.Zero):
        terms.append(jnp.broadcast_to(bias_dot, x.shape))
    return mask_to_zero(sum(terms[1:], terms[0]).astype(x.dtype), where, spec.band)


def mask_to_zero_lowering(t, *masks, band):
    return jnp.where(operands.operand_mask(t.shape, masks[0] if masks else None, band), t, 0)


def mask_to_zero_abstract_eval(t, *masks, band):
    return t.update(weak_type=False)


def mask_to_zero_jvp_rule(primals, tangents, *, band):
    masks = primals[1:]
    y = mask_to_zero_p.bind(*primals, band=band)
    if isinstance(tangents[0], ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, mask_to_zero_p.bind(tangents[0], *masks, band=band)


def mask_to_zero_transpose_rule(cotangent, t, *masks, band):
    if isinstance(cotangent, ad.Zero):
        of_t: Any = ad.Zero(t.aval)
    else:
        of_t = mask_to_zero_p.bind(cotangent, *masks, band=band)
    return [of_t, *(None for _ in masks)]


def mask_to_zero_batch_rule(operands, dims, *, band):
    return mask_to_zero_p.bind(*registration.batch_logits(operands, dims), band=band), 0


registration.define_eager_evaluation(mask_to_zero_p, ("band",))
mask_to_zero_p.def_abstract_eval(mask_to_zero_abstract_eval)
ad.primitive_jvps[mask_to_zero_p] = mask_to_zero_jvp_rule
ad.primitive_transposes[mask_to_zero_p] = mask_to_zero_transpose_rule
batching.primitive_batchers[mask_to_zero_p] = mask_to_zero_batch_rule
mlir.register_lowering(mask_to_zero_p, mlir.lower_fun(mask_to_zero_lowering, multiple_results=False))
