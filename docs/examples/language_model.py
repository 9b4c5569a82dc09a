"""Steps of a language model over words, whose logits are never stored.

The text is the source of Python's own library, whose tens of thousands of different words are the classes.
The weights of the last layer are those of the embedding, (words, width), hence ``class_axis=0``.

    python docs/examples/language_model.py --steps 30
"""

import argparse
import pathlib
import re
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_softmax2p as s2p

WIDTH, HEADS, CONTEXT, BATCH = 128, 4, 128, 8

Parameters = dict[str, Any]


def read_words() -> tuple[np.ndarray, int]:
    """The text as numbers of words, and how many different words there are."""
    modules = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)
    number_of: dict[str, int] = {}
    numbers = [number_of.setdefault(word, len(number_of)) for word in re.findall(r"[A-Za-z]+|\S", text)]
    return np.array(numbers, np.int32), len(number_of)


def initial_parameters(words: int) -> Parameters:
    """Random weights of one layer of attention and one of a perceptron."""
    shapes = {
        "embedding": (words, WIDTH),
        "position": (CONTEXT, WIDTH),
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(shape[0] if shape[0] < words else WIDTH)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def features(params: Parameters, tokens: jax.Array) -> jax.Array:
    """What the last layer is given: (batch, context, width) for tokens of shape (batch, context)."""
    x = params["embedding"][tokens] + params["position"]
    q, k, v = jnp.moveaxis((x @ params["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    x = x + s2p.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ params["out"]
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def linear_loss(params: Parameters, batch: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next word, in blocks of logits."""
    x = features(params, batch[:, :-1])
    return s2p.linear_softmax_cross_entropy(x, params["embedding"], batch[:, 1:], class_axis=0).mean()


def stored_loss(params: Parameters, batch: jax.Array) -> jax.Array:
    """The same from an array of all logits."""
    logits = features(params, batch[:, :-1]) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def temporary_megabytes(loss: Any, params: Parameters, batch: jax.Array) -> float:
    """What XLA plans besides operands and results for the loss and its gradient."""
    analysis = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 1e6


def main(steps: int) -> list[float]:
    """Trains, and returns the losses."""
    numbers, words = read_words()
    params = initial_parameters(words)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(linear_loss)(params, batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(0), []
    for i in range(steps):
        starts = rng.integers(len(numbers) - CONTEXT, size=(BATCH, 1))
        batch = jnp.asarray(numbers[starts + np.arange(CONTEXT + 1)])
        if i == 0:
            print(f"{words} different words, {BATCH * CONTEXT} predictions a step")
            for loss in (stored_loss, linear_loss):
                print(f"{loss.__name__}: {temporary_megabytes(loss, params, batch):.0f} MB of temporaries")
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        if i % 10 == 0:
            print(f"step {i:4}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
