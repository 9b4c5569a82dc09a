"""linear_softmax_cross_entropy and logsumexp_of_products as users call them."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from jax_softmax2p.arguments import (
    as_axis_name,
    as_boolean_array,
    as_floating_array,
    as_real_array,
    check_broadcasts,
)
from jax_softmax2p.eager import jit_when_eager
from jax_softmax2p.jax_compat import as_varying
from jax_softmax2p.labels import as_class_indices, as_labels, saturate_known_labels
from jax_softmax2p.linear import derivatives, formula
from jax_softmax2p.linear.blocks import Wanted
from jax_softmax2p.linear.formula import LossSpec
from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.collectives import AxisNames
from jax_softmax2p.primitives.dispatch import Implementation, as_implementation, check_native_support
from jax_softmax2p.reference import compute_dtype
from jax_softmax2p.scalars import as_index, as_number, as_positive_integer, as_soft_cap

Array = jax.Array


@jit_when_eager(
    "inputs", "weights", "labels", "bias", "where", "scale", prepare={"labels": saturate_known_labels}
)
def linear_softmax_cross_entropy(
    inputs: jax.typing.ArrayLike,
    weights: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    bias: jax.typing.ArrayLike | None = None,
    where: jax.typing.ArrayLike | None = None,
    scale: jax.typing.ArrayLike | None = None,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_axis: int = 1,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
    token_block_size: int | None = None,
    recompute: bool = False,
) -> Array:
    r"""Cross-entropy of softmax(inputs @ weights) and classes, whose logits are never stored as a whole.

    .. math:: \ell = \log \sum_j \exp(z_j) - z_{label}, \quad z = scale · x W + bias

    What :func:`softmax_cross_entropy_with_integer_labels` computes from inputs @ weights, in blocks of
    tokens. Of the logits, one block exists at a time. Gradients are computed together with the loss, by as
    many products of matrices as where the logits are stored; see below.

    Args:
      inputs: floating-point array (..., D), one row for each token.
      weights: floating-point array (D, V), or (V, D) with ``class_axis=0``, as embeddings are stored.
      labels: array (...) of integers of any dtype. Those below 0 count from the end, as in NumPy; one out of
        range makes the loss NaN, and no contribution of its own to the gradient.
      bias: array (V,), is added to the logits, before the soft cap. -inf leaves a class out, but not with
        ``soft_cap`` or ``label_smoothing``: the cap makes such a logit finite, and smoothing takes its loss.
      where: boolean array that broadcasts to the labels' shape; tokens where it is False have a loss of 0 and
        add nothing to gradients, whatever they hold.
      scale: number, or array that broadcasts to the labels' shape followed by 1, such as a temperature's
        inverse; inputs are multiplied by it, and rounded to their dtype, first.
      soft_cap: a positive number c: logits become c·tanh(z / c), as in Gemma 2 (arXiv 2408.00118).
      label_smoothing: from 0 to 1, the share of each label that goes to all classes alike.
      z_loss: times the squared logsumexp is added to the loss (PaLM, arXiv 2204.02311).
      class_axis: which axis of the weights counts the classes, 0 or 1.
      axis_name: inside :func:`jax.shard_map`, the axis of the mesh, or several, along which the classes are
        sharded: weights and bias are this device's shard. Labels count the classes of all shards; inputs and
        labels are the same on all devices along these axes.
      implementation: as in :func:`softmax`, for what is done with the logits of a block.
      token_block_size: how many tokens a block has at most. None: a quarter of all (for 16 bits an eighth, or
        a third of the number of features, if that is more), but 128 to 512, and of more than 131,072 classes
        at least 64, of 16 million logits in all. Smaller ones take less memory and more time.
      recompute: whether gradients are left to the backward pass, which computes the logits again. Nothing is
        kept for it but the logsumexp of each token.

    Returns:
      Array of the labels' shape, of the dtype of inputs @ weights. The logits are float32 for 16-bit inputs,
      and are not rounded before the loss is.

    Raises:
      TypeError: inputs, weights or bias are not floating-point numbers, or labels not integers.
      ValueError: shapes do not fit; where is not boolean; class_axis is not 0 or 1; soft_cap or
        token_block_size is not positive; label_smoothing is not from 0 to 1; axis_name names no axis here;
        implementation is unknown, or is "native" and cannot run.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_softmax2p as s2p
      >>> inputs, embedding = jnp.ones((3, 2)), jnp.zeros((5, 2))
      >>> labels = jnp.array([1, 4, 0])
      >>> s2p.linear_softmax_cross_entropy(inputs, embedding, labels, class_axis=0).round(3)
      Array([1.609, 1.609, 1.609], dtype=float32)

    Gradients:
      Each token's cotangent is applied to that token. With the loss, gradients for cotangents of 1 are
      computed; that of inputs is then multiplied by the cotangents. So are those of weights and bias where
      all tokens that ``where`` keeps have the same cotangent, as in a mean: three products in all. Where
      cotangents differ, as in a sum with weights of tokens, they are computed again, by two more; with
      ``recompute=True`` it is four in any case. The gradient of the weights is summed in float32, in an array
      of their shape, which lives from the loss on, or with ``recompute=True`` in the backward pass alone.
      Products of 16-bit arrays round the logits' gradient to 16 bits first, as they do where the logits are
      stored. Derivatives of second order, and in forward mode, take all logits at once.

    Source: blocks of tokens as in Liger Kernel, arXiv 2410.10989; the lse as in :func:`softmax`.
    """
    inputs, weights = as_floating_array(inputs, "inputs"), as_floating_array(weights, "weights")
    labels = as_labels(labels)
    spec = _as_spec(inputs, weights, class_axis, axis_name, implementation, token_block_size, recompute)
    soft_cap = as_soft_cap(soft_cap, "soft_cap")
    label_smoothing, z_loss = as_number(label_smoothing, "label_smoothing"), as_number(z_loss, "z_loss")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    spec = spec._replace(soft_cap=soft_cap, label_smoothing=label_smoothing, z_loss=z_loss)
    if labels.shape != inputs.shape[:-1]:
        raise ValueError(
            f"labels must have the inputs' shape without the last axis, {inputs.shape[:-1]}, "
            f"got {labels.shape}"
        )
    labels = as_class_indices(labels, spec.num_classes_everywhere(weights))
    return _loss_of_tokens(spec, inputs, weights, bias, labels, where, scale)


@jit_when_eager("a", "b", "bias", "where", "scale")
def logsumexp_of_products(
    a: jax.typing.ArrayLike,
    b: jax.typing.ArrayLike,
    *,
    bias: jax.typing.ArrayLike | None = None,
    where: jax.typing.ArrayLike | None = None,
    scale: jax.typing.ArrayLike | None = None,
    soft_cap: float | None = None,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
    token_block_size: int | None = None,
    recompute: bool = False,
) -> Array:
    r"""The logarithm of sums of exponentials of products, which are never stored as a whole.

    .. math:: y_i = \log \sum_j \exp(scale · a_i · b_j + bias_j)

    For contrastive losses, retrieval, and Sinkhorn's iterations between points; docs/contrastive.md has
    recipes. The gradient in a is attention of a to b with b as values.

    Args:
      a: floating-point array (..., D).
      b: floating-point array (M, D).
      bias: array (M,), is added to the products, before the soft cap. Without one, -inf leaves an element
        out.
      where: boolean array that broadcasts to a's shape without the last axis; rows where it is False give
        -inf, and add nothing to gradients.
      scale: as in :func:`linear_softmax_cross_entropy`, of a.
      soft_cap: as in :func:`linear_softmax_cross_entropy`.
      axis_name: inside :func:`jax.shard_map`, the mesh axes along which b and bias are sharded.
      implementation: as in :func:`softmax`.
      token_block_size: how many rows of a make a block, at most.
      recompute: as in :func:`linear_softmax_cross_entropy`. Worthwhile where the cotangents of rows differ
        and the gradients of b or bias are asked for.

    Returns:
      Array of a's shape without the last axis, of the dtype of the products.

    Raises:
      TypeError, ValueError: as :func:`linear_softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p as s2p
      >>> s2p.logsumexp_of_products(jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [100.0]])).round(3)
      Array([  0.693, 100.   ], dtype=float32)

    Source: as :func:`linear_softmax_cross_entropy`.
    """
    a, b = as_floating_array(a, "a"), as_floating_array(b, "b")
    spec = _as_spec(a, b, 0, axis_name, implementation, token_block_size, recompute, names=("a", "b"))
    soft_cap = as_soft_cap(soft_cap, "soft_cap")
    no_labels = jnp.zeros((0,), jnp.int32)
    return _loss_of_tokens(spec._replace(soft_cap=soft_cap), a, b, bias, no_labels, where, scale, -jnp.inf)


def _as_spec(
    inputs: Array,
    weights: Array,
    class_axis: int,
    axis_name: AxisNames | None,
    implementation: Implementation | None,
    token_block_size: int | None,
    recompute: bool,
    names: tuple[str, str] = ("inputs", "weights"),
) -> LossSpec:
    """The checked parameters that both functions have."""
    if as_index(class_axis) not in (0, 1):
        raise ValueError(f"class_axis must be 0 or 1, got {class_axis}")
    if inputs.ndim < 1 or weights.ndim != 2 or weights.shape[1 - class_axis] != inputs.shape[-1]:
        expected = "(D, V)" if class_axis else "(V, D)"
        raise ValueError(
            f"{names[1]} must be {expected} for {names[0]} of (..., D), "
            f"got {weights.shape} for {inputs.shape}"
        )
    if token_block_size is not None:
        token_block_size = as_positive_integer(token_block_size, "token_block_size")
    implementation = as_implementation(implementation)
    check_native_support(implementation, jnp.result_type(inputs, weights))
    axis_names = () if axis_name is None else as_axis_name(axis_name)
    return LossSpec(
        class_axis=class_axis,
        axis_names=axis_names,
        num_shards=collectives.num_shards(axis_names),
        implementation=implementation,
        token_block_size=token_block_size,
        recompute=bool(recompute),
    )


def _loss_of_tokens(
    spec: LossSpec,
    inputs: Array,
    weights: Array,
    bias: jax.typing.ArrayLike | None,
    labels: Array,
    where: jax.typing.ArrayLike | None,
    scale: jax.typing.ArrayLike | None,
    masked_loss: float = 0.0,
) -> Array:
    """The loss in the shape of the inputs without their last axis."""
    *shape, d = inputs.shape
    dtype = jnp.result_type(inputs, weights)
    if bias is None:
        bias = jnp.zeros((0,), dtype)
    else:
        bias = as_floating_array(bias, "bias")
        if bias.shape != (spec.num_classes(weights),):
            raise ValueError(f"bias must have the shape {(spec.num_classes(weights),)}, got {bias.shape}")
    mask = None if where is None else _as_mask(where, tuple(shape))
    if mask is not None:
        inputs = jnp.where(mask[..., None], inputs, 0)
        if labels.size:  # A class, so that no NaN arises.
            labels = jnp.where(mask, labels, 0)
    if scale is not None:
        inputs = _scaled(inputs, scale, mask)
    x = inputs.reshape(math.prod(shape), d)
    loss = _loss(spec, x, weights, bias, labels.reshape(-1), None if mask is None else mask.reshape(-1))
    loss = loss.reshape(shape).astype(dtype)
    return loss if mask is None else jnp.where(mask, loss, masked_loss)


def _scaled(inputs: Array, scale: jax.typing.ArrayLike, mask: Array | None) -> Array:
    """Scale times inputs, rounded once to the inputs' dtype; scales of masked tokens do not count."""
    scale = as_real_array(scale, "scale")
    check_broadcasts("scale", scale, (*inputs.shape[:-1], 1), "one number a row,")
    if mask is not None:
        scale = jnp.where(mask[..., None], scale, 1)
    wide = compute_dtype(jnp.result_type(inputs, scale))
    return (inputs.astype(wide) * scale.astype(wide)).astype(inputs.dtype)


def _as_mask(where: jax.typing.ArrayLike, shape: tuple[int, ...]) -> Array:
    """The mask of tokens."""
    mask = as_boolean_array(where, "where")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"where must broadcast to the shape {shape}, got {mask.shape}") from None


def _loss(spec: LossSpec, x: Array, weights: Array, bias: Array, labels: Array, mask: Array | None) -> Array:
    """The loss of the rows of x."""
    dtype = compute_dtype(jnp.result_type(x, weights))
    ones = jnp.ones(x.shape[:1], dtype) if mask is None else mask.astype(dtype)
    if spec.axis_names:
        if not (_have_elements(weights) and isinstance(x.shape[0], int)):
            raise ValueError(
                "with axis_name, sizes must be known, and those of weights not 0; "
                f"got weights of shape {weights.shape} for {x.shape[0]} inputs"
            )
        collectives.check_derivatives(x, spec.axis_names)
        varying = (as_varying(a, spec.axis_names) for a in (x, weights, bias))
        return _sharded_loss(spec, *varying, labels, ones)[0]
    if not _can_be_cut(x, weights):
        return formula.plain_loss(spec, x, weights, bias, labels)
    return derivatives.linear_loss(spec, (x, weights, bias, labels, ones)).loss


def _can_be_cut(*operands: Array) -> bool:
    """Whether arrays have sizes that are known and not 0, and none that JAX shards explicitly."""
    return _have_elements(*operands) and not any(any(jax.typeof(a).sharding.spec) for a in operands)


def _have_elements(*operands: Array) -> bool:
    """Whether arrays have sizes that are known and not 0."""
    return all(isinstance(size, int) and size for a in operands for size in a.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sharded_loss(spec: LossSpec, *operands: Array) -> tuple[Array, ...]:
    """Loss, and hi and lo of the lse, of whole rows whose classes are sharded."""
    return derivatives.compute_loss(*operands, spec=spec, wanted=Wanted())[:3]


@functools.partial(_sharded_loss.defjvp, symbolic_zeros=True)
def _sharded_loss_jvp(
    spec: LossSpec, primals: Sequence[Array], tangents: Sequence[Array | SymbolicZero]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    dots = [ad.Zero(t.aval) if isinstance(t, SymbolicZero) else t for t in tangents]
    loss, dot = derivatives.jvp_of_loss(spec, primals, dots, derivatives.compute_loss)
    dot = jax.lax.psum(dot, spec.axis_names)
    return loss[:3], (dot, jnp.zeros_like(loss.hi), jnp.zeros_like(loss.lo))
