"""Softmaxes along an axis that is sharded among devices, inside ``jax.shard_map``.

Each device reads its shard once, for the lse of that. One all-gather brings every shard's to every device;
what follows from the lse of the whole row needs no communication more.

Sums of exponentials travel as their logarithms, hi + lo: pairs as large as (mantissa, exponent), good to
2^-42 for float32, where a mantissa of 24 bits would take half of the 2 ULP that results may be off by.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from jax_softmax2p import reference
from jax_softmax2p.arguments import Logits
from jax_softmax2p.jax_compat import all_gather_invariant, as_varying
from jax_softmax2p.primitives import collectives, log_softmax, logsumexp, softmax
from jax_softmax2p.primitives.dispatch import Implementation
from jax_softmax2p.primitives.logsumexp_derivatives import logsumexp_jvp, no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_from_operands
from jax_softmax2p.primitives.operands import OperandSpec
from jax_softmax2p.reference import Lse

Array = jax.Array
_Primals = tuple[Array, ...]
_Tangents = tuple[Array | SymbolicZero, ...]
_CrossEntropy = tuple[Array, Lse, Array]


class _Static(NamedTuple):
    """What the functions with derivatives of their own take as one hashable argument.

    Attributes:
      axis_names: the mesh axes over which rows are sharded.
      axis: the primitives' parameter, as are the others.
      spec: without a band.
      implementation: as users pass it.
    """

    axis_names: tuple[str, ...]
    axis: int
    spec: OperandSpec
    implementation: Implementation | None

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the primitives."""
        return {"axis": self.axis, "spec": self.spec, "implementation": self.implementation}


def sharded_softmax(logits: Logits) -> Array:
    """The softmax of this shard of the rows, in the merged x's shape and dtype."""
    return _softmax(*_prepared(logits))


def sharded_log_softmax(logits: Logits) -> Array:
    """The logarithm of the softmax of this shard of the rows, in the merged x's shape and dtype."""
    static, x, *operands = _prepared(logits)
    return log_softmax.subtract_lse(x, _logsumexp(static, x, *operands), *operands, **static.params)


def sharded_logsumexp(logits: Logits) -> Lse:
    """The lse of whole rows, of x's shape without the axis."""
    return _logsumexp(*_prepared(logits))


def sharded_cross_entropy(logits: Logits, labels: Array) -> Array:
    """The lse of whole rows minus the logit at the label; 0 for rows without a True in their mask.

    Args:
      logits: this shard of the rows.
      labels: int32 of rows, from 0 to the size of the whole row, which stands for no class.
    """
    static, x, *operands = _prepared(logits)
    return _cross_entropy(static, x, labels, *operands)[0]


def _prepared(logits: Logits) -> tuple[Any, ...]:
    """What the functions below take: the static argument, x, and the other operands."""
    axis_names = logits.axis_name
    assert axis_names is not None, "for rows that are sharded"
    x = logits.operands[0]
    collectives.check_derivatives(x, axis_names)
    first = collectives.shard_index(axis_names) * x.shape[logits.axis]
    operands, spec = logits.spec.band_to_mask(logits.operands, 0, first)
    static = _Static(axis_names, logits.axis, spec, logits.implementation)
    return static, *(as_varying(operand, axis_names) for operand in operands)


def _tangent(static: _Static, primals: _Primals, tangents: _Tangents) -> Array:
    """That of the logits, of x's shape."""
    dots = [ad.Zero(dot.aval) if isinstance(dot, SymbolicZero) else dot for dot in tangents]
    return tangent_from_operands(primals, dots, static.spec)


