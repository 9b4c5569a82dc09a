"""softmax, log_softmax and logsumexp as users call them."""

import jax
import jax.numpy as jnp
import numpy as np

# By name: inside patch_jax_nn() jax.nn's attribute is this module's own function.
from jax.nn import logsumexp as logsumexp_of_jax

from jax_softmax2p import native, reference, sharding
from jax_softmax2p.arguments import Axis, Band, Logits, Where, as_logits
from jax_softmax2p.primitives import log_softmax as log_softmax_primitive
from jax_softmax2p.primitives import logsumexp as logsumexp_primitives
from jax_softmax2p.primitives import softmax as softmax_primitive
from jax_softmax2p.primitives.collectives import Names
from jax_softmax2p.primitives.operands import operand_mask

Array = jax.Array


def softmax(
    x: jax.typing.ArrayLike,
    axis: Axis = -1,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    axis_name: Names | None = None,
    algorithm: str = "auto",
    implementation: str | None = None,
) -> Array:
    r"""Softmax, by the two-pass algorithm.

    .. math:: \mathrm{softmax}(x)_i = \frac{\exp(x_i)}{\sum_j \exp(x_j)}

    A drop-in for :func:`jax.nn.softmax`, which it follows on every edge case: a row with a NaN or a +inf
    gives NaN throughout; -inf gives 0; a row of nothing but -inf gives NaN. Differentiable to any order
    in both modes.

    Args:
      x: array of logits, of any shape. float32, float64, bfloat16 and float16 have native kernels on CPUs;
        complex is computed by the reference, float8 in float32. Integers are promoted as by jnp.exp, after
        their maximum has been subtracted exactly.
      axis: the axis or axes over which the result sums to 1: an integer, several, or None for all.
      where: boolean array that broadcasts to x's shape; positions where it is False take no part and
        give 0, and what x holds there, NaN included, harms nothing, in the gradient too. A row without
        a True gives zeros. Or a :class:`Band`, a mask that needs no array.
      scale: x is multiplied by it first: a real number, or an array that broadcasts to x's shape and has
        size 1 along the axis, such as a temperature's inverse for every row.
      bias: is added to scale·x: a real array that broadcasts to x's shape. With scale and bias the result has
        the dtype of x * scale + bias, and no array for that is made: scale·x + bias is rounded once, in
        float32 for 16-bit logits.
      axis_name: inside :func:`jax.shard_map`, the axis of the mesh, or several, along which ``axis`` is
        divided among devices: x, where and bias are this device's part, and so is the result. See below.
      algorithm: "auto", or by name "two_pass" (the second pass recomputes every exponential) or
        "two_pass_reload" (it loads what the first kept), which give the same bits; "three_pass_recompute"
        and "three_pass_reload" find the maximum first, to compare with.
      implementation: None runs a native kernel where one can run and the jax.numpy reference elsewhere;
        "native" is an error where none can; "reference" is the reference.

    Returns:
      Array of x's shape and (promoted) dtype. float32 results are within 2 ULP of the exact softmax of the
      logits, and float64 within 4, where a native kernel runs; subnormal results may be flushed to zero.

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

      A vocabulary in parts on all devices:

      >>> import jax
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("vocab",), axis_types=(AxisType.Auto,))
      >>> part = lambda x: jax_softmax2p.softmax(x, axis_name="vocab")
      >>> f = jax.shard_map(part, mesh=mesh, in_specs=P(None, "vocab"), out_specs=P(None, "vocab"))
      >>> jnp.sum(f(jnp.zeros((1, 8 * jax.device_count())))).item()
      1.0

    Rows in parts:
      Each device reads its part once, for the logsumexp of that; one all-gather brings the pairs of all S parts
      to all devices, each of which then finishes its part. The usual way, the maximum and then the sum of
      exponentials, takes two all-reduces, the second of which waits for a second read. Bytes that a device
      receives for B rows of float32, where all-reduces are made of reduce-scatter and all-gather:

      ==================  =======================  ====================================
      forwards            here                     maximum, then sum
      ==================  =======================  ====================================
      softmax, logsumexp  1 · 8·B·(S - 1)          2 all-reduces, 16·B·(S - 1)/S
      integer labels      1 · 12·B·(S - 1)         2 or 3 all-reduces, 24·B·(S - 1)/S
      ==================  =======================  ====================================

      (with a mask, 4·B·(S - 1) more for labels: whether a row has a True at all). The gradients of logsumexp
      and of the cross-entropy take no collective more: their factor is one number a row, which all devices
      have. Those of softmax and log_softmax take one all-reduce of one number a row, <y, t> or the sum of the
      cotangents, as any way does: it is a sum over the whole row of what the backward pass brings. (Where
      shard_map is told not to check what varies, JAX adds one of its own, as for jax.lax.psum.)

      With a latency of L for each of the log2(S) steps of an all-gather, twice as many for an all-reduce, and
      W bytes a second, one collective is faster up to some B = L·W·log2(S)/(4·S) rows. Carried on paper to 64
      machines with 10^7 classes, 50 µs and 10 Gbit/s: 0.3 ms against 1.2 ms for one row, 0.9 against 1.2 ms
      for 1,024, equal at some 1,500. Of 1,024 rows a machine has 1.6·10^8 logits then, which take 0.15 s and
      more: what counts is that they are read twice and not three times, with one exponential each time.

      Measured (python -m benchmarks.vocab_parallel; integer labels with a mask, B = 64, 10^6 classes): the
      all-gather's result is 2, 4 and 8 KiB for S = 2, 4 and 8, 16·B·S as above with the device's own part;
      the all-reduces' 256 and 512 bytes. A step with its matrix products is 1.31 to 1.51 times as fast.

      Results are as exact as of whole rows. Sums over cotangents are XLA's, in float32: the gradient of
      softmax is within 4 ULP of the row's largest |y·t| rather than of its own largest entry, that of
      log_softmax within some 32 ULP of its largest entry. Integers are not shifted by their maximum, and
      complex x is an error.

    Source: M. Dukhan and A. Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, Algorithm 3.
    """
    native.check_algorithm(algorithm)
    if axis_name is not None and algorithm != "auto":
        raise ValueError(f"algorithm must be 'auto' where axis_name is given, got {algorithm!r}")
    logits = as_logits(
        x, axis, where, scale=scale, bias=bias, axis_name=axis_name, implementation=implementation
    )
    return softmax_of_logits(logits, algorithm=algorithm)


