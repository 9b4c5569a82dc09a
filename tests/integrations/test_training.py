"""Training with flax and optax, with this package and without it: the losses agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from layers import normal

import jax_softmax2p as s2p
from jax_softmax2p.integrations import flax_attention, patch_jax_nn


class Transformer(nnx.Module):
    """Two layers of causal attention over 17 tokens."""

    def __init__(self, attention, rngs):
        self.embedding = nnx.Embed(17, 16, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(
                    2,
                    16,
                    decode=False,
                    attention_fn=attention,
                    dropout_rate=0.1,
                    deterministic=False,
                    rngs=rngs,
                )
                for _ in range(2)
            ]
        )
        self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(16, 17, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms[:2], self.layers, strict=True):
            x = x + layer(norm(x), mask=nnx.make_causal_mask(tokens))
        return self.head(self.norms[2](x))


def train(attention, loss, steps=20):
    """The losses of a small transformer that learns to count, always from the same seed."""
    model = Transformer(attention, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        value, gradient = nnx.value_and_grad(lambda model: loss(model(tokens[:, :-1]), tokens[:, 1:]).mean())(
            model
        )
        optimizer.update(model, gradient)
        return value

    rng = np.random.default_rng(0)
    batches = (rng.integers(17, size=(steps, 4, 1)) + rng.integers(1, 4, (steps, 4, 1)) * np.arange(13)) % 17
    return [float(step(model, optimizer, jnp.asarray(batch))) for batch in batches]


def test_a_transformer_learns_the_same():
    """With flax and optax as they are, with this package's attention and loss, and with jax.nn patched."""
    theirs = train(nnx.dot_product_attention, optax.softmax_cross_entropy_with_integer_labels)
    assert theirs[-1] < 0.8 * theirs[0]
    ours = train(flax_attention, s2p.softmax_cross_entropy_with_integer_labels)
    with patch_jax_nn():
        patched = train(nnx.dot_product_attention, optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    np.testing.assert_allclose(patched, theirs, rtol=1e-4)
    assert ours != theirs
    assert patched != theirs


@pytest.mark.parametrize("soft", [False, True])
def test_losses_in_a_training_step_of_optax(soft):
    """A classifier, from one seed, learns the same with this package's losses as with optax's."""
    x, labels = normal(64, 8), jnp.asarray(np.random.default_rng(0).integers(10, size=64))
    targets = jax.nn.one_hot(labels, 10) * 0.9 + 0.01 if soft else labels
    name = "softmax_cross_entropy" if soft else "softmax_cross_entropy_with_integer_labels"

    def losses(loss):
        optimizer, params = optax.sgd(0.5, momentum=0.9), {"w": normal(8, 10), "b": jnp.zeros(10, np.float32)}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            function = lambda params: loss(x @ params["w"] + params["b"], targets).mean()
            value, gradient = jax.value_and_grad(function)(params)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state, value

        values = []
        for _ in range(10):
            params, state, value = step(params, state)
            values.append(float(value))
        return values

    ours, theirs = losses(getattr(s2p, name)), losses(getattr(optax, name))
    assert theirs[-1] < 0.9 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
