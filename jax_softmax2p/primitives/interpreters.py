"""The primitives under interpreters of programs that stand apart from JAX's core: jet and checkify."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import jet
from jax.extend.core import Primitive

from jax_softmax2p import jax_compat
from jax_softmax2p.primitives.operands import fix_others


def define_interpreter_rules(primitive: Primitive, reference: Callable[..., Any]) -> None:
    """Makes a primitive known to jet and checkify.

    jet differentiates the reference, whose operations have Taylor rules. The float checks of checkify look
    for NaNs in the results, as they do for JAX's primitives.

    Args:
      primitive: the primitive.
      reference: computes its results in jax.numpy, or by other primitives, as reference(*operands, **params).
    """

    def taylor_rule(primals: Any, series: Any, **params: Any) -> Any:
        # Masks and labels have no series.
        varying = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.inexact)]
        call = fix_others(functools.partial(reference, **params), primals, varying)
        # The coefficients that rules take and return are not scaled by factorials.
        return jet.jet(
            call, [primals[i] for i in varying], [series[i] for i in varying], factorial_scaled=False
        )

    define_taylor_rule(primitive, taylor_rule)
    jax_compat.check_nans_under_checkify(primitive)


def define_taylor_rule(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Makes a primitive known to jet by rule(primals, series, **params): results and their coefficients."""
    rules: dict[Primitive, Callable[..., Any]] = jet.jet_rules
    rules[primitive] = rule
