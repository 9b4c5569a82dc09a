"""Losses and gradients, block by block of tokens.

A block computes its logits once, (tokens of the block, V), and from them the loss and, chunk by chunk of
classes, their gradient and the two products with it. The gradient of the weights is added up over the blocks
in float32. So three products of matrices are computed for the loss with all of its gradients, as many as
where the logits are stored.

Source: the blocks of tokens are those of Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_softmax2p.linear import formula
from jax_softmax2p.linear.formula import LossSpec, product, zeros_like_varying
from jax_softmax2p.reference import Lse, compute_dtype

Array = jax.Array

MAX_BLOCK_LOGITS = 1 << 23
"""How many logits a block has at most: 32 MiB of float32. Measured."""

BLOCK_TOKENS = range(64, 257)
"""How many tokens a block has: products of fewer rows are slow, and more are no faster. Measured."""

MAX_CHUNK_WEIGHTS = 1 << 18
"""How many weights belong to a chunk of classes: 1 MiB of float32, which caches hold. Measured."""

MAX_CHUNK_CLASSES = 1 << 13


class Operands(NamedTuple):
    """What a loss is computed from.

    Attributes:
      x: (N, D).
      weights: (D, V), or (V, D), as the spec says.
      bias: (V,), or of size 0.
      labels: int32 (N,), as :func:`formula.loss` takes them, or of size 0.
      factor: (N,), the cotangent of each token's loss.
    """

    x: Array
    weights: Array
    bias: Array
    labels: Array
    factor: Array


class Wanted(NamedTuple):
    """Which gradients are computed."""

    x: bool = False
    weights: bool = False
    bias: bool = False


class Sums(NamedTuple):
    """The gradients, each None unless it is wanted, in the dtype that they are computed in.

    Attributes:
      x: (N, D).
      weights: (D, V), whatever the layout of the weights.
      bias: (V,).
    """

    x: Array | None
    weights: Array | None
    bias: Array | None


def token_blocks(spec: LossSpec, num_tokens: int, num_classes: int) -> tuple[int, int]:
    """How many tokens a block has, and how many blocks there are."""
    size = spec.token_block_size
    if size is None:
        size = min(max(BLOCK_TOKENS.start, MAX_BLOCK_LOGITS // num_classes), BLOCK_TOKENS.stop - 1)
    count = max(1, math.ceil(num_tokens / size))
    return max(1, math.ceil(num_tokens / count)), count


def class_chunks(num_features: int, num_classes: int) -> tuple[int, int, int]:
    """How many classes a chunk has, how many chunks there are, and how many classes are left."""
    size = min(MAX_CHUNK_CLASSES, MAX_CHUNK_WEIGHTS // max(num_features, 32))
    size = max(size, 256)
    if num_classes <= size:
        return num_classes, 1, 0
    return size, *divmod(num_classes, size)


def losses(spec: LossSpec, operands: Operands, wanted: Wanted) -> tuple[Array, Lse, Sums]:
    """The loss and lse of every token, and the gradients that are wanted."""
    loss, lse, sums = _over_blocks(spec, operands, None, wanted, None, None)
    assert loss is not None, "it is computed with the lse"
    return loss, lse, sums


def gradients(spec: LossSpec, operands: Operands, lse: Lse, wanted: Wanted) -> Sums:
    """The gradients that are wanted, with the logits computed again."""
    return _over_blocks(spec, operands, lse, wanted, None, None)[2]


def corrected_gradients(
    spec: LossSpec, operands: Operands, lse: Lse, wanted: Wanted, with_ones: Sums, ones: Array
) -> Sums:
    """Gradients of weights and bias from those that were computed for a factor of 1, or of 0 for some tokens.

    They are multiplied by the factor if that is the same number for all tokens that count, and else computed
    again.

    Args:
      spec: which loss.
      operands: with the factor. It must be 0 where ``ones`` is.
      lse: of the tokens.
      wanted: without x.
      with_ones: the gradients for the factor ``ones``.
      ones: (N,), 1 for the tokens that count.
    """
    factor = operands.factor
    common = factor[jnp.argmax(ones)] if factor.size else jnp.zeros((), factor.dtype)
    is_common = jnp.all(factor == common * ones)
    _, num_blocks = token_blocks(spec, factor.shape[0], spec.num_classes(operands.weights))
    # A loop of no blocks works on the memory of the gradients in place, which a conditional would copy.
    start = jax.tree.map(lambda x: x * jnp.where(is_common, common, 0).astype(x.dtype), with_ones)
    start = jax.tree.map(lambda x: jnp.where(is_common, x, 0), start)
    return _over_blocks(spec, operands, lse, wanted, start, jnp.where(is_common, 0, num_blocks))[2]


def _over_blocks(
    spec: LossSpec,
    operands: Operands,
    lse: Lse | None,
    wanted: Wanted,
    start: Sums | None,
    blocks_to_do: Array | None,
) -> tuple[Array | None, Lse, Sums]:
    """Losses and lse, if that is None, and gradients.

    Args:
      spec: which loss.
      operands: of all tokens.
      lse: of all tokens, or None.
      wanted: which gradients.
      start: what the gradients of weights and bias are added to; None: zeros.
      blocks_to_do: how many blocks are computed, the first; None: all.
    """
    x, weights, bias, labels, factor = operands
    n, d = x.shape
    num_classes = spec.num_classes(weights)
    size, count = token_blocks(spec, n, num_classes)
    dtype = compute_dtype(jnp.result_type(x, weights))
    zeros = lambda *shape: zeros_like_varying(shape, dtype, *operands)
    # Losses are the same on all devices among which the classes are sharded.
    of_rows = lambda: zeros_like_varying((count, size), dtype, *operands, invariant=spec.axis_names)
    blocks = lambda a: _split_tokens(a, size, count)
    per_token = blocks(x), blocks(labels), blocks(factor.astype(dtype))
    lse_blocks = None if lse is None else Lse(*map(blocks, lse))
    if start is None:
        start = Sums(
            None,
            zeros(d, num_classes) if wanted.weights else None,
            zeros(num_classes) if wanted.bias else None,
        )
    results = (
        None if lse is not None else tuple(of_rows() for _ in range(3)),
        zeros(count, size, d) if wanted.x else None,
    )

    def add_block(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        (rows, x_bar), sums = carry
        at = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
        put = lambda a, value: jax.lax.dynamic_update_index_in_dim(a, value.astype(a.dtype), i, 0)
        x, labels, factor = (at(a) if a.size else a for a in per_token)
        block = Operands(x, weights, bias, labels.reshape(-1), factor)
        z = formula.logits(spec, x, weights, bias)
        if lse_blocks is None:
            loss, block_lse = formula.loss(spec, z, block.labels)
            rows = tuple(map(put, rows, (loss, *block_lse)))
        else:
            block_lse = Lse(*map(at, lse_blocks))
        if any(wanted):
            block_x_bar, sums = _add_gradients(spec, block, z, block_lse, wanted, sums)
            x_bar = None if x_bar is None else put(x_bar, block_x_bar)
        return (rows, x_bar), sums

    carry = jax.lax.fori_loop(0, count if blocks_to_do is None else blocks_to_do, add_block, (results, start))
    (rows, x_bar), sums = carry
    merge = lambda a: a.reshape(size * count, *a.shape[2:])[:n]
    sums = sums._replace(x=None if x_bar is None else merge(x_bar))
    if rows is None:
        assert lse is not None, "it is computed with the loss"
        return None, lse, sums
    loss, hi, lo = map(merge, rows)
    return loss, Lse(hi, lo), sums


def _split_tokens(a: Array, size: int, count: int) -> Array:
    """(blocks, tokens of a block, ...), with zeros at the end; an empty array stays as it is."""
    if not a.size or (count == 1 and a.shape[0] == size):
        return a[None] if a.size else a
    padding = [(0, size * count - a.shape[0]), *((0, 0) for _ in a.shape[1:])]
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])


def _add_gradients(
    spec: LossSpec, block: Operands, z: Array, lse: Lse, wanted: Wanted, sums: Sums
) -> tuple[Array | None, Sums]:
    """The gradient of a block's x, and those of weights and bias added to their sums.

    Args:
      spec: which loss.
      block: its operands.
      z: its logits.
      lse: of its tokens.
      wanted: which gradients.
      sums: of the blocks before, x None.
    """
    x, weights, *_ = block
    num_tokens, num_classes = z.shape
    d = x.shape[1]
    num_classes_everywhere = spec.num_classes_everywhere(weights)
    letters = spec.weight_letters
    narrow = jnp.result_type(x, weights)
    x_transposed = x.T

    def add_chunk(start: Array | int, size: int, carry: Any) -> Any:
        x_bar, sums = carry
        labels = block.labels - start
        labels = jnp.where((labels >= 0) & (labels < size), labels, size)
        z_chunk = jax.lax.dynamic_slice_in_dim(z, start, size, 1)
        g = formula.logits_gradient(spec, z_chunk, lse, labels, block.factor, num_classes_everywhere)
        narrow_g = g.astype(narrow)  # Products of 16-bit operands are those that CPUs have.
        if x_bar is not None:
            chunk = jax.lax.dynamic_slice_in_dim(weights, start, size, spec.class_axis)
            x_bar = x_bar + product(f"nv,{letters}->nd", narrow_g, chunk)
        if sums.weights is not None:
            added = product("dn,nv->dv", x_transposed, narrow_g)
            sums = sums._replace(weights=_add_at(sums.weights, added, start))
        if sums.bias is not None:
            sums = sums._replace(bias=_add_at(sums.bias, jnp.sum(g, 0), start))
        return x_bar, sums

    size, count, rest = class_chunks(d, num_classes)
    x_bar = zeros_like_varying((num_tokens, d), z.dtype, z, *block) if wanted.x else None
    if count == 1 and not rest:
        return add_chunk(0, num_classes, (x_bar, sums))
    carry = jax.lax.fori_loop(0, count, lambda i, carry: add_chunk(i * size, size, carry), (x_bar, sums))
    return add_chunk(size * count, rest, carry) if rest else carry


def _add_at(total: Array, added: Array, start: Array | int) -> Array:
    """The total with something added to the columns from ``start`` on."""
    axis = total.ndim - 1
    columns = jax.lax.dynamic_slice_in_dim(total, start, added.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, columns + added, start, axis)
