"""The logarithm of a mean of exponentials, of numbers that arrive in chunks and are not kept.

Importance sampling estimates the integral of e^f by the mean of e^(f(x) - log q(x)) over samples x of q. The
exponents here are around 1000, so that no float holds e^them. Each chunk is reduced to a pair (mantissa,
exponent), which adds up without overflow, whatever the order. So parts may also come from several processes
or files.

    python docs/examples/streaming_logsumexp.py --chunks 100
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p as s2p

SIZE, DIMENSIONS, WIDER = 2**16, 4, 1.5


@jax.jit
def add_chunk(total: s2p.SumExp, key: jax.Array) -> s2p.SumExp:
    """The sum so far, and that of a new chunk."""
    x = WIDER * jax.random.normal(key, (SIZE, DIMENSIONS))
    log_f = 1000 - jnp.sum(x * x, -1) / 2
    log_q = -jnp.sum((x / WIDER) ** 2, -1) / 2 - DIMENSIONS * jnp.log(WIDER * jnp.sqrt(2 * jnp.pi))
    return total.combine(s2p.sum_exp(log_f - log_q))


def main(chunks: int) -> tuple[float, float]:
    """The estimate, and the exact logarithm of the integral."""
    total = s2p.SumExp.empty()
    for key in jax.random.split(jax.random.key(0), chunks):
        total = add_chunk(total, key)
    estimate = float(total.log()) - np.log(chunks * SIZE)
    exact = 1000 + DIMENSIONS / 2 * np.log(2 * np.pi)
    print(f"{chunks * SIZE} samples: {estimate:.4f}; the integral's logarithm is {exact:.4f}")
    return estimate, exact


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100)
    main(parser.parse_args().chunks)
