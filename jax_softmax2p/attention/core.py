"""Attention of one block: the product of query and key, the softmax in place, the product with value."""

import functools
import operator

import jax
import jax.numpy as jnp

from jax_softmax2p.arguments import as_logits
from jax_softmax2p.attention.operands import Operands, Options, Result, are_known, at_least_one
from jax_softmax2p.logits import apply_soft_cap
from jax_softmax2p.ops import logsumexp, softmax_of_logits
from jax_softmax2p.primitives.operands import Band, operand_mask

Array = jax.Array


def attention_core(
    operands: Operands, options: Options, band: Band | None = None, band_mask: Array | None = None
) -> Result:
    """Attention of all queries to all keys of the operands, whose logits are stored as a whole.

    Args:
      operands: the arrays, of (B, K, G, T, ...) without the dimensions that are mapped over.
      options: precision, dropout, implementation and whether lse is wanted.
      band: which keys the i-th query of the operands attends to.
      band_mask: the same as a boolean array of shape (T, S). At most one of the two is given.

    Returns:
      The output, and lse or None, in query's layout. Those of fully masked queries mean nothing, except that
      where :func:`fills_weights` says so their output has equal weights for all keys.
    """
    sizes = operands.sizes
    # XLA copies the product before it goes into a custom call if it has a dimension of size 1 in front.
    o = operands.squeeze([axis for axis, size in enumerate(sizes[:-2]) if size == 1])
    qk_einsum, wv_einsum = "...th,...sh->...ts", "...ts,...sh->...th"
    key, value = o.key, o.value
    if sizes[-3] != 1:
        qk_einsum, wv_einsum = "...gth,...sh->...gts", "...gts,...sh->...gth"
        key, value = key[..., 0, :, :], value[..., 0, :, :]
    logits = jnp.einsum(qk_einsum, o.query, key, precision=options.precision)
    if options.logits_soft_cap is not None:
        logits = apply_soft_cap(o.scale * logits, options.logits_soft_cap)
        o = o._replace(scale=jnp.ones_like(o.scale))
    weights, lse = _softmax(logits, o, options, band, band_mask)
    if o.fully_masked is not None and fills_weights(operands, band):
        weights = jnp.where(o.fully_masked, 1 / at_least_one(sizes[-1]), weights)
    if o.dropout_mask is not None:
        weights = jnp.where(o.dropout_mask, weights, 0)
    output = jnp.einsum(wv_einsum, weights, value, precision=options.precision)
    output = output.reshape(*sizes[:-1], value.shape[-1])
    if o.dropout_mask is not None:
        output = output / options.keep_prob
    return Result(output, None if lse is None else lse.reshape(*sizes[:-1], 1))


def fills_weights(operands: Operands, band: Band | None) -> bool:
    """Whether fully masked queries get equal weights, rather than the mean of all values in a second read.

    With dropout they must. Of few queries, as in decoding, weights are less than values.
    """
    if operands.dropout_mask is not None:
        return True
    queries, keys = operands.sizes[-2:]
    return band is None and are_known(queries, keys) and queries < operands.value.shape[-1] and keys > 0


def _softmax(
    logits: Array, operands: Operands, options: Options, band: Band | None, band_mask: Array | None
) -> tuple[Array, Array | None]:
    """The softmax of scale · logits + bias under all masks, in the memory of the logits.

    Args:
      logits: (..., T, S), without the dimensions of size 1.
      operands: scale, bias and masks, which broadcast against the logits.
      options: as in ``attention_core``, as are band and band_mask.

    Returns:
      The weights, of the logits' shape, and lse of shape (..., T, 1), or None where it is not wanted.
    """
    if band_mask is not None:
        band_mask = band_mask.reshape((1,) * (logits.ndim - 2) + band_mask.shape)
    where = all_of(operands.mask, _not(operands.q_padding), _not(operands.kv_padding), band_mask)
    if operands.bias is not None:
        # A row whose bias is -inf wherever the masks leave a key would become NaN.
        where = all_of(where, _not(operands.fully_masked))
    scale, bias, implementation = operands.scale, operands.bias, options.implementation
    lse = None
    if options.return_lse:
        lse = logsumexp(
            logits if options.lse_has_gradient else jax.lax.stop_gradient(logits),
            -1,
            where=where if band is None else operand_mask(logits.shape, where, band),
            keepdims=True,
            scale=scale,
            bias=bias,
            implementation=implementation,
        )
    softmax_logits = as_logits(
        logits, -1, where, band=band, scale=scale, bias=bias, implementation=implementation
    )
    return softmax_of_logits(softmax_logits, in_place=True), lse


def all_of(*masks: Array | None) -> Array | None:
    """The conjunction of the masks that are not None; None if all are."""
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, given) if given else None


def _not(mask: Array | None) -> Array | None:
    return None if mask is None else ~mask
