"""Attention sinks: a logit of each head of queries that takes part in the sum of exponentials alone.

A sink is a key that every query attends to, whose value is 0. So attention follows from the output and the
lse without it, in no time that depends on the keys:

    output·sigmoid(lse - sink)        logaddexp(lse, sink)

and the gradient in query, key and value is that of attention without sinks, from this output and this lse.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def apply_sinks(output: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The output and the lse with sinks.

    Args:
      output: (B, T, N, H), of attention without sinks.
      lse: (B, T, N, 1), of the dtype that attention is computed in.
      sinks: (B, 1, N, 1), of lse's dtype, where B may be 1.
    """
    # Its derivative in the sink is -sigmoid(lse - sink)·sigmoid(sink - lse), of which neither factor is 1
    # minus another. JAX's own derivative of the sigmoid would be 0 where the sigmoid is rounded to 1.
    share = jnp.exp(-jnp.logaddexp(sinks - lse, 0))
    return (output * share).astype(output.dtype), jnp.logaddexp(lse, sinks)


def sinks_cotangent(sinks: Array, output: Array, lse: Array, cotangent: Array) -> Array:
    """That of sinks, (B, 1, N, 1), from the results of the primitive and the output's cotangent."""
    products = cotangent.astype(lse.dtype) * output.astype(lse.dtype)
    weights = jnp.exp((sinks - lse[..., :1]) - lse[..., 1:])
    return -jnp.sum(weights * jnp.sum(products, -1, keepdims=True), 1, keepdims=True)
