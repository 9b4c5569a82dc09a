"""Attention composed of matrix products and softmax: the layout by heads, queries without keys, and sinks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p.attention.blocks import blockwise_attention
from jax_softmax2p.attention.core import all_of, fills_weights
from jax_softmax2p.attention.operands import Operands, Options, Result, are_known, at_least_one
from jax_softmax2p.primitives.attention_sinks import apply_sinks
from jax_softmax2p.primitives.operands import Band, band_columns, operand_mask
from jax_softmax2p.reference import compute_dtype

Array = jax.Array

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
"""What jax.nn writes over masked logits. Queries whose logits are all masked have this lse."""


def composed_attention(arrays: dict[str, Array], band: Band | None, options: Options) -> Result:
    """Attention of arguments that are given by name, and returned as in ``multi_head_attention``, but with
    the lse in the dtype of the computation."""
    query, sinks, returns_lse = arrays["query"], arrays.get("sinks"), options.return_lse
    if sinks is not None:
        options = dataclasses.replace(options, return_lse=True, lse_has_gradient=True)
    operands = _as_operands(arrays)
    operands = operands._replace(fully_masked=_fully_masked_queries(operands, band))
    result = blockwise_attention(operands, band, options)
    result = _fill_masked_queries(operands, result, band)
    heads_last = lambda x: jnp.moveaxis(x, 3, 1).reshape(*query.shape[:-1], x.shape[-1])
    output, lse = jax.tree.map(heads_last, result)
    if sinks is not None:
        output, lse = apply_sinks(output, lse, sinks.astype(lse.dtype))
    return Result(output.astype(query.dtype), jax.lax.stop_gradient(lse) if returns_lse else None)


def _as_operands(arrays: dict[str, Array]) -> Operands:
    """The arguments in five dimensions, in the dtype of the computation, without fully_masked."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    k, dtype = key.shape[2], compute_dtype(query.dtype)
    split = lambda x: x.reshape(*x.shape[:2], k, x.shape[2] // k, x.shape[3])
    heads_first = lambda x: jnp.moveaxis(split(x), 1, 3).astype(dtype)
    by_head = lambda name: _split_heads(arrays[name], k) if name in arrays else None
    padding = lambda name, size: _padding(arrays[name], size) if name in arrays else None
    bias = by_head("bias")
    q_padding, kv_padding = padding("query_lengths", query.shape[1]), padding("key_lengths", key.shape[1])
    return Operands(
        query=heads_first(query),
        key=heads_first(key),
        value=heads_first(value),
        scale=arrays["scale"].astype(dtype),
        bias=None if bias is None else bias.astype(dtype),
        mask=by_head("mask"),
        q_padding=None if q_padding is None else q_padding[..., :, None],
        kv_padding=None if kv_padding is None else kv_padding[..., None, :],
        dropout_mask=by_head("dropout_mask"),
    )


def _split_heads(x: Array, k: int) -> Array:
    """Reshapes (B, N, T, S) to (B, K, G, T, S), where any size may be 1 instead."""
    b, n, t, s = x.shape
    return x.reshape(b, 1, 1, t, s) if n == 1 else x.reshape(b, k, n // k, t, s)


def _padding(lengths: Array, size: int) -> Array:
    """Which of ``size`` positions are padding: (B, 1, 1, size) from lengths of shape (B,)."""
    positions = jax.lax.broadcasted_iota(lengths.dtype, (1, 1, 1, size), 3)
    return positions >= lengths.reshape(-1, 1, 1, 1)


def _fully_masked_queries(operands: Operands, band: Band | None) -> Array | None:
    """The queries that attend to no key, because of masks or of a bias that amounts to one.

    Returns:
      Boolean array that broadcasts to (B, K, G, T, 1). None if it is known, when this is traced, that there
      are no such queries.
    """
    t, s = operands.sizes[-2:]
    arrays = operands.bias, operands.mask, operands.kv_padding
    if all(x is None for x in arrays) and (
        band is None or (are_known(t, s) and all(band_columns(band, range(i, i + 1), s) for i in range(t)))
    ):
        return None
    kv_mask = None if operands.kv_padding is None else ~operands.kv_padding
    mask = all_of(operand_mask(operands.sizes, operands.mask, band), kv_mask)
    if mask is None:
        return None
    if operands.bias is None:
        return ~jnp.any(mask, -1, keepdims=True)
    bias = jax.lax.stop_gradient(operands.bias)
    lowest = jnp.finfo(bias.dtype).min  # As good as -inf, which jax_debug_infs would report.
    return jnp.max(bias, -1, keepdims=True, where=mask, initial=lowest) <= DEFAULT_MASK_VALUE


def _fill_masked_queries(operands: Operands, result: Result, band: Band | None) -> Result:
    """The result with what jax.nn defines for fully masked queries and for padding.

    Fully masked queries get the mean of all values, unless they have it already, and padding gets 0; both get
    the lse of a masked logit.
    """
    output, lse = result
    fully_masked, q_padding = operands.fully_masked, operands.q_padding
    if fully_masked is not None and not fills_weights(operands, band):
        mean = jnp.sum(operands.value, -2, keepdims=True) / at_least_one(operands.sizes[-1])
        output = jnp.where(fully_masked, mean, output)
    if q_padding is not None:
        output = jnp.where(q_padding, 0, output)
    if lse is not None:
        for rows in (fully_masked, q_padding):
            lse = lse if rows is None else jnp.where(rows, DEFAULT_MASK_VALUE, lse)
    return Result(output, lse)
