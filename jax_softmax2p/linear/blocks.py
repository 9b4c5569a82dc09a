"""Losses and gradients, block by block of tokens.

A block computes its logits once, (tokens of the block, V), and from them the loss and, chunk by chunk of
classes, their gradient and the two products with it. The gradient of the weights is added up over the blocks
in float32. So three products of matrices are computed for the loss with all of its gradients, as many as
where the logits are stored.

Source: the blocks of tokens are those of Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_softmax2p.linear import formula
from jax_softmax2p.linear.formula import LossSpec, product, zeros_like_varying
from jax_softmax2p.reference import Lse, compute_dtype

Array = jax.Array

MAX_BLOCK_LOGITS = 1 << 24
"""How many logits a block has at most: 64 MiB of float32. Measured."""

MIN_BLOCKS = 4
"""How many blocks many tokens make at least, for the sake of memory."""

BLOCK_TOKENS = range(64, 513)
"""How many tokens a block has: products of fewer rows are slow, and more are no faster. Measured."""

MIN_BLOCK_TOKENS = 128
"""From how few tokens on blocks are made smaller only where classes are very many.

Every block reads all weights and adds to all of their gradient: with 128 tokens the loss and its gradients
take 0.72 to 0.90 of the time that they take with 64, for (N, D, V) = (512, 768, 50257), (256, 512, 32000) and
(512, 256, 50257) in float32 and bfloat16 (Cascade Lake).
"""

MAX_FEATURES_BY_TOKEN = 3
"""In 16 bits, how many features there are at most for a token of a block, if that has less than 512.

