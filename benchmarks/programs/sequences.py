"""Models of sequences: recurrences in log space, inside ``lax.scan``."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs.program import Program, integers, normal, with_gradient

SYMBOLS = 16
"""What a state of the hidden Markov model may emit."""


def hmm_forward(shape, rng):
    """Log-likelihood of a hidden Markov model, by the forward algorithm. Shape: steps, states."""
    steps, states = shape

    def log_likelihood(parameters, observations):
        transitions = jax.nn.log_softmax(parameters["transitions"])
        emissions = jax.nn.log_softmax(parameters["emissions"])

        def step(alpha, observation):
            alpha = jax.nn.logsumexp(alpha[:, None] + transitions, axis=0)
            return alpha + emissions[:, observation], None

        first = jax.nn.log_softmax(parameters["initial"]) + emissions[:, observations[0]]
        alpha, _ = jax.lax.scan(step, first, observations[1:])
        return jax.nn.logsumexp(alpha)

    parameters = {
        "initial": normal(rng, states),
        "transitions": normal(rng, states, states),
        "emissions": normal(rng, states, SYMBOLS),
    }
    return log_likelihood, (parameters, integers(rng, SYMBOLS, steps))


def bayesian_hmm(shape, rng):
    """Potential of a probabilistic program: an HMM with normal priors and emissions. Shape: steps, states."""
    steps, states = shape
    logpdf = jax.scipy.stats.norm.logpdf

    def potential(parameters, observations):
        prior = sum(logpdf(x).sum() for x in jax.tree.leaves(parameters))
        transitions = jax.nn.log_softmax(parameters["transition_logits"])
        scales = jnp.exp(parameters["log_scales"])
        emissions = logpdf(observations[:, None], parameters["means"], scales)

        def step(alpha, emission):
            return jax.scipy.special.logsumexp(alpha[:, None] + transitions, axis=0) + emission, None

        alpha, _ = jax.lax.scan(step, emissions[0] - np.log(states).astype(emissions.dtype), emissions[1:])
        return -(prior + jax.scipy.special.logsumexp(alpha))

    parameters = {
        "transition_logits": normal(rng, states, states),
        "means": normal(rng, states),
        "log_scales": normal(rng, states, scale=0.3),
    }
    return potential, (parameters, normal(rng, steps))


def linear_chain_crf(shape, rng):
    """Negative log-likelihood of a linear-chain CRF, with lengths. Shape: batch, steps, tags."""
    batch, steps, tags = shape

    def loss(parameters, labels, lengths):
        emissions, transitions = parameters["emissions"], parameters["transitions"]
        valid = jnp.arange(steps) < lengths[:, None]

        def step(alpha, inputs):
            emission, is_valid = inputs
            new = jax.nn.logsumexp(alpha[:, :, None] + transitions, axis=1) + emission
            return jnp.where(is_valid[:, None], new, alpha), None

        alpha, _ = jax.lax.scan(step, emissions[:, 0], (emissions.swapaxes(0, 1)[1:], valid.T[1:]))
        of_labels = jnp.take_along_axis(emissions, labels[..., None], -1)[..., 0]
        of_pairs = transitions[labels[:, :-1], labels[:, 1:]]
        score = jnp.where(valid, of_labels, 0).sum(-1) + jnp.where(valid[:, 1:], of_pairs, 0).sum(-1)
        return jnp.mean(jax.nn.logsumexp(alpha, axis=-1) - score)

    parameters = {"emissions": normal(rng, *shape), "transitions": normal(rng, tags, tags)}
    lengths = steps // 2 + integers(rng, steps // 2 + 1, batch)
    return loss, (parameters, integers(rng, tags, batch, steps), lengths)


def ctc(shape, rng):
    """Connectionist temporal classification, a label to 8 frames. Shape: batch, frames, classes."""
    import optax

    batch, frames, classes = shape

    def loss(logits, paddings, labels, label_paddings):
        return optax.ctc_loss(logits, paddings, labels, label_paddings).mean()

    labels = 1 + integers(rng, classes - 1, batch, frames // 8)
    paddings = np.arange(frames) >= frames - integers(rng, frames // 4, batch, 1)
    label_paddings = np.arange(frames // 8) >= frames // 8 - integers(rng, frames // 16, batch, 1)
    return loss, (
        normal(rng, *shape),
        paddings.astype(np.float32),
        labels,
        label_paddings.astype(np.float32),
    )


PROGRAMS = {
    **with_gradient(
        "HMM forward", Program(hmm_forward, ((256, 3), (256, 32), (256, 128)), (20, 3), tolerance=1e-5)
    ),
    "gradient of a Bayesian HMM": Program(bayesian_hmm, ((500, 3),), (20, 3), differentiates=True),
    **with_gradient("CRF", Program(linear_chain_crf, ((16, 64, 64), (64, 64, 128)), (2, 6, 5))),
    **with_gradient("CTC", Program(ctc, ((16, 200, 64),), (2, 32, 5), tolerance=1e-5)),
}
