"""Attention by one native kernel, which stores no logits.

It is a primitive, which is lowered to the composed attention where that is faster, or where there is no such
kernel. The gradient in query, key, value and a bias is another kernel, which computes the weights again. All
other derivatives are composed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_softmax2p import native
from jax_softmax2p.attention import blocks
from jax_softmax2p.attention.composed import composed_attention
from jax_softmax2p.attention.operands import Options, Result, are_known
from jax_softmax2p.primitives.attention import define_attention
from jax_softmax2p.primitives.attention_lowering import OPERAND_NAMES, batch_of, roles_of
from jax_softmax2p.primitives.dispatch import choose_path
from jax_softmax2p.primitives.operands import Band
from jax_softmax2p.primitives.registration import bind
from jax_softmax2p.reference import compute_dtype

Array = jax.Array

LARGE_HEADS = 256
"""From how many features of query and value on few weights are rather stored than computed again."""


def unfused_reason(arrays: dict[str, Array], options: Options) -> str | None:
    """Why attention of these arrays is composed whatever their sizes; None where it may be fused.

    Args:
      arrays: the arguments of ``multi_head_attention`` that are arrays, by name.
      options: the options.
    """
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    sizes = *query.shape, *key.shape, *value.shape
    if choose_path(options.implementation, None) == "reference":
        return "the reference is composed"
    if query.dtype not in native.DTYPES:
        return f"there is no native kernel for dtype {query.dtype}"
    if not are_known(*sizes) or 0 in sizes:
        return "sizes are symbolic or 0"
    if options.query_block_size is not None:
        return "query_block_size is given"
    if options.precision is not None:
        return "a precision is given"
    return None


def fused_attention(arrays: dict[str, Array], band: Band | None, options: Options) -> Result:
    """Attention of arguments that are given by name, and returned as in ``multi_head_attention``, but with
    the lse in the dtype of the computation."""
    query = arrays["query"]
    dtype = compute_dtype(query.dtype)
    arrays = arrays | {"scale": arrays["scale"].astype(dtype).reshape(1)}
    for name in ("bias", "sinks"):
        if name in arrays:
            arrays[name] = arrays[name].astype(dtype)
    names = tuple(name for name in OPERAND_NAMES if name in arrays)
    output, lse = bind(
        attention_p,
        *(arrays[name] for name in ("query", "key", "value", "scale", *names)),
        names=names,
        band=band,
        soft_cap=options.logits_soft_cap,
        return_lse=options.return_lse,
        implementation=options.implementation,
    )
    if "dropout_mask" in arrays:
        # A probability in 16 bits would make all elements too large, or too small, by up to 0.2%.
        output = (output.astype(dtype) / jnp.asarray(options.keep_prob, dtype)).astype(query.dtype)
    hi = jax.lax.stop_gradient(lse)[..., :1]
    return Result(output, hi if options.return_lse else None)


def _composed(
    *operands: Array,
    names: tuple[str, ...],
    band: Band | None,
    soft_cap: float | None,
    return_lse: bool,
    implementation: Any,
) -> tuple[Array, Array]:
    """The primitive's results, composed."""
    arrays = dict(zip(("query", "key", "value", "scale", *names), operands, strict=True))
    query = arrays["query"]
    batch = batch_of(operands, roles_of(names, 3, 0))
    for name in ("query", "key", "value"):
        arrays[name] = jnp.broadcast_to(arrays[name], (batch, *arrays[name].shape[1:]))
    arrays["scale"] = arrays["scale"].reshape((1,) * 5)
    options = Options(
        implementation=implementation,
        return_lse=return_lse,
        logits_soft_cap=soft_cap,
    )
    output, lse = composed_attention(arrays, band, options)
    if lse is None:
        return output, jnp.zeros((*output.shape[:-1], 2), compute_dtype(query.dtype))
    return output, jnp.pad(lse, [(0, 0)] * 3 + [(0, 1)])


def _stores_weights(
    query: Array,
    key: Array,
    value: Array,
    *others: Array,
    names: tuple[str, ...],
    implementation: Any,
    **_: Any,
) -> bool:
    """Whether to differentiate the composed attention: in one block, whose weights the gradient reads.

    Kernels compute the weights again, and are faster all the same where heads are not large: with 16 to 64
    features the composed gradient takes 1.4 to 1.9 times as long, with 128 it takes 0.8 (Zen 4).
    """
    batch = batch_of((query, key, value, *others), roles_of(names, 3, 0))
    logits = math.prod((batch, *query.shape[1:3], key.shape[1]))
    if implementation == "native" or logits > blocks.max_block_logits():
        return False
    if query.shape[3] + value.shape[3] >= LARGE_HEADS:
        return True
    return jax.default_backend() != "cpu" or native.unavailable_reason() is not None


attention_p = define_attention("softmax2p_attention", _composed, _stores_weights)
