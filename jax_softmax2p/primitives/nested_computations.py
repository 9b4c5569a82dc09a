"""The primitives in the computations of reductions and scatters, which XLA compiles as part of the operation.

XLA's CPU backend compiles the reducer of a reduction, and the update of a scatter, as scalar code, and aborts
the process where it finds a custom call there. JAX lowers such a computation by the ordinary lowering rules.
These cannot tell where they are: a jitted function in it is lowered once for all of its callers. So the
lowering rules of the operations that hold such computations first choose the reference for all primitives in
them. The rules of other operations, such as ``while`` and ``cond``, lower to whole programs, where custom
calls may be.
"""

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive

from jax_softmax2p import jax_compat
from jax_softmax2p.primitives import dispatch

_PRIMITIVES_WITH_IMPLEMENTATION: set[Primitive] = set()
"""This package's primitives that have the parameter ``implementation``."""

OPERATIONS = (jax.lax.reduce_p, jax.lax.reduce_window_p, jax.lax.select_and_scatter_p, jax.lax.scatter_p)
"""JAX's primitives whose computations users write. JAX writes those of the others, such as reduce_sum."""


def add_primitive(primitive: Primitive) -> None:
    """Makes a primitive known that has the parameter ``implementation``."""
    _PRIMITIVES_WITH_IMPLEMENTATION.add(primitive)


def choose_reference(param: Any) -> Any:
    """A parameter of a primitive, with the reference for this package's primitives in all of its jaxprs.

    Returns:
      The same object if none of the primitives is in it.

    Raises:
      ValueError: one of them has implementation="native".
    """
    if isinstance(param, ClosedJaxpr):
        jaxpr = choose_reference(param.jaxpr)
        return param if jaxpr is param.jaxpr else param.replace(jaxpr=jaxpr)
    if isinstance(param, Jaxpr):
        equations = [_choose_reference_in_equation(equation) for equation in param.eqns]
        return param if _are_same(equations, param.eqns) else param.replace(eqns=equations)
    if isinstance(param, tuple):  # The branches of a conditional are one.
        items = [choose_reference(item) for item in param]
        return param if _are_same(items, param) else tuple(items)
    return param


def _choose_reference_in_equation(equation: Any) -> Any:
    params = {name: choose_reference(value) for name, value in equation.params.items()}
    if equation.primitive in _PRIMITIVES_WITH_IMPLEMENTATION:
        if params["implementation"] == "native":
            dispatch.refuse_native("XLA compiles reducers and updates of scatters without custom calls")
        params["implementation"] = "reference"
    return (
        equation if _are_same(params.values(), equation.params.values()) else equation.replace(params=params)
    )


def _are_same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


for _operation in OPERATIONS:
    jax_compat.map_params_before_lowering(_operation, choose_reference)
