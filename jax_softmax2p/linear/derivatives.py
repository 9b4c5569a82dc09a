"""The loss of linear layers as three primitives, so that gradients are computed together with the loss.

``linear_loss_p`` is the loss. Differentiated, it also computes the gradients for a cotangent of 1 for every
token that counts, with the same logits. ``linear_loss_jvp_p`` is its derivative, linear in the tangents,
which has these gradients as operands. What it is transposed to, ``linear_loss_vjp_p``, multiplies them by the
cotangents: those of x token by token, those of weights and bias only where all tokens that count have the
same cotangent, as in a mean. Where they differ, it computes the gradients of weights and bias again, since
they are sums over tokens. So they are right for every cotangent, and take no product more for a mean.

Being primitives, they are batched as one loss of more tokens where the weights are shared. A batched custom
VJP would make a gradient of the weights for each element of the batch.

The operands after x, weights, bias, labels and ones are known from these, and have no derivatives of their
own: the derivatives of ``linear_loss_jvp_p`` and ``linear_loss_vjp_p`` are those of the plain formula.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import ad

from jax_softmax2p.linear import blocks, formula
from jax_softmax2p.linear.blocks import Operands, Sums, Wanted
from jax_softmax2p.linear.formula import LossSpec
from jax_softmax2p.primitives.logsumexp import lse_aval
from jax_softmax2p.primitives.operands import Tangent
from jax_softmax2p.primitives.registration import bind, define_primitive
from jax_softmax2p.reference import Lse, compute_dtype

Array = jax.Array

NONE_WANTED = Wanted()


class Loss(NamedTuple):
    """What ``linear_loss_p`` returns: loss and lse of tokens, and gradients, each of size 0 unless wanted."""

    loss: Array
    hi: Array
    lo: Array
    x_bar: Array
    weights_bar: Array
    bias_bar: Array


class Known(NamedTuple):
    """The first operands of the derivatives: those of the loss, and what the loss returned but for itself.

    Their tangents, and their dimensions of a batch, stand in the same places.
    """

    x: Any
    weights: Any
    bias: Any
    labels: Any
    ones: Any
    hi: Any
    lo: Any
    x_bar: Any
    weights_bar: Any
    bias_bar: Any


OF_CLASSES = frozenset({"weights", "bias", "weights_bar", "bias_bar"})
"""Those of :class:`Known` that have no tokens, and so are the same for a batch of tokens."""


def _split(operands: Sequence[Any]) -> tuple[Known, Sequence[Any]]:
    """What is known, and the operands that follow: tangents, or a cotangent."""
    count = len(Known._fields)
    return Known(*operands[:count]), operands[count:]


def linear_loss(spec: LossSpec, operands: Sequence[Array], wanted: Wanted = NONE_WANTED) -> Loss:
    """The loss of tokens, of the lse's dtype, with the gradients that are wanted for a cotangent of ones.

    Args:
      spec: which loss.
      operands: as ``blocks.Operands``, with 1 for the tokens that count and 0 for others as the factor. The
        cotangents of the others must be 0.
      wanted: which gradients.
    """
    return Loss(*bind(linear_loss_p, *operands, spec=spec, wanted=wanted))


def compute_loss(*operands: Array, spec: LossSpec, wanted: Wanted) -> Loss:
    """What :func:`linear_loss` returns, in operations of JAX and of other primitives."""
    tokens = Operands(*operands)
    local = tokens._replace(labels=formula.sharded_labels(spec, tokens.labels, tokens.weights))
    loss, lse, sums = blocks.losses(spec, local, wanted)
    if tokens.labels.size:
        is_class = tokens.labels < spec.num_classes_everywhere(tokens.weights)
        loss = jnp.where(is_class, loss, jnp.nan)
    x_bar = None if sums.x is None else sums.x.astype(tokens.x.dtype)
    return Loss(loss, *lse, *map(_or_empty, (x_bar, sums.weights, sums.bias)))


def linear_loss_jvp(
    spec: LossSpec, operands: Sequence[Array], known: Sequence[Array], dots: Sequence[Array | None]
) -> Array:
    """The derivative of the loss along tangents of x, weights and bias, (N,); where classes are sharded, the
    part of this device's classes.

    Args:
      spec: which loss.
      operands: as for :func:`linear_loss`, with the labels of this device.
      known: the results of :func:`linear_loss` but for the loss.
      dots: the tangents, None for zero.
    """
    wanted = Wanted(*(dot is not None for dot in dots))
    given = [dot for dot in dots if dot is not None]
    return bind(linear_loss_jvp_p, *operands, *known, *given, spec=spec, wanted=wanted)


def jvp_of_loss(
    spec: LossSpec, operands: Sequence[Array], tangents: Sequence[Tangent], compute: Callable[..., Loss]
) -> tuple[Loss, Array]:
    """The loss with all that is known for its derivative, and its tangent, on this device."""
    dots = [None if isinstance(t, ad.Zero) else t for t in tangents[:3]]
    wanted = Wanted() if spec.recompute else Wanted(*(dot is not None for dot in dots))
    loss = compute(*operands, spec=spec, wanted=wanted)
    x, weights, bias, labels, ones = operands
    local = x, weights, bias, formula.sharded_labels(spec, labels, weights), ones
    return loss, linear_loss_jvp(spec, local, loss[1:], dots)


def _or_empty(a: Array | None) -> Array:
    return jnp.zeros((0,)) if a is None else a


def _loss_avals(x: ShapedArray, weights: ShapedArray, *_: Any, spec: LossSpec, wanted: Wanted) -> Loss:
    n, d = x.shape
    num_classes = weights.shape[spec.class_axis]
    dtype = compute_dtype(jnp.result_type(x, weights))
    row = lse_aval(x, -1).update(dtype=dtype)
    shaped = lambda aval, shape, dtype: aval.update(shape=shape, dtype=dtype, weak_type=False)
    empty = row.update(shape=(0,), dtype=jax.dtypes.canonicalize_dtype(float))
    return Loss(
        row,
        row,
        row,
        shaped(x, (n, d), x.dtype) if wanted.x else empty,
        shaped(weights, (d, num_classes), dtype) if wanted.weights else empty,
        row.update(shape=(num_classes,)) if wanted.bias else empty,
    )


def _loss_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, spec: LossSpec, wanted: Wanted
) -> tuple[Loss, list[Tangent]]:
    compute = lambda *operands, spec, wanted: linear_loss(spec, operands, wanted)
    loss, dot = jvp_of_loss(spec, primals, tangents, compute)
    if any(wanted):  # A derivative of higher order: these are known from the operands.
        loss = linear_loss(spec, primals, wanted)
    else:
        loss = loss._replace(**{name: _or_empty(None) for name in Loss._fields[3:]})
    return loss, [dot, *(ad.Zero(jax.typeof(a).to_tangent_aval()) for a in loss[1:])]


def _loss_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], *, spec: LossSpec, wanted: Wanted
) -> tuple[Sequence[Array], Sequence[int | None]]:
    """One loss of more tokens, or, where weights differ, one loss after the other."""
    call = functools.partial(linear_loss_p.bind, spec=spec, wanted=wanted)
    size = _batch_size(operands, dims)
    if _has_batch(dims[1:3]) or size == 0:
        return _map_batch(call, operands, dims)
    flat = [
        _flatten(a, dim, size) if i not in (1, 2) else a
        for i, (a, dim) in enumerate(zip(operands, dims, strict=True))
    ]
    results = Loss(*call(*flat))
    unflatten = lambda a: a.reshape(size, a.shape[0] // size, *a.shape[1:])
    # The gradients of weights and bias are those of the whole batch. The batch rules below know that.
    batched = [unflatten(a) for a in results[:4]]
    return [*batched, *results[4:]], [0, 0, 0, 0, None, None]


def _jvp_avals(x: ShapedArray, weights: ShapedArray, *_: Any, spec: LossSpec, wanted: Wanted) -> ShapedArray:
    aval: Any = _loss_avals(x, weights, spec=spec, wanted=NONE_WANTED).loss
    return aval


def _apply_jvp(*operands: Array, spec: LossSpec, wanted: Wanted) -> Array:
    known, dots = _split(operands)
    z = formula.logits(spec, known.x, known.weights, known.bias)
    one = jnp.ones_like(known.hi)
    total = spec.num_classes_everywhere(known.weights)
    g = formula.logits_gradient(spec, z, Lse(known.hi, known.lo), known.labels, one, total)
    return formula.apply_to_tangents(spec, g, known.x, known.weights, _expand(dots, wanted))


def _jvp_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, spec: LossSpec, wanted: Wanted
) -> tuple[Array, Array]:
    known, dots = _split(primals)
    _, tangents_of_dots = _split(tangents)

    def plain(x: Array, weights: Array, bias: Array, *dots: Array) -> Array:
        one = jnp.ones(x.shape[:1], compute_dtype(jnp.result_type(x, weights)))
        g = formula.plain_logits_gradient(spec, x, weights, bias, known.labels, one)
        return formula.apply_to_tangents(spec, g, x, weights, _expand(dots, wanted))

    varying = [*known[:3], *dots]
    directions = [*tangents[:3], *tangents_of_dots]
    result = linear_loss_jvp_p.bind(*primals, spec=spec, wanted=wanted)
    _, dot = jax.jvp(plain, varying, list(map(ad.instantiate_zeros, directions)))
    return result, dot.astype(result.dtype)


def _jvp_transpose_rule(
    cotangent: Tangent, *operands: Any, spec: LossSpec, wanted: Wanted
) -> list[Tangent | None]:
    known, dots = _split(operands)
    if isinstance(cotangent, ad.Zero):
        bars: Sequence[Tangent] = [ad.Zero(dot.aval) for dot in dots]
    else:
        bars = bind(linear_loss_vjp_p, *known, cotangent, spec=spec, wanted=wanted)
    of_dots = [bar if ad.is_undefined_primal(dot) else None for bar, dot in zip(bars, dots, strict=True)]
    return [*[None] * len(known), *of_dots]


def _jvp_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], *, spec: LossSpec, wanted: Wanted
) -> tuple[Any, Any]:
    call = functools.partial(linear_loss_jvp_p.bind, spec=spec, wanted=wanted)
    _, dots = _split(operands)
    has_tokens = [name not in OF_CLASSES for name in Known._fields]
    has_tokens += [wanted.x and i == 0 for i in range(len(dots))]
    size = _batch_size(operands, dims)
    of_classes = [dim for dim, of_tokens in zip(dims, has_tokens, strict=True) if not of_tokens]
    if _has_batch(of_classes) or size == 0:
        return _map_batch(call, *_without_sums_of_batch(operands, dims))
    flat = [
        _flatten(a, dim, size) if of_tokens else a
        for a, dim, of_tokens in zip(operands, dims, has_tokens, strict=True)
    ]
    return call(*flat).reshape(size, -1), 0


def _vjp_avals(*avals: ShapedArray, spec: LossSpec, wanted: Wanted) -> list[ShapedArray]:
    like = lambda aval: avals[0].update(
        shape=aval.shape, dtype=aval.dtype, weak_type=False, sharding=aval.sharding
    )
    return [like(aval) for aval, is_wanted in zip(avals[:3], wanted, strict=True) if is_wanted]


def _apply_vjp(*operands: Array, spec: LossSpec, wanted: Wanted) -> list[Array]:
    known, (factor,) = _split(operands)
    tokens = Operands(*known[:4], factor)
    lse = Lse(known.hi, known.lo)
    is_known = Wanted(*(bool(a.size) for a in (known.x_bar, known.weights_bar, known.bias_bar)))
    known_sums = Wanted(False, wanted.weights and is_known.weights, wanted.bias and is_known.bias)
    sums = Sums(None, known.weights_bar, known.bias_bar)
    sums = Sums(*(a if is_kept else None for a, is_kept in zip(sums, known_sums, strict=True)))
    missing = Wanted(*(a and not b for a, b in zip(wanted, is_known, strict=True)))
    results: list[Array | None] = [None, None, None]
    if any(known_sums):
        results = blocks.corrected_gradients(spec, tokens, lse, known_sums, sums, known.ones)
    if any(missing):
        again = blocks.gradients(spec, tokens, lse, missing)
        results = [a if b is None else b for a, b in zip(results, again, strict=True)]
    if wanted.x and is_known.x:
        results[0] = (known.x_bar * factor[:, None]).astype(known.x.dtype)
    return [a for a in results if a is not None]


def _vjp_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, spec: LossSpec, wanted: Wanted
) -> tuple[list[Array], list[Array]]:
    known, (factor,) = _split(primals)

    def plain(x: Array, weights: Array, bias: Array, factor: Array) -> list[Array]:
        g = formula.plain_logits_gradient(spec, x, weights, bias, known.labels, factor)
        return formula.apply_to_products(spec, g, x, weights, bias, wanted)

    dots = tuple(ad.instantiate_zeros(t) for t in (*tangents[:3], tangents[-1]))
    _, dot = jax.jvp(plain, (*known[:3], factor), dots)
    return linear_loss_vjp_p.bind(*primals, spec=spec, wanted=wanted), dot


def _vjp_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], *, spec: LossSpec, wanted: Wanted
) -> tuple[Any, Any]:
    """Each element of the batch has gradients of its own."""
    call = functools.partial(linear_loss_vjp_p.bind, spec=spec, wanted=wanted)
    return _map_batch(call, *_without_sums_of_batch(operands, dims))


def _without_sums_of_batch(
    operands: Sequence[Array], dims: Sequence[int | None]
) -> tuple[list[Array], list[int | None]]:
    """Operands without known gradients of weights and bias where these are those of a whole batch."""
    known, rest = _split(operands)
    known_dims, _ = _split(dims)
    if _has_batch([known_dims.x, known_dims.labels, known_dims.ones]):
        if known_dims.weights_bar is None:
            known = known._replace(weights_bar=_or_empty(None))
        if known_dims.bias_bar is None:
            known = known._replace(bias_bar=_or_empty(None))
    return [*known, *rest], list(dims)


def _expand(given: Sequence[Any], wanted: Wanted) -> list[Any]:
    """What is given for x, weights and bias, where that is wanted, with None elsewhere."""
    items = iter(given)
    return [next(items) if is_wanted else None for is_wanted in wanted]


def _has_batch(dims: Iterable[int | None]) -> bool:
    return any(dim is not None for dim in dims)


def _batch_size(operands: Sequence[Array], dims: Sequence[int | None]) -> int:
    return next(a.shape[dim] for a, dim in zip(operands, dims, strict=True) if dim is not None)


def _flatten(a: Array, dim: int | None, size: int) -> Array:
    """An array of tokens of a batch, as one of more tokens. One of size 0 stands for none."""
    if not a.size:
        return jnp.zeros((0,), a.dtype)
    a = jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)
    return a.reshape(size * a.shape[1], *a.shape[2:])


def _map_batch(call: Callable[..., Any], operands: Sequence[Array], dims: Sequence[int | None]) -> Any:
    """One element of the batch after the other."""
    batched = [jnp.moveaxis(a, dim, 0) for a, dim in zip(operands, dims, strict=True) if dim is not None]

    def element(batched: Sequence[Array]) -> Any:
        items = iter(batched)
        return call(*(a if dim is None else next(items) for a, dim in zip(operands, dims, strict=True)))

    result = jax.lax.map(element, batched)
    return result, jax.tree.map(lambda _: 0, result)


linear_loss_p = define_primitive(
    "softmax2p_linear_loss",
    params=("spec", "wanted"),
    spec_has_implementation=True,
    multiple_results=True,
    abstract_eval=lambda *avals, **params: list(_loss_avals(*avals, **params)),
    jvp_rule=_loss_jvp_rule,
    batch_rule=_loss_batch_rule,
    lowering=compute_loss,
)

linear_loss_jvp_p = define_primitive(
    "softmax2p_linear_loss_jvp",
    params=("spec", "wanted"),
    spec_has_implementation=True,
    abstract_eval=_jvp_avals,
    jvp_rule=_jvp_jvp_rule,
    transpose_rule=_jvp_transpose_rule,
    batch_rule=_jvp_batch_rule,
    lowering=_apply_jvp,
)

linear_loss_vjp_p = define_primitive(
    "softmax2p_linear_loss_vjp",
    params=("spec", "wanted"),
    spec_has_implementation=True,
    multiple_results=True,
    abstract_eval=_vjp_avals,
    jvp_rule=_vjp_jvp_rule,
    batch_rule=_vjp_batch_rule,
    lowering=_apply_vjp,
)
