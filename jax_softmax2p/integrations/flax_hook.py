"""Flax's attention functions, computed by this package."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_softmax2p.arguments import as_array, check_broadcasts
from jax_softmax2p.attention.api import as_sinks
from jax_softmax2p.attention.multi_head import multi_head_attention
from jax_softmax2p.attention.operands import Options, promote_to_inexact
from jax_softmax2p.logits import apply_soft_cap
from jax_softmax2p.ops import logsumexp, softmax
from jax_softmax2p.primitives.attention_sinks import apply_sinks
from jax_softmax2p.primitives.operands import Band
from jax_softmax2p.reference import compute_dtype
from jax_softmax2p.scalars import as_soft_cap

if TYPE_CHECKING:
    from flax import linen, nnx

Array = jax.Array
Einsum = Callable[..., Array]


def flax_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: "linen.Module | nnx.Module | None" = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Einsum | None = None,
    attn_weights_value_einsum: Einsum | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    *,
    logits_soft_cap: float | None = None,
    sinks: jax.typing.ArrayLike | None = None,
) -> Array:
    """Attention for the argument ``attention_fn`` of flax's layers, in ``nnx`` and in ``linen``.

    It computes what flax's own ``dot_product_attention`` computes, with the same random numbers in dropout,
    and as :func:`jax_softmax2p.dot_product_attention` does it: the logits are in float32 whatever the dtype,
    in place, and block by block where there are many.

    Args:
      query: array of shape (batch..., T, N, H), with any number of batch dimensions.
      key: array of shape (batch..., S, K, H), where N is a multiple of K.
      value: array of shape (batch..., S, K, H').
      bias: array that broadcasts to (batch..., N, T, S).
      mask: array that broadcasts like bias. A query attends to a key where it is neither 0 nor False.
      broadcast_dropout: whether batch and heads share one dropout mask.
      dropout_rng: key for dropout.
      dropout_rate: the probability with which a weight is dropped.
      deterministic: whether no weight is dropped.
      dtype: of the operands and of the result; by default the dtype to which the arrays promote.
      precision: of the matrix products.
      module: a layer that is to store the weights as "attention_weights". They exist as a whole then.
      force_fp32_for_softmax: whether to return at least float32, as linen does. The softmax is computed in
        float32 anyway.
      einsum_dot_general: the ``dot_general`` of both products. With this or one of the next two, the weights
        exist as a whole.
      qk_attn_weights_einsum: what computes the logits instead of ``jnp.einsum``.
      attn_weights_value_einsum: what computes the result instead of ``jnp.einsum``.
      promote_dtype: promote_dtype((query, key, value), dtype=dtype) replaces the usual promotion.
      is_causal: as in :func:`jax_softmax2p.dot_product_attention`.
      logits_soft_cap: as there. Layers do not pass it: give them ``functools.partial`` of this function.
      sinks: as there, of shape (N,); as logits_soft_cap.

    Returns:
      Array of shape (batch..., T, N, H').

    Raises:
      TypeError: an argument is not an array.
      ValueError: the shapes do not fit together; logits_soft_cap is not a positive finite number; dropout
        has no key; or only one einsum is given, or both
        together with precision or einsum_dot_general.

    Example:
      >>> from flax import nnx
      >>> from jax_softmax2p.integrations import flax_attention
      >>> layer = nnx.MultiHeadAttention(
      ...     4, 32, decode=False, attention_fn=flax_attention, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jax.numpy.ones((2, 5, 32)), is_causal=True).shape
      (2, 5, 32)
    """
    query, key, value = as_array(query, "query"), as_array(key, "key"), as_array(value, "value")
    query, key, value = _promote((query, key, value), dtype, promote_dtype, force_fp32_for_softmax)
    _check_query_and_key(query, key)
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have key's shape {key.shape} but for the last size, got {value.shape}")
    batch, heads = query.shape[:-3], query.shape[-2]
    shape = (*batch, heads, query.shape[-3], key.shape[-3])
    if mask is not None:
        mask = as_array(mask, "mask").astype(bool)
    keep_prob = _keep_prob(dropout_rate, deterministic)
    dropout_mask = _dropout_mask(dropout_rng, keep_prob, shape, broadcast_dropout)
    soft_cap = as_soft_cap(logits_soft_cap, "logits_soft_cap")
    sinks = None if sinks is None else as_sinks(sinks, heads)
    einsums_given = _check_einsums(
        qk_attn_weights_einsum, attn_weights_value_einsum, precision, einsum_dot_general
    )
    if module is not None or einsum_dot_general or einsums_given or jnp.iscomplexobj(query):
        einsum = _product(precision, einsum_dot_general)
        weights = _attention_weights(
            query, key, bias, mask, is_causal, qk_attn_weights_einsum or einsum, soft_cap, sinks
        )
        if module is not None:
            _sow(module, weights)
        weights = _drop(weights, dropout_mask, keep_prob, weights.dtype)
        wv_einsum = attn_weights_value_einsum or einsum
        return wv_einsum("...hqk,...khd->...qhd", weights.astype(value.dtype), _repeat_heads(value, heads))
    flatten = lambda x: x.reshape(math.prod(batch), *x.shape[-3:])
    flatten_operand = lambda name, x: None if x is None else _flatten_batch(name, x, shape)
    output, _ = multi_head_attention(
        flatten(query),
        flatten(key),
        flatten(value),
        bias=flatten_operand("bias", bias),
        mask=flatten_operand("mask", mask),
        dropout_mask=flatten_operand("the dropout mask", dropout_mask),
        sinks=sinks,
        band=Band() if is_causal else None,
        options=Options(logits_soft_cap=soft_cap, keep_prob=keep_prob, precision=precision),
    )
    return output.reshape(*query.shape[:-1], value.shape[-1])


def flax_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: "linen.Module | nnx.Module | None" = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    einsum: Einsum | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
) -> Array:
    """Flax's ``dot_product_attention_weights``, in ``nnx`` and in ``linen``.

    Args and errors are those of :func:`flax_attention`; einsum is its qk_attn_weights_einsum.

    Returns:
      Array of shape (batch..., N, T, S), the weights after dropout. With force_fp32_for_softmax they are
      float32, or float64 if there is dropout of float64.
    """
    query, key = as_array(query, "query"), as_array(key, "key")
    query, key = _promote((query, key), dtype, promote_dtype, force_fp32_for_softmax)
    _check_query_and_key(query, key)
    if einsum and (precision or einsum_dot_general):
        raise ValueError("precision and einsum_dot_general cannot be combined with einsum")
    if mask is not None:
        mask = as_array(mask, "mask").astype(bool)
    einsum = einsum or _product(precision, einsum_dot_general)
    weights = _attention_weights(query, key, bias, mask, is_causal, einsum)
    weights = weights.astype(jnp.float32) if force_fp32_for_softmax else weights
    if module is not None:
        _sow(module, weights)
    keep_prob = _keep_prob(dropout_rate, deterministic)
    dropout_mask = _dropout_mask(dropout_rng, keep_prob, weights.shape, broadcast_dropout)
    return _drop(weights, dropout_mask, keep_prob, query.dtype)


def _promote(
    arrays: tuple[Array, ...],
    dtype: jax.typing.DTypeLike | None,
    promote_dtype: Callable[..., Any] | None,
    at_least_float32: bool,
) -> tuple[Array, ...]:
    """Query, key and perhaps value in one inexact dtype, which is ``dtype`` unless that is None."""
    if promote_dtype is not None:
        arrays = tuple(promote_dtype(arrays, dtype=dtype))
    else:
        arrays = promote_to_inexact(arrays, dtype)
    if at_least_float32:
        arrays = tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays)
    return arrays


def _check_query_and_key(query: Array, key: Array) -> None:
    """Checks for (batch..., T, N, H) and (batch..., S, K, H) where K divides N."""
    if query.ndim < 3:
        raise ValueError(f"query must have at least 3 dimensions, got shape {query.shape}")
    if key.ndim != query.ndim or key.shape[:-3] != query.shape[:-3] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the batch and the last size of query's shape {query.shape}, got {key.shape}"
        )
    num_heads, num_key_heads = query.shape[-2], key.shape[-2]
    if num_key_heads == 0 or num_heads % num_key_heads:
        raise ValueError(f"query must have a multiple of key's {num_key_heads} heads, got {num_heads}")


def _keep_prob(dropout_rate: float, deterministic: bool) -> float:
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be at least 0 and less than 1, got {dropout_rate}")
    return 1.0 if deterministic else 1 - dropout_rate


def _dropout_mask(
    dropout_rng: Array | None, keep_prob: float, shape: tuple[int, ...], broadcast: bool
) -> Array | None:
    """Which weights of a shape (batch..., N, T, S) are kept, as flax draws them; None if all are."""
    if keep_prob == 1:
        return None
    if dropout_rng is None:
        raise ValueError("dropout_rng must be given where dropout_rate is not 0")
    drawn_shape = (1,) * (len(shape) - 2) + shape[-2:] if broadcast else shape
    return jax.random.bernoulli(dropout_rng, keep_prob, drawn_shape)


def _drop(weights: Array, dropout_mask: Array | None, keep_prob: float, dtype: jnp.dtype) -> Array:
    """The weights after dropout, multiplied in flax's way by an array of the dtype."""
    if dropout_mask is None:
        return weights
    return weights * (dropout_mask / jnp.asarray(keep_prob, dtype))


def _product(
    precision: jax.lax.PrecisionLike, dot_general: Callable[..., Array] | None
) -> Callable[..., Array]:
    """``jnp.einsum`` with these options."""
    einsum = functools.partial(jnp.einsum, precision=precision)
    return functools.partial(einsum, _dot_general=dot_general) if dot_general else einsum


def _check_einsums(
    qk_einsum: Einsum | None,
    wv_einsum: Einsum | None,
    precision: jax.lax.PrecisionLike,
    einsum_dot_general: Callable[..., Array] | None,
) -> bool:
    """Whether both einsums are given; ValueError for combinations that flax refuses as well."""
    if bool(qk_einsum) != bool(wv_einsum):
        raise ValueError("qk_attn_weights_einsum and attn_weights_value_einsum must be given together")
    if qk_einsum and (precision or einsum_dot_general):
        raise ValueError(
            "precision and einsum_dot_general cannot be combined with qk_attn_weights_einsum and "
            "attn_weights_value_einsum"
        )
    return bool(qk_einsum)


def _flatten_batch(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """An operand with one batch dimension.

    Args:
      name: of the operand, for errors.
      x: an array that broadcasts to the shape.
      shape: (batch..., N, T, S).

    Returns:
      (product of the batch or 1, ...), where the last three dimensions are as in x, or 1 where x lacks them.
    """
    x = as_array(x, name)
    check_broadcasts(name, x, shape, "(batch..., N, T, S) =")
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    batch = shape[:-3] if math.prod(x.shape[:-3]) != 1 else x.shape[:-3]
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(math.prod(batch), *x.shape[-3:])


def _repeat_heads(x: Array, heads: int) -> Array:
    """Repeats key/value heads of (batch..., S, K, H) so that there are as many as the queries have."""
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], -2)


def _attention_weights(
    query: Array,
    key: Array,
    bias: Array | None,
    mask: Array | None,
    is_causal: bool,
    einsum: Einsum,
    soft_cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """All weights of attention, (batch..., N, T, S), with the masks added as flax adds them."""
    scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    logits = einsum("...qhd,...khd->...hqk", scaled, _repeat_heads(key, query.shape[-2]))
    if soft_cap is not None:
        logits = apply_soft_cap(logits, soft_cap)
    if bias is not None:
        logits = logits + bias
    if is_causal:
        causal = jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool)
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = softmax(logits)
    if sinks is not None:
        wide = logits.astype(compute_dtype(logits.dtype))
        lse = logsumexp(wide, -1, keepdims=True)
        weights, _ = apply_sinks(weights, lse, sinks[0, 0, :, :, None].astype(lse.dtype))
    return weights.astype(query.dtype)


def _sow(module: "linen.Module | nnx.Module", weights: Array) -> None:
    """Stores the weights in the layer, where flax's own attention stores them."""
    from flax import linen, nnx

    if isinstance(module, linen.Module):
        module.sow("intermediates", "attention_weights", weights)
    else:
        module.sow(nnx.Intermediate, "attention_weights", weights)