def _gather(static: _Static, x: Array, operands: Sequence[Array], *of_rows: Array) -> tuple[Lse, list[Array]]:
    """The lse of whole rows; and further arrays of rows, with those of all shards along a new first axis.

    All of them travel in one all-gather, in the dtype of the lse.
    """
    lse = logsumexp.logsumexp(x, *operands, exact=True, **static.params)
    shard = jnp.stack(jnp.broadcast_arrays(*lse, *(array.astype(lse.hi.dtype) for array in of_rows)))
    gathered = all_gather_invariant(shard, static.axis_names)
    hi, lo, *rest = (gathered[:, i] for i in range(len(shard)))
    return logsumexp.combine_shards(Lse(hi, lo), **static.params), rest


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _logsumexp(static: _Static, x: Array, *operands: Array) -> Lse:
    lse, _ = _gather(static, x, operands)
    return lse


@functools.partial(_logsumexp.defjvp, symbolic_zeros=True)
def _logsumexp_jvp(static: _Static, primals: _Primals, tangents: _Tangents) -> tuple[Lse, Lse]:
    x, *operands = primals
    lse = _logsumexp(static, *primals)
    dot = _derivative_of_lse(static, x, lse, no_labels(), _tangent(static, primals, tangents), operands)
    return lse, Lse(dot, jnp.zeros_like(lse.lo))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(static: _Static, x: Array, *operands: Array) -> Array:
    lse = _logsumexp(static, x, *operands)
    return softmax.softmax_from_lse(x, lse, *operands, **static.params)


@functools.partial(_softmax.defjvp, symbolic_zeros=True)
def _softmax_jvp(static: _Static, primals: _Primals, tangents: _Tangents) -> tuple[Array, Array]:
    y = _softmax(static, *primals)
    reduce_shards = lambda dot: jax.lax.psum(dot, static.axis_names)
    t = _tangent(static, primals, tangents)
    return y, reference.softmax_jacobian(y, t, axis=static.axis, reduce_shards=reduce_shards)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, x: Array, labels: Array, *operands: Array) -> _CrossEntropy:
    """The loss; and, for the sake of the derivatives, the lse, and 1 for rows with a True in their mask."""
    size = x.shape[static.axis]
    index = jnp.expand_dims(collectives.local_labels(labels, size, static.axis_names), static.axis)
    # One past the end, where it is another shard's, gives 0; of all shards together one adds the label's
    # logit.
    logit = jnp.take_along_axis(x, index, static.axis, mode="fill", fill_value=0).squeeze(static.axis)
    where = static.spec.unpack(operands).where
    masks = [] if where is None else [jnp.any(where, static.axis)]
    lse, (logits, *masks) = _gather(static, x, operands, logit, *masks)
    whole = size * logits.shape[0]
    logit = jnp.where(labels < whole, jnp.sum(logits, 0), jnp.nan)
    loss = (lse.hi - logit) + lse.lo
    unmasked = jnp.max(masks[0], 0) if masks else jnp.ones_like(loss)
    return jnp.where(unmasked > 0, loss, 0), lse, unmasked


@functools.partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _cross_entropy_jvp(
    static: _Static, primals: _Primals, tangents: _Tangents
) -> tuple[_CrossEntropy, _CrossEntropy]:
    x, labels, *operands = primals
    loss, lse, unmasked = _cross_entropy(static, *primals)
    t = jnp.zeros_like(x) if isinstance(tangents[0], SymbolicZero) else tangents[0]
    local = collectives.local_labels(labels, x.shape[static.axis], static.axis_names)
    dot, hi_dot = (_derivative_of_lse(static, x, lse, which, t, operands) for which in (local, no_labels()))
    loss_dot = jnp.where(unmasked > 0, dot, 0)
    lse_dot = Lse(hi_dot, jnp.zeros_like(lse.lo))
    return (loss, lse, unmasked), (loss_dot, lse_dot, jnp.zeros_like(unmasked))


def _derivative_of_lse(
    static: _Static, x: Array, lse: Lse, labels: Array, t: Array, operands: Sequence[Array]
) -> Array:
    """The derivative of the lse of whole rows along t, minus t at the labels, by one all-reduce."""
    dot = logsumexp_jvp(x, *lse, labels, t, *operands, **static.params)
    return jax.lax.psum(dot, static.axis_names)
