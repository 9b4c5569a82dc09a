"""Steps of training and of inference of small networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs.program import Program, integers, matrix, normal


def classifier_step(shape, rng):
    """A step of Adam for a perceptron with one hidden layer. Shape: batch, classes."""
    import optax

    batch, classes = shape
    optimizer = optax.adam(1e-3, eps=1e-5)

    def loss(parameters, images, labels):
        hidden = jax.nn.relu(images @ parameters["hidden"] + parameters["bias"])
        logits = hidden @ parameters["output"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(parameters, images, labels):
        value, gradient = jax.value_and_grad(loss)(parameters, images, labels)
        updates, _ = optimizer.update(gradient, optimizer.init(parameters))
        return value, optax.apply_updates(parameters, updates)

    parameters = {
        "hidden": matrix(rng, 784, 256),
        "bias": normal(rng, 256, scale=0.1),
        "output": matrix(rng, 256, classes),
    }
    return step, (parameters, normal(rng, batch, 784), integers(rng, classes, batch))


def policy_gradient_steps(shape, rng):
    """An epoch of PPO in eight minibatches: clipped ratios, values, entropy. Shape: samples, actions."""
    import optax

    samples, actions = shape
    minibatches, observed, width = 8, 4, 64
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-4, eps=1e-5))

    def loss(parameters, batch):
        hidden = jnp.tanh(batch["observations"] @ parameters["first"])
        hidden = jnp.tanh(hidden @ parameters["second"])
        logits, value = hidden @ parameters["policy"], (hidden @ parameters["value"])[:, 0]
        log_p = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_p, batch["actions"][:, None], axis=-1)[:, 0]
        ratio, advantages = jnp.exp(chosen - batch["log_p"]), batch["advantages"]
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages).mean()
        entropy = -(jax.nn.softmax(logits) * log_p).sum(-1).mean()
        return 0.5 * ((value - batch["returns"]) ** 2).mean() - gain - 0.01 * entropy

    def epoch(parameters, batches):
        def step(carry, batch):
            parameters, state = carry
            value, gradient = jax.value_and_grad(loss)(parameters, batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(parameters, updates), state), value

        (parameters, _), losses = jax.lax.scan(step, (parameters, optimizer.init(parameters)), batches)
        return parameters, losses

    parameters = {
        "first": matrix(rng, observed, width),
        "second": matrix(rng, width, width),
        "policy": matrix(rng, width, actions),
        "value": matrix(rng, width, 1),
    }
    size = minibatches, samples // minibatches
    batches = {
        "observations": normal(rng, *size, observed),
        "actions": integers(rng, actions, *size),
        "log_p": np.log(rng.uniform(0.5 / actions, 1.5 / actions, size)).astype(np.float32),
        "advantages": normal(rng, *size),
        "returns": normal(rng, *size),
    }
    return epoch, (parameters, batches)


def router(shape, rng):
    """A router to experts: gates of the two best, load balance and z-loss. Shape: tokens, experts."""
    tokens, experts = shape
    width = 256

    def loss(weights, inputs, quality):
        logits = inputs @ weights
        best, chosen = jax.lax.top_k(logits, 2)
        gates = jax.nn.softmax(best)
        gain = (gates * jnp.take_along_axis(quality, chosen, -1)).sum(-1).mean()
        load = jax.nn.one_hot(chosen, experts, dtype=logits.dtype).mean((0, 1))
        balance = experts * jnp.sum(load * jax.nn.softmax(logits).mean(0))
        return 0.01 * balance + 1e-3 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2) - gain

    return loss, (matrix(rng, width, experts), normal(rng, tokens, width), normal(rng, tokens, experts))


def _normalised(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _attention_weights(rng, width: int, heads: int) -> dict[str, np.ndarray]:
    projections = {name: matrix(rng, width, heads, width // heads) for name in ("query", "key", "value")}
    return {**projections, "output": matrix(rng, width, width).reshape(heads, width // heads, width)}


def _projected(weights, x):
    """Queries, keys and values, of shape (..., heads, size)."""
    return (jnp.einsum("...d,dnh->...nh", x, weights[name]) for name in ("query", "key", "value"))


def _transformer_layer(rng, width: int, heads: int) -> dict[str, np.ndarray]:
    feed_forward = {"up": matrix(rng, width, 4 * width), "down": matrix(rng, 4 * width, width)}
    return {**_attention_weights(rng, width, heads), **feed_forward}


def _through_layers(layers, x, **options):
    """Of a transformer, with attention of these options."""
    for layer in layers:
        attended = jax.nn.dot_product_attention(*_projected(layer, _normalised(x)), **options)
        x = x + jnp.einsum("btnh,nhd->btd", attended, layer["output"])
        x = x + jax.nn.gelu(_normalised(x) @ layer["up"]) @ layer["down"]
    return x


def language_model_step(shape, rng):
    """A step of AdamW for a causal transformer of two layers. Shape: batch, context, vocabulary."""
    import optax

    batch, context, vocabulary = shape
    width, heads, layers = 128, 4, 2
    optimizer = optax.adamw(1e-3, eps=1e-5)

    def logits_of(parameters, tokens):
        x = parameters["embedding"][tokens] + parameters["position"]
        x = _through_layers(parameters["layers"], x, is_causal=True)
        return _normalised(x) @ parameters["embedding"].T

    def loss(parameters, tokens):
        logits = logits_of(parameters, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(parameters, tokens):
        value, gradient = jax.value_and_grad(loss)(parameters, tokens)
        updates, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
        return value, optax.apply_updates(parameters, updates)

    parameters = {
        "embedding": normal(rng, vocabulary, width, scale=width**-0.5),
        "position": normal(rng, context, width, scale=width**-0.5),
        "layers": [_transformer_layer(rng, width, heads) for _ in range(layers)],
    }
    return step, (parameters, integers(rng, vocabulary, batch, context + 1))


def vision_transformer_step(shape, rng):
    """A step of AdamW for two layers of the size of ViT-Tiny's. Shape: images, patches and a class token."""
    import optax

    images, tokens = shape
    width, heads, layers, classes, patch = 192, 3, 2, 1000, 3 * 16 * 16
    optimizer = optax.adamw(1e-3, eps=1e-5)

    def loss(parameters, patches, labels):
        embedded = patches @ parameters["embedding"]
        token = jnp.broadcast_to(parameters["class"], (images, 1, width))
        x = jnp.concatenate([token, embedded], axis=1) + parameters["position"]
        logits = _normalised(_through_layers(parameters["layers"], x)[:, 0]) @ parameters["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(parameters, patches, labels):
        value, gradient = jax.value_and_grad(loss)(parameters, patches, labels)
        updates, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
        return value, optax.apply_updates(parameters, updates)

    parameters = {
        "embedding": matrix(rng, patch, width),
        "class": normal(rng, width, scale=width**-0.5),
        "position": normal(rng, tokens, width, scale=width**-0.5),
        "layers": [_transformer_layer(rng, width, heads) for _ in range(layers)],
        "head": matrix(rng, width, classes),
    }
    return step, (parameters, normal(rng, images, tokens - 1, patch), integers(rng, classes, images))


def window_attention(shape, rng):
    """Attention in windows with a learned bias, as in Swin. Shape: windows, tokens, heads, size."""
    windows, tokens, heads, size = shape
    width = heads * size

    def loss(parameters, x):
        query, key, value = _projected(parameters["weights"], x)
        attended = jax.nn.dot_product_attention(query, key, value, parameters["bias"])
        return jnp.mean((x + jnp.einsum("btnh,nhd->btd", attended, parameters["weights"]["output"])) ** 2)

    parameters = {
        "weights": _attention_weights(rng, width, heads),
        "bias": normal(rng, heads, tokens, tokens),
    }
    return loss, (parameters, normal(rng, windows, tokens, width))


def attention_with_dropout(shape, rng):
    """Flax's attention as its layers call it in training. Shape: batch, context, heads, size."""
    from flax import linen

    batch, context, heads, size = shape
    width = heads * size
    # Random numbers are of the dtype of the probability, which of a plain float depends on jax_enable_x64.
    dropout: dict[str, Any] = {"dropout_rng": jax.random.key(0), "dropout_rate": np.float32(0.1)}

    def loss(weights, x):
        query, key, value = _projected(weights, x)
        attended = linen.dot_product_attention(query, key, value, **dropout)
        return jnp.mean((x + jnp.einsum("btnh,nhd->btd", attended, weights["output"])) ** 2)

    return loss, (_attention_weights(rng, width, heads), normal(rng, batch, context, width))


def encoder_layer(shape, rng):
    """Attention as many models write it out, with padding masked by -1e9. Shape: batch, context, width."""
    batch, context, width = shape
    heads = width // 32

    def loss(weights, x, lengths):
        query, key, value = _projected(weights, _normalised(x))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * (width // heads) ** -0.5
        valid = jnp.arange(context) < lengths[:, None]
        probabilities = jax.nn.softmax(jnp.where(valid[:, None, None, :], scores, -1e9), axis=-1)
        attended = jnp.einsum("bnts,bsnh->btnh", probabilities, value)
        return jnp.mean((x + jnp.einsum("btnh,nhd->btd", attended, weights["output"])) ** 2)

    lengths = context // 2 + integers(rng, context // 2 + 1, batch)
    return loss, (_attention_weights(rng, width, heads), normal(rng, *shape), lengths)


def decode(shape, rng):
    """Sixteen steps of decoding, with a cache of keys and values. Shape: batch, cache, heads, size."""
    batch, cached, heads, size = shape
    steps = 16

    def run(weights, x, keys, values, lengths):
        def step(_, state):
            x, keys, values, lengths = state
            query, key, value = _projected(weights, x)
            sequences = jnp.arange(batch)
            keys, values = keys.at[sequences, lengths].set(key), values.at[sequences, lengths].set(value)
            lengths = lengths + 1
            attended = jax.nn.dot_product_attention(
                query[:, None], keys, values, key_value_seq_lengths=lengths
            )
            x = _normalised(x + jnp.einsum("bnh,nhd->bd", attended[:, 0], weights["output"]))
            return x, keys, values, lengths

        return jax.lax.fori_loop(0, steps, step, (x, keys, values, lengths))[0]

    weights = _attention_weights(rng, heads * size, heads)
    x = normal(rng, batch, heads * size)
    lengths = cached // 4 + integers(rng, cached - steps - cached // 4 + 1, batch)
    return run, (weights, x, normal(rng, *shape), normal(rng, *shape), lengths)


PROGRAMS = {
    "classifier step": Program(
        classifier_step, ((256, 10), (256, 1000)), (8, 10), tolerance=1e-5, has_our_losses=True
    ),
    "PPO epoch": Program(policy_gradient_steps, ((2048, 2), (2048, 18)), (64, 3), tolerance=1e-5),
    "expert router": Program(router, ((8192, 8), (8192, 64)), (16, 5), differentiates=True),
    "language model step": Program(
        language_model_step, ((8, 128, 4096),), (2, 8, 30), tolerance=1e-4, has_our_losses=True
    ),
    "vision transformer step": Program(
        vision_transformer_step, ((16, 197),), (2, 5), tolerance=1e-4, has_our_losses=True
    ),
    "gradient of window attention": Program(
        window_attention, ((128, 49, 4, 32),), (3, 9, 2, 4), differentiates=True
    ),
    "gradient of attention with dropout": Program(
        attention_with_dropout, ((8, 256, 8, 64),), (2, 9, 2, 4), differentiates=True
    ),
    "encoder layer": Program(encoder_layer, ((8, 128, 256),), (2, 8, 64), differentiates=True),
    "decode": Program(decode, ((4, 2048, 8, 64), (1, 4096, 8, 64)), (3, 32, 2, 8)),
}
