"""Meshes of eight devices of the host, and what crosses between them: for the tests that run on those."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.vocab_parallel import collectives

SHAPE = {"data": 4, "model": 2}


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=(axis_type,) * len(SHAPE))


def place(x, mesh, *spec):
    """The array, divided as the spec says along its first dimensions, but for those of size 1."""
    own = [None if size == 1 else part for size, part in zip(x.shape, spec, strict=False)]
    return jax.device_put(x, NamedSharding(mesh, P(*own)))


def run(f, *operands):
    """The results of f in jit; and of the collectives in its program the kinds and the bytes of results."""
    compiled = jax.jit(f).lower(*operands).compile()
    return compiled(*operands), collectives(compiled.as_text())


def with_vjp(f):
    """f(*operands, cotangent) -> results, cotangents of the operands: without a sum over the batch."""

    def both(*operands):
        y, vjp = jax.vjp(f, *operands[:-1])
        return y, vjp(operands[-1])

    return both


def kinds(found):
    return sorted(kind for kind, _ in found)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
