"""How XLA shards the primitives among devices: without communication along every dimension but their axis.

A lowering rule does not know how its operands will be sharded. It leaves a mark, and XLA calls back with the
shardings that it has chosen: see ``jax.experimental.custom_partitioning``.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_softmax2p import jax_compat
from jax_softmax2p.primitives.collectives import AxisNames, as_axis_names, shard_index
from jax_softmax2p.primitives.operands import OperandSpec

Shape = tuple[int, ...]

ShardedRule = Callable[..., Any]
"""What a device does where the axis itself is sharded: sharded_rule(axis_names, *operands, **params)."""

Partition = tuple[Mesh, Callable[..., Any], Any, tuple[Sharding, ...]]
"""What XLA is told: the mesh, what each device runs, and the shardings of the results and of the operands."""


def num_shards(mesh: Any, entry: AxisNames | None) -> int:
    """Into how many shards an entry of a PartitionSpec divides a dimension."""
    return math.prod(mesh.shape[name] for name in as_axis_names(entry))


def lower(
    primitive: Primitive,
    sharded_rule: ShardedRule,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    **params: Any,
) -> Sequence[Any]:
    """Lowers the primitive to what XLA partitions, and each shard then to the primitive on a shard.

    Args:
      primitive: that which is lowered.
      sharded_rule: for shards of rows.
      ctx: of the lowering rule.
      operands: its values.
      params: the primitive's parameters.
    """
    axis = params["axis"]

    def partition(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Partition:
        if mesh.empty:
            return _partition_without_names(primitive, mesh, arguments, results, params)
        return _partition_by_names(primitive, sharded_rule, mesh, arguments, results, params)

    def infer(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        x = arguments[0]
        return jax.tree.map(lambda r: _sharding_like(x, mesh, _entries(x), r.shape, axis), results)

    def rule(mesh: Mesh, operand_types: Sequence[Any], result_types: Sequence[Any]) -> SdyShardingRule:
        operand_shapes = [tuple(t.shape) for t in operand_types]
        return _sharding_rule(operand_shapes, [tuple(t.shape) for t in result_types], axis)

    call = custom_partitioning(lambda *operands: primitive.bind(*operands, **params))
    call.def_partition(
        jax_compat.on_shards(partition), infer_sharding_from_operands=infer, sharding_rule=rule
    )
    return mlir.lower_fun(call, multiple_results=primitive.multiple_results)(ctx, *operands)


def _partition_by_names(
    primitive: Primitive,
    sharded_rule: ShardedRule,
    mesh: Mesh,
    arguments: Sequence[Any],
    results: Any,
    params: dict[str, Any],
) -> Partition:
    """All operands and results are sharded as x, whose sharding names axes of the mesh."""
    x = arguments[0]
    axis, spec = params["axis"], params.get("spec", OperandSpec())
    entries = _entries(x)
    if x.shape[axis] % num_shards(mesh, entries[axis]):
        entries[axis] = None  # The last shard would be padded, and the padding summed.
    names = as_axis_names(entries[axis])
    row_names = as_axis_names(entries[-2]) if spec.band is not None else ()

    def local(*operands: jax.Array) -> Any:
        local_params = dict(params)
        if spec.band is not None and (names or row_names):
            first_row, first_column = (
                shard_index(axis_names) * size if axis_names else 0
                for axis_names, size in zip((row_names, names), operands[0].shape[-2:], strict=True)
            )
            operands, local_params["spec"] = spec.band_to_mask(operands, first_row, first_column)
        if names:
            return sharded_rule(names, *operands, **local_params)
        return primitive.bind(*operands, **local_params)

    sharding = lambda array: _sharding_like(x, mesh, entries, array.shape, axis)
    return mesh, local, jax.tree.map(sharding, results), tuple(map(sharding, arguments))


def _partition_without_names(
    primitive: Primitive, mesh: Mesh, arguments: Sequence[Any], results: Any, params: dict[str, Any]
) -> Partition:
    """The shardings that XLA has chosen if they need no communication, whole arrays if not.

    In a region of the program that is manual along some axes of the mesh only, nothing has a name.
    """
    x = arguments[0]
    axis = params["axis"] % x.ndim
    together = {axis, x.ndim - 2} if params.get("spec", OperandSpec()).band is not None else {axis}
    arrays = (*arguments, *jax.tree.leaves(results))
    dimensions = (
        [None if at in together else at for at in _dimensions_of_x(array.shape, x.shape, axis)]
        for array in arrays
    )
    fits = common_shard_places(arrays, dimensions) is not None
    sharding = (lambda a: a.sharding) if fits else (lambda a: jax_compat.replicated(a.sharding))
    local = lambda *operands: primitive.bind(*operands, **params)
    return mesh, local, jax.tree.map(sharding, results), tuple(sharding(a) for a in arguments)


def common_shard_places(
    arrays: Iterable[Any], names: Iterable[Sequence[Hashable]]
) -> dict[Hashable, np.ndarray] | None:
    """Which shard of a dimension each device holds, if of dimensions with one name it holds the same.

    Args:
      arrays: with the shardings that XLA has chosen, which name no axes of a mesh.
      names: those of each array's dimensions; None of one that must not be sharded.

    Returns:
      For each name, an integer for each device; or None, if the shardings do not fit.
    """
    common: dict[Hashable, np.ndarray] = {}
    for array, of_array in zip(arrays, names, strict=True):
        places = jax_compat.shard_places(array.sharding, array.ndim)
        for place, name in zip(places.T, of_array, strict=True):
            expected = np.zeros(1, int) if name is None else common.setdefault(name, place)
            if (place != expected).any():
                return None
    return common


def _sharding_rule(operands: Sequence[Shape], results: Sequence[Shape], axis: int) -> SdyShardingRule:
    """Dimensions that correspond to one of x have its name, others one of their own."""
    unique = itertools.count()

    def mapping(shape: Shape) -> ArrayMapping:
        dimensions = _dimensions_of_x(shape, operands[0], axis)
        return ArrayMapping(*(f"own{next(unique)}" if at is None else f"x{at}" for at in dimensions))

    axis_factor = f"x{axis % len(operands[0])}"
    result_mappings = tuple(map(mapping, results))
    reduced = () if any(axis_factor in mapped for mapped in result_mappings) else (axis_factor,)
    return SdyShardingRule(tuple(map(mapping, operands)), result_mappings, reduction_factors=reduced)


def _dimensions_of_x(shape: Shape, x_shape: Shape, axis: int) -> list[int | None]:
    """To which dimension of x each of another operand or result corresponds; None: to none.

    An array has x's rank, or one less if it holds one element for each row. The empty array of a derivative
    without labels has a dimension of size 0 that corresponds to none.
    """
    dimensions = [at for at in range(len(x_shape)) if len(shape) == len(x_shape) or at != axis % len(x_shape)]
    if len(shape) != len(dimensions):
        return [None] * len(shape)
    return [at if size == x_shape[at] else None for at, size in zip(dimensions, shape, strict=True)]


def _sharding_like(x: Any, mesh: Mesh, entries: Sequence[Any], shape: Shape, axis: int) -> Sharding:
    """The sharding of an array like x's, whose PartitionSpec has these entries."""
    if mesh.empty:
        return jax_compat.replicated(x.sharding)
    dimensions = _dimensions_of_x(shape, x.shape, axis)
    return NamedSharding(mesh, PartitionSpec(*(None if at is None else entries[at] for at in dimensions)))


def _entries(x: Any) -> list[Any]:
    """The entries of x's PartitionSpec, one for each dimension."""
    spec = getattr(x.sharding, "spec", ())
    return [*spec, *(None for _ in range(x.ndim - len(spec)))]
