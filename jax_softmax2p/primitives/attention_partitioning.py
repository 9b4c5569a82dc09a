"""How XLA shards attention among devices: by batch and heads.

Only gradients of what examples or heads on several devices share are added up; nothing else communicates.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_softmax2p import jax_compat
from jax_softmax2p.primitives.collectives import as_axis_names
from jax_softmax2p.primitives.partitioning import Partition, common_shard_places, num_shards

Shape = tuple[int, ...]

Role = tuple[str | None, ...]
"""What the dimensions of an array are: "batch", "heads", or None for those that are not sharded."""


def lower(
    primitive: Primitive,
    roles: Sequence[Role],
    result_roles: Sequence[Role],
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    **params: Any,
) -> Sequence[Any]:
    """Lowers attention to what XLA partitions, and each shard then to attention of the shard.

    Args:
      primitive: that which is lowered.
      roles: those of its operands, of which query and key are the first two.
      result_roles: those of its results, of which the first has query's heads.
      ctx: of the lowering rule.
      operands: its values.
      params: the primitive's parameters.
    """

    def shardings(mesh: Mesh, arguments: Sequence[Any], arrays: Sequence[Any], of: Sequence[Role]) -> Any:
        entries = _entries(mesh, arguments)

        def sharding(array: Any, axes: Role) -> Sharding:
            if mesh.empty:
                return jax_compat.replicated(arguments[0].sharding)
            sizes = zip(array.shape, axes, strict=True)
            spec = PartitionSpec(*(None if size == 1 else entries[axis] for size, axis in sizes))
            return NamedSharding(mesh, spec)

        chosen = [sharding(array, axes) for array, axes in zip(arrays, of, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(arrays), chosen)

    def partition(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Partition:
        if mesh.empty and _fits(arguments, roles, results, result_roles):
            # In a region that is manual along some axes of the mesh only, nothing has a name.
            found = jax.tree.map(lambda array: array.sharding, (results, tuple(arguments)))
            return mesh, lambda *operands: primitive.bind(*operands, **params), *found
        entries = _entries(mesh, arguments)

        def local(*operands: jax.Array) -> list[jax.Array]:
            parts = primitive.bind(*operands, **params)
            return [
                _sum_of_shards(part, whole.shape, axes, entries)
                for part, whole, axes in zip(parts, results, result_roles, strict=True)
            ]

        results_shardings = shardings(mesh, arguments, results, result_roles)
        return mesh, local, results_shardings, shardings(mesh, arguments, tuple(arguments), roles)

    def infer(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        return shardings(mesh, arguments, results, result_roles)

    def rule(mesh: Mesh, operand_types: Sequence[Any], result_types: Sequence[Any]) -> SdyShardingRule:
        operand_shapes = [tuple(t.shape) for t in operand_types]
        result_shapes = [tuple(t.shape) for t in result_types]
        return _sharding_rule(mesh, operand_shapes, result_shapes, roles, result_roles)

    call = custom_partitioning(lambda *operands: primitive.bind(*operands, **params))
    call.def_partition(
        jax_compat.on_shards(partition), infer_sharding_from_operands=infer, sharding_rule=rule
    )
    return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _entries(mesh: Mesh, arguments: Sequence[Any]) -> dict[str | None, Any]:
    """The entries of the PartitionSpecs for batch and heads, by query's sharding.

    Where all heads of queries share one of keys, that is on every device.
    """
    query, key, value = arguments[:3]
    spec = [*getattr(query.sharding, "spec", ()), None, None, None, None]
    batch, heads = spec[0], spec[2]
    if max(x.shape[0] for x in (query, key, value)) % num_shards(mesh, batch):
        batch = None
    divided = query.shape[2] if key.shape[2] == 1 else key.shape[2]
    if divided % num_shards(mesh, heads):
        heads = None
    return {"batch": batch, "heads": heads, None: None}


def _sum_of_shards(part: jax.Array, whole: Shape, axes: Role, entries: dict[str | None, Any]) -> jax.Array:
    """A result of the whole shape, of which every device has its part: the gradient of what they share."""
    names = tuple(name for axis in _shared(whole, axes) for name in as_axis_names(entries[axis]))
    summed: jax.Array = jax.lax.psum(part, names) if names else part
    return summed


def _shared(shape: Shape, axes: Role) -> list[str | None]:
    """What a result of this shape does not vary with."""
    return [axis for size, axis in zip(shape, axes, strict=True) if size == 1]


def _fits(
    arguments: Sequence[Any], roles: Sequence[Role], results: Sequence[Any], result_roles: Sequence[Role]
) -> bool:
    """Whether the shardings that XLA has chosen need no communication."""
    arrays = (*arguments, *results)
    names = [
        [None if size == 1 else axis for size, axis in zip(array.shape, axes, strict=True)]
        for array, axes in zip(arrays, (*roles, *result_roles), strict=True)
    ]
    places = common_shard_places(arrays, names)
    if places is None:
        return False
    sizes = (zip(array.shape, axes, strict=True) for array, axes in zip(arrays, names, strict=True))
    num_heads = {size for size, axis in itertools.chain(*sizes) if axis == "heads"}
    num_shards_of_heads = 1 + max(places.get("heads", [0]))
    if len(num_heads) > 1 and any(heads % num_shards_of_heads for heads in num_heads):
        return False  # Groups of heads would be divided.
    of_results = zip(results, result_roles, strict=True)
    shared = {axis for result, axes in of_results for axis in _shared(result.shape, axes)}
    return not any(places[axis].any() for axis in shared & places.keys())


def _sharding_rule(
    mesh: Mesh,
    operands: Sequence[Shape],
    results: Sequence[Shape],
    roles: Sequence[Role],
    result_roles: Sequence[Role],
) -> SdyShardingRule:
    """Batch and heads have names, heads of queries those of keys and of the groups; all else has its own.

    Heads of queries and of keys have names by themselves where the axes of the mesh do not divide those of
    keys: otherwise XLA might give keys a part of an axis, which no PartitionSpec can name.
    """
    heads, key_heads = operands[0][2], operands[1][2]
    grouped = heads != key_heads
    divides = key_heads > 1 and key_heads % math.prod(mesh.shape.values()) == 0
    own = iter(range(1000))
    factors: dict[str, Any] = {}

    def factor(size: int, axis: str | None) -> str | CompoundFactor:
        if axis == "batch" and size == results[0][0]:
            return "batch"
        if axis == "heads" and size == heads and grouped and divides:
            factors["groups"] = heads // key_heads
            return CompoundFactor("heads", "groups")
        if axis == "heads" and size in (heads, key_heads):
            return "key_heads" if size == key_heads and grouped and not divides else "heads"
        return f"own{next(own)}"

    mappings = [
        ArrayMapping(*(factor(size, axis) for size, axis in zip(shape, axes, strict=True)))
        for shape, axes in zip((*operands, *results), (*roles, *result_roles), strict=True)
    ]
    count = len(operands)
    return SdyShardingRule(tuple(mappings[:count]), tuple(mappings[count:]), **factors)
