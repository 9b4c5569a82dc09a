"""logsumexp_jvp_p and logsumexp_vjp_p, of which the derivative of logsumexp is made, and what they have in
common with the derivatives of log_softmax.

Their operands are x; the lse of its logits as hi and lo; labels, integers of rows, or an empty array where
there are none; and t, a tangent or cotangent, in which they are linear; then those of
``primitives.operands``. With z the logits they are made of p = e^(z - hi - lo), recomputed:

    logsumexp_jvp(t) = sum(p·t) - t[label]        logsumexp_vjp(factor) = factor·(p - one_hot(label))

Each is the other's transpose. Without labels they lack the second term.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits
from jax_softmax2p.primitives.operands import OperandSpec, Tangent, move_batch_to_front, reference_rule
from jax_softmax2p.primitives.registration import NativeLowering, Rule, bind, define_primitive
from jax_softmax2p.reference import Lse

Array = jax.Array

PARAMS = ("axis", "spec", "implementation")
"""The parameters of logsumexp, log_softmax and these derivatives."""

NUM_LEADING_OPERANDS = 5
"""x, hi, lo, labels and t."""

NO_LABELS_SHAPE = (0,)
"""The shape of the operand labels where there are none."""


def logsumexp_jvp(
    x: Array, hi: Array, lo: Array, labels: Array, t: Array, *operands: Array, **params: Any
) -> Array:
    """The derivative of the lse along t, minus t at the labels; of hi's shape and dtype.

    Args:
      x: of an inexact dtype.
      hi: of the lse, and lo.
      lo: as hi.
      labels: int32 of hi's shape, from 0 to the size of the axis, which stands for no class; or
        :func:`no_labels`.
      t: a tangent of the logits, of x's shape and dtype.
      operands: those of ``spec``, see ``primitives.operands``.
      params: axis (negative), spec, implementation.
    """
    return bind(logsumexp_jvp_p, x, hi, lo, labels, t, *operands, **params)


def logsumexp_vjp(
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    *operands: Array,
    shares_forward: bool = False,
    **params: Any,
) -> Array:
    """The transpose of :func:`logsumexp_jvp`, of x's shape and dtype, for a factor of hi's.

    ``shares_forward`` is that of :func:`reference.logsumexp_vjp`.
    """
    operands = (x, hi, lo, labels, factor, *operands)
    return bind(logsumexp_vjp_p, *operands, shares_forward=shares_forward, **params)


def jvp_of_kept(x: Array, lse: Lse, labels: Array, t: Array, *operands: Array, **params: Any) -> Array:
    """:func:`logsumexp_jvp` by a derivative that is kept, made with the lse: XLA fuses its product."""
    one = jnp.ones_like(lse.hi)
    kept = logsumexp_vjp(x, *lse, labels, one, *operands, shares_forward=True, **params)
    return jnp.sum(kept * t, params["axis"])


def no_labels() -> Array:
    """The operand of a derivative without labels."""
    # An iota is made on the device. Zeros would be a number that is transferred from the host.
    return jax.lax.iota(jnp.int32, *NO_LABELS_SHAPE)


def lse_attributes(*, spec: OperandSpec, **_: Any) -> dict[str, Any]:
    """The attributes of the FFI targets of primitives with PARAMS."""
    return dict(spec.ffi_attributes())


def define_lse_derivative(
    name: str,
    *,
    apply: Rule,
    transposed: Rule,
    change_rule: Rule,
    abstract_eval: Rule,
    lowering: NativeLowering | Rule,
    params: tuple[str, ...] = PARAMS,
    eager_params: Mapping[str, Any] | None = None,
) -> Primitive:
    """Makes a primitive that is linear in t.

    Args:
      name: as in :func:`define_primitive`.
      apply: applies the primitive, as apply(*operands, **params).
      transposed: the same of the primitive that is its transpose in t.
      change_rule: by how much the result changes with z - hi - lo, as change_rule(change, *operands,
        **params), where the change has x's shape.
      abstract_eval: the result's abstract value but for its weak type, from those of the operands.
      lowering: as in :func:`define_primitive`.
      params: as in :func:`define_primitive`; its transpose gets those of PARAMS.
      eager_params: as in :func:`define_primitive`.
    """

    def abstract_eval_rule(*avals: ShapedArray, **_: Any) -> ShapedArray:
        return abstract_eval(*avals).update(weak_type=False)

    def jvp_rule(
        primals: Sequence[Array], tangents: Sequence[Tangent], **params: Any
    ) -> tuple[Array, Tangent]:
        terms: list[Array] = []
        change = _change_of_log_probabilities(primals, tangents, params["spec"], params["axis"])
        if change is not None:
            terms.append(change_rule(change, *primals, **params))
        if not isinstance(tangents[4], ad.Zero):
            terms.append(apply(*primals[:4], tangents[4], *primals[5:], **params))
        return apply(*primals, **params), sum(terms[1:], terms[0])

    def transpose_rule(
        cotangent: Tangent,
        x: Array,
        hi: Array,
        lo: Array,
        labels: Array,
        t: ad.UndefinedPrimal,
        *operands: Array,
        **params: Any,
    ) -> list[Tangent | None]:
        assert ad.is_undefined_primal(t), "linear in t alone"
        if isinstance(cotangent, ad.Zero):
            t_bar: Tangent = ad.Zero(t.aval)
        else:
            common = {name: params[name] for name in PARAMS}
            t_bar = transposed(x, hi, lo, labels, cotangent, *operands, **common)
        return [None, None, None, None, t_bar, *(None for _ in operands)]

    def batch_rule(operands: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
        batched = move_batch_to_front(operands, dims, NUM_LEADING_OPERANDS)
        if operands[3].shape == NO_LABELS_SHAPE:
            batched[3] = operands[3]
        return apply(*batched, **params), 0

    return define_primitive(
        name,
        params=params,
        abstract_eval=abstract_eval_rule,
        jvp_rule=jvp_rule,
        transpose_rule=transpose_rule,
        batch_rule=batch_rule,
        lowering=lowering,
        eager_params=eager_params,
    )


def _change_of_log_probabilities(
    primals: Sequence[Array], tangents: Sequence[Tangent], spec: OperandSpec, axis: int
) -> Array | None:
    """The tangent of z - hi - lo, of x's shape, in the dtype of hi; None if it is a symbolic zero."""
    x, hi, *_ = primals
    x_dot, hi_dot, lo_dot, *_ = tangents
    operands, operands_dot = spec.unpack(primals), spec.unpack(tangents)
    logits_dots = (x_dot, operands_dot.scale, operands_dot.bias)
    terms: list[Array] = []
    if any(dot is not None and not isinstance(dot, ad.Zero) for dot in logits_dots):
        logits_dot = tangent_of_logits(x, x_dot, operands, operands_dot, spec.band)
        terms.append(logits_dot.astype(hi.dtype))
    terms += [-jnp.expand_dims(dot, axis) for dot in (hi_dot, lo_dot) if not isinstance(dot, ad.Zero)]
    return sum(terms[1:], terms[0]) if terms else None


