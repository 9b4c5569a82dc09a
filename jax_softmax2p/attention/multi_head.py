"""Attention of (B, T, N, H) arrays: fused or composed, and their shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_softmax2p.attention.composed import composed_attention
from jax_softmax2p.attention.fused import fused_attention, unfused_reason
from jax_softmax2p.attention.operands import Options, Result
from jax_softmax2p.primitives.attention_note import note_composed_attention
from jax_softmax2p.primitives.dispatch import choose_path
from jax_softmax2p.primitives.operands import Band
from jax_softmax2p.primitives.partitioning import num_shards

Array = jax.Array


def multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    dropout_mask: Array | None = None,
    sinks: Array | None = None,
    scale: Array | None = None,
    band: Band | None = None,
    options: Options,
) -> Result:
    """Attention of arguments that have been checked.

    The sizes are B batch, T queries, S keys, N heads, K key/value heads, which divide N, and H.

    Args:
      query: (B, T, N, H), of a floating-point dtype.
      key: (B, S, K, H), of query's dtype.
      value: (B, S, K, H'), of query's dtype.
      bias: the summand of the scaled logits: four dimensions that broadcast to (B, N, T, S).
      mask: boolean, in bias's layout: True where a query attends to a key.
      query_lengths: (B,) of int32: how many queries an example has. The output of the others is 0.
      key_lengths: (B,) of int32: how many keys an example has.
      dropout_mask: boolean, in bias's layout: True for the weights that dropout keeps.
      sinks: (1, 1, N, 1), floating-point: the logits of keys whose values are 0.
      scale: the factor of the logits: one element. None: 1/sqrt(H).
      band: which keys the i-th query attends to; None: all.
      options: what is fixed when this is traced.

    Returns:
      The output, (B, T, N, H'), and lse, (B, T, N, 1), or None, both of query's dtype.
    """
    if scale is None:
        scale = jnp.asarray(1 / np.sqrt(max(1, query.shape[-1])))
    if sinks is not None and bias is not None and mask is None:
        # Where a mask is given, queries whose biases are all -inf are fully masked instead of NaN, and so
        # attend to the sink alone.
        mask = jnp.ones((1, 1, 1, 1), bool)
    optional = {
        "bias": bias,
        "mask": mask,
        "query_lengths": query_lengths,
        "key_lengths": key_lengths,
        "dropout_mask": dropout_mask,
        "sinks": sinks,
    }
    arrays = {"query": query, "key": key, "value": value, "scale": scale.reshape((1,) * 5)}
    arrays |= {name: x for name, x in optional.items() if x is not None}
    reason = unfused_reason(arrays, options)
    fused = reason is None
    if reason is not None and choose_path(options.implementation, None) == "primitive":
        arrays["query"] = note_composed_attention(query, reason)
    attend = functools.partial(_attend, fused=fused, band=band, options=options)
    specs = _explicit_specs(arrays)
    if specs is None:
        return attend(arrays)
    arrays = jax.tree.map(jax.sharding.reshard, arrays, specs)
    mesh = jax.typeof(query).sharding.mesh
    return jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=specs["query"])(arrays)


def _attend(arrays: dict[str, Array], *, fused: bool, band: Band | None, options: Options) -> Result:
    """The results, both of query's dtype."""
    output, lse = (fused_attention if fused else composed_attention)(arrays, band, options)
    return Result(output, None if lse is None else lse.astype(output.dtype))


def _explicit_specs(arrays: dict[str, Array]) -> dict[str, PartitionSpec] | None:
    """How to shard the arguments, by batch and heads, where query's sharding is explicit; None elsewhere.

    XLA chooses the shardings that are not explicit, inside the loops as well.

    Args:
      arrays: the arguments of ``multi_head_attention`` that are arrays, by name.
    """
    sharding = jax.typeof(arrays["query"]).sharding
    if not any(sharding.spec):
        return None
    batch, _, heads, _ = sharding.spec
    key_heads = arrays["key"].shape[2]
    divided = arrays["query"].shape[2] if key_heads == 1 else key_heads
    if divided % num_shards(sharding.mesh, heads):
        heads = None
    of_keys = PartitionSpec(batch, None, None if key_heads == 1 else heads, None)
    specs = {"query": PartitionSpec(batch, None, heads, None), "scale": PartitionSpec()}
    specs |= {"key": of_keys, "value": of_keys}
    if "sinks" in arrays:
        specs["sinks"] = PartitionSpec(None, None, heads, None)
    for name, x in arrays.items():
        if name not in specs:
            axes = zip(x.shape, (batch, heads, None, None), strict=False)
            specs[name] = PartitionSpec(*(None if size == 1 else axis for size, axis in axes))
    return specs
