"""Fused attention: the primitive of one native kernel that stores no logits.

Its operands are those that ``attention_lowering`` describes. Its results are the output and the lse, which,
like scale and bias, is of the dtype that attention is computed in, as hi, its rounding, and lo: the gradient
computes weights as e^(logit - lse), which a rounding by log n, as of an lse of 1e9, would multiply by n.

The same function of other primitives, the composed one, belongs to a layer above. ``define_attention`` takes
it: it is what the primitive is lowered to where it is not native, and what is differentiated but for the
gradient in query, key, value and a bias.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad
from jax.sharding import PartitionSpec

from jax_softmax2p import native
from jax_softmax2p.primitives.attention_gradient import (
    AttentionDerivatives,
    attention_jvp,
    define_attention_derivatives,
)
from jax_softmax2p.primitives.attention_lowering import (
    PARAMS,
    AttentionLowering,
    batch_entry,
    batch_of,
    fold_batch,
    roles_of,
)
from jax_softmax2p.primitives.operands import Tangent, fix_others
from jax_softmax2p.primitives.registration import define_primitive
from jax_softmax2p.reference import compute_dtype

Array = jax.Array
Rule = Callable[..., Any]


def attention_abstract_eval(
    query: ShapedArray,
    key: ShapedArray,
    value: ShapedArray,
    *others: ShapedArray,
    names: tuple[str, ...],
    **_: Any,
) -> tuple[ShapedArray, ShapedArray]:
    """The output (B, T, N, H') and the lse (B, T, N, 2)."""
    operands, roles = (query, key, value, *others), roles_of(names, 3, 0)
    shape = batch_of(operands, roles), *query.shape[1:3]
    partition = PartitionSpec(batch_entry(operands, roles), *query.sharding.spec[1:])
    sharding = query.sharding.update(spec=partition)
    output = query.update(shape=(*shape, value.shape[3]), weak_type=False, sharding=sharding)
    return output, output.update(shape=(*shape, 2), dtype=compute_dtype(query.dtype))


def attention_batch_rule(
    primitive: Primitive, operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[tuple[Array, Array], tuple[int, int]]:
    """The new dimension becomes a part of the batch. Only where there was one are operands repeated."""
    dtype, scales = operands[0].dtype, operands[3]
    if dims[3] is not None:
        # Rarely is there a scale for each. Queries take it, which must not be rounded for that.
        scales = jnp.moveaxis(scales, dims[3], 0).reshape(-1, 1, 1, 1, 1)
        query, *others = (x.astype(scales.dtype) for x in operands[:3])
        query = (query if dims[0] is None else jnp.moveaxis(query, dims[0], 0)) * scales
        operands = [query, *others, jnp.ones((1,), scales.dtype), *operands[4:]]
        dims = [0, *dims[1:3], None, *dims[4:]]
    folded, split = fold_batch(operands, dims, roles_of(params["names"], 3, 0), broadcast=False)
    output, lse = primitive.bind(*folded, **params)
    return (split(output).astype(dtype), split(lse)), (0, 0)


def attention_jvp_rule(
    primitive: Primitive,
    derivatives: AttentionDerivatives,
    composed: Rule,
    stores_weights: Callable[..., bool],
    primals: Sequence[Array],
    tangents: Sequence[Tangent],
    **params: Any,
) -> tuple[Any, Any]:
    """The result is fused, and the tangent linear in those of query, key, value, bias and sinks, with a
    native transpose.

    All is composed where that stores the weights for the gradient, and the tangent in scale always, as in a
    bias that broadcasts over keys.
    """

    def composed_jvp(among: Sequence[int]) -> tuple[Any, Any]:
        varying = [i for i in among if not isinstance(tangents[i], ad.Zero)]
        call = fix_others(functools.partial(composed, **params), primals, varying)
        return jax.jvp(call, [primals[i] for i in varying], [tangents[i] for i in varying])

    if stores_weights(*primals, **params):
        return composed_jvp(range(len(primals)))
    # The gradient may be native where this is not, as in a loop over cotangents, and needs the lse then.
    output, lse = primitive.bind(*primals, **params | {"return_lse": True})
    terms = []
    places = {name: 4 + i for i, name in enumerate(params["names"])}

    def is_linear(name: str) -> bool:
        if name == "bias":
            i = places[name]
            return primals[i].shape[3] == primals[1].shape[1] and not isinstance(tangents[i], ad.Zero)
        return name == "sinks"

    names = tuple(filter(is_linear, params["names"]))
    linear = (0, 1, 2, *(places[name] for name in names))
    if not all(isinstance(tangents[i], ad.Zero) for i in linear):
        arrays = [ad.instantiate_zeros(tangents[i]) for i in linear]
        operands = *primals[:4], output, lse, *arrays, *primals[4:]
        terms.append(attention_jvp(derivatives.jvp, *operands, linear=names, **params))
    others = [i for i in range(len(primals)) if i not in linear]
    if not all(isinstance(tangents[i], ad.Zero) for i in others):
        terms.append(composed_jvp(others)[1][0])
    return (output, lse), (sum(terms[1:], terms[0]), ad.Zero(jax.typeof(lse)))


def define_attention(name: str, composed: Rule, stores_weights: Callable[..., bool]) -> Primitive:
    """Makes the primitive.

    Args:
      name: of the primitive, as jaxprs show it.
      composed: the same function of other primitives, as composed(*operands, **params).
      stores_weights: whether the composed function stores the weights for its derivative, and is to be
        differentiated itself, as stores_weights(*operands, **params).
    """
    derivatives = define_attention_derivatives(name, composed)
    primitive: Primitive = define_primitive(
        name,
        params=PARAMS,
        abstract_eval=attention_abstract_eval,
        jvp_rule=lambda primals, tangents, **params: attention_jvp_rule(
            primitive, derivatives, composed, stores_weights, primals, tangents, **params
        ),
        batch_rule=lambda operands, dims, **params: attention_batch_rule(primitive, operands, dims, **params),
        lowering=AttentionLowering(target=native.ATTENTION_TARGET, reference=composed),
        multiple_results=True,
    )
    return primitive
