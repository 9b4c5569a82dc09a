"""Reference or native: the one place that decides which of the two runs, and says why.

There are two moments to decide at. When a public function is called, ``as_implementation`` and
``check_native_support`` refuse what cannot be had, and ``choose_path`` says whether the primitives are used
at all. When a primitive is lowered, for one platform, ``choose_lowering`` says what it becomes; which sizes
are worth a native call, ``thresholds`` knows.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
from jax.core import ShapedArray
from jax.interpreters import mlir

from jax_softmax2p import jax_compat, native
from jax_softmax2p.primitives.thresholds import COMPOSED_ELEMENTS, Operation, min_elements

Implementation = Literal["native", "reference"]
"""What users may ask for; None leaves the choice to :func:`choose_lowering`."""

LoweredImplementation = Implementation | Literal["in_loop"] | None
"""The parameter when a primitive is lowered: "in_loop" is None in the body of a loop."""


class Choice(NamedTuple):
    """What a primitive is lowered to.

    Attributes:
      lowering: "native" is one FFI call; "sharded" leaves the primitive to XLA to partition among devices,
        and is followed by another choice for what each device runs; "reference" is jax.numpy.
      reason: why.
    """

    lowering: Literal["native", "sharded", "reference"]
    reason: str


def as_implementation(implementation: str | None) -> Implementation | None:
    """What users passed, checked.

    Raises:
      ValueError: there is no such implementation.
    """
    match implementation:
        case None | "native" | "reference":
            return implementation
        case _:
            raise ValueError(f"implementation must be None, 'native' or 'reference'; got {implementation!r}")


def check_native_support(implementation: Implementation | None, dtype: np.dtype) -> None:
    """Raises ValueError where a native kernel is asked for and cannot run on this CPU for the dtype."""
    if implementation == "native" and (reason := native.unsupported_reason(dtype)):
        refuse_native(reason)


def refuse_native(reason: str) -> NoReturn:
    """Raises the error of implementation="native" where no native kernel can run."""
    raise ValueError(f"implementation='native' cannot run: {reason}")


def choose_path(
    implementation: Implementation | None, axis_name: Any
) -> Literal["primitive", "reference", "sharded"]:
    """Which code a public function runs.

    With implementation="reference" it is the reference itself rather than a primitive that is lowered to it,
    so that JAX differentiates the reference: that is what the primitives' own derivatives are tested against.
    Rows that are sharded along a mesh axis have one implementation, of primitives and collectives. Kernels of
    Pallas take the reference, since Pallas compiles JAX's own primitives alone.
    """
    if axis_name is not None:
        return "sharded"
    if implementation is None and jax_compat.is_tracing_pallas_kernel():
        return "reference"
    return "reference" if implementation == "reference" else "primitive"


def choose_lowering(
    ctx: mlir.LoweringRuleContext,
    implementation: LoweredImplementation,
    choose_on_one_device: Callable[[], Choice],
    *,
    on_cpu: bool,
) -> Choice:
    """What the primitive ``ctx.primitive`` becomes for operands of the avals ``ctx.avals_in``.

    Args:
      ctx: what JAX tells a lowering rule.
      implementation: the primitive's parameter.
      choose_on_one_device: what it becomes where the program is for one device.
      on_cpu: whether the rule is the one for CPUs.

    Raises:
      ValueError: the implementation is "native" and cannot run.
    """
    x: Any = ctx.avals_in[0]
    if implementation in (None, "in_loop") and jax_compat.is_for_export(ctx):
        return Choice("reference", "an exported program may run where this package is not installed")
    if not jax_compat.is_sharded(ctx):
        return choose_on_one_device()
    reason = _unsupported_reason(x, on_cpu)
    if reason is None and not jax_compat.has_devices_to_partition(ctx):
        reason = "a program for several devices is exported, or lowered without them"
    if implementation == "reference" or reason is not None:
        return _choose_reference(implementation, reason)
    return Choice("sharded", "each device chooses for its shard")


def choose_on_device(
    implementation: LoweredImplementation, operation: Operation, x: ShapedArray, axis: int, *, on_cpu: bool
) -> Choice:
    """What a primitive becomes on one device.

    Args:
      implementation: the primitive's parameter.
      operation: what the primitive computes.
      x: its first operand.
      axis: the primitive's parameter.
      on_cpu: whether the device is a CPU.

    Raises:
      ValueError: the implementation is "native" and cannot run.
    """
    if (forced := forced_choice(implementation, x, on_cpu=on_cpu)) is not None:
        return forced
    in_loop = implementation == "in_loop"
    least, elements = min_elements(operation, x.shape, axis, in_loop=in_loop), math.prod(x.shape)
    reason = f"{elements} elements{' in a loop' * in_loop}: from {least} on a native call is faster"
    return Choice("native" if elements >= least else "reference", reason)


def forced_choice(implementation: LoweredImplementation, x: ShapedArray, *, on_cpu: bool) -> Choice | None:
    """What a primitive becomes on one device whatever its size; None where that decides.

    Args:
      implementation: the primitive's parameter.
      x: its first operand.
      on_cpu: whether the device is a CPU.

    Raises:
      ValueError: the implementation is "native" and cannot run.
    """
    reason = _unsupported_reason(x, on_cpu)
    if implementation == "reference" or reason is not None:
        return _choose_reference(implementation, reason)
    if implementation == "native":
        return Choice("native", "implementation='native'")
    return None


def is_composed(ctx: mlir.LoweringRuleContext, implementation: LoweredImplementation) -> bool:
    """Whether what is native is to fuse with its users, if there is a way to compose it."""
    x: Any = ctx.avals_in[0]
    return implementation != "native" and math.prod(x.shape) < COMPOSED_ELEMENTS


def _choose_reference(implementation: LoweredImplementation, unsupported_reason: str | None) -> Choice:
    if implementation == "reference":
        return Choice("reference", "implementation='reference'")
    assert unsupported_reason is not None, "the native kernel could run"
    if implementation == "native":
        refuse_native(unsupported_reason)
    return Choice("reference", unsupported_reason)


def _unsupported_reason(x: ShapedArray, on_cpu: bool) -> str | None:
    """Why there is no native kernel for x on a device, or None."""
    return native.unsupported_reason(x.dtype) if on_cpu else "there are native kernels for CPUs only"
