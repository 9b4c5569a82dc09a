"""How attention is cut into blocks, so that its memory does not grow with queries times keys.

Few logits are one block. Many are cut three times, from the outside in:

1. Batch and key/value heads: as many at a time as one block has room for.
2. With a band, the queries into a few ranges, each of which reads the keys that are visible to it alone. The
   ranges are unrolled, since their keys are ranges of different sizes.
3. The queries of a range, by a loop over blocks of equal size and one that is smaller.

The gradient of a range and of a block computes their logits again (``jax.checkpoint``), so that it stores
query, key and value alone.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_softmax2p.attention.core import attention_core
from jax_softmax2p.attention.operands import Operands, Options, Result, are_known
from jax_softmax2p.primitives.operands import Band, band_columns, band_mask, shift_band

Array = jax.Array

MAX_BLOCK_LOGITS = 1 << 20
"""How many logits a block has at most: 4 MiB of float32, which caches hold. Measured."""

MAX_BLOCK_LOGITS_OF_ACCELERATORS = 1 << 28
"""The same on a GPU or TPU: 1 GiB. A loop over blocks is a row of small kernels there: in blocks of a CPU's
size the gradient of causal (4, 1024, 12, 64) took 15.8 ms, where jax.nn's takes 0.9 (H200)."""

MIN_BLOCK_QUERIES = 128
"""How many queries a block has at least, since matrix products of fewer rows are slow. Measured."""

MAX_BAND_RANGES = 16
"""How many ranges the queries are cut into at most where there is a band."""


def max_block_logits() -> int:
    """How many logits a block has at most on the platform that JAX runs on.

    For which one a program will be lowered is not known when it is traced.
    """
    return MAX_BLOCK_LOGITS if jax.default_backend() == "cpu" else MAX_BLOCK_LOGITS_OF_ACCELERATORS


