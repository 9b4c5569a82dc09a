"""What every primitive needs: eager evaluation, and the choice between kernel and reference."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_softmax2p import native


def define_eager_evaluation(primitive: Primitive, static_argnames: tuple[str, ...]) -> None:
    """Makes the primitive run outside jit, each time as a jitted call of itself."""

    def call(*operands, **params):
        return primitive.bind(*operands, **params)

    # To JAX's NaN checker a jitted function is something to take apart and run again, primitive by
    # primitive, unless it carries this mark, as JAX's own primitives do.
    call._apply_primitive = True  # type: ignore[attr-defined]
    jitted = jax.jit(call, static_argnames=static_argnames)

    def evaluate(*operands, **params):
        # Under disable_jit the jitted function would call the primitive, and so itself, forever.
        with jax.disable_jit(False):
            return jitted(*operands, **params)

    primitive.def_impl(evaluate)


def define_lowerings(
    primitive: Primitive,
    target: str,
    reference: Callable[..., jax.Array],
    attributes: tuple[str, ...] = (),
) -> None:
    """Lowers the primitive to an FFI call on CPU where that can run, to the reference elsewhere.

    The primitive has one result; its operands and its result have one shape and one dtype, and it works
    along its parameter ``axis``, which is negative. Its parameter ``implementation`` may be "native" to
    make the lowering fail rather than fall back.

    Args:
      target: the name of the FFI target. It works along the last axis, unless ``axis`` is an attribute.
      reference: the same in jax.numpy, as reference(*operands, axis).
      attributes: parameters of the primitive that the target takes as attributes; integers as int64.
    """
    ffi_call = jax.ffi.ffi_lowering(target)

    def along_last_axis(*operands, axis: int, **params) -> jax.Array:
        moved = [jax.numpy.moveaxis(operand, axis, -1) for operand in operands]
        return jax.numpy.moveaxis(primitive.bind(*moved, axis=-1, **params), -1, axis)

    def lower_to_reference(ctx: Any, *operands, axis: int, **_):
        rule = mlir.lower_fun(lambda *args: reference(*args, axis), multiple_results=False)
        return rule(ctx, *operands)

    def lower_elsewhere(ctx: Any, *operands, implementation: str | None, **params):
        if implementation == "native":
            raise ValueError(native_refusal("there are native kernels for CPUs only"))
        return lower_to_reference(ctx, *operands, **params)

    def lower_on_cpu(ctx: Any, *operands, implementation: str | None, **params):
        reason = native.reason_against(ctx.avals_in[0].dtype)
        if reason is not None:
            if implementation == "native":
                raise ValueError(native_refusal(reason))
            return lower_to_reference(ctx, *operands, **params)
        if params["axis"] != -1 and "axis" not in attributes:
            rule = mlir.lower_fun(along_last_axis, multiple_results=False)
            return rule(ctx, *operands, implementation=implementation, **params)
        return ffi_call(ctx, *operands, **{name: _attribute(params[name]) for name in attributes})

    mlir.register_lowering(primitive, lower_elsewhere)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")


def _attribute(value: Any) -> Any:
    """What the FFI's attributes want: integers with a width."""
    return np.int64(value) if isinstance(value, int) else value


def native_refusal(reason: str) -> str:
    """The words of the error that implementation="native" raises."""
    return f"implementation='native' cannot run: {reason}"
