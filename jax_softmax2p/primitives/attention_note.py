"""A note in programs that attention is composed whatever its sizes, and why. ``explain`` reads it."""

from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_softmax2p.primitives.interpreters import define_taylor_rule

Array = jax.Array

attention_note_p = Primitive("softmax2p_attention_note")
"""Returns its operand, and is lowered to nothing."""


def note_composed_attention(query: Array, reason: str) -> Array:
    """The query, with a note of why its attention is not fused."""
    noted: Array = attention_note_p.bind(query, reason=reason)
    return noted


def _identity(x: Any, *, reason: str) -> Any:
    return x


def _abstract_eval(x: ShapedArray, *, reason: str) -> ShapedArray:
    return x


def _jvp_rule(primals: Any, tangents: Any, *, reason: str) -> Any:
    return attention_note_p.bind(*primals, reason=reason), tangents[0]


def _batch_rule(operands: Any, dims: Any, *, reason: str) -> Any:
    return attention_note_p.bind(*operands, reason=reason), dims[0]


def _taylor_rule(primals: Any, series: Any, *, reason: str) -> Any:
    return primals[0], series[0]


attention_note_p.def_impl(_identity)
attention_note_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[attention_note_p] = _jvp_rule
batching.primitive_batchers[attention_note_p] = _batch_rule
mlir.register_lowering(attention_note_p, lambda ctx, x, *, reason: [x])
define_taylor_rule(attention_note_p, _taylor_rule)
