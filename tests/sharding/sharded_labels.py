"""Integer labels of every dtype, where rows or classes are sharded over eight devices."""

import functools

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_labels import check, edges, losses_and_gradient_of

from jax_softmax2p import softmax_cross_entropy_with_integer_labels

CLASSES = 200
"""Shards have 25 classes. The last one begins at class 175, which int8 cannot hold, nor int4 their number."""

DTYPES = ["int4", "int8", "uint8", "uint32", "int64"]


def on_mesh(function, axis_type, x_spec, labels_spec):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(axis_type,))

    def run(x, labels):
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, x_spec))
            labels = jax.device_put(labels, NamedSharding(mesh, labels_spec))
            return jax.jit(function)(x, labels)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_explicitly_sharded_classes(dtype, implementation):
    loss = functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)
    function = on_mesh(losses_and_gradient_of(loss), AxisType.Explicit, P(None, "devices"), P())
    check(function, edges(dtype, CLASSES), dtype, CLASSES)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64"])
@pytest.mark.parametrize(
    ("axis_type", "x_spec", "labels_spec"),
    [
        (AxisType.Auto, P(None, "devices"), P()),
        (AxisType.Auto, P("devices"), P("devices")),
        (AxisType.Explicit, P("devices"), P("devices")),
    ],
    ids=["classes, auto", "rows, auto", "rows, explicit"],
)
def test_sharded(axis_type, x_spec, labels_spec, dtype, implementation):
    loss = functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)
    function = on_mesh(losses_and_gradient_of(loss), axis_type, x_spec, labels_spec)
    check(function, edges(dtype, CLASSES), dtype, CLASSES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_axis_name(dtype, implementation):
    """Labels count the classes of all shards."""
    loss = functools.partial(
        softmax_cross_entropy_with_integer_labels, axis_name="devices", implementation=implementation
    )
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "devices"), P()), out_specs=P())
    check(jax.jit(losses_and_gradient_of(sharded)), edges(dtype, CLASSES), dtype, CLASSES)
