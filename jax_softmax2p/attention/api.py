"""The public function of attention, and the checks of its arguments."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p.arguments import (
    as_array,
    as_boolean_array,
    as_floating_array,
    as_numeric_array,
    as_real_array,
)
from jax_softmax2p.attention.multi_head import multi_head_attention
from jax_softmax2p.attention.operands import Options
from jax_softmax2p.eager import jit_when_eager
from jax_softmax2p.primitives.dispatch import Implementation, as_implementation
from jax_softmax2p.primitives.operands import Band
from jax_softmax2p.scalars import as_index, as_positive_integer, as_soft_cap

Array = jax.Array
ArrayLike = jax.typing.ArrayLike


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    implementation: Implementation | Literal["xla"] | None = None,
    return_residual: Literal[False] = False,
    query_block_size: int | None = None,
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    implementation: Implementation | Literal["xla"] | None = None,
    return_residual: Literal[True],
    query_block_size: int | None = None,
) -> tuple[Array, Array]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    implementation: Implementation | Literal["xla"] | None = None,
    return_residual: bool = False,
    query_block_size: int | None = None,
) -> Array | tuple[Array, Array]: ...


@jit_when_eager(
    "query", "key", "value", "bias", "mask", "scale", "query_seq_lengths", "key_value_seq_lengths", "sinks"
)
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    implementation: Implementation | Literal["xla"] | None = None,
    return_residual: bool = False,
    query_block_size: int | None = None,
) -> Array | tuple[Array, Array]:
    r"""Scaled dot-product attention, in memory that does not grow with queries times keys.

    .. math:: \mathrm{Attention}(Q, K, V) = \mathrm{softmax}(scale · QK^T + B) V

    A drop-in for :func:`jax.nn.dot_product_attention`, with its results on every edge case: a query that may
    attend to no key attends to all keys alike, and a query beyond its sequence's length gives 0. There is one
    exception: a query whose masks leave only keys with a bias below -2.38e38 attends to all keys alike here,
    and to the masked keys there.

    One kernel computes the result in tiles, and one the gradient; neither stores an array of T·S. Where they
    do not run (:func:`explain` says why), matrix products surround a softmax, block by block where there are
    many logits, which the gradient computes again. Nothing is computed for keys that ``is_causal`` or
    ``local_window_size`` mask for a whole block. The result is differentiable to any order in both modes.

    The sizes are B batch, T queries, S keys, H, and N heads. K key/value heads divide N: multi-head, grouped
    and multi-query attention.

    Args:
      query: floating-point array of shape (B, T, N, H) or (T, N, H).
      key: array of query's dtype and of shape (B, S, K, H) or (S, K, H).
      value: array of key's shape and dtype.
      bias: array of up to four dimensions that broadcasts to (B, N, T, S). It is added to the scaled logits.
      mask: boolean array that broadcasts like bias. A query attends to a key where it is True.
      scale: number by which the logits are multiplied; None: 1/sqrt(H).
      is_causal: whether query i attends only to the keys up to the i-th.
      query_seq_lengths: int32 array of shape (B,): how many queries each example has. The others give 0.
      key_value_seq_lengths: int32 array of shape (B,): how many keys each example has.
      local_window_size: (left, right): query i attends only to the keys from i - left to i + right. One
        integer stands for both.
      logits_soft_cap: a positive number c: scaled logits z become c·tanh(z / c), as in Gemma 2, before the
        bias is added and before masks, as in flash-attention and in ONNX.
      sinks: floating-point array of shape (N,): of each head of query, a logit that takes part in the sum of
        exponentials alone, as in gpt-oss. Weights are exp(logit) / (sum of exp(logits) + exp(sink)) then, and
        a query that may attend to no key gives 0. It is neither scaled nor masked, and -inf is no sink.
      implementation: as in :func:`softmax`. "xla", which is one of jax.nn's, means None.
      return_residual: whether to return the logsumexp of each query's logits, its sink among them, too. It
        has no gradient.
      query_block_size: how many queries of a head a block has, which is composed then, without the kernel. By
        default, blocks of what is composed have up to 2^20 logits, on GPUs and TPUs 2^28, and at least 128
        queries.

    Returns:
      Array of query's shape and dtype. With return_residual, a pair of it and of an array of shape (B, T, N)
      or (T, N). Both are computed in float32, or in float64 for float64, and rounded once.

    Raises:
      TypeError: query, key, value or sinks are not floating-point, or bias or scale not real.
      ValueError: an argument's shape or dtype is not as described; query_block_size is not a positive
        integer, or logits_soft_cap not a positive finite number; implementation is unknown, "cudnn", or
        "native" where no native kernel can run.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> q = k = jnp.zeros((3, 1, 8))
      >>> v = jnp.arange(3.0)[:, None, None] * jnp.ones(8)
      >>> jax_softmax2p.dot_product_attention(q, k, v, is_causal=True)[:, 0, 0].tolist()
      [0.0, 0.5, 1.0]
      >>> sinks = jnp.zeros(1)  # As likely as one of the keys.
      >>> jax_softmax2p.dot_product_attention(q, k, v, sinks=sinks)[:, 0, 0].tolist()
      [0.75, 0.75, 0.75]

    Sources: A. Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; for the blocks, M. N. Rabe and
    C. Staats, "Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682; for the soft cap, Gemma Team,
    "Gemma 2", arXiv 2408.00118; for the sinks, OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv
    2508.10925; jax.nn's documentation.
    """
    batched = np.ndim(query) != 3
    query, key, value = _as_heads("query", query), _as_heads("key", key), _as_heads("value", value)
    _check_heads(query, key, value)
    b, t, n, _ = query.shape
    logits_shape = b, n, t, key.shape[1]
    result, lse = multi_head_attention(
        query,
        key,
        value,
        bias=None if bias is None else _as_bias(bias, logits_shape),
        mask=None if mask is None else _as_mask(mask, logits_shape),
        query_lengths=_as_lengths("query_seq_lengths", query_seq_lengths, b),
        key_lengths=_as_lengths("key_value_seq_lengths", key_value_seq_lengths, b),
        sinks=None if sinks is None else as_sinks(sinks, n),
        scale=None if scale is None else _as_scale(scale),
        band=_as_band(is_causal, local_window_size),
        options=Options(
            implementation=_as_implementation(implementation),
            return_lse=bool(return_residual),
            logits_soft_cap=as_soft_cap(logits_soft_cap, "logits_soft_cap"),
            query_block_size=_as_block_size(query_block_size),
        ),
    )
    if not batched:
        result = result[0]
    return result if lse is None else (result, lse.reshape(result.shape[:-1]))


def _as_heads(name: str, x: ArrayLike) -> Array:
    """A floating-point array of four dimensions, of which the batch may be missing in x."""
    array = as_numeric_array(x, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point numbers, got dtype {array.dtype}")
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions, got shape {array.shape}")
    return array if array.ndim == 4 else array[None]


def _check_heads(query: Array, key: Array, value: Array) -> None:
    """Checks that shapes (B, T, N, H), (B, S, K, H) and (B, S, K, H) and one dtype are given."""
    b, _, n, h = query.shape
    k = key.shape[2]
    if key.shape[0] != b or key.shape[3] != h:
        raise ValueError(f"key must have query's batch {b} and head size {h}, got shape {key.shape}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {key.shape}, got {value.shape}")
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {array.dtype}")
    if k == 0 or n % k:
        raise ValueError(f"query must have a multiple of key's {k} heads, got {n}")


def _as_bias(bias: ArrayLike, logits_shape: tuple[int, ...]) -> Array:
    """A real array of four dimensions that broadcasts to (B, N, T, S)."""
    return _with_four_dimensions("bias", as_real_array(bias, "bias"), logits_shape)


def _as_mask(mask: ArrayLike, logits_shape: tuple[int, ...]) -> Array:
    """A boolean array of four dimensions that broadcasts to (B, N, T, S)."""
    return _with_four_dimensions("mask", as_boolean_array(mask, "mask"), logits_shape)


def _with_four_dimensions(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """The array with dimensions of size 1 in front, checked to broadcast to the shape of four dimensions."""
    if array.ndim > 4 or any(
        size not in (1, full) for size, full in zip(array.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"{name} must broadcast to (B, N, T, S) = {shape}, got shape {array.shape}")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _as_lengths(name: str, lengths: ArrayLike | None, batch: int) -> Array | None:
    """An int32 array of shape (batch,), or None."""
    if lengths is None:
        return None
    array = as_array(lengths, name)
    if array.dtype != jnp.int32 or array.shape != (batch,):
        raise ValueError(
            f"{name} must be int32 of shape ({batch},), got {array.dtype} of shape {array.shape}"
        )
    return array


def _as_scale(scale: ArrayLike) -> Array:
    """A real array of one element."""
    array = as_real_array(scale, "scale")
    if array.size != 1:
        raise ValueError(f"scale must be one number, got shape {array.shape}")
    return array


def as_sinks(sinks: ArrayLike, heads: int) -> Array:
    """Floating-point numbers, one for each head of queries, as an array of shape (1, 1, N, 1)."""
    array = as_floating_array(sinks, "sinks")
    if array.shape != (heads,):
        raise ValueError(
            f"sinks must have shape ({heads},), one for each head of query, got shape {array.shape}"
        )
    return array[None, None, :, None]


def _as_band(is_causal: bool, window: int | tuple[int, int] | None) -> Band | None:
    """The keys that a query attends to by is_causal and local_window_size; None: all."""
    if window is None:
        return Band() if is_causal else None
    given = window if isinstance(window, tuple | list) else (window, window)
    limits = [limit for limit in map(as_index, given) if limit is not None]
    if len(given) != 2 or len(limits) != 2:
        raise ValueError(f"local_window_size must be an integer or two, got {window!r}")
    before, after = limits
    if before < 0 or after < 0:
        raise ValueError(f"local_window_size must not be negative, got {window!r}")
    return Band(before, 0 if is_causal else after)


def _as_block_size(size: int | None) -> int | None:
    """A positive integer or None."""
    return None if size is None else as_positive_integer(size, "query_block_size")


def _as_implementation(implementation: str | None) -> Implementation | None:
    """The implementation of the softmax."""
    if implementation == "cudnn":
        raise ValueError("implementation='cudnn' is jax.nn's alone; None runs on any device")
    return as_implementation(None if implementation == "xla" else implementation)
