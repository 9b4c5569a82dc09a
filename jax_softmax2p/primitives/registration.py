"""Defining a primitive: everything that JAX has to be told, in one call at the bottom of the primitive's
module.

Their parameter ``implementation`` says what :mod:`jax_softmax2p.primitives.dispatch` may choose. All but
those of attention work along one axis, their parameter ``axis``, which is negative.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_softmax2p import exact_sums, jax_compat
from jax_softmax2p.primitives import dispatch, interpreters, nested_computations, partitioning
from jax_softmax2p.primitives.dispatch import Choice
from jax_softmax2p.primitives.thresholds import Operation

Rule = Callable[..., Any]


LOWERINGS: dict[Primitive, "KernelLowering | Rule"] = {}
"""How each of this package's primitives is lowered, as it was defined."""


def _no_attributes(**_: Any) -> dict[str, Any]:
    return {}


def _no_operand(avals: Sequence[Any], **_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelLowering(abc.ABC):
    """How a primitive is lowered that has a native kernel.

    Attributes:
      target: the name of the FFI target.
      reference: the same in jax.numpy, as reference(*operands, **params).
      composed: what it becomes in place of its own kernel where ``is_composed`` says so: a function of other
        primitives and jax.numpy, as composed(*operands, **params).
      reused_operand: as reused_operand(avals, **params), the number of the operand whose memory the result
        takes, or None. XLA copies it first where it is needed afterwards.
    """

    target: str
    reference: Rule
    composed: Rule | None = None
    reused_operand: Callable[..., int | None] = _no_operand

    @abc.abstractmethod
    def choose_on_device(self, avals: Sequence[Any], params: Mapping[str, Any], *, on_cpu: bool) -> Choice:
        """What the primitive becomes on one device, for operands of these avals."""

    @abc.abstractmethod
    def is_composed(self, ctx: mlir.LoweringRuleContext, params: Mapping[str, Any]) -> bool:
        """Whether what is native is ``composed``, where there is that."""

    @abc.abstractmethod
    def lower_sharded(
        self, primitive: Primitive, ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any
    ) -> Sequence[Any]:
        """Lowers the primitive to what XLA partitions among devices."""

    @abc.abstractmethod
    def ffi_attributes(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All attributes of the target."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeLowering(KernelLowering):
    """How a primitive is lowered that works along an axis.

    It is composed where its result fits into a cache, and so is to fuse with its users.

    Attributes:
      operation: what it computes, by which dispatch chooses.
      sharded_rule: what each device does where XLA shards the axis itself, as sharded_rule(axis_names,
        *operands, **params).
      labelled_operation: the operation where the fourth operand, labels, is not empty, if that is another.
      attributes: the target's attributes but the axis, as attributes(**params).
    """

    operation: Operation
    sharded_rule: partitioning.ShardedRule
    labelled_operation: Operation | None = None
    attributes: Callable[..., dict[str, Any]] = _no_attributes

    def operation_of(self, avals: Sequence[Any], params: Mapping[str, Any]) -> Operation:
        """What the primitive computes of operands of these avals."""
        if self.labelled_operation is not None and avals[3].size:
            return self.labelled_operation
        return params.get("for_derivative") or self.operation

    def choose_on_device(self, avals: Sequence[Any], params: Mapping[str, Any], *, on_cpu: bool) -> Choice:
        """By the operation and the size of the first operand."""
        operation = self.operation_of(avals, params)
        return dispatch.choose_on_device(
            params["implementation"], operation, avals[0], params["axis"], on_cpu=on_cpu
        )

    def is_composed(self, ctx: mlir.LoweringRuleContext, params: Mapping[str, Any]) -> bool:
        """By the size of the first operand."""
        return dispatch.is_composed(ctx, params["implementation"])

    def lower_sharded(
        self, primitive: Primitive, ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any
    ) -> Sequence[Any]:
        """By what lies along the axis, and beside it."""
        return partitioning.lower(primitive, self.sharded_rule, ctx, *operands, **params)

    def ffi_attributes(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The axis and the others."""
        return {"axis": np.int64(params["axis"]), **self.attributes(**params)}


def define_primitive(
    name: str,
    *,
    params: tuple[str, ...],
    abstract_eval: Rule,
    jvp_rule: Rule,
    batch_rule: Rule,
    lowering: KernelLowering | Rule,
    transpose_rule: Rule | None = None,
    multiple_results: bool = False,
    eager_params: Mapping[str, Any] | None = None,
    spec_has_implementation: bool = False,
) -> Primitive:
    """Makes a primitive with all of its rules.

    Args:
      name: of the primitive, as jaxprs show it.
      params: the names of its parameters.
      abstract_eval: abstract_eval(*avals, **params): the results' abstract values. They come from an
        operand's (``aval.update``), so that shardings and varying mesh axes survive.
      jvp_rule: jvp_rule(primals, tangents, **params): results and their tangents; tangents may be ad.Zero.
      batch_rule: batch_rule(operands, dims, **params): results and their batch dimensions.
      lowering: for a primitive without a kernel of its own, a function of jax.numpy and other primitives, as
        lowering(*operands, **params).
      transpose_rule: transpose_rule(cotangent, *operands, **params), of a primitive that is linear in an
        operand.
      multiple_results: whether it returns a sequence of results.
      eager_params: parameters that have this value outside jit, whatever was passed. What reuses an operand's
        memory in a larger program would copy the operand first in one of its own.
      spec_has_implementation: whether the implementation is a field of the parameter ``spec``, not a
        parameter.
    """
    primitive = Primitive(name)
    LOWERINGS[primitive] = lowering
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(_refuse_partial_sums(name, abstract_eval))
    primitive.def_impl(_eager_evaluation(primitive, params, dict(eager_params or {})))
    ad.primitive_jvps[primitive] = jvp_rule
    batching.primitive_batchers[primitive] = batch_rule
    if transpose_rule is not None:
        ad.primitive_transposes[primitive] = transpose_rule
    if spec_has_implementation:
        nested_computations.add_primitive(primitive, "spec")
    elif "implementation" in params:
        nested_computations.add_primitive(primitive, "params")
    # Those without a kernel of their own are lowered to others, which ask for devices.
    jax_compat.require_devices_during_lowering(primitive)
    if isinstance(lowering, KernelLowering):
        interpreters.define_interpreter_rules(primitive, lowering.reference)
        _register_native_lowering(primitive, lowering)
    else:
        interpreters.define_interpreter_rules(primitive, lowering)
        lower = nested_computations.lower_fun(lowering, multiple_results=multiple_results)
        mlir.register_lowering(primitive, lower)
    return primitive


def bind(primitive: Primitive, *operands: Any, **params: Any) -> Any:
    """Applies a primitive to operands, which inside shard_map must vary over the same mesh axes."""
    axes = tuple(frozenset[str]().union(*map(jax_compat.varying_axes, operands)))
    return primitive.bind(*(jax_compat.as_varying(operand, axes) for operand in operands), **params)


def _refuse_partial_sums(name: str, abstract_eval: Rule) -> Rule:
    """The rule, with the error that JAX's own primitives raise which are not linear."""

    def checked(*avals: Any, **params: Any) -> Any:
        for aval in avals:
            if unreduced := aval.sharding.spec.unreduced:
                raise NotImplementedError(
                    f"{name} of an array that is unreduced along the mesh axes {sorted(unreduced)}: "
                    "add it up first, by jax.sharding.reshard"
                )
        return abstract_eval(*avals, **params)

    return checked


def _eager_evaluation(primitive: Primitive, params: tuple[str, ...], eager_params: dict[str, Any]) -> Rule:
    """Evaluation outside jit: a jitted call, compiled once for shapes, dtypes and parameters."""

    def call(*operands: Any, **params: Any) -> Any:
        return primitive.bind(*operands, **params)

    # JAX's checks of results name the function in their messages.
    call.__name__ = call.__qualname__ = primitive.name
    jax_compat.mark_as_primitive(call)
    jitted = jax.jit(call, static_argnames=params)

    def evaluate(*operands: Any, **params: Any) -> Any:
        # Under disable_jit the jitted function would call the primitive, and so itself, forever.
        with jax.disable_jit(False):
            return jitted(*operands, **(params | eager_params))

    return evaluate


def _register_native_lowering(primitive: Primitive, lowering: KernelLowering) -> None:
    lower_fun = functools.partial(nested_computations.lower_fun, multiple_results=primitive.multiple_results)
    lower_to_reference = lower_fun(lowering.reference)
    lower_composed = lowering.composed and lower_fun(lowering.composed)

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, on_cpu: bool, **params: Any) -> Sequence[Any]:
        choice = dispatch.choose_lowering(
            ctx,
            params["implementation"],
            lambda: lowering.choose_on_device(ctx.avals_in, params, on_cpu=on_cpu),
            on_cpu=on_cpu,
        )
        match choice.lowering:
            case "reference":
                in_loop = params["implementation"] == "in_loop"
                with exact_sums.in_loop(in_loop), exact_sums.on_accelerator(not on_cpu):
                    return lower_to_reference(ctx, *operands, **params)
            case "sharded":
                return lowering.lower_sharded(primitive, ctx, *operands, **params)
            case "native" if lower_composed and lowering.is_composed(ctx, params):
                return lower_composed(ctx, *operands, **params | {"implementation": "native"})
            case "native":
                reused = lowering.reused_operand(ctx.avals_in, **params)
                aliases = None if reused is None else {reused: 0}
                call = jax.ffi.ffi_lowering(lowering.target, operand_output_aliases=aliases)
                return call(ctx, *operands, **lowering.ffi_attributes(params))

    def lower_on_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Sequence[Any]:
        return lower(ctx, *operands, on_cpu=True, **params)

    def lower_elsewhere(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Sequence[Any]:
        return lower(ctx, *operands, on_cpu=False, **params)

    mlir.register_lowering(primitive, lower_elsewhere)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
