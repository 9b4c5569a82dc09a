"""Fused attention: the primitive of one native kernel that stores no logits.

Its operands are query (B, T, N, H), key (B, S, K, H), value (B, S, K, H') and scale, one element; then, as its
parameter ``names`` tells, bias and mask, which broadcast to (B, N, T, S), and int32 lengths of queries and keys
of shape (B,). The batch of any of them may be 1. Scale, bias and lse are of the dtype that attention is
computed in.

The same function of other primitives, the composed one, belongs to a layer above. ``define_attention`` takes
it: it is what the primitive is lowered to where it is not native, and what is differentiated.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from jax_softmax2p import native
from jax_softmax2p.primitives import attention_partitioning
from jax_softmax2p.primitives.dispatch import Choice, forced_choice
from jax_softmax2p.primitives.operands import Band, Tangent
from jax_softmax2p.primitives.registration import NativeLowering, define_primitive
from jax_softmax2p.reference import compute_dtype

Array = jax.Array
Rule = Callable[..., Any]

OPERAND_NAMES = ("bias", "mask", "query_lengths", "key_lengths")
"""The operands after the first four, in their order; their places are the bits of the FFI attribute."""

PARAMS = ("names", "band", "return_lse", "implementation")
"""The primitive's parameters. Without return_lse, the lse means nothing."""

LEAST_WORK = 0
"""From how many multiply-adds on the fused kernel is faster than the composed function."""


def attention_abstract_eval(
    query: ShapedArray, key: ShapedArray, value: ShapedArray, *_: ShapedArray, **__: Any
) -> tuple[ShapedArray, ShapedArray]:
    """The output (B, T, N, H') and the lse (B, T, N, 1)."""
    batch = max(query.shape[0], key.shape[0], value.shape[0])
    shape = batch, *query.shape[1:3]
    output = query.update(shape=(*shape, value.shape[3]), weak_type=False)
    return output, output.update(shape=(*shape, 1), dtype=compute_dtype(query.dtype))


def attention_batch_rule(
    primitive: Primitive, operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[tuple[Array, Array], tuple[int, int]]:
    """The new dimension becomes a part of the batch. Only where there was one are operands repeated."""
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    num_unbatched = params["names"].count("query_lengths") + params["names"].count("key_lengths")
    batch = max(
        x.shape[0 if dim is None or dim > 0 else 1] for x, dim in zip(operands[:3], dims, strict=False)
    )

    def merge(i: int, x: Array, dim: int | None) -> Array:
        if i == 3:
            return x
        is_length = i >= len(operands) - num_unbatched
        if dim is None and not is_length and (x.shape[0] == 1):
            return x
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        if x.shape[1] != batch:
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        return x.reshape(size * batch, *x.shape[2:])

    dtype, scales = operands[0].dtype, operands[3]
    if dims[3] is not None:
        # Rarely is there a scale for each. Queries take it, which must not be rounded for that.
        scales = jnp.moveaxis(scales, dims[3], 0).reshape(size, 1, 1, 1, 1)
        query, *others = (x.astype(scales.dtype) for x in operands[:3])
        query = (query if dims[0] is None else jnp.moveaxis(query, dims[0], 0)) * scales
        operands = [query, *others, jnp.ones((1,), scales.dtype), *operands[4:]]
        dims = [0, *dims[1:3], None, *dims[4:]]
    merged = [merge(i, x, dim) for i, (x, dim) in enumerate(zip(operands, dims, strict=True))]
    output, lse = primitive.bind(*merged, **params)
    split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return (split(output).astype(dtype), split(lse)), (0, 0)


def attention_jvp_rule(
    primitive: Primitive,
    composed: Rule,
    stores_weights: Callable[..., bool],
    primals: Sequence[Array],
    tangents: Sequence[Tangent],
    **params: Any,
) -> tuple[Any, Any]:
    """The tangent of the composed function; its output, too, where that keeps what the derivative needs."""
    varying = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def call(*values: Array) -> Any:
        replaced = dict(zip(varying, values, strict=True))
        return composed(*(replaced.get(i, x) for i, x in enumerate(primals)), **params)

    results, result_tangents = jax.jvp(call, [primals[i] for i in varying], [tangents[i] for i in varying])
    if not stores_weights(*primals, **params):
        results = primitive.bind(*primals, **params)
    return results, result_tangents


@dataclasses.dataclass(frozen=True)
class AttentionLowering(NativeLowering):
    """How attention is lowered: ``operation`` and ``sharded_rule`` are not asked for."""

    def choose_on_device(self, avals: Sequence[Any], params: Mapping[str, Any], *, on_cpu: bool) -> Choice:
        """By the number of multiply-adds."""
        forced = forced_choice(params["implementation"], avals[0], on_cpu=on_cpu)
        if forced is not None:
            return forced
        query, key, value = avals[:3]
        batch = max(x.shape[0] for x in avals[:3])
        work = batch * np.prod(query.shape[1:3]) * key.shape[1] * (query.shape[3] + value.shape[3])
        reason = f"{work} multiply-adds: from {LEAST_WORK} on the fused kernel is faster"
        return Choice("native" if work >= LEAST_WORK else "reference", reason)

    def lower_sharded(
        self, primitive: Primitive, ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any
    ) -> Sequence[Any]:
        """By batch and heads."""
        return attention_partitioning.lower(primitive, ctx, *operands, **params)

    def ffi_attributes(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Which operands there are, and the band; a limit of -1 is none."""
        band: Band = params["band"] or Band(None, None)
        limit = lambda x: np.int64(-1 if x is None else x)
        operands = sum(1 << OPERAND_NAMES.index(name) for name in params["names"])
        return {"operands": np.int64(operands), "before": limit(band.before), "after": limit(band.after)}


def define_attention(name: str, composed: Rule, stores_weights: Callable[..., bool]) -> Primitive:
    """Makes the primitive.

    Args:
      name: of the primitive, as jaxprs show it.
      composed: the same function of other primitives, as composed(*operands, **params).
      stores_weights: whether the composed function stores the weights for its derivative, as
        stores_weights(*operands, **params). Where it does not, it computes them again, and its output is not
        needed for the derivative.
    """
    primitive: Primitive = define_primitive(
        name,
        params=PARAMS,
        abstract_eval=attention_abstract_eval,
        jvp_rule=lambda primals, tangents, **params: attention_jvp_rule(
            primitive, composed, stores_weights, primals, tangents, **params
        ),
        batch_rule=lambda operands, dims, **params: attention_batch_rule(primitive, operands, dims, **params),
        lowering=AttentionLowering(
            operation="softmax",
            target=native.ATTENTION_TARGET,
            reference=composed,
            sharded_rule=composed,
        ),
        multiple_results=True,
    )
    return primitive
