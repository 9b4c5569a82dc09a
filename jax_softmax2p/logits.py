"""What losses and attention do with logits: the soft cap, and the logit at a label."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p import reference

Array = jax.Array


def as_soft_cap(soft_cap: Any, name: str) -> float | None:
    """A positive finite number, or None; a ValueError names the argument."""
    if soft_cap is None:
        return None
    # Arithmetic in float32 must neither divide by 0 nor multiply by infinity.
    limits = np.finfo(np.float32)
    is_number = isinstance(soft_cap, int | float | np.integer | np.floating)
    if not (is_number and limits.tiny <= soft_cap <= limits.max):
        raise ValueError(f"{name} must be a positive finite number or None, got {soft_cap!r}")
    return float(soft_cap)


def apply_soft_cap(z: Array, soft_cap: float) -> Array:
    """Logits that approach -soft_cap and soft_cap, but never exceed them.

    Source: Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", arXiv 2408.00118.
    """
    return soft_cap * jnp.tanh(z / soft_cap)


def logit_at_label(x: Array, labels: Array, axis: int) -> Array:
    """The logit at the label of every row, by a sum along the axis; NaN for a label beyond it.

    For where JAX does not gather: along an explicitly sharded axis, and from a row that sharded labels share.

    Args:
      x: logits.
      labels: as ``as_class_indices`` returns them, of a shape to which the rows broadcast.
      axis: of the classes, negative.
    """
    logit = jnp.sum(jnp.where(reference.one_hot(labels, x.shape, axis), x, 0), axis)
    return jnp.where(labels < x.shape[axis], logit, jnp.nan)
