"""What every primitive needs: eager evaluation, and the choice between kernel and reference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_softmax2p import native
from jax_softmax2p.primitives import collectives, partitioning
from jax_softmax2p.primitives.operands import OperandSpec, operand_mask


def define_eager_evaluation(
    primitive: Primitive, static_argnames: tuple[str, ...], **eager_params: Any
) -> None:
    """Makes the primitive run outside jit, each time as a jitted call of itself.

    Args:
      static_argnames: its parameters.
      eager_params: those that have this value there, whatever was given. What reuses an operand's memory in a
        larger program would copy the operand first in one of its own.
    """

    def call(*operands, **params):
        return primitive.bind(*operands, **params)

    # To JAX's NaN checker a jitted function is something to take apart and run again, primitive by
    # primitive, unless it carries this mark, as JAX's own primitives do.
    call._apply_primitive = True  # type: ignore[attr-defined]
    jitted = jax.jit(call, static_argnames=static_argnames)

    def evaluate(*operands, **params):
        # Under disable_jit the jitted function would call the primitive, and so itself, forever.
        with jax.disable_jit(False):
            return jitted(*operands, **(params | eager_params))

    primitive.def_impl(evaluate)


def define_lowerings(
    primitive: Primitive,
    target: str,
    reference: Callable[..., Any],
    attributes: Callable[..., dict[str, Any]],
    *,
    sharded_rule: partitioning.ShardedRule,
    num_leading_operands: int = 0,
    reused: Callable[..., int | None] = lambda **params: None,
) -> None:
    """Lowers the primitive to an FFI call on CPU where that can run, to the reference elsewhere.

    The primitive works along its parameter ``axis``, which is negative. Its parameter ``implementation`` may
    be "native" to make the lowering fail rather than fall back, or "reference". Its operands are x, its own,
    and what its parameter ``spec``, if it has one, says.

    Args:
      target: the name of the FFI target.
      reference: the same in jax.numpy: reference(x, *own operands, axis=, scale=, bias=, where=).
      attributes: the target's attributes but the axis, from the primitive's parameters.
      sharded_rule: what each device does where XLA divides the axis itself among several.
      num_leading_operands: how many.
      reused: the operand whose memory the result takes, from the primitive's parameters. XLA copies it first
        where it is needed afterwards.
    """
    multiple = primitive.multiple_results
    first_given = 1 + num_leading_operands

    def with_names(*operands, axis: int, spec: OperandSpec | None = None, **_):
        if spec is None:
            return reference(*operands, axis=axis)
        named = spec.named(operands)
        if spec.band is not None:
            named["where"] = operand_mask(operands[0].shape, named.get("where"), spec.band)
        return reference(*operands[:first_given], axis=axis, **named)

    def lower_to_reference(ctx: Any, *operands, **params):
        rule = mlir.lower_fun(lambda *args: with_names(*args, **params), multiple_results=multiple)
        return rule(ctx, *operands)

    def lower_elsewhere(ctx: Any, *operands, implementation: str | None, **params):
        if implementation == "native":
            raise ValueError(native_refusal("there are native kernels for CPUs only"))
        return lower_to_reference(ctx, *operands, **params)

    def lower_on_cpu(ctx: Any, *operands, implementation: str | None, **params):
        if implementation == "reference":
            return lower_to_reference(ctx, *operands, **params)
        reason = native.reason_against(ctx.avals_in[0].dtype)
        divided = partitioning.is_sharded(ctx)
        if reason is None and divided and not partitioning.can_divide(ctx):
            reason = "a program for several devices is exported, or lowered without them"
        if reason is not None:
            if implementation == "native":
                raise ValueError(native_refusal(reason))
            return lower_to_reference(ctx, *operands, **params)
        if divided:
            params["implementation"] = implementation
            return partitioning.lower(primitive, sharded_rule, ctx, *operands, **params)
        operand = reused(**params)
        aliases = None if operand is None else {operand: 0}
        call = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
        return call(ctx, *operands, axis=np.int64(params["axis"]), **attributes(**params))

    partitioning.require_devices(primitive)
    mlir.register_lowering(primitive, lower_elsewhere)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")


def batch_logits(operands: Any, dims: Any, num_leading_operands: int = 0) -> list[jax.Array]:
    """The operands of a primitive with their batch dimension at the front.

    Those that are not batched get a dimension of size 1 there if they broadcast; x and the primitive's own,
    of which there are ``num_leading_operands``, are repeated. As the axis counts from the end, it stays what it is.
    """
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    batched = []
    for i, (x, dim) in enumerate(zip(operands, dims, strict=True)):
        if dim is not None:
            batched.append(jnp.moveaxis(x, dim, 0))
        elif i <= num_leading_operands:
            batched.append(jnp.broadcast_to(x, (size, *x.shape)))
        else:
            batched.append(jnp.expand_dims(x, 0))
    return batched


def compute_dtype(dtype: Any) -> np.dtype:
    """What arrays of a floating dtype are computed in."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def without_axis(x: Any, axis: int, dtype: Any) -> Any:
    """The abstract value of a reduction of x along an axis."""
    shape = tuple(size for i, size in enumerate(x.shape) if i != axis % x.ndim)
    spec = [part for i, part in enumerate(x.sharding.spec) if i != axis % x.ndim]
    sharding = x.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return x.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def with_common_varying_axes(*operands: Any) -> list[jax.Array]:
    """Inside shard_map: operands must vary over the same mesh axes, as jax.numpy's own do."""
    union = frozenset[str]().union(*map(collectives.varying_axes, operands))
    return [collectives.as_varying(operand, tuple(union)) for operand in operands]


def native_refusal(reason: str) -> str:
    """The words of the error that implementation="native" raises."""
    return f"implementation='native' cannot run: {reason}"
