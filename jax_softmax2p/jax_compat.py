"""What JAX keeps private, and what differs between the versions of JAX that are supported (from 0.8 on).

No other module imports from ``jax._src``, reads private attributes, or asks for JAX's version. Each function
says which version it bridges, so that it can go once that version is no longer supported.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import checkify
from jax._src.core import trace_state_clean
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax._src.interpreters.mlir import _lowerings
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Sharding

Array = jax.Array


def is_tracing() -> bool:
    """Whether a transformation or jit is tracing what runs here. Private in all versions."""
    return not trace_state_clean()


def is_argument(x: Array) -> bool:
    """Whether x is an argument of the function that jit is tracing, rather than made in it.

    Private in all versions: the equation that a tracer of jit comes from. Where a version does not tell, and
    for tracers of other transformations, it is taken for one that is made.
    """
    return getattr(x, "parent", x) is None


def require_devices_during_lowering(primitive: Primitive) -> None:
    """Has JAX tell the primitive's lowering rule about devices.

    Private in all versions: JAX does so only if a primitive of this set is in the program.
    """
    prim_requires_devices_during_lowering.add(primitive)


def map_params_before_lowering(primitive: Primitive, function: Callable[[Any], Any]) -> None:
    """Has one of JAX's own primitives lowered with function(param) in place of every parameter.

    Private in all versions: that a primitive's rule can be read, and replaced.
    """
    entry = _lowerings[primitive]

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        return entry.rule(ctx, *operands, **{name: function(param) for name, param in params.items()})

    mlir.register_lowering(primitive, lower, inline=entry.inline)


def check_nans_under_checkify(primitive: Primitive) -> None:
    """Has checkify's float checks look for NaNs in the primitive's results.

    Private in all versions: the public module cannot be told what to check.
    """
    checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


def is_tracing_pallas_kernel() -> bool:
    """Whether the kernel of a pallas_call is being traced.

    Private in all versions: the context that Pallas traces kernels in. It takes long to import, and traces
    nothing before somebody else has imported it.
    """
    pallas: Any = sys.modules.get("jax._src.pallas.core")
    if hasattr(pallas, "_grid_context"):  # From jax 0.12 on.
        return pallas._grid_context.value is not None
    environment = getattr(pallas, "_pallas_tracing_env", None)
    return getattr(environment, "grid_context", None) is not None


def mark_as_primitive(function: Callable[..., Any]) -> None:
    """Marks the function that a jitted evaluation of one primitive is made of.

    Private in all versions. JAX's NaN checker takes a jitted function apart and runs it again, primitive by
    primitive, unless it carries this mark, as the evaluation of JAX's own primitives does.
    """
    function._apply_primitive = True  # type: ignore[attr-defined]


def is_sharded(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA is to partition what is being lowered among several devices.

    Private in all versions: the context of a lowering says so only in its axis context, which is of one class
    inside shard_map (with the mesh's manual axes) and of another outside.
    """
    context: Any = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        sizes = (size for name, size in context.mesh.shape.items() if name not in context.manual_axes)
        return math.prod(sizes) > 1
    return getattr(context, "num_devices", 1) > 1


def is_for_export(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether a program is lowered for jax.export. Private in all versions, as for :func:`is_sharded`."""
    context: Any = ctx.module_context
    return bool(context.lowering_parameters.for_export)


def has_devices_to_partition(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether there are devices for XLA to call back about; an exported program has none.

    Private in all versions, as for :func:`is_sharded`.
    """
    context: Any = ctx.module_context.axis_context
    if hasattr(context, "mesh"):
        known = isinstance(context.mesh, jax.sharding.Mesh)  # An AbstractMesh has no devices.
    else:
        known = getattr(context, "device_assignment", None) is not None
    return known and not is_for_export(ctx)


def replicated(sharding: Any) -> Sharding:
    """The sharding of whole arrays on the same devices. Private in all versions: the list of these."""
    return type(sharding).get_replicated(sharding._internal_device_list)


def shard_places(sharding: Any, ndim: int) -> np.ndarray:
    """Which shard of each dimension a device holds: integers of shape (devices, ndim), or (1, ndim) if all
    devices hold the whole array.

    Private in all versions: the tiles of a sharding that XLA has chosen, and that names no axes of a mesh.
    """
    tiles = sharding._hlo_sharding
    if tiles.is_replicated():
        return np.zeros((1, ndim), int)
    # The dimensions of the array come first, and then those of devices that hold the same.
    places = np.indices(tiles.tile_assignment_dimensions()).reshape(-1, len(tiles.tile_assignment_devices()))
    return places[:ndim, np.argsort(tiles.tile_assignment_devices())].T


def on_shards(partition: Callable[..., Any]) -> Callable[..., Any]:
    """The partition callback of custom_partitioning, whose function is traced without explicit axes.

    From jax 0.11 on, JAX traces what each device runs under the mesh that the caller has set. Where its axes
    are explicit, it would ask XLA to shard what is a shard already.
    """

    def call(*arguments: Any) -> Any:
        mesh, function, *shardings = partition(*arguments)

        def on_shard(*operands: Any) -> Any:
            outer = jax.sharding.get_abstract_mesh()
            auto = (jax.sharding.AxisType.Auto,) * len(outer.axis_names)
            outer = jax.sharding.AbstractMesh(outer.axis_sizes, outer.axis_names, axis_types=auto)
            with jax.sharding.use_abstract_mesh(outer):
                return function(*operands)

        return mesh, on_shard, *shardings

    return call


def inside_shard_map(axis_names: tuple[str, ...]) -> bool:
    """Whether the axes are those of an enclosing shard_map, and not of a vmap."""
    return set(axis_names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes along which JAX knows x to differ.

    Its type has the attribute ``mat`` from jax 0.10 on, and ``vma`` before.
    """
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())


def as_varying(x: Array, axis_names: tuple[str, ...]) -> Array:
    """x as an array that may differ along mesh axes, where JAX keeps track of that.

    ``jax.lax.pcast`` is there from jax 0.9 on; before, ``jax.lax.pvary`` did the same.
    """
    varying = varying_axes(x)
    missing = tuple(name for name in axis_names if name not in varying)
    if not missing or not inside_shard_map(missing):
        return x
    if not hasattr(jax.lax, "pcast"):
        return jax.lax.pvary(x, missing)  # type: ignore[attr-defined]
    return jax.lax.pcast(x, missing, to="varying")


def all_gather_invariant(x: Array, axis_names: tuple[str, ...]) -> Array:
    """The arrays of all shards along a new first axis, which JAX knows to be the same on all devices.

    ``all_gather`` has the argument ``to`` from jax 0.10 on; before, a function without a public name did
    this.
    """
    if not inside_shard_map(axis_names):
        return jax.lax.all_gather(x, axis_names)
    x = as_varying(x, axis_names)
    if jax.__version_info__ < (0, 10):
        from jax._src.lax import parallel

        untyped: Any = parallel
        return untyped.all_gather_invariant(x, axis_names)
    return jax.lax.all_gather(x, axis_names, to="invarying")


def differentiates_unchecked_collectives() -> bool:
    """Whether reverse-mode derivatives of collectives are right where shard_map does not check what varies.

    Before 0.10 JAX follows the rules of checked programs in derivatives of unchecked ones.
    """
    return jax.__version_info__ >= (0, 10)