def blockwise_attention(operands: Operands, band: Band | None, options: Options) -> Result:
    """Attention in one block if there are few logits, else in as many as are needed.

    Args:
      operands: the arrays, (B, K, G, T, ...).
      band: which keys the i-th query attends to; None: all.
      options: the options; query_block_size overrides the limits of this module.

    Returns:
      The output and lse, or None, of (B, K, G, T, ...). Those of fully masked queries mean nothing, except
      for the output with dropout.
    """
    b, k, g, t, s = operands.sizes
    # How many blocks there are cannot be known of symbolic sizes.
    if not are_known(*operands.sizes) or 0 in operands.sizes:
        return attention_core(operands, options, band)
    if options.query_block_size is None and b * k * g * t * s <= max_block_logits():
        return attention_core(operands, options, band)
    devices = _num_auto_devices()
    num_shards = math.gcd(b, devices), math.gcd(k, devices)
    if options.query_block_size is None:
        logits = max(1, max_block_logits() * devices // math.prod(num_shards))
        block_queries, block_heads = max(MIN_BLOCK_QUERIES, logits // (g * s)), max(1, logits // (g * t * s))
    else:
        block_queries, block_heads = options.query_block_size, 1
    attend = functools.partial(_attend_ranges, band=band, block_size=block_queries, options=options)
    operands = jax.tree.map(functools.partial(_loop_axes_first, num_shards=num_shards), operands)
    result = _map_batch_and_heads(attend, operands, block_heads)
    return jax.tree.map(lambda x: jnp.moveaxis(x, (0, 1), (1, 3)).reshape(b, k, *x.shape[4:]), result)


def _num_auto_devices() -> int:
    """Among how many devices XLA may shard what is traced here."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)


def _loop_axes_first(x: Array, num_shards: tuple[int, int]) -> Array:
    """Splits batch and heads into an axis to loop over and one that may be sharded.

    XLA shards an axis into contiguous ranges. A loop over the minor factor of the axis therefore leaves every
    shard on its device.

    Args:
      x: (B, K, ...), or with size 1 where it broadcasts.
      num_shards: how many shards B and K may have. They divide B and K.

    Returns:
      (B / shards of B, K / shards of K, shards of B, shards of K, ...).
    """
    b, k = (min(size, count) for size, count in zip(x.shape[:2], num_shards, strict=True))
    split = x.reshape(b, x.shape[0] // b, k, x.shape[1] // k, *x.shape[2:])
    return jnp.moveaxis(split, (1, 3), (0, 1))


def _map_batch_and_heads(
    function: Callable[[Operands], Result], operands: Operands, block_heads: int
) -> Result:
    """Maps the function over the first two axes, block_heads of their elements at a time."""
    b, k = operands.query.shape[:2]
    if all(x is None or x.shape[0] * x.shape[1] in (1, b * k) for x in operands):
        # One loop copies less than two.
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), operands)
        result = _map_first_axis(function, merged, block_heads)
        return jax.tree.map(lambda x: x.reshape(b, k, *x.shape[1:]), result)
    over_heads = functools.partial(_map_first_axis, function, batch_size=block_heads)
    return _map_first_axis(over_heads, operands, max(1, block_heads // k))


def _map_first_axis(function: Callable[[Operands], Result], operands: Operands, batch_size: int) -> Result:
    """Maps the function over the first axis, batch_size elements at a time.

    Operands of size 1 there broadcast, and are not repeated.
    """
    size = operands.query.shape[0]
    mapped, shared = operands.partition(lambda x: x.shape[0] == size)
    shared = jax.tree.map(lambda x: x[0], shared)
    call = lambda mapped: function(mapped.combine(shared))
    if size == 1:
        return jax.tree.map(lambda x: x[None], call(jax.tree.map(lambda x: x[0], mapped)))
    if batch_size >= size:
        return jax.vmap(call)(mapped)
    return jax.lax.map(call, mapped, batch_size=batch_size if batch_size > 1 else None)


def _attend_ranges(operands: Operands, band: Band | None, block_size: int, options: Options) -> Result:
    """Attention of a few heads: each range of queries to the keys that the band makes visible to it.

    Args:
      operands: the arrays, (..., G, T, ...).
      band: which keys the i-th query attends to; None: all.
      block_size: how many queries a block has at most.
      options: as in ``attention_core``.
    """
    t, s = operands.sizes[-2:]
    # With dropout, fully masked queries attend to every key that it keeps, also to those outside their band.
    band_of_reads = None if operands.dropout_mask is not None else band
    size = t if band_of_reads is None else max(min(block_size, MIN_BLOCK_QUERIES), -(-t // MAX_BAND_RANGES))
    results = []
    for start in range(0, t, size):
        queries = range(start, min(t, start + size))
        keys = range(s) if band_of_reads is None else band_columns(band_of_reads, queries, s)
        # The operands are sliced inside the checkpoint: the slices of all ranges, which the gradient would
        # store otherwise, are larger than the operands.
        attend = functools.partial(
            _attend_range,
            queries=queries,
            keys=keys,
            band=band if keys else None,
            block_size=block_size,
            options=options,
        )
        results.append(jax.checkpoint(attend)(operands))
    return _concatenate_queries(*results)


def _attend_range(
    operands: Operands, queries: range, keys: range, band: Band | None, block_size: int, options: Options
) -> Result:
    """Attention of a range of queries to a range of keys, in blocks of queries.

    Args:
      operands: the arrays of all queries and keys, (..., G, T, ...).
      queries: the range of the queries.
      keys: the range of the keys, which holds all that the band makes visible to the queries.
      band: which keys a query attends to, both counted from those of all; None: all.
      block_size: how many queries a block has at most.
      options: as in ``attention_core``.
    """
    operands = operands.slice_keys(keys)

    def single_block(operands: Operands, queries: range) -> Result:
        # A band has no Band where it begins right of the first key in the first row. It becomes a mask there.
        shifted = None if band is None else shift_band(band, queries.start, keys.start)
        mask = None if shifted else range_mask(queries.start + jnp.arange(len(queries)))
        return attention_core(operands.slice_queries(queries), options, shifted, mask)

    def range_mask(query_indices: Array) -> Array | None:
        key_indices = keys.start + jnp.arange(len(keys))[None]
        return None if band is None else band_mask(band, query_indices[:, None], key_indices)

    if len(queries) <= block_size:
        return single_block(operands, queries)
    num_blocks, remainder = divmod(len(queries), block_size)
    last = range(queries.stop - remainder, queries.stop)
    per_query, shared = operands.slice_queries(range(queries.start, last.start)).split_queries(block_size)

    @jax.checkpoint
    def block(first_query: Array, per_query: Operands) -> Result:
        # The loop computes where a block starts, so that its band cannot be a Band, which is static.
        mask = range_mask(first_query + jnp.arange(block_size))
        return attention_core(per_query.combine(shared), options, band_mask=mask)

    first_queries = queries.start + block_size * jnp.arange(num_blocks)
    blocks = jax.lax.map(lambda xs: block(*xs), (first_queries, per_query))
    merge = lambda x: jnp.moveaxis(x, 0, -3).reshape(*x.shape[1:-2], num_blocks * block_size, x.shape[-1])
    result = jax.tree.map(merge, blocks)
    if not remainder:
        return result
    last_block = functools.partial(single_block, queries=last)
    return _concatenate_queries(result, jax.checkpoint(last_block)(operands))


def _concatenate_queries(*results: Result) -> Result:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, -2), *results)