def softmax_of_logits(logits: Logits, *, algorithm: str = "auto", in_place: bool = False) -> Array:
    """Softmax of arguments that have been checked.

    Args:
      logits: the arguments.
      algorithm: as in :func:`softmax`.
      in_place: that x, and cotangents of the result, are not needed afterwards.
    """
    if logits.axis_name is not None:
        return logits.restore(sharding.softmax(logits))
    if logits.params["implementation"] == "reference":
        return logits.restore(reference.softmax(logits.operands[0], **logits.reference_operands()))
    y = softmax_primitive.softmax(*logits.operands, algorithm=algorithm, in_place=in_place, **logits.params)
    return logits.restore(y)


def logsumexp_of_logits(logits: Logits) -> tuple[Array, Array]:
    """The logsumexp of arguments that have been checked: its rounding, and what that leaves."""
    if logits.axis_name is not None:
        return sharding.logsumexp(logits)
    if logits.params["implementation"] == "reference":
        return reference.logsumexp(logits.operands[0], **logits.reference_operands())
    return logsumexp_primitives.logsumexp(*logits.operands, **logits.params)


def log_softmax(
    x: jax.typing.ArrayLike,
    axis: Axis = -1,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    axis_name: Names | None = None,
    implementation: str | None = None,
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
      the exact value, 1 ULP of the row's largest logit, or 2^-50, whichever is most, where a native kernel
      runs.

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
    if axis_name is not None:
        y = sharding.log_softmax(logits)
    elif implementation == "reference":
        y, *_ = reference.log_softmax(logits.operands[0], **logits.reference_operands())
    else:
        y, *_ = log_softmax_primitive.log_softmax(*logits.operands, **logits.params)
    return logits.restore(y)


def logsumexp(
    a: jax.typing.ArrayLike,
    axis: Axis = None,
    b: jax.typing.ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Where = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    axis_name: Names | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    r"""The logarithm of the sum of exponentials, in one read of the array.

    .. math:: \mathrm{logsumexp}(a) = \log \sum_j b_j \exp(a_j)

    A drop-in for :func:`jax.nn.logsumexp`, which it follows on every edge case: a NaN gives NaN, else a +inf
    +inf; nothing but -inf, or nothing at all, gives -inf. The gradient is recomputed from a and the result:
    nothing else of a's size is kept for it.

    Args:
      a: array of logits, as x of :func:`softmax`.
      axis: the axis or axes to reduce; None for all.
      b: factors of the exponentials, which broadcast with a. With them, and for complex a, it is
        jax.nn.logsumexp that computes.
      keepdims: whether the axes stay in the result, with size 1.
      return_sign: whether to return (result, sign), where sign is that of the sum.
      where: as in :func:`softmax`; what is masked adds nothing.
      scale: as in :func:`softmax`.
      bias: as in :func:`softmax`.
      axis_name: as in :func:`softmax`; cannot be combined with b, nor with complex a.
      implementation: as in :func:`softmax`; "native" cannot be combined with b.

    Returns:
      Array of a's shape without the axes, of its (promoted) dtype; and its like, with signs. Results are
      within 2 ULP of the exact value or 1 ULP of the row's largest logit, whichever is more, where a native
      kernel runs.

    Raises:
      TypeError, ValueError: as :func:`softmax`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> float(jax_softmax2p.logsumexp(jnp.full(8, 1000.0)) - 1000)
      2.0794677734375

    Source: pass 1 of Algorithm 3 of arXiv 2001.04438.
    """
    if b is not None and axis_name is not None:
        raise ValueError("axis_name cannot be combined with b")
    if b is not None or (np.iscomplexobj(a) and axis_name is None):
        return _general_logsumexp(a, axis, b, keepdims, return_sign, where, scale, bias, implementation)
    logits = as_logits(
        a,
        axis,
        where,
        scale=scale,
        bias=bias,
        axis_name=axis_name,
        implementation=implementation,
        shift_integers=False,
        name="a",
    )
    hi, _ = logsumexp_of_logits(logits)
    result = logits.restore_reduced(hi, keepdims)
    if not return_sign:
        return result
    # Of a sum of exponentials: 1, or 0 where there is none, or NaN.
    return result, jnp.where(result == -jnp.inf, 0, jnp.where(jnp.isnan(result), result, 1)).astype(
        result.dtype
    )


def _general_logsumexp(
    a, axis, b, keepdims, return_sign, where, scale, bias, implementation
) -> Array | tuple[Array, Array]:
    """With factors, or complex."""
    logits = as_logits(a, axis, where, scale=scale, bias=bias, implementation=None, shift_integers=False)
    if implementation == "native":
        raise ValueError(
            "implementation='native' cannot run: there is no native kernel with b, or for complex"
        )
    mask = operand_mask(logits.shape, None, logits.params["spec"].band) if isinstance(where, Band) else where
    z = jnp.asarray(a)
    if scale is not None:
        z = z * scale
    if bias is not None:
        z = z + bias
    return logsumexp_of_jax(z, axis, b, keepdims, return_sign, mask)
