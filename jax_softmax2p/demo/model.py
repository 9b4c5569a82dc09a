"""A small causal transformer over characters, for one sequence at a time, whose softmax is an argument."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Parameters = dict[str, Any]
Softmax = Callable[..., Array]


class Size(NamedTuple):
    """The sizes of a transformer and of its training batches.

    Attributes:
      layers: each is attention and a multilayer perceptron.
      width: features of a token.
      heads: of attention, which divide the width.
      context: tokens of a sequence.
      batch: sequences of a training step.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch: int


def initial_parameters(key: Array, vocabulary: int, size: Size) -> Parameters:
    """Random weights, normal with a variance of one over the number of rows."""

    def normal(*shape: int) -> Array:
        nonlocal key
        key, subkey = jax.random.split(key)
        return jax.random.normal(subkey, shape) / np.sqrt(shape[0])

    columns = {"qkv": 3 * size.width, "out": size.width, "up": 4 * size.width}
    return {
        "embedding": normal(vocabulary, size.width),
        "position": normal(size.context, size.width),
        "layers": [
            {name: normal(size.width, count) for name, count in columns.items()}
            | {"down": normal(4 * size.width, size.width)}
            for _ in range(size.layers)
        ],
        "head": normal(size.width, vocabulary),
    }


def batch_loss(params: Parameters, batch: Array, size: Size, softmax: Softmax) -> Array:
    """The mean cross-entropy of the next token, for a batch of shape (batch, context + 1)."""
    logits = jax.vmap(lambda tokens: apply_model(params, tokens, size, softmax))(batch[:, :-1])
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)
    return -jnp.mean(log_probs)


def apply_model(params: Parameters, tokens: Array, size: Size, softmax: Softmax) -> Array:
    """Logits of shape (context, vocabulary) for one sequence of tokens, of shape (context,)."""
    x = params["embedding"][tokens] + params["position"]
    for layer in params["layers"]:
        x = x + causal_attention(layer, rms_norm(x), size, softmax)
        x = x + jax.nn.gelu(rms_norm(x) @ layer["up"]) @ layer["down"]
    return rms_norm(x) @ params["head"]


def causal_attention(layer: Parameters, x: Array, size: Size, softmax: Softmax) -> Array:
    """Causal self-attention on x of shape (context, width)."""
    q, k, v = jnp.moveaxis((x @ layer["qkv"]).reshape(size.context, 3, size.heads, -1), 1, 0)
    logits = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones((size.context, size.context), bool))
    output = jnp.einsum("hts,shd->thd", softmax(logits, axis=-1, where=mask), v)
    return output.reshape(size.context, size.width) @ layer["out"]


def rms_norm(x: Array) -> Array:
    """Root-mean-square normalisation (arXiv 1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
