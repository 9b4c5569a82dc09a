"""What losses and attention do with logits: the soft cap, and the logit at a label."""

import jax
import jax.numpy as jnp

from jax_softmax2p import reference

Array = jax.Array


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