The gradient of the weights, which is added up in float32, is so much larger than a block that this costs
less than 3% of memory. (512, 768, 50257) takes 0.91 of the time with 256 tokens that it takes with 128.
"""

MAX_CHUNK_WEIGHTS = 1 << 20
"""How many weights belong to a chunk of classes: 4 MiB of float32, which caches hold. Measured."""

MIN_CHUNK_CLASSES = 1 << 8
MAX_CHUNK_CLASSES = 1 << 14

MAX_CHUNK_LOGITS = 1 << 22
"""How many logits the gradients that are computed again have at a time: 16 MiB of float32."""


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


def token_blocks(
    spec: LossSpec, num_tokens: int, num_features: int, num_classes: int, itemsize: int
) -> tuple[int, int]:
    """How many tokens a block has, and how many blocks there are, for inputs of some bytes each."""
    size = spec.token_block_size
    if size is None:
        of_memory = -(-num_tokens * min(itemsize, 4) // (4 * MIN_BLOCKS))
        of_weights = num_features // MAX_FEATURES_BY_TOKEN if itemsize < 4 else 0
        wanted = max(of_memory, of_weights, MIN_BLOCK_TOKENS)
        size = max(BLOCK_TOKENS.start, min(BLOCK_TOKENS.stop - 1, MAX_BLOCK_LOGITS // num_classes, wanted))
    count = max(1, math.ceil(num_tokens / size))
    return max(1, math.ceil(num_tokens / count)), count


def class_chunks(num_features: int, num_classes: int) -> tuple[int, int, int]:
    """How many classes a chunk has, how many chunks there are, and how many classes are left."""
    size = min(MAX_CHUNK_CLASSES, MAX_CHUNK_WEIGHTS // max(num_features, 32))
    size = max(size, MIN_CHUNK_CLASSES)
    if num_classes <= size:
        return num_classes, 1, 0
    return size, *divmod(num_classes, size)


def losses(spec: LossSpec, operands: Operands, wanted: Wanted) -> tuple[Array, Lse, Sums]:
    """The loss and lse of every token, and the gradients that are wanted, by blocks of tokens."""
    x, weights, bias, labels, factor = operands
    n, d = x.shape
    num_classes = spec.num_classes(weights)
    dtype = compute_dtype(jnp.result_type(x, weights))
    size, count = token_blocks(spec, n, d, num_classes, jnp.result_type(x, weights).itemsize)
    zeros = lambda *shape: zeros_like_varying(shape, dtype, *operands)
    # Losses are the same on all devices among which the classes are sharded.
    of_rows = lambda: zeros_like_varying((count, size), dtype, *operands, invariant=spec.axis_names)
    per_token = [_split_tokens(a, size, count) for a in (x, labels, factor.astype(dtype))]
    results = tuple(of_rows() for _ in range(3)), zeros(count, size, d) if wanted.x else None
    sums = Sums(
        None,
        zeros(d, num_classes) if wanted.weights else None,
        zeros(num_classes) if wanted.bias else None,
    )

    def add_block(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        (rows, x_bar), sums = carry
        put = lambda a, value: jax.lax.dynamic_update_index_in_dim(a, value.astype(a.dtype), i, 0)
        x, labels, factor = (
            jax.lax.dynamic_index_in_dim(a, i, keepdims=False) if a.size else a for a in per_token
        )
        block = Operands(x, weights, bias, labels, factor)
        z = formula.logits(spec, x, weights, bias)
        loss, lse = formula.loss(spec, z, labels)
        rows = tuple(map(put, rows, (loss, *lse)))
        if any(wanted):
            block_x_bar, sums = _add_block_gradients(spec, block, z, lse, wanted, sums)
            x_bar = None if x_bar is None else put(x_bar, block_x_bar)
        return (rows, x_bar), sums

    (rows, x_bar), sums = jax.lax.fori_loop(0, count, add_block, (results, sums))
    merge = lambda a: a.reshape(size * count, *a.shape[2:])[:n]
    loss, hi, lo = map(merge, rows)
    return loss, Lse(hi, lo), sums._replace(x=None if x_bar is None else merge(x_bar))


def gradients(spec: LossSpec, operands: Operands, lse: Lse, wanted: Wanted) -> list[Array | None]:
    """The gradients that are wanted, in the dtypes of what they belong to, by chunks of classes.

    The logits of a chunk are computed again for all tokens. That of the weights has their layout, and is
    written once.
    """
    x_bar, *rest = _over_chunks(spec, operands, lse, wanted, None, None)
    return [None if x_bar is None else x_bar.astype(operands.x.dtype), *rest]


def corrected_gradients(
    spec: LossSpec, operands: Operands, lse: Lse, wanted: Wanted, with_ones: Sums, ones: Array
) -> list[Array | None]:
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
    common = factor[jnp.argmax(ones)]
    is_common = jnp.all(factor == common * ones)
    start: list[Array | None] = [None, None, None]
    if with_ones.weights is not None:
        scaled = with_ones.weights * common.astype(with_ones.weights.dtype)
        scaled = scaled.astype(operands.weights.dtype)
        start[1] = scaled if spec.class_axis == 1 else scaled.T
    if with_ones.bias is not None:
        start[2] = (with_ones.bias * common.astype(with_ones.bias.dtype)).astype(operands.bias.dtype)
    # A loop of no chunks leaves the memory of the gradients as it is, where a conditional would copy it.
    return _over_chunks(spec, operands, lse, wanted, start, is_common)


def _over_chunks(
    spec: LossSpec,
    operands: Operands,
    lse: Lse,
    wanted: Wanted,
    start: Sequence[Array | None] | None,
    is_done: Array | None,
) -> list[Array | None]:
    """Gradients of x, weights and bias, each None unless it is wanted.

    Args:
      spec: which loss.
      operands: of all tokens.
      lse: of all tokens.
      wanted: which gradients; with ``is_done`` not that of x.
      start: arrays for the gradients of weights and bias.
      is_done: a scalar, whether these hold the gradients already; or None.
    """
    x, weights, bias, labels, factor = operands
    dtype = compute_dtype(jnp.result_type(x, weights))
    n = x.shape[0]
    num_classes = spec.num_classes(weights)
    x_transposed = _transposed(x)
    factor = factor.astype(dtype)
    narrow = jnp.result_type(x, weights)
    if start is None:
        zeros = lambda a: zeros_like_varying(a.shape, a.dtype, *operands)
        start = [None, zeros(weights) if wanted.weights else None, zeros(bias) if wanted.bias else None]
    x_bar = zeros_like_varying(x.shape, dtype, *operands) if wanted.x else None

    def put_chunk(first: Array | int, size: int, carry: Any) -> Any:
        x_bar, weights_bar, bias_bar = carry
        chunk = _weights_of(spec, weights, first, size)
        chunk_bias = jax.lax.dynamic_slice_in_dim(bias, first, size) if bias.size else bias
        z = formula.logits(spec, x, chunk, chunk_bias)
        total = spec.num_classes_everywhere(weights)
        g = formula.logits_gradient(spec, z, lse, _labels_of(labels, first, size), factor, total)
        narrow_g = g.astype(narrow)
        if x_bar is not None:
            x_bar = x_bar + product(f"nv,{spec.weight_letters}->nd", narrow_g, chunk)
        if weights_bar is not None:
            added = product("dn,nv->dv", x_transposed, narrow_g).astype(weights_bar.dtype)
            added = added if spec.class_axis == 1 else added.T
            weights_bar = jax.lax.dynamic_update_slice_in_dim(weights_bar, added, first, spec.class_axis)
        if bias_bar is not None:
            added = jnp.sum(g, 0).astype(bias_bar.dtype)
            bias_bar = jax.lax.dynamic_update_slice_in_dim(bias_bar, added, first, 0)
        return x_bar, weights_bar, bias_bar

    size = min(num_classes, max(MIN_CHUNK_CLASSES, MAX_CHUNK_LOGITS // n))
    count, rest = divmod(num_classes, size)
    carry = (x_bar, *start[1:])
    if is_done is not None:
        # The last chunk has classes of the one before it, too, whose gradients it writes again.
        put = lambda i, carry: put_chunk(jnp.minimum(i * size, num_classes - size), size, carry)
        return list(jax.lax.fori_loop(0, jnp.where(is_done, 0, count + bool(rest)), put, carry))
    carry = jax.lax.fori_loop(0, count, lambda i, carry: put_chunk(i * size, size, carry), carry)
    return list(put_chunk(size * count, rest, carry) if rest else carry)


def _transposed(x: Array) -> Array:
    """The transpose of x, as an array of its own.

    XLA would make a transposition a part of the products that take its result, after it has widened those of
    bfloat16 that it has no code for; it has none for those that it makes so.
    """
    return jax.lax.optimization_barrier(x.T)


def _split_tokens(a: Array, size: int, count: int) -> Array:
    """(blocks, tokens of a block, ...), with zeros at the end; an empty array stays as it is."""
    if not a.size or (count == 1 and a.shape[0] == size):
        return a[None] if a.size else a
    padding = [(0, size * count - a.shape[0]), *((0, 0) for _ in a.shape[1:])]
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])


def _add_block_gradients(
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
    num_classes = z.shape[1]
    narrow = jnp.result_type(x, weights)
    x_transposed = _transposed(x)

    def add_chunk(first: Array | int, size: int, carry: Any) -> Any:
        x_bar, sums = carry
        z_chunk = jax.lax.dynamic_slice_in_dim(z, first, size, 1)
        total = spec.num_classes_everywhere(weights)
        labels = _labels_of(block.labels, first, size)
        g = formula.logits_gradient(spec, z_chunk, lse, labels, block.factor, total)
        narrow_g = g.astype(narrow)  # Products of 16-bit operands are those that CPUs have.
        if x_bar is not None:
            chunk = _weights_of(spec, weights, first, size)
            x_bar = x_bar + product(f"nv,{spec.weight_letters}->nd", narrow_g, chunk)
        if sums.weights is not None:
            added = product("dn,nv->dv", x_transposed, narrow_g)
            sums = sums._replace(weights=_add_at(sums.weights, added, first))
        if sums.bias is not None:
            sums = sums._replace(bias=_add_at(sums.bias, jnp.sum(g, 0), first))
        return x_bar, sums

    size, count, rest = class_chunks(x.shape[1], num_classes)
    x_bar = zeros_like_varying(x.shape, z.dtype, z, *block) if wanted.x else None
    if count == 1 and not rest:
        return add_chunk(0, num_classes, (x_bar, sums))
    carry = jax.lax.fori_loop(0, count, lambda i, carry: add_chunk(i * size, size, carry), (x_bar, sums))
    return add_chunk(size * count, rest, carry) if rest else carry


def _labels_of(labels: Array, first: Array | int, size: int) -> Array:
    """Labels as those of a chunk of classes; ``size`` where they are of another one."""
    if not labels.size:
        return labels
    labels = labels - first
    return jnp.where((labels >= 0) & (labels < size), labels, size)


def _weights_of(spec: LossSpec, weights: Array, first: Array | int, size: int) -> Array:
    """The weights of a chunk of classes."""
    chunk = jax.lax.dynamic_slice_in_dim(weights, first, size, spec.class_axis)
    # XLA would else convert all weights to float32 before the loop, for products that it has in float32 only.
    return jax.lax.optimization_barrier(chunk)


def _add_at(total: Array, added: Array, start: Array | int) -> Array:
    """The total with something added to the columns from ``start`` on."""
    axis = total.ndim - 1
    columns = jax.lax.dynamic_slice_in_dim(total, start, added.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, columns + added, start, axis)
