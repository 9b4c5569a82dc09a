"""softmax, log_softmax and logsumexp as users call them."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p import native, reference, sharding
from jax_softmax2p.arguments import Axis, Bias, Logits, Where, as_logits
from jax_softmax2p.eager import jit_when_eager
from jax_softmax2p.factors import logsumexp_with_factors
from jax_softmax2p.native import Algorithm
from jax_softmax2p.primitives import log_softmax as log_softmax_primitive
from jax_softmax2p.primitives import logsumexp as logsumexp_primitive
from jax_softmax2p.primitives import softmax as softmax_primitive
from jax_softmax2p.primitives.collectives import AxisNames
from jax_softmax2p.primitives.dispatch import Implementation, choose_path
from jax_softmax2p.primitives.row_bias import add_row_bias
from jax_softmax2p.reference import Lse

Array = jax.Array


@jit_when_eager("x", "where", "scale", "bias")
def softmax(
    x: jax.typing.ArrayLike,
    axis: Axis = -1,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    axis_name: AxisNames | None = None,
    algorithm: Algorithm = "auto",
    implementation: Implementation | None = None,
) -> Array:
    r"""Softmax, by the two-pass algorithm.

    .. math:: \mathrm{softmax}(x)_i = \frac{\exp(x_i)}{\sum_j \exp(x_j)}

    A drop-in for :func:`jax.nn.softmax`, which it follows on every edge case: a row with a NaN or a +inf
    gives NaN throughout; -inf gives 0; a row of nothing but -inf gives NaN. Differentiable to any order
    in both modes.

    Args:
      x: array of logits, of any shape. float32, float64, bfloat16 and float16 have native kernels on CPUs;
        complex is computed by the reference, float8 in float32. Integers are promoted as by jnp.exp, and
        without scale, bias and axis_name their maximum is subtracted exactly before.
      axis: the axis or axes over which the result sums to 1: an integer, several, or None for all.
      where: boolean array that broadcasts to x's shape; positions where it is False take no part and
        give 0, and what x holds there, NaN included, harms nothing, in the gradient too. A row without
        a True gives zeros. Or a :class:`Band`, a mask that needs no array.
      scale: x is multiplied by it first: a real number, or an array that broadcasts to x's shape and has
        size 1 along the axis, such as a temperature's inverse for every row.
      bias: is added to scale·x: a real array that broadcasts to x's shape, or a tuple of several, each of
        which broadcasts to it by itself. With scale and bias the result has the dtype of x * scale + bias,
        and no array for that is made: kernels round scale·x + bias once, in float32 for 16-bit logits. Nor is
        one made for ``bias=(f[:, None], g[None, :])``: see below.
      axis_name: inside :func:`jax.shard_map`, the axis of the mesh, or several, along which ``axis`` is
        sharded: x, where and bias are this device's shard, and so is the result. See below.
      algorithm: "auto", or by name "two_pass" (the second pass recomputes every exponential) or
        "two_pass_reload" (it loads what the first kept), which give the same bits; "three_pass_recompute"
        and "three_pass_reload" find the maximum first, to compare with.
      implementation: None runs a native kernel where one can run and is faster, and elsewhere the jax.numpy
        reference, which XLA fuses: :func:`explain` tells. "native" is an error where none can run;
        "reference" is the reference.

    Returns:
      Array of x's shape and (promoted) dtype. float32 results are within 2 ULP of the exact softmax of the
      logits, and float64 within 4, where a native kernel runs; where the reference does, within 4 ULP in rows
      of up to 1,024 elements; subnormal results may be flushed to zero.

    Raises:
      TypeError: x, scale or bias is not an array of numbers, or axis no integer.
      ValueError: axis is out of range or given twice; where is not boolean; where, scale or bias does not
        broadcast to x's shape; scale varies along the axis; where is a Band and axis not the last;
        axis_name names no axis here, or is combined with an algorithm; algorithm or implementation is
        unknown; implementation is "native" and cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> y = jax_softmax2p.softmax(jnp.array([0.0, 0.0, jnp.nan]), where=jnp.array([True, True, False]))
      >>> y.tolist()
      [0.5, 0.5, 0.0]

      A temperature for every query, learnt as its inverse, as in selective self-attention (Zhang et al.,
      arXiv 2411.12892):

      >>> scores, inverse = jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([[0.0], [100.0]])
      >>> jax_softmax2p.softmax(scores, scale=inverse).tolist()
      [[0.5, 0.5], [0.0, 1.0]]

      The gates of a mixture of experts, softmax over the k largest of every row and 0 elsewhere (Shazeer
      et al., arXiv 1701.06538):

      >>> router = jnp.array([[3.0, 1.0, 3.0, 2.0]])
      >>> kth = jnp.sort(router)[:, -2:-1]
      >>> jax_softmax2p.softmax(router, where=router >= kth).tolist()
      [[0.5, 0.0, 0.5, 0.0]]

      A vocabulary sharded among all devices:

      >>> import jax
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("vocab",), axis_types=(AxisType.Auto,))
      >>> shard = lambda x: jax_softmax2p.softmax(x, axis_name="vocab")
      >>> f = jax.shard_map(shard, mesh=mesh, in_specs=P(None, "vocab"), out_specs=P(None, "vocab"))
      >>> jnp.sum(f(jnp.zeros((1, 8 * jax.device_count())))).item()
      1.0

    Sharded rows:
      With ``axis_name`` each device reads its shard once, and one all-gather of 8 bytes a row and device
      brings all of their sums to all devices. Results are as exact as of whole rows; gradients, and what this
      costs, are described in docs/sharding.md. Integers are not shifted by their maximum, and complex x is an
      error.

    Several biases:
      Those of size 1 along the axis do not change a softmax where they are finite, and are added to a
      logsumexp, hi + lo, afterwards: no kernel reads them. The others are added to one another, in float32
      for 16-bit logits, and rounded to x's dtype, as an array of the shape to which they broadcast without
      x: if that is x's own, an array of x's size is made. With ``axis_name``, and with the factors b of a
      logsumexp, all of them are added so.

    Source: M. Dukhan and A. Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, Algorithm 3.
    """
    native.check_algorithm(algorithm)
    if axis_name is not None and algorithm != "auto":
        raise ValueError(f"algorithm must be 'auto' where axis_name is given, got {algorithm!r}")
    logits = as_logits(
        x, axis, where, scale=scale, bias=bias, axis_name=axis_name, implementation=implementation
    )
    return softmax_of_logits(logits, algorithm=algorithm)


def softmax_of_logits(logits: Logits, *, algorithm: Algorithm = "auto", in_place: bool = False) -> Array:
    """Softmax of arguments that have been checked.

    Args:
      logits: the arguments.
      algorithm: as in :func:`softmax`.
      in_place: that x, and cotangents of the result, are not needed afterwards.
    """
    match choose_path(logits.implementation, logits.axis_name):
        case "sharded":
            y = sharding.sharded_softmax(logits)
        case "reference":
            y = reference.softmax(*logits.reference_operands(), axis=logits.axis)
        case "primitive":
            y = softmax_primitive.softmax(
                *logits.operands, algorithm=algorithm, in_place=in_place, **logits.params
            )
    return logits.restore(y)


def logsumexp_of_logits(logits: Logits, *, exact: bool = True, zero_at_minus_infinity: bool = False) -> Lse:
    """The lse of arguments that have been checked, of the merged x's shape without the axis.

    Args:
      logits: the arguments.
      exact: whether lo matters; see :func:`reference.logsumexp`.
      zero_at_minus_infinity: as in :func:`reference.logsumexp`; not for rows that are sharded, nor with
        biases of rows.
    """
    assert not zero_at_minus_infinity or (exact and not logits.axis_name and not logits.row_biases)
    match choose_path(logits.implementation, logits.axis_name):
        case "sharded":
            return sharding.sharded_logsumexp(logits)
        case "reference":
            return reference.logsumexp(
                *logits.reference_operands(),
                axis=logits.axis,
                exact=exact,
                zero_at_minus_infinity=zero_at_minus_infinity,
            )
        case "primitive":
            exact = exact or bool(logits.row_biases)
            lse = logsumexp_primitive.logsumexp(
                *logits.operands,
                exact=exact,
                zero_at_minus_infinity=zero_at_minus_infinity,
                **logits.params,
            )
            x, *operands = logits.operands
            for row_bias in logits.row_biases:
                lse = add_row_bias(x, lse, row_bias, *operands, **logits.params)
            return lse


@jit_when_eager("x", "where", "scale", "bias")
def log_softmax(
    x: jax.typing.ArrayLike,
    axis: Axis = -1,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
) -> Array:
    r"""The logarithm of the softmax, as exact where the softmax vanishes.

    .. math:: \mathrm{log\_softmax}(x)_i = x_i - \log \sum_j \exp(x_j)

    A drop-in for :func:`jax.nn.log_softmax`, which it follows on every edge case: a row with a NaN or a +inf,
    or of nothing but -inf, gives NaN throughout; -inf gives -inf.

    Args:
      x: as in :func:`softmax`.
      axis: as in :func:`softmax`.
      where: as in :func:`softmax`, but masked positions give -inf.
      scale: as in :func:`softmax`.
      bias: as in :func:`softmax`.
      axis_name: as in :func:`softmax`.
      implementation: as in :func:`softmax`.

    Returns:
      Array of x's shape and (promoted) dtype, never above 0. float32 and float64 results are within 2 ULP of
      the exact value, or 1 ULP of the row's largest logit, whichever is more, where a native kernel runs; the
      logarithm of a probability near 1 is within 4 ULP of its own size, as gradients are, however near.

    Raises:
      TypeError, ValueError: as :func:`softmax`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> jax_softmax2p.log_softmax(jnp.array([0.0, 1000.0])).tolist()
      [-1000.0, 0.0]

    Source: as :func:`softmax`; the sum is that of pass 1.
    """
    logits = as_logits(
        x, axis, where, scale=scale, bias=bias, axis_name=axis_name, implementation=implementation
    )
    match choose_path(logits.implementation, logits.axis_name):
        case "sharded":
            y = sharding.sharded_log_softmax(logits)
        case "reference":
            operands = logits.reference_operands()
            y, *_ = reference.log_softmax(*operands, axis=logits.axis, differentiable=True)
        case "primitive":
            y, *_ = log_softmax_primitive.log_softmax(*logits.operands, **logits.params)
    return logits.restore(y)


@overload
def logsumexp(
    a: jax.typing.ArrayLike,
    axis: Axis = None,
    b: jax.typing.ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
) -> Array: ...
@overload
def logsumexp(
    a: jax.typing.ArrayLike,
    axis: Axis = None,
    b: jax.typing.ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: Where = None,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]: ...
@overload
def logsumexp(
    a: jax.typing.ArrayLike,
    axis: Axis = None,
    b: jax.typing.ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]: ...
@jit_when_eager("a", "b", "where", "scale", "bias")
def logsumexp(
    a: jax.typing.ArrayLike,
    axis: Axis = None,
    b: jax.typing.ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]:
    r"""The logarithm of the sum of exponentials, in one read of the array.

    .. math:: \mathrm{logsumexp}(a) = \log \sum_j b_j \exp(a_j)

    A drop-in for :func:`jax.nn.logsumexp`, which it follows on every edge case: a NaN gives NaN, else a +inf
    +inf; nothing but -inf, or nothing at all, gives -inf. The gradient of a large array is recomputed
    from a and the result: nothing else of a's size is kept for it. That of a small one keeps the softmax.

    Args:
      a: array of logits, as x of :func:`softmax`, or of booleans, which count as 0 and 1.
      axis: the axis or axes to reduce; None for all.
      b: factors of the exponentials, of any sign. a, b and where broadcast, and axis counts the dimensions of
        the result of that. Elements with a factor of 0 take no part. For complex a or b, jax.nn.logsumexp
        computes.
      keepdims: whether the axes stay in the result, with size 1.
      return_sign: whether to return (result, sign), where sign is that of the sum.
      where: as in :func:`softmax`; what is masked adds nothing.
      scale: as in :func:`softmax`.
      bias: as in :func:`softmax`.
      axis_name: as in :func:`softmax`; cannot be combined with b, nor with complex a.
      implementation: as in :func:`softmax`.

    Returns:
      Array of a's shape without the axes, of its (promoted) dtype, of the logarithms of the sums, NaN of
      a negative one. With return_sign, that of the sum's absolute value, and an array of the signs. Results
      are within 2 ULP of the exact value or 1 ULP of the row's largest logit, whichever is more, where a
      native kernel runs. With b the sum besides is off by up to 4 ULP of the sum of all ``|b·exp(a)|``.

    Raises:
      TypeError, ValueError: as :func:`softmax`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> float(jax_softmax2p.logsumexp(jnp.full(8, 1000.0)) - 1000)
      2.0794677734375

      e^1001 - e^1000:

      >>> jax_softmax2p.logsumexp(jnp.array([1001.0, 1000.0]), b=jnp.array([1.0, -1.0])).round(2)
      Array(1000.54, dtype=float32)

    Source: pass 1 of Algorithm 3 of arXiv 2001.04438.
    """
    if b is not None and axis_name is not None:
        raise ValueError("axis_name cannot be combined with b")
    if getattr(a, "dtype", type(a)) in (jnp.bool_, bool):
        a = jnp.asarray(a).astype(jax.eval_shape(jnp.exp, a).dtype)
    if b is not None or (np.iscomplexobj(a) and axis_name is None):
        return logsumexp_with_factors(
            a,
            b,
            axis,
            where,
            scale=scale,
            bias=bias,
            keepdims=keepdims,
            return_sign=return_sign,
            implementation=implementation,
        )
    logits = as_logits(
        a,
        axis,
        where,
        scale=scale,
        bias=bias,
        axis_name=axis_name,
        implementation=implementation,
        shift_invariant=False,
        name="a",
    )
    result = logits.restore_reduced(logsumexp_of_logits(logits, exact=False).hi, keepdims)
    if not return_sign:
        return result
    # Of a sum of exponentials: 1, or 0 where there is none, or NaN.
    sign = jnp.where(result == -jnp.inf, 0, jnp.where(jnp.isnan(result), result, 1))
    return result, sign.astype(result.dtype)
