"""How XLA divides the primitives among devices: without communication along every dimension but their axis.

A lowering rule does not know how its operands will be sharded. It leaves a mark, and XLA calls back with the
shardings that it has chosen: see ``jax.experimental.custom_partitioning``.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

# JAX tells lowering rules about devices only if a primitive of this set is in the program.
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.operands import OperandSpec

Shape = tuple[int, ...]

ShardedRule = Callable[..., Any]
"""What a device does where the axis itself is divided: sharded_rule(names, *operands, **params)."""


def num_shards(mesh: Any, part: collectives.Names | None) -> int:
    """Into how many parts the axes of a mesh divide a dimension."""
    return math.prod(mesh.shape[name] for name in collectives.names_of(part))


def require_devices(primitive: Primitive) -> None:
    """Has JAX tell the primitive's lowering rule about devices."""
    prim_requires_devices_during_lowering.add(primitive)


def is_sharded(ctx: Any) -> bool:
    """Whether XLA is to divide what is being lowered among several devices."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return context.mesh.size > 1 and set(context.manual_axes) != set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) > 1


def can_divide(ctx: Any) -> bool:
    """Whether there are devices for XLA to call back about: to exported programs there are none."""
    context = ctx.module_context.axis_context
    known = hasattr(context, "mesh") or getattr(context, "device_assignment", None) is not None
    return known and not ctx.module_context.lowering_parameters.for_export


def lower(primitive: Primitive, sharded_rule: ShardedRule, ctx: Any, *operands: Any, **params: Any) -> Any:
    """Lowers the primitive to what XLA divides, and each part then to the primitive on a part."""
    axis = params["axis"]

    def partition(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        if mesh.empty:
            return _as_they_are(primitive, mesh, arguments, results, params)
        return _by_names(primitive, sharded_rule, mesh, arguments, results, params)

    def infer(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        x = arguments[0]
        return jax.tree.map(lambda r: _like(x, mesh, _partition_spec(x), r.shape, axis), results)

    def rule(mesh: Mesh, operand_types: Sequence[Any], result_types: Sequence[Any]) -> SdyShardingRule:
        return _rule([tuple(t.shape) for t in operand_types], [tuple(t.shape) for t in result_types], axis)

    call = custom_partitioning(lambda *operands: primitive.bind(*operands, **params))
    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return mlir.lower_fun(call, multiple_results=primitive.multiple_results)(ctx, *operands)


def _by_names(
    primitive: Primitive,
    sharded_rule: ShardedRule,
    mesh: Mesh,
    arguments: Sequence[Any],
    results: Any,
    params: dict[str, Any],
) -> tuple[Any, ...]:
    """All operands and results as the first of them, whose sharding names axes of the mesh."""
    x = arguments[0]
    axis, spec = params["axis"], params.get("spec", OperandSpec())
    partition = _partition_spec(x)
    if x.shape[axis] % num_shards(mesh, partition[axis]):
        partition[axis] = None  # The last shard would be padded, and the padding summed.
    names = collectives.names_of(partition[axis])
    row_names = collectives.names_of(partition[-2]) if spec.band is not None else ()

    def local(*operands: jax.Array) -> Any:
        shard_params = dict(params)
        if spec.band is not None and (names or row_names):
            first = [
                collectives.shard_index(n) * size if n else 0
                for n, size in zip((row_names, names), operands[0].shape[-2:], strict=True)
            ]
            operands, shard_params["spec"] = collectives.with_mask(operands, spec, *first)
        if names:
            return sharded_rule(names, *operands, **shard_params)
        return primitive.bind(*operands, **shard_params)

    shardings = tuple(_like(x, mesh, partition, argument.shape, axis) for argument in arguments)
    return mesh, local, jax.tree.map(lambda r: _like(x, mesh, partition, r.shape, axis), results), shardings


def _as_they_are(
    primitive: Primitive, mesh: Mesh, arguments: Sequence[Any], results: Any, params: dict[str, Any]
) -> tuple[Any, ...]:
    """The shardings that XLA has chosen if they need no communication, whole arrays if not.

    In a part of the program that is manual along some axes of the mesh only, nothing has a name.
    """
    x = arguments[0]
    axis = params["axis"]
    of_x = x.sharding.shard_shape(x.shape)
    parts = [whole // max(part, 1) for whole, part in zip(x.shape, of_x, strict=True)]
    banded = params.get("spec", OperandSpec()).band is not None
    everything = [*arguments, *jax.tree.leaves(results)]
    fits = parts[axis] == 1 and not (banded and parts[-2] > 1)
    for array in everything:
        expected = tuple(
            size if at is None else size // parts[at]
            for size, at in zip(array.shape, _dimensions(array.shape, x.shape, axis), strict=True)
        )
        fits = fits and array.sharding.shard_shape(array.shape) == expected
    sharding = (lambda a: a.sharding) if fits else (lambda a: _replicated(a.sharding))
    local = lambda *operands: primitive.bind(*operands, **params)
    return mesh, local, jax.tree.map(sharding, results), tuple(sharding(a) for a in arguments)


def _rule(operands: Sequence[Shape], results: Sequence[Shape], axis: int) -> SdyShardingRule:
    """Dimensions that correspond have the same name, others one of their own."""
    own = itertools.count()

    def mapping(shape: Shape) -> ArrayMapping:
        corresponding = _dimensions(shape, operands[0], axis)
        return ArrayMapping(*(f"own{next(own)}" if at is None else f"x{at}" for at in corresponding))

    of_axis = f"x{axis % len(operands[0])}"
    of_results = tuple(map(mapping, results))
    reduced = () if any(of_axis in mapped for mapped in of_results) else (of_axis,)
    return SdyShardingRule(tuple(map(mapping, operands)), of_results, reduction_factors=reduced)


def _dimensions(shape: Shape, of_x: Shape, axis: int) -> list[int | None]:
    """To which dimension of x each of another operand or result corresponds; None: to none.

    An array has x's rank, or, with one element a row, one less. Labels that are not there have a size of 0.
    """
    corresponding = [at for at in range(len(of_x)) if len(shape) == len(of_x) or at != axis % len(of_x)]
    if len(shape) != len(corresponding):
        return [None] * len(shape)
    return [at if size == of_x[at] else None for at, size in zip(corresponding, shape, strict=True)]


def _like(x: Any, mesh: Mesh, partition: Sequence[Any], shape: Shape, axis: int) -> Sharding:
    if mesh.empty:
        return _replicated(x.sharding)
    parts = [None if at is None else partition[at] for at in _dimensions(shape, x.shape, axis)]
    return NamedSharding(mesh, PartitionSpec(*parts))


def _partition_spec(x: Any) -> list[Any]:
    spec = getattr(x.sharding, "spec", ())
    return [*spec, *(None for _ in range(x.ndim - len(spec)))]


def _replicated(sharding: Any) -> Sharding:
    return type(sharding).get_replicated(sharding._internal_device_list)
