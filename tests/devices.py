"""Meshes of eight host devices, and the collectives of programs on them."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.vocab_parallel import collectives

SHAPE = {"data": 4, "model": 2}


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=(axis_type,) * len(SHAPE))


def place(x, mesh, *spec):
    """The array, sharded by the spec along its first dimensions, except those of size 1."""
    axes = [None if size == 1 else axis for size, axis in zip(x.shape, spec, strict=False)]
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


def run(f, *operands):
    """The results of f inside jit, and the kind and result bytes of each collective in its program."""
    compiled = jax.jit(f).lower(*operands).compile()
    return compiled(*operands), collectives(compiled.as_text())


def value_and_vjp(f):
    """(*operands, cotangent) -> (results, cotangents of the operands), without a sum over the batch."""

    def both(*operands):
        y, vjp = jax.vjp(f, *operands[:-1])
        return y, vjp(operands[-1])

    return both


def kinds(collectives):
    return sorted(kind for kind, _ in collectives)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