def logsumexp_jvp_change(
    change: Array, x: Array, hi: Array, lo: Array, labels: Array, t: Array, *operands: Array, **params: Any
) -> Array:
    """sum(p·change·t): the labels' term does not change."""
    changed = (change * t.astype(change.dtype)).astype(x.dtype)
    return logsumexp_jvp(x, hi, lo, no_labels(), changed, *operands, **params)


def logsumexp_jvp_sharded_rule(
    axis_names: tuple[str, ...],
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    *operands: Array,
    **params: Any,
) -> Array:
    """One all-reduce of one number a row; each shard has the labels that lie in it."""
    labels = collectives.local_labels(labels, x.shape[params["axis"]], axis_names)
    return jax.lax.psum(logsumexp_jvp(x, hi, lo, labels, t, *operands, **params), axis_names)


def logsumexp_vjp_change(
    change: Array,
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    *operands: Array,
    **params: Any,
) -> Array:
    """factor·p·change: the labels' term does not change."""
    weights = logsumexp_vjp(x, hi, lo, no_labels(), factor, *operands, **params)
    return (weights * change).astype(x.dtype)


def logsumexp_vjp_sharded_rule(
    axis_names: tuple[str, ...],
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    *operands: Array,
    **params: Any,
) -> Array:
    """No communication; each shard has the labels that lie in it."""
    params["shares_forward"] = False  # The logsumexp of whole rows is not that of this shard.
    labels = collectives.local_labels(labels, x.shape[params["axis"]], axis_names)
    return logsumexp_vjp(x, hi, lo, labels, factor, *operands, **params)


logsumexp_jvp_p = define_lse_derivative(
    "softmax2p_logsumexp_jvp",
    apply=logsumexp_jvp,
    transposed=logsumexp_vjp,
    change_rule=logsumexp_jvp_change,
    abstract_eval=lambda x, hi, *_: hi,
    lowering=NativeLowering(
        operation="derivative of logsumexp",
        labelled_operation="derivative of cross-entropy",
        target=native.LOGSUMEXP_JVP_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.logsumexp_jvp),
        sharded_rule=logsumexp_jvp_sharded_rule,
    ),
)

logsumexp_vjp_p = define_lse_derivative(
    "softmax2p_logsumexp_vjp",
    apply=logsumexp_vjp,
    transposed=logsumexp_jvp,
    change_rule=logsumexp_vjp_change,
    abstract_eval=lambda x, *_: x,
    params=(*PARAMS, "shares_forward"),
    lowering=NativeLowering(
        operation="derivative of logsumexp",
        labelled_operation="derivative of cross-entropy",
        target=native.LOGSUMEXP_VJP_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.logsumexp_vjp, "shares_forward"),
        sharded_rule=logsumexp_vjp_sharded_rule,
    ),
)
