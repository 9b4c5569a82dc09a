"""The primitives in the computations that operations of JAX hold: of reductions and scatters, and of loops.

XLA compiles the computations of reductions and scatters as part of the operation. Its CPU backend compiles
the reducer of a reduction, and the update of a scatter, as scalar code, and aborts the process where it finds
a custom call there. JAX lowers such a computation by the ordinary lowering rules. These cannot tell where
they are: a jitted function in it is lowered once for all of its callers. So the lowering rules of the
operations that hold such computations first choose the reference for all primitives in them. The rules of
other operations, such as ``while`` and ``cond``, lower to whole programs, where custom calls may be.

In the bodies of loops small work is to fuse with what surrounds it (``thresholds``). The lowering rules of
loops mark the primitives in them, and a primitive that is marked, and lowered to others, marks these
(``lower_fun``).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from jax_softmax2p import jax_compat
from jax_softmax2p.primitives import dispatch

_HAS_IMPLEMENTATION: dict[Primitive, Literal["params", "spec"]] = {}
"""Which of this package's primitives have an implementation: a parameter of that name, or a field of the
parameter ``spec``."""

OPERATIONS = (jax.lax.reduce_p, jax.lax.reduce_window_p, jax.lax.select_and_scatter_p, jax.lax.scatter_p)
"""JAX's primitives whose computations users write. JAX writes those of the others, such as reduce_sum."""

LOOPS = (jax.lax.while_p, jax.lax.scan_p)
"""JAX's primitives whose bodies run many times."""

Implementation = dispatch.LoweredImplementation


def add_primitive(primitive: Primitive, implementation_in: Literal["params", "spec"]) -> None:
    """Makes a primitive known that has an implementation."""
    _HAS_IMPLEMENTATION[primitive] = implementation_in


def choose_reference(implementation: Implementation) -> Implementation:
    """The implementation where XLA compiles no custom calls.

    Raises:
      ValueError: it is "native".
    """
    if implementation == "native":
        dispatch.refuse_native("XLA compiles reducers and updates of scatters without custom calls")
    return "reference"


def mark_loop(implementation: Implementation) -> Implementation:
    """The implementation in the body of a loop."""
    return "in_loop" if implementation is None else implementation


def replace_implementations(param: Any, replace: Callable[[Implementation], Implementation]) -> Any:
    """A parameter of a primitive, with other implementations of this package's primitives in all its jaxprs.

    Args:
      param: of any kind.
      replace: makes the implementation from the one that there is.

    Returns:
      The same object if none of the primitives is in it.
    """
    again = functools.partial(replace_implementations, replace=replace)
    if isinstance(param, Jaxpr):  # From jax 0.11 on, closed ones are too.
        equations = [_replace_in_equation(equation, replace) for equation in param.eqns]
        return param if _are_same(equations, param.eqns) else param.replace(eqns=equations)
    if isinstance(param, ClosedJaxpr):
        jaxpr = again(param.jaxpr)
        return param if jaxpr is param.jaxpr else param.replace(jaxpr=jaxpr)
    if isinstance(param, tuple):  # The branches of a conditional are one.
        items = [again(item) for item in param]
        if _are_same(items, param):
            return param
        return type(param)(*items) if hasattr(param, "_fields") else tuple(items)
    return param


def _replace_in_equation(equation: Any, replace: Callable[[Implementation], Implementation]) -> Any:
    params = {name: replace_implementations(value, replace) for name, value in equation.params.items()}
    match _HAS_IMPLEMENTATION.get(equation.primitive):
        case "params":
            params["implementation"] = replace(params["implementation"])
        case "spec" if (new := replace(params["spec"].implementation)) != params["spec"].implementation:
            params["spec"] = params["spec"]._replace(implementation=new)
    return (
        equation if _are_same(params.values(), equation.params.values()) else equation.replace(params=params)
    )


def _are_same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def lower_fun(function: Callable[..., Any], *, multiple_results: bool) -> Callable[..., Any]:
    """The lowering rule that a function of JAX's and of this package's primitives makes.

    Args:
      function: as function(*operands, **params), with an implementation that users may pass.
      multiple_results: whether it returns a sequence of results.
    """
    return mlir.lower_fun(
        in_loops_too(function, multiple_results=multiple_results), multiple_results=multiple_results
    )


def in_loops_too(function: Callable[..., Any], *, multiple_results: bool) -> Callable[..., Any]:
    """The function, which with the implementation "in_loop" marks the primitives that it calls.

    Args:
      function: as in :func:`lower_fun`.
      multiple_results: as in :func:`lower_fun`.
    """

    def in_place(*operands: Any, **params: Any) -> Any:
        if params.get("implementation") != "in_loop":
            return function(*operands, **params)
        call = functools.partial(function, **params | {"implementation": None})
        marked = replace_implementations(jax.make_jaxpr(call)(*operands), mark_loop)
        results = jaxpr_as_fun(marked)(*operands)
        return results if multiple_results else results[0]

    return in_place


REPLACEMENTS = dict.fromkeys(OPERATIONS, choose_reference) | dict.fromkeys(LOOPS, mark_loop)
"""What is done to implementations in the computations of JAX's primitives."""

for _operation, _replace in REPLACEMENTS.items():
    jax_compat.map_params_before_lowering(
        _operation, functools.partial(replace_implementations, replace=_replace)
    )
