"""A Gaussian mixture in numpyro, fitted inside ``patch_jax_nn``.

numpyro adds up the components by ``jax.nn.logsumexp``, and normalises their weights by
``jax.nn.log_softmax``. Within the context, both are this package's. The model does not change.

    python docs/examples/mixture_numpyro.py --steps 1000
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

import jax_softmax2p as s2p

CENTRES, WEIGHTS, SIZE = np.array([-4.0, 0.0, 3.0]), np.array([0.2, 0.5, 0.3]), 2000


def mixture(points: jax.Array) -> None:
    """Three components with unknown weights and centres, and one unknown width."""
    components = len(CENTRES)
    logits = numpyro.sample("logits", dist.Normal(0.0, 2.0).expand([components]).to_event(1))
    # Ordered, so that exchanged components are not a second solution.
    ordered = dist.TransformedDistribution(
        dist.Normal(0.0, 3.0).expand([components]).to_event(1), dist.transforms.OrderedTransform()
    )
    centres = numpyro.sample("centres", ordered)
    width = numpyro.sample("width", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("points", len(points)):
        numpyro.sample(
            "x",
            dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(centres, width)),
            obs=points,
        )


def main(steps: int) -> tuple[np.ndarray, s2p.integrations.PatchedCalls]:
    """Fits, and returns the centres found, and what the context counted."""
    rng = np.random.default_rng(0)
    component = rng.choice(len(CENTRES), SIZE, p=WEIGHTS)
    points = jnp.asarray(rng.normal(CENTRES[component], 0.7), jnp.float32)
    guide = AutoDelta(mixture)
    svi = SVI(mixture, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    with s2p.patch_jax_nn("numpyro") as calls:
        result = svi.run(jax.random.key(0), steps, points, progress_bar=False)
    found = guide.median(result.params)
    centres, weights = (np.asarray(x, np.float64) for x in (found["centres"], s2p.softmax(found["logits"])))
    print("centres", centres.round(2), "of", CENTRES)
    print("weights", weights.round(2), "of", WEIGHTS)
    print("computed by this package:", dict(calls.computed))
    return centres, calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    main(parser.parse_args().steps)
