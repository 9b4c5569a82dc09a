"""Axes that are not the last, as arrays [outer, n, inner] of every shape that a kernel treats differently."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax2p
from jax_softmax2p import native

pytestmark = pytest.mark.long

# Inner sizes below, at and above a vector; small matrices; panels divided at 256 columns and at 2048 rows.
LAYOUTS = [
    *[(outer, n, inner) for inner in (1, 2, 3, 7, 16, 100) for outer, n in ((37, 5), (3, 40), (2, 300))],
    (2, 17, 1000),
    (40, 1, 90),
    (1, 5000, 1),
    (2, 5000, 3),
    (1, 4097, 7),
    (1, 2049, 300),
    (1, 6001, 16),
    (3, 1000, 24),
]


def make(name, layout, dtype):
    """The array, and its columns as rows."""
    outer, n, inner = layout
    rows = np.stack([cases.make(name, n, dtype, seed) for seed in range(outer * inner)])
    return np.ascontiguousarray(rows.reshape(outer, inner, n).swapaxes(1, 2)), rows


def as_rows(y):
    return np.ascontiguousarray(y.swapaxes(1, 2)).reshape(-1, y.shape[1])


def softmax_into(x, **options):
    y = np.empty_like(x)
    native.softmax_into(x, y, axis=1, **options)
    return y


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["normal", "spike", "ramp -90…90", "masks"])
def test_accuracy(name, dtype, isa):
    for layout in LAYOUTS:
        x, rows = make(name, layout, dtype)
        exact = cases.exact_softmax(rows)
        for algorithm in ("auto", "two_pass", "three_pass_recompute", "three_pass_reload"):
            error = cases.ulp_error(as_rows(softmax_into(x, isa=isa, algorithm=algorithm)), exact)
            assert error <= cases.CONTRACT_ULP[dtype], (layout, algorithm)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bits(dtype, isa, algorithm):
    """Bits do not depend on the algorithm, the threads, the output buffer, the batch or the alignment."""
    for layout in LAYOUTS:
        x, _ = make("normal", layout, dtype)
        expected = softmax_into(x, isa=isa, algorithm=cases.algorithm_with_same_bits(algorithm))
        for threads in (1, 2, 5):
            y = softmax_into(x, isa=isa, algorithm=algorithm, threads=threads)
            np.testing.assert_array_equal(y, expected)
        in_place = cases.at_offset(x, 3)
        native.softmax_into(in_place, in_place, axis=1, isa=isa, algorithm=algorithm)
        np.testing.assert_array_equal(in_place, expected)
        last = softmax_into(np.ascontiguousarray(x[-1:]), isa=isa, algorithm=algorithm)
        np.testing.assert_array_equal(last, expected[-1:])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_no_writes_out_of_bounds(dtype, isa):
    for layout in LAYOUTS:
        x, _ = make("normal", layout, dtype)
        surroundings = np.full(x.size + 128, 7, dtype)
        out = surroundings[61 : 61 + x.size].reshape(x.shape)
        native.softmax_into(x, out, axis=1, isa=isa)
        assert (surroundings[:61] == 7).all()
        assert (surroundings[61 + x.size :] == 7).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_columns_beyond_the_exact_range(dtype, isa, algorithm):
    for layout in ((2, 9, 7), (20, 10, 4), (2, 100, 7), (1, 30, 90), (1, 300, 4), (1, 2100, 40)):
        x, _ = make("normal", layout, np.float64)
        x[..., 0::5] += 1e7
        x[..., 1::5] -= 1e9
        x[:, 1, 2] = -np.inf
        x = x.astype(dtype)
        y = softmax_into(x, isa=isa, algorithm=algorithm)
        error = cases.ulp_error(as_rows(y), cases.exact_softmax(as_rows(x)))
        assert error <= cases.CONTRACT_ULP[dtype], layout
        # Columns that need no third pass have the same bits beside others that need it.
        x[..., 0::5] = 0
        x[..., 1::5] = 0
        np.testing.assert_array_equal(softmax_into(x, isa=isa, algorithm=algorithm)[..., 3], y[..., 3])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_non_finite_columns_do_not_affect_others(dtype, isa, algorithm):
    for layout in ((1, 9, 7), (20, 10, 4), (1, 100, 7), (1, 30, 90), (1, 300, 3), (1, 2100, 40)):
        x, _ = make("normal", layout, dtype)
        expected = softmax_into(x, isa=isa, algorithm=algorithm)
        x[:, layout[1] // 2, 0] = np.nan
        x[:, 0, 1] = np.inf
        x[:, :, 2] = -np.inf
        y = softmax_into(x, isa=isa, algorithm=algorithm)
        assert np.isnan(y[..., :3]).all(), layout
        np.testing.assert_array_equal(y[..., 3:], expected[..., 3:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [7, 300])
def test_gradients_beyond_the_exact_range(dtype, n):
    """The weights of logsumexp, near columns that need no third pass, whose bits stay."""

    @jax.jit
    def weights(x, cotangent):
        logsumexp = functools.partial(jax_softmax2p.logsumexp, axis=0, implementation="native")
        return jax.vjp(logsumexp, x)[1](cotangent)[0]

    x, cotangent = make("normal", (1, n, 90), dtype)[0][0], np.linspace(0.5, 2, 90, dtype=dtype)
    ordinary = np.asarray(weights(x, cotangent))
    far = np.arange(90) % 4 == 1
    x[:, far] = (x[:, far].astype(np.float64) + 1e7).astype(dtype)
    y = np.asarray(weights(x, cotangent))
    np.testing.assert_array_equal(y[:, ~far], ordinary[:, ~far])
    exact = cases.exact_softmax(np.ascontiguousarray(x.T)) * cotangent[:, None]
    assert cases.ulp_error(np.ascontiguousarray(y.T), exact) <= 4
    for value in (np.nan, np.inf, -np.inf):
        x[n // 2, far] = value
        np.testing.assert_array_equal(weights(x, cotangent)[:, ~far], ordinary[:, ~far])
    y = np.asarray(weights(x, np.where(far, np.inf, cotangent).astype(dtype)))
    np.testing.assert_array_equal(y[:, ~far], ordinary[:, ~far])


@pytest.mark.parametrize("shape", [(6, 5, 4), (3, 1000, 3), (2, 300, 5, 7)])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_through_jax(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    for axis in range(-len(shape), len(shape)):
        expected = np.empty(shape, dtype)
        native.softmax_into(np.asarray(x), expected, axis=axis)
        np.testing.assert_array_equal(
            jax.jit(lambda x, axis=axis: jax_softmax2p.softmax(x, axis))(x), expected
        )
        if axis % len(shape) != 0:
            mapped = jax.jit(jax.vmap(lambda x, axis=axis: jax_softmax2p.softmax(x, axis % len(shape) - 1)))(
                x
            )
            np.testing.assert_array_equal(mapped, expected)


def test_large_arrays_with_non_temporal_stores(isa):
    x = np.random.default_rng(0).standard_normal((1_200_000, 8), np.float32)
    for shift in (0, 1):
        out = cases.at_offset(np.zeros_like(x), shift)
        native.softmax_into(x, out, isa=isa, threads=2)
        few = np.empty_like(x[-100:])
        native.softmax_into(x[-100:], few, isa=isa)
        np.testing.assert_array_equal(out[-100:], few)
        assert cases.ulp_error(out[:1000], cases.exact_softmax(x[:1000])) <= 2
