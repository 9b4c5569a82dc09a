"""Integer labels of every dtype, where rows or classes are sharded over eight devices."""

import functools

import jax
import numpy as np
import pytest
from comparison import values_and_gradient
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from near_certainty import assert_exact, exact_loss, rows_of
from test_labels import check, edges, expected, jax_array, logits_for

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


def sharded_over(mesh, loss):
    """The loss of logits whose classes are sharded, and of labels that all devices have."""
    return jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "devices"), P()), out_specs=P())


@pytest.mark.parametrize("dtype", DTYPES)
def test_explicitly_sharded_classes(dtype, implementation):
    loss = functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)
    function = on_mesh(values_and_gradient(loss), AxisType.Explicit, P(None, "devices"), P())
    check(function, edges(dtype, CLASSES), dtype, CLASSES)


@pytest.mark.long
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
    function = on_mesh(values_and_gradient(loss), axis_type, x_spec, labels_spec)
    check(function, edges(dtype, CLASSES), dtype, CLASSES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_axis_name(dtype, implementation):
    """Labels count the classes of all shards."""
    loss = functools.partial(
        softmax_cross_entropy_with_integer_labels, axis_name="devices", implementation=implementation
    )
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    check(jax.jit(values_and_gradient(sharded_over(mesh, loss))), edges(dtype, CLASSES), dtype, CLASSES)


def test_axis_name_where_a_row_has_many_labels():
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    loss = functools.partial(softmax_cross_entropy_with_integer_labels, axis_name="devices")
    check_one_row(jax.jit(values_and_gradient(sharded_over(mesh, loss))))


@pytest.mark.long
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("x_spec", "labels_spec"), [(P(None, "devices"), P()), (P(), P("devices"))], ids=["classes", "labels"]
)
def test_a_row_has_many_labels(axis_type, x_spec, labels_spec, implementation):
    loss = functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)
    check_one_row(on_mesh(values_and_gradient(loss), axis_type, x_spec, labels_spec))


def check_one_row(function):
    """The logits have one row, which all labels share."""
    integers = edges("int32", CLASSES)
    x = logits_for([0], CLASSES)
    losses, gradient = function(x, jax_array(integers, "int32"))
    exact_losses, exact_gradients = expected(np.repeat(x, len(integers), 0), integers)
    np.testing.assert_allclose(losses, exact_losses, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(gradient, exact_gradients.sum(0, keepdims=True), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("spec", [P(None, "devices"), P("devices")], ids=["classes", "rows"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_near_certainty(dtype, spec):
    z, labels = (array[: len(array) // 8 * 8] for array in rows_of(40, dtype))
    loss = softmax_cross_entropy_with_integer_labels
    function = on_mesh(values_and_gradient(loss), AxisType.Auto, spec, P())
    for actual, exact in zip(function(z, labels), exact_loss(z, labels), strict=True):
        assert_exact(actual, exact, dtype)
