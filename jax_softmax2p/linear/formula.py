"""What is computed from a block of logits: losses, and the gradient of the logits.

Tokens are the rows of x, (N, D); classes the columns of the logits z, (N, V). Where the classes are sharded
among devices, V counts those of this device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p import jax_compat, reference
from jax_softmax2p.arguments import as_logits
from jax_softmax2p.logits import apply_soft_cap, logit_at_label
from jax_softmax2p.ops import logsumexp_of_logits
from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.dispatch import LoweredImplementation
from jax_softmax2p.primitives.logsumexp import combine_shards, logsumexp
from jax_softmax2p.primitives.logsumexp_derivatives import logsumexp_vjp, no_labels
from jax_softmax2p.primitives.operands import OperandSpec
from jax_softmax2p.reference import Lse, compute_dtype

Array = jax.Array


class LossSpec(NamedTuple):
    """What the loss is, as one hashable parameter.

    Attributes:
      class_axis: which axis of the weights counts classes: 1 of (D, V), 0 of (V, D).
      soft_cap: logits become soft_cap·tanh(z / soft_cap); None: they stay.
      label_smoothing: the share of the label that goes to all classes alike.
      z_loss: the factor of the squared lse.
      axis_names: the mesh axes over which classes are sharded.
      num_shards: among how many devices.
      implementation: as users pass it, or, where it is lowered, as its primitives have it.
      token_block_size: how many tokens a block has; None: as many as are fast.
      recompute: whether the gradients of the weights are left to the backward pass.
    """

    class_axis: int = 1
    soft_cap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    axis_names: tuple[str, ...] = ()
    num_shards: int = 1
    implementation: LoweredImplementation = None
    token_block_size: int | None = None
    recompute: bool = False

    @property
    def weight_letters(self) -> str:
        """The axes of the weights, for einsum."""
        return "dv" if self.class_axis == 1 else "vd"

    def num_classes(self, weights: Array) -> int:
        """How many classes this device has."""
        return weights.shape[self.class_axis]

    def num_classes_everywhere(self, weights: Array) -> int:
        """How many classes there are on all devices."""
        return self.num_classes(weights) * self.num_shards


def product(subscripts: str, a: Array, b: Array) -> Array:
    """An einsum whose sums and result are float32 for operands of 16 bits."""
    dtype = compute_dtype(jnp.result_type(a, b))
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def logits(spec: LossSpec, x: Array, weights: Array, bias: Array) -> Array:
    """The logits of tokens, in the dtype that they are computed in; ``bias`` may have size 0 for none."""
    z = product(f"nd,{spec.weight_letters}->nv", x, weights)
    if bias.size:
        z = z + bias[None].astype(z.dtype)
    return z if spec.soft_cap is None else apply_soft_cap(z, spec.soft_cap)


def loss(spec: LossSpec, z: Array, labels: Array) -> tuple[Array, Lse]:
    """The loss of tokens but for labels that name no class, and the lse, each of them (N,).

    Args:
      spec: which loss.
      z: as :func:`logits` returns them.
      labels: int32 (N,), the labels among the columns of z, z.shape[1] for others; or of size 0: the loss is
        the lse.
    """
    num_classes = z.shape[1] * spec.num_shards
    lse = logsumexp(z, exact=True, axis=-1, spec=OperandSpec(), implementation=spec.implementation)
    of_rows = []
    if labels.size:
        of_rows.append(jnp.take_along_axis(z, labels[:, None], 1, mode="fill", fill_value=0)[:, 0])
    if labels.size and spec.label_smoothing:
        of_rows.append(jnp.sum(z * (1 / num_classes), 1))  # The sum of large logits would overflow.
    if spec.axis_names:  # One all-gather for all of them.
        gathered = jax_compat.all_gather_invariant(jnp.stack([*lse, *of_rows]), spec.axis_names)
        lse = combine_shards(Lse(gathered[:, 0], gathered[:, 1]), implementation=spec.implementation, axis=-1)
        of_rows = [jnp.sum(gathered[:, 2 + i], 0) for i in range(len(of_rows))]
    total = lse.hi
    if labels.size:
        total = (lse.hi - of_rows[0]) + lse.lo
    if labels.size and spec.label_smoothing:
        total = total + spec.label_smoothing * (of_rows[0] - of_rows[1])
    if spec.z_loss:
        total = total + spec.z_loss * lse.hi * lse.hi
    return total, lse


def logits_gradient(
    spec: LossSpec, z: Array, lse: Lse, labels: Array, factor: Array, num_classes: int
) -> Array:
    """The derivative of the loss by the products x·w + bias, times a factor of tokens.

    Args:
      spec: which loss.
      z: some columns of the logits, as :func:`logits` returns them.
      lse: of whole rows.
      labels: as in :func:`loss`, among these columns.
      factor: (N,), the cotangents.
      num_classes: of whole rows, on all devices.
    """
    total = factor * (1 + 2 * spec.z_loss * lse.hi) if spec.z_loss else factor
    which = labels if labels.size else no_labels()
    params: dict[str, Any] = {"axis": -1, "spec": OperandSpec(), "implementation": spec.implementation}
    g = logsumexp_vjp(z, *lse, which, total, **params)
    if labels.size and (spec.z_loss or spec.label_smoothing):
        # The one_hot above has the factor of the softmax, and wants that of the cross-entropy. Their
        # difference would have lost digits: near certainty it is all that remains.
        at_label = (2 * spec.z_loss * lse.hi + spec.label_smoothing) * factor
        corrected = jnp.where(reference.one_hot(labels, z.shape, -1), at_label[:, None], 0)
        g = g + corrected - (spec.label_smoothing / num_classes) * factor[:, None]
    return g if spec.soft_cap is None else g * soft_cap_derivative(spec.soft_cap, z)


def soft_cap_derivative(soft_cap: float, z: Array) -> Array:
    """The derivative of soft_cap·tanh(y / soft_cap) where its value is z."""
    ratio = z / soft_cap
    return (1 - ratio) * (1 + ratio)


def plain_loss(spec: LossSpec, x: Array, weights: Array, bias: Array, labels: Array) -> Array:
    """The loss from all logits at once, in operations that JAX differentiates and shards.

    For sizes that are not known, or 0, and for arrays that are sharded explicitly.
    """
    z = logits(spec, x, weights, bias)
    prepared = as_logits(z, -1, None, implementation=spec.implementation, name="inputs")
    lse = logsumexp_of_logits(prepared)
    total = lse.hi
    if labels.ndim and labels.shape == total.shape:
        logit = logit_at_label(z, labels, -1)
        total = (lse.hi - logit) + lse.lo
        if spec.label_smoothing:
            total = total + spec.label_smoothing * (logit - jnp.mean(z, 1))
    return total + spec.z_loss * lse.hi * lse.hi if spec.z_loss else total


def plain_logits_gradient(
    spec: LossSpec, x: Array, weights: Array, bias: Array, labels: Array, factor: Array
) -> Array:
    """:func:`logits_gradient` of all logits at once, in operations that JAX differentiates."""
    z = logits(spec, x, weights, bias)
    num_classes = spec.num_classes_everywhere(weights)
    prepared = as_logits(
        z, -1, None, axis_name=spec.axis_names or None, implementation=spec.implementation, name="inputs"
    )
    hi, lo = logsumexp_of_logits(prepared)
    g = jnp.exp((z - hi[:, None]) - lo[:, None])
    if spec.z_loss:
        g = g * (1 + 2 * spec.z_loss * hi[:, None])
    if labels.size:
        at_label = reference.one_hot(labels, z.shape, -1)
        g = g - jnp.where(at_label, 1 - spec.label_smoothing, 0) - spec.label_smoothing / num_classes
    if spec.soft_cap is not None:
        g = g * soft_cap_derivative(spec.soft_cap, z)
    return g * factor.astype(g.dtype)[:, None]


def apply_to_tangents(
    spec: LossSpec, g: Array, x: Array, weights: Array, dots: Sequence[Array | None]
) -> Array:
    """The tangent of the loss, (N,), from the gradient of all logits and tangents of x, weights and bias."""
    x_dot, weights_dot, bias_dot = dots
    result = jnp.zeros(g.shape[:1], g.dtype)
    if x_dot is not None:
        result = result + jnp.sum(g * product(f"nd,{spec.weight_letters}->nv", x_dot, weights), 1)
    if weights_dot is not None:
        result = result + jnp.sum(g * product(f"nd,{spec.weight_letters}->nv", x, weights_dot), 1)
    if bias_dot is not None:
        result = result + jnp.sum(g * bias_dot.astype(g.dtype), 1)
    return result


def apply_to_products(
    spec: LossSpec, g: Array, x: Array, weights: Array, bias: Array, wanted: Sequence[bool]
) -> list[Array]:
    """Those wanted of the gradients of x, weights and bias, from the gradient of all logits."""
    letters = spec.weight_letters
    gradients = (
        lambda: product(f"nv,{letters}->nd", g, weights).astype(x.dtype),
        lambda: product(f"nd,nv->{letters}", x, g).astype(weights.dtype),
        lambda: jnp.sum(g, 0).astype(bias.dtype),
    )
    return [gradient() for gradient, is_wanted in zip(gradients, wanted, strict=True) if is_wanted]


def sharded_labels(spec: LossSpec, labels: Array, weights: Array) -> Array:
    """Labels of all classes as those of the classes of this device."""
    if not labels.size or not spec.axis_names:
        return labels
    return collectives.local_labels(labels, spec.num_classes(weights), spec.axis_names)


def zeros_like_varying(
    shape: tuple[int, ...], dtype: np.dtype, *operands: Array, invariant: tuple[str, ...] = ()
) -> Array:
    """Zeros that may differ along the mesh axes along which the operands do, as a loop's carry must."""
    axes = tuple(frozenset[str]().union(*map(jax_compat.varying_axes, operands)) - set(invariant))
    return jax_compat.as_varying(jnp.zeros(shape, dtype), axes)
