"""A row has the same bits whatever its place, the batch, the threads, the alignment and the algorithm."""

import functools

import cases
import jax
import numpy as np
import pytest

import jax_softmax2p
from jax_softmax2p import native

pytestmark = pytest.mark.long

SHAPES = [(3, 7), (5, 1000), (300, 1500), (40, 33_000), (3, 66_000), (9000, 3), (1000, 100)]
LANES = 16  # The float32 lanes of the widest vector.
# Input and output of this many elements exceed the last-level cache together.
LARGE = 4096 * (native.cache_bytes()[1] // (2 * 4 * 4096) + 200)


def softmax_into(x, **options):
    y = np.empty_like(x)
    native.softmax_into(x, y, **options)
    return y


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_small_lengths_at_every_alignment(dtype, isa, algorithm):
    for n in (*range(4 * LANES + 1), *range(127, 131), *range(150, 161)):
        x = cases.make("normal", n, dtype) if n else np.empty(0, dtype)
        expected = softmax_into(x, isa=isa, algorithm=cases.algorithm_with_same_bits(algorithm))
        for shift in range(0, LANES, 3):
            shifted = cases.at_offset(x, shift)
            for out_shift in (shift, 0, 1, 7):
                surroundings = cases.at_offset(np.full(n + 2 * LANES, 7, dtype), out_shift)
                out = surroundings[LANES : LANES + n]
                native.softmax_into(shifted, out, isa=isa, algorithm=algorithm)
                np.testing.assert_array_equal(out, expected)
                assert (surroundings[:LANES] == 7).all()
                assert (surroundings[LANES + n :] == 7).all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_algorithms_and_in_place_agree(name, dtype, isa, algorithm):
    for n in (1, 31, 1000, 5001, 70_000, 400_001):
        x = cases.make(name, n, dtype)
        expected = softmax_into(x, isa=isa, algorithm=cases.algorithm_with_same_bits(algorithm))
        for threads in (1, 2, 5):
            y = softmax_into(x, isa=isa, algorithm=algorithm, threads=threads)
            np.testing.assert_array_equal(y, expected)
            in_place = x.copy()
            native.softmax_into(in_place, in_place, isa=isa, algorithm=algorithm, threads=threads)
            np.testing.assert_array_equal(in_place, expected)


@pytest.mark.parametrize(("rows", "n"), SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bits_do_not_depend_on_the_batch(dtype, rows, n, isa):
    x = np.stack([cases.make("normal", n, dtype, seed) for seed in range(rows)])
    alone = np.stack([softmax_into(row, isa=isa) for row in x])
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(softmax_into(x, isa=isa, threads=threads), alone)


@functools.cache
def large_row():
    """A row that most CPUs write with non-temporal stores, and its exact softmax."""
    x = cases.make("normal", LARGE + 5, np.float32)
    return x, cases.exact_softmax(x)


def test_arrays_larger_than_the_caches(isa, algorithm):
    """Results are written with non-temporal stores, whatever their alignment."""
    x, expected = large_row()
    parts = x[:LARGE].reshape(-1, 4096)
    alone = np.stack(
        [softmax_into(row, isa=isa, algorithm=cases.algorithm_with_same_bits(algorithm)) for row in parts]
    )
    for shift in (0, 3):
        out = cases.at_offset(np.zeros_like(parts), shift)
        native.softmax_into(parts, out, isa=isa, algorithm=algorithm, threads=2)
        np.testing.assert_array_equal(out, alone)
    out = cases.at_offset(np.zeros_like(x), 1)
    native.softmax_into(x, out, isa=isa, algorithm=algorithm, threads=2)
    assert cases.ulp_error(out, expected) <= 2


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_jacobian(dtype, isa):
    rng = np.random.default_rng(0)
    for rows, n in ((1, 5), (7, 1000), (2, 70_000), (300, 301)):
        y = softmax_into(rng.standard_normal((rows, n)).astype(dtype))
        t = rng.standard_normal((rows, n)).astype(dtype)
        expected = np.empty_like(y)
        for row in range(rows):
            native.softmax_jacobian_into(y[row], t[row], expected[row], isa=isa)
        for threads in (1, 2, 5):
            apart, in_place_of_y, in_place_of_t = np.empty_like(y), y.copy(), t.copy()
            native.softmax_jacobian_into(y, t, apart, isa=isa, threads=threads)
            native.softmax_jacobian_into(in_place_of_y, t, in_place_of_y, isa=isa, threads=threads)
            native.softmax_jacobian_into(y, in_place_of_t, in_place_of_t, isa=isa, threads=threads)
            for out in (apart, in_place_of_y, in_place_of_t):
                np.testing.assert_array_equal(out, expected)


@pytest.mark.long
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_jacobian_past_the_caches(dtype, isa):
    """Rows that fill cache lines are written past the caches where there are many: with the same bits."""
    rng = np.random.default_rng(0)
    for row_bytes in (64, 128, 256):
        n = row_bytes // np.dtype(dtype).itemsize
        y, t = (np.tile(rng.random((1000, n)), (2**24 // (1000 * n), 1)).astype(dtype) for _ in range(2))
        few, many = np.empty_like(y[:1000]), np.empty_like(y)
        native.softmax_jacobian_into(y[:1000], t[:1000], few, isa=isa)
        native.softmax_jacobian_into(y, t, many, isa=isa)
        np.testing.assert_array_equal(many, np.tile(few, (len(y) // 1000, 1)))


@pytest.mark.parametrize("shape", [(6, 5), (33, 2049), (16, 30576), (2, 3, 70_001)])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_jit_vmap_and_loop_agree(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    rows = x.reshape(-1, shape[-1])
    expected = softmax_into(rows).reshape(shape)
    np.testing.assert_array_equal(jax.jit(jax_softmax2p.softmax)(x), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax_softmax2p.softmax))(x), expected)
    loop = np.stack([jax_softmax2p.softmax(row) for row in rows]).reshape(shape)
    np.testing.assert_array_equal(loop, expected)
