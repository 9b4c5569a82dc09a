"""What runs where: the native kernel or the reference, for every operation of a program, and why."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jax_softmax2p.primitives import nested_computations, registration
from jax_softmax2p.primitives.attention_note import attention_note_p


class Explanation(NamedTuple):
    """What runs for one operation of a program.

    Attributes:
      operation: the name of the primitive, as jaxprs show it.
      shape: of the array that it works on, vmapped dimensions included.
      dtype: of that array.
      axis: along which the rows lie, negative.
      implementation: "native" or "reference".
      reason: why.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    implementation: Literal["native", "reference"]
    reason: str


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Says which operations of this package in a function are native, which are the reference, and why.

    Attention that no kernel takes whatever its sizes, as with a ``precision``, is called the reference, and
    followed by the softmaxes that it is composed of.

    With ``implementation=None`` small work in loops, and small derivatives, run as jax.numpy code that XLA
    fuses with its neighbours, and the rest in native kernels. The shape decides, the dtype, the operation and
    the platform; where a program runs on several devices, the shape of what lies on one of them. The table is
    in ``primitives/thresholds.py``.

    Args:
      function: a function of arrays. It is traced, not run.
      args: its arguments: arrays, or jax.ShapeDtypeStruct in their place. Others, such as an axis, are bound
        before: ``explain(functools.partial(softmax, axis=0), x)``.
      kwargs: as args.

    Returns:
      The operations in the order of the program, of which loops and branches are part. What is said holds on
      one device of the default platform; exported programs hold the reference, but for what asks for
      "native".

    Raises:
      ValueError: implementation="native" is asked for and cannot run.

    Example:
      >>> import jax
      >>> import jax_softmax2p
      >>> loop = lambda rows: jax.lax.map(jax_softmax2p.softmax, rows)
      >>> short, long = (jax.ShapeDtypeStruct((1000, n), "float32") for n in (100, 1000))
      >>> [choice] = jax_softmax2p.explain(loop, short)
      >>> choice.implementation, choice.reason
      ('reference', '100 elements in a loop: from 256 on a native call is faster')
      >>> jax_softmax2p.explain(loop, long)[0].implementation
      'native'
    """
    return list(_explain_jaxpr(jax.make_jaxpr(function)(*args, **kwargs).jaxpr))


def _explain_jaxpr(jaxpr: Jaxpr) -> Iterator[Explanation]:
    for equation in jaxpr.eqns:
        lowering = registration.LOWERINGS.get(equation.primitive)
        if isinstance(lowering, registration.KernelLowering):
            yield _explain_equation(equation, lowering)
        elif equation.primitive is attention_note_p:
            x: Any = equation.invars[0].aval
            reason = f"attention is composed: {equation.params['reason']}"
            yield Explanation("softmax2p_attention", x.shape, x.dtype.name, -1, "reference", reason)
        elif lowering is not None:
            rule = nested_computations.in_loops_too(
                lowering, multiple_results=equation.primitive.multiple_results
            )
            rule = functools.partial(rule, **equation.params)
            yield from _explain_jaxpr(jax.make_jaxpr(rule)(*(v.aval for v in equation.invars)).jaxpr)
        else:
            replace = nested_computations.REPLACEMENTS.get(equation.primitive, lambda kept: kept)
            for param in equation.params.values():
                yield from _explain_param(nested_computations.replace_implementations(param, replace))


def _explain_param(param: Any) -> Iterator[Explanation]:
    if isinstance(param, ClosedJaxpr):
        yield from _explain_jaxpr(param.jaxpr)
    elif isinstance(param, Jaxpr):
        yield from _explain_jaxpr(param)
    elif isinstance(param, tuple):
        for item in param:
            yield from _explain_param(item)


def _explain_equation(equation: Any, lowering: registration.KernelLowering) -> Explanation:
    avals, params = [v.aval for v in equation.invars], equation.params
    choice = lowering.choose_on_device(avals, params, on_cpu=jax.default_backend() == "cpu")
    x = avals[0]
    implementation: Literal["native", "reference"] = "native" if choice.lowering == "native" else "reference"
    return Explanation(
        equation.primitive.name, x.shape, x.dtype.name, params.get("axis", -1), implementation, choice.reason
    )
