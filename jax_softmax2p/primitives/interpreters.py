"""The primitives under interpreters of programs that stand apart from JAX's core: jet and checkify."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import jet
from jax.extend.core import Primitive

from jax_softmax2p import jax_compat


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

        def call(*varying_operands: Any) -> Any:
            replaced = dict(zip(varying, varying_operands, strict=True))
            return reference(*(replaced.get(i, x) for i, x in enumerate(primals)), **params)

        # The coefficients that rules take and return are not scaled by factorials.
        return jet.jet(
            call, [primals[i] for i in varying], [series[i] for i in varying], factorial_scaled=False
        )

    jet_rules: dict[Primitive, Callable[..., Any]] = jet.jet_rules
    jet_rules[primitive] = taylor_rule
    jax_compat.check_nans_under_checkify(primitive)
