"""The fused kernel of attention: its products, its tiles, and its masks, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close, normal
from jax.test_util import check_grads
from test_attention import DEFAULT_MASK_VALUE, combined_mask, formula, lengths

from jax_softmax2p import dot_product_attention, explain, native

ISAS = native.supported_isas()
DTYPES = [np.float32, np.float64, jnp.bfloat16, np.float16]
EPS = {np.float32: 2.0**-24, np.float64: 2.0**-53, jnp.bfloat16: 2.0**-8, np.float16: 2.0**-11}


@functools.partial(jax.jit, static_argnames=("is_causal", "local_window_size", "return_residual"))
def fused(*operands, **options):
    return dot_product_attention(*operands, implementation="native", **options)


def operands_of(b, t, s, n, k, h, dtype=np.float32, size=1.0):
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [(size * normal(*shape, seed=i)).astype(dtype) for i, shape in enumerate(shapes)]


def exact_attention(
    query, key, value, *, bias=0.0, mask=None, scale=None, is_causal=False, local_window_size=None, **options
):
    """jax.nn's definition in float64, with NumPy: the output, the lse and the largest logit."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    t, s = q.shape[1], k.shape[1]
    q_lengths, kv_lengths = (options.get(f"{name}_seq_lengths") for name in ("query", "key_value"))
    z = np.einsum("btnh,bsnh->bnts", q, k) * (1 / np.sqrt(q.shape[-1]) if scale is None else scale) + bias
    combined = combined_mask(t, s, mask, is_causal, q_lengths, kv_lengths, local_window_size)
    if combined is not None:
        z = np.where(combined, z, DEFAULT_MASK_VALUE)
    largest = z.max(-1, keepdims=True)
    e = np.exp(z - largest)
    total = e.sum(-1, keepdims=True)
    y = np.einsum("bnts,bsnh->btnh", e / total, v)
    if q_lengths is not None:
        y *= (np.arange(t) < q_lengths[:, None])[..., None, None]
    used = z if combined is None else np.where(combined, z, 0)
    return y, np.moveaxis((largest + np.log(total))[..., 0], 1, 2), np.abs(used).max()


def check(operands, dtype=np.float32, **options):
    """DESIGN's contract: 8·sqrt(S) roundings of the largest value, 16-bit results rounded once more.

    Large logits are rounded before they are subtracted from one another.
    """
    y, lse, largest_logit = exact_attention(*operands, **options)
    actual = fused(*operands, **options)
    actual, exact = (actual, (y, lse)) if isinstance(actual, tuple) else ((actual,), (y,))
    s, largest = operands[1].shape[1], float(np.abs(np.asarray(operands[2], np.float64)).max())
    rounding = 2.0**-53 if dtype == np.float64 else 2.0**-24
    bound = (8 * np.sqrt(s) + 2 * largest_logit) * rounding * max(largest, 1)
    for x, y in zip(actual, exact, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        limit = bound + (EPS[dtype] * np.abs(y) if dtype in (jnp.bfloat16, np.float16) else 0)
        finite = np.abs(y) < 6e4
        assert (np.abs(x - y) <= limit)[finite].all(), np.abs(x - y)[finite].max()


class TestProduct:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_all_tiles_and_tails(self, isa, dtype):
        """Rows and columns from one to more than a tile, and depths beside those of a transposition."""
        for columns in (1, 3, 4, 7, 8, 9, 16, 17, 24, 31, 33, 47, 48, 49, 97):
            for rows, depth in ((1, 1), (2, 5), (3, 4), (8, 7), (9, 16), (16, 3), (17, 64), (31, 10)):
                a = normal(rows, depth).astype(dtype)
                b = normal(depth, columns, seed=1).astype(dtype)
                exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
                bound = depth * np.finfo(dtype).eps * (np.abs(a) @ np.abs(b)).max()
                assert np.abs(native.product(a, b, isa=isa) - exact).max() <= bound

    def test_errors(self):
        square = np.ones((2, 2))
        for a, b, error in (
            (square.astype(int), square, TypeError),
            (square, square.astype(np.float32), TypeError),
            (square[0], square, ValueError),
            (square, np.ones((3, 2)), ValueError),
            (square, np.ones((2, 4))[:, ::2], ValueError),
        ):
            with pytest.raises(error):
                native.product(a, b)


class TestSizes:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("b", "t", "s", "n", "k", "h"),
        [(1, 130, 70, 1, 1, 64), (2, 49, 65, 2, 1, 37), (1, 197, 197, 2, 2, 16), (1, 9, 200, 4, 2, 5)],
    )
    def test_blocks(self, b, t, s, n, k, h, dtype):
        operands = operands_of(b, t, s, n, k, h, dtype)
        check(operands, dtype, return_residual=True)
        check(operands, dtype, is_causal=True)

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 1), (1, 8, 2), (3, 2, 1), (2, 3, 3), (5, 2, 2)])
    def test_few_queries(self, t, n, k, dtype):
        """Split over keys, with a smaller last chunk and tile, and sizes beside those of a vector."""
        for s, h in ((3, 8), (700, 64), (1100, 37)):
            operands = operands_of(2, t, s, n, k, h, dtype)
            check(operands, dtype, return_residual=True)
        check(operands, dtype, local_window_size=(0, 600))

    def test_all_counts_of_rows(self):
        """Panels of one to three vectors, and their tails."""
        for t in (9, 16, 17, 33, 48, 49, 64, 65, 113):
            check(operands_of(1, t, 20, 1, 1, 8))


class TestMasks:
    """With few queries and with many."""

    @pytest.mark.parametrize("t", [2, 140])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_masks_and_biases(self, t, dtype):
        """Of every shape that broadcasts, with fully masked queries and with lengths."""
        b, s, n, k, h = 2, 150, 4, 2, 16
        operands = operands_of(b, t, s, n, k, h, dtype)
        size_lengths = {
            "query_seq_lengths": lengths(t - 1, t),
            "key_value_seq_lengths": lengths(s, 77),
        }
        for shape in ((b, n, t, s), (1, n, 1, s), (b, 1, t, 1), (1, 1, 1, s), (1, 1, t, s)):
            mask = normal(*shape, seed=3) > 0.3
            mask[..., 0, :] = False
            bias = normal(*shape, seed=4).astype(dtype)
            check(operands, dtype, bias=bias)
            check(operands, dtype, mask=mask, return_residual=True)
            check(operands, dtype, mask=mask, bias=bias, is_causal=True, **size_lengths)
        check(operands, dtype, local_window_size=(3, 5), scale=-2.0, **size_lengths)

    @pytest.mark.parametrize("t", [3, 140])
    def test_masked_nan_in_values(self, t):
        """It harms the queries that attend to it, and nobody else."""
        q, k, v = operands_of(1, t, t, 1, 1, 8)
        expected = fused(q, k, np.where(np.arange(t)[:, None, None] == 2, 0, v), is_causal=True)
        v[0, 2] = np.nan
        y = fused(q, k, v, is_causal=True)
        np.testing.assert_array_equal(np.isnan(y[0, :, 0, 0]), np.arange(t) >= 2)
        np.testing.assert_array_equal(y[:, :2], expected[:, :2])

    @pytest.mark.parametrize("which", [1, 2])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_masked_key_or_value_that_is_not_finite_in_gradients(self, which, dtype, value):
        """Its gradient is 0, and all others are as if it were finite."""
        operands = operands_of(2, 70, 150, 2, 1, 8, dtype)
        mask = np.arange(150) != 5
        ours = functools.partial(dot_product_attention, implementation="native", mask=mask)
        gradient = jax.jit(jax.grad(functools.partial(weighted, ours), (1, 2, 3)))
        cotangent = normal(2, 70, 2, 8, seed=7).astype(dtype)
        expected = gradient(cotangent, *operands)
        operands[which][:, 5] = value
        for x, y in zip(gradient(cotangent, *operands), expected, strict=True):
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("t", [1, 3, 140])
    @pytest.mark.parametrize("length", [1, 61, 77])
    def test_padded_keys(self, t, length):
        """They are not read, whatever they hold, and leave no trace in the bits."""
        q, k, v = operands_of(2, t, 150, 6, 3, 24)
        expected = fused(q, k[:, :length], v[:, :length])
        k[:, length:] = v[:, length:] = np.nan
        y = fused(q, k, v, key_value_seq_lengths=lengths(length, length))
        np.testing.assert_array_equal(y, expected)


class TestLogits:
    """Of all magnitudes."""

    @pytest.mark.parametrize("t", [2, 60])
    def test_offsets(self, t):
        """Rows with a large offset, in the tiles that follow only, or in the first one."""
        s = 200
        q, k, v = operands_of(1, t, s, 1, 1, 8)
        for offset in (30.0, 1e3, 5e4, 1e6, 1e30):
            # Where logits are too coarse to be compared, they are equal.
            operands = (q, k, v) if offset < 1e5 else (0 * q, k, v)
            for sign in (1, -1):
                bias = np.zeros((1, 1, t, s), np.float32)
                bias[..., : s // 2] = sign * offset
                check(operands, bias=bias, return_residual=True)
                check(operands, bias=np.full_like(bias, sign * offset))

    @pytest.mark.parametrize("t", [2, 60])
    def test_not_finite(self, t):
        """As jax.nn's: NaN for a NaN, a +inf, and -inf throughout; 0 for some -inf."""
        operands = operands_of(1, t, 100, 1, 1, 8)
        bias = np.zeros((1, 1, t, 100), np.float32)
        bias[..., 0, 70], bias[..., 1, :] = np.inf, -np.inf
        y, lse = fused(*operands, bias=bias, return_residual=True)
        assert np.isnan(y[0, :2]).all()
        assert np.isfinite(y[0, 2:]).all()
        assert lse[0, 0, 0] == np.inf
        assert lse[0, 1, 0] == -np.inf
        bias = np.where(normal(1, 1, t, 100) > 0, 0, -np.inf).astype(np.float32)
        check(operands, bias=bias)
        bias[0, 0, 1, 5] = np.nan
        np.testing.assert_array_equal(np.isnan(fused(*operands, bias=bias)[0, :, 0, 0]), np.arange(t) == 1)

    @pytest.mark.parametrize("t", [1, 40])
    def test_nan_with_all_bits_set_stays_nan(self, t):
        """Memory that was filled with ones, say: rounding to bfloat16 must not carry out of it."""
        bias = np.zeros((1, 1, t, 9), np.float32)
        bias[0, 0, 0, 3] = np.array(0xFFFFFFFF, np.uint32).view(np.float32)
        y = fused(*operands_of(1, t, 9, 1, 1, 8, jnp.bfloat16), bias=bias)
        np.testing.assert_array_equal(np.isnan(np.asarray(y[0, :, 0, 0], np.float32)), np.arange(t) == 0)

    def test_infinite_sinks(self):
        """A sink of +inf takes all, one of -inf nothing; they have no NaN, nor have gradients."""
        q, k, v = operands_of(1, 5, 9, 3, 1, 8)
        sinks = np.array([np.inf, 0, -np.inf], np.float32)
        y, lse = fused(q, k, v, sinks=sinks, return_residual=True)
        assert not np.any(y[:, :, 0])
        assert np.isposinf(lse[:, :, 0]).all()
        np.testing.assert_allclose(y[:, :, 2], fused(q, k, v)[:, :, 2], rtol=1e-6)
        gradients = jax.jit(jax.grad(lambda *xs: (fused(*xs, sinks=sinks)[:, :, ::2] ** 2).sum(), (0, 1, 2)))(
            q, k, v
        )
        expected = jax.jit(jax.grad(lambda *xs: (fused(*xs)[:, :, 2] ** 2).sum(), (0, 1, 2)))(q, k, v)
        for x, y in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_large_values(self):
        """They do not overflow where their mean does not."""
        q, k, v = operands_of(1, 50, 100, 1, 1, 8)
        check((q, k, v * np.float32(1e30)))

    def test_large_products(self):
        check(operands_of(1, 60, 300, 1, 1, 64, size=20.0))


GRADIENT_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 70)},
    "bias": {"bias": normal(2, 4, 130, 150, seed=5)},
    "mask": {"mask": normal(1, 4, 130, 150, seed=6) > 0.2},
    "masked queries": {"mask": np.arange(130)[:, None] % 7 > np.zeros((130, 150))},
    "lengths": {
        "query_seq_lengths": lengths(130, 77),
        "key_value_seq_lengths": lengths(0, 101),
        "is_causal": True,
    },
    "scale": {"scale": -0.7},
}


def weighted(function, cotangent, *operands):
    return jnp.sum(function(*operands) * cotangent)


class TestLongSums:
    """Equal values, whose rounding errors do not cancel one another as those of random values do."""

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("t", [1, 16])
    @pytest.mark.parametrize("masked", [False, True])
    def test_values(self, dtype, t, masked):
        s = 2**17
        q, k = np.zeros((1, t, 1, 8), dtype), np.zeros((1, s, 1, 8), dtype)
        v = np.full((1, s, 1, 8), 0.926, dtype)
        y = fused(q, k, v, mask=np.zeros((1, 1, 1, 1), bool) if masked else None)
        np.testing.assert_allclose(np.asarray(y), v[:, :1].repeat(t, 1), rtol=2 * np.sqrt(s) * EPS[dtype])

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_gradients(self, dtype):
        """Of keys and values, sums over queries, and of queries, sums over keys.

        dP and delta are 5.2 and cancel but for some 1e-5: gradients of queries and keys have their roundings.
        """
        long, short = 2**16, 4
        for t, s in ((long, short), (short, long)):
            q, k, v = (np.full((1, n, 1, 8), x, dtype) for n, x in ((t, 0.1), (s, 0.1), (s, 0.926)))
            k[:, 0], v[:, 0] = 0.3, 0.5  # So that weights and gradients are not all equal.
            cotangent = np.full((1, t, 1, 8), 0.7, dtype)
            ours = functools.partial(dot_product_attention, implementation="native")
            actual = jax.jit(jax.grad(functools.partial(weighted, ours), (1, 2, 3)))(cotangent, q, k, v)
            wide = [x.astype(np.float64) for x in (cotangent, q, k, v)]
            expected = jax.jit(jax.grad(functools.partial(weighted, formula), (1, 2, 3)))(*wide)
            cancelling = 5.2 * 0.3 / np.sqrt(8)
            for x, y, terms in zip(actual, expected, (cancelling, cancelling, 0), strict=True):
                tolerance = 4 * np.sqrt(long) * np.abs(y).max() + 64 * terms
                np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=EPS[dtype] * tolerance)


class TestGradient:
    """In query, key and value, against that of jax.nn's definition in float64."""

    @pytest.mark.long
    @pytest.mark.parametrize("case", GRADIENT_CASES)
    def test_cases(self, case):
        options = GRADIENT_CASES[case]
        operands = operands_of(2, 130, 150, 4, 2, 20, np.float64)
        cotangent = normal(2, 130, 4, 20, seed=7)
        expected = jax.jit(
            jax.grad(functools.partial(weighted, functools.partial(formula, **options), cotangent), (0, 1, 2))
        )(*operands)
        ours = functools.partial(dot_product_attention, implementation="native", **options)
        gradient = jax.jit(jax.grad(functools.partial(weighted, ours, cotangent), (0, 1, 2)))
        assert_close(gradient(*operands), expected)
        for x, y in zip(gradient(*(x.astype(np.float32) for x in operands)), expected, strict=True):
            assert x.dtype == np.float32
            # Of large logits dP - delta cancels where a weight is nearly 1.
            assert_close(x, y, 1.5e-5 if case == "scale" else 4e-6)

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("b", "t", "s", "n", "k", "h"), [(1, 1, 1, 1, 1, 1), (1, 9, 1100, 2, 1, 8), (3, 50, 20, 6, 6, 37)]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sizes(self, b, t, s, n, k, h, dtype):
        """Several chunks of keys among them."""
        operands = operands_of(b, t, s, n, k, h, dtype)
        cotangent = normal(b, t, n, h, seed=7).astype(dtype)
        wide = [np.asarray(x, np.float64) for x in (cotangent, *operands)]
        expected = jax.jit(jax.grad(functools.partial(weighted, formula), (1, 2, 3)))(*wide)
        ours = functools.partial(dot_product_attention, implementation="native")
        actual = jax.jit(jax.grad(functools.partial(weighted, ours), (1, 2, 3)))(cotangent, *operands)
        for x, y in zip(actual, expected, strict=True):
            assert x.dtype == dtype
            # The output, from which delta comes, has been rounded to 16 bits.
            tolerance = max(4 * EPS[dtype], 4e-6 if dtype == np.float32 else 1e-14)
            assert_close(np.asarray(x, np.float64), y, tolerance)

    def test_large_products(self):
        """Logits of some 1e6 and 1e8, all equal."""
        ones, v, cotangent = (
            np.ones((1, 12, 1, 8), np.float32),
            normal(1, 12, 1, 8),
            normal(1, 12, 1, 8, seed=7),
        )
        ours = functools.partial(dot_product_attention, implementation="native", is_causal=True)
        expected = np.cumsum((cotangent / np.arange(1, 13)[:, None, None])[:, ::-1], 1)[:, ::-1]
        for size in (1e3, 1e4):
            operands = np.float32(size) * ones, np.float32(size) * ones, v.astype(np.float32)
            value_gradient = jax.jit(jax.grad(lambda v, q, k: (ours(q, k, v) * cotangent).sum()))(
                operands[2], *operands[:2]
            )
            assert_close(value_gradient, expected, 4e-6)

    @pytest.mark.long(last=4)
    @pytest.mark.parametrize("last", [4, 1])
    def test_bias_and_scale_and_higher_orders(self, last):
        @jax.jit
        def f(q, k, v, bias, scale):
            return dot_product_attention(q, k, v, bias, scale=scale, is_causal=True, implementation="native")

        operands = (*operands_of(1, 3, 4, 2, 1, 2, np.float64), normal(1, 2, 1, last), 0.4)
        check_grads(f, operands, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)

    @pytest.mark.long(in_axes=(1, 0, 0))
    @pytest.mark.parametrize("in_axes", [(0, None, None), (1, 0, 0), (None, None, 2)])
    def test_vmap(self, in_axes):
        operands = [normal(1, 7, 4, 8), normal(1, 9, 2, 8, seed=1), normal(1, 9, 2, 8, seed=2)]
        operands = [
            x if axis is None else np.stack([x, 2 * x], axis)
            for x, axis in zip(operands, in_axes, strict=True)
        ]
        lengths_of = {"key_value_seq_lengths": lengths(6)}
        ours = functools.partial(dot_product_attention, implementation="native", is_causal=True, **lengths_of)
        gradients = [
            jax.jit(jax.vmap(jax.grad(lambda *xs, f=f: (f(*xs) ** 2).sum(), (0, 1, 2)), in_axes))(*operands)
            for f in (ours, functools.partial(formula, is_causal=True, **lengths_of))
        ]
        assert_close(*gradients)
        outer = jax.jit(jax.grad(lambda *xs: (jax.vmap(ours, in_axes)(*xs) ** 2).sum(), 2))(*operands)
        total = gradients[1][2] if in_axes[2] is None else jnp.moveaxis(gradients[1][2], 0, in_axes[2])
        assert_close(outer, total.sum(0) if in_axes[2] is None else total)


BIASES = [(3, 4, 70, 150), (1, 4, 70, 150), (3, 1, 70, 150), (1, 1, 70, 150), (1, 4, 1, 150), (1, 1, 1, 150)]


class TestGradientInBias:
    """It is computed by the kernel, and summed over what the bias broadcasts over."""

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*BIASES, (1, 4, 70, 1)])
    @pytest.mark.parametrize("with_sinks", [False, True])
    def test_shapes(self, shape, dtype, with_sinks):
        operands = [*operands_of(3, 70, 150, 4, 2, 20, dtype), normal(*shape, seed=5).astype(dtype)]
        cotangent = normal(3, 70, 4, 20, seed=7).astype(dtype)
        sinks = normal(4, seed=8).astype(dtype) if with_sinks else None
        options = {"is_causal": True, "logits_soft_cap": 3.0, "key_value_seq_lengths": lengths(150, 33, 0)}
        self.check(cotangent, operands, **options, sinks=sinks)

    @pytest.mark.parametrize("shape", [(1, 1, 9, 1100), (2, 1, 1, 1100)])
    def test_several_chunks_of_keys(self, shape):
        operands = [*operands_of(2, 9, 1100, 2, 1, 8, np.float32), normal(*shape, seed=5).astype(np.float32)]
        self.check(normal(2, 9, 2, 8, seed=7).astype(np.float32), operands)

    def test_several_examples_in_a_part(self):
        operands = [
            *operands_of(9, 200, 30, 16, 16, 70),
            normal(1, 1, 200, 30, seed=5).astype(np.float32),
        ]
        mask = normal(9, 1, 200, 30, seed=6) > -1
        self.check(normal(9, 200, 16, 70, seed=7).astype(np.float32), operands, mask=mask)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_padding_with_a_bias_that_is_not_finite(self, value):
        q, k, v = operands_of(2, 7, 9, 2, 1, 8)
        bias, cotangent = normal(1, 2, 7, 9, seed=5).astype(np.float32), normal(2, 7, 2, 8, seed=7)
        spoilt = np.where(np.arange(7)[:, None] < 3, bias, np.float32(value))
        ours = functools.partial(
            dot_product_attention, implementation="native", query_seq_lengths=lengths(3, 2)
        )
        gradient = jax.jit(jax.grad(functools.partial(weighted, ours), (1, 2, 3, 4)))
        expected, actual = (gradient(cotangent.astype(np.float32), q, k, v, b) for b in (bias, spoilt))
        assert_close(actual, expected)
        assert not np.any(actual[3][:, :, 3:])

    @staticmethod
    def check(cotangent, operands, **options):
        exact = functools.partial(formula, **options)
        ours = functools.partial(dot_product_attention, implementation="native", **options)
        wide = [np.asarray(x, np.float64) for x in (cotangent, *operands)]
        expected = jax.jit(jax.grad(functools.partial(weighted, exact), (1, 2, 3, 4)))(*wide)
        actual = jax.jit(jax.grad(functools.partial(weighted, ours), (1, 2, 3, 4)))(cotangent, *operands)
        dtype = cotangent.dtype.type
        for x, y in zip(actual, expected, strict=True):
            assert x.dtype == dtype
            largest = np.abs(y).max()
            tolerance = max(4 * EPS[dtype], 4e-6 if dtype == np.float32 else 1e-14) * max(1.0, largest)
            np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=tolerance)

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("offset", [-1e9, 1e9, -1e38, 3e4])
    def test_large_equal_logits(self, dtype, offset):
        """Masks by finite biases, say: weights of 1/n, though the lse is rounded to the logit."""
        limit = float(jnp.finfo(dtype).max) / 4
        offset = np.clip(offset, -limit, limit)
        operands = operands_of(1, 9, 70, 2, 1, 8, dtype)
        operands[0] = 0 * operands[0]
        bias = np.full((1, 2, 9, 70), offset).astype(dtype)
        bias[:, :, :3, :3] = 0
        cotangent = normal(1, 9, 2, 8, seed=7).astype(dtype)
        for options in ({}, {"is_causal": True}, {"sinks": np.full(2, bias[0, 0, 8, 8])}):
            self.check(cotangent, [*operands, bias], **options)

    @pytest.mark.parametrize("bias_axis", [None, 0])
    def test_vmap(self, bias_axis):
        q, k, v = normal(3, 2, 7, 4, 8), normal(2, 9, 2, 8, seed=1), normal(2, 9, 2, 8, seed=2)
        bias = normal(*(3,) * (bias_axis == 0), 1, 4, 7, 9, seed=3)
        axes = 0, None, None, bias_axis
        ours = functools.partial(dot_product_attention, implementation="native")
        gradients = [
            jax.jit(jax.vmap(jax.grad(lambda *xs, f=f: (f(*xs) ** 2).sum(), 3), axes))(q, k, v, bias)
            for f in (ours, formula)
        ]
        assert_close(*gradients)

    def test_vmap_over_the_scale(self):
        q, k, v = operands_of(1, 7, 9, 2, 1, 8, np.float64)
        scales = np.array([0.5, 2.0])
        gradients = [
            jax.jit(
                jax.vmap(jax.grad(lambda k, scale, f=f: (f(q, k, v, scale=scale) ** 2).sum()), (None, 0))
            )(k, scales)
            for f in (functools.partial(dot_product_attention, implementation="native"), formula)
        ]
        assert_close(*gradients)

    def test_is_native(self):
        """But for a bias that broadcasts over keys."""

        def calls(last):
            operands = *operands_of(1, 70, 80, 2, 1, 8), normal(1, 2, 70, last).astype(np.float32)
            loss = lambda *xs: (dot_product_attention(*xs, implementation="native") ** 2).sum()
            text = jax.jit(jax.grad(loss, 3)).lower(*operands).as_text()
            return [text.count(f"custom_call @jax_softmax2p_{x}") for x in ("attention_vjp_v1", "softmax_v1")]

        assert calls(80) == [1, 0]
        assert calls(1)[0] == 0


def exact_gradients(q, k, v, cotangent, after):
    """Of the causal or full attention of as many heads of queries as of keys, in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scale = 1 / np.sqrt(q.shape[-1])
    z = scale * np.einsum("btnh,bsnh->bnts", q, k)
    if after is not None:
        z = np.where(np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None] + after, z, -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btnh,bsnh->bnts", g, v)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    products = "bnts,bsnh->btnh", "bnts,btnh->bsnh", "bnts,btnh->bsnh"
    return [np.einsum(e, a, b) for e, a, b in zip(products, (ds, ds, p), (k, q, g), strict=True)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("after", [None, 0, 3])
class TestInstructionSets:
    """The kernels on NumPy arrays, on one thread and on several, which give the same bits."""

    def test_values_and_gradients(self, isa, dtype, after):
        for b, t, s, n, h in ((1, 1, 600, 3, 20), (2, 5, 70, 1, 16), (1, 61, 67, 2, 9), (1, 150, 1100, 1, 8)):
            operands = operands_of(b, t, s, n, n, h, dtype)
            cotangent = normal(b, t, n, h, seed=7).astype(dtype)
            results = native.attention(*operands, cotangent, after=after, isa=isa)
            again = native.attention(*operands, cotangent, after=after, isa=isa, threads=3)
            for x, y in zip(results, again, strict=True):
                assert x.tobytes() == y.tobytes()
            window = None if after is None else (t + s, after)
            y, lse, _ = exact_attention(*operands, local_window_size=window)
            gradients = exact_gradients(*operands, cotangent, after)
            for x, exact in zip(results, (y, lse, *gradients), strict=True):
                tolerance = max(4 * EPS[dtype], 1e-5 if dtype != np.float64 else 1e-14)
                assert_close(x.astype(np.float64), exact, tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("t", "n", "k"), [(10, 1, 1), (64, 8, 1), (64, 12, 2), (30, 1, 1)])
def test_what_is_not_finite_after_the_last_visible_key(isa, dtype, t, n, k):
    """Wherever it lies, only queries that attend to it have it; in the gradient, too."""
    q, key, value = operands_of(1, t, 64, n, k, 8, dtype)
    cotangent = normal(1, t, n, 8, seed=7).astype(dtype)
    attention = functools.partial(native.attention, before=None, after=0, isa=isa)
    y, _, dq, *_ = attention(q, key, value, cotangent)
    for at in range(5, 14):
        with_nan, with_inf = value.copy(), key.copy()
        with_nan[0, at], with_inf[0, at] = np.nan, np.inf
        with_nan_y = attention(q, key, with_nan, cotangent)[0]
        np.testing.assert_array_equal(with_nan_y[:, :at], y[:, :at])
        assert np.all(np.isnan(with_nan_y[:, at:]))
        for changed in ((with_inf, value), (key, with_nan)):
            np.testing.assert_array_equal(attention(q, *changed, cotangent)[2][:, :at], dq[:, :at])


def test_bits_do_not_depend_on_neighbours():
    """A query's bits are those that it has alone, but for the split over keys of few."""
    q, k, v = operands_of(1, 400, 300, 1, 1, 64)
    whole = np.asarray(fused(q, k, v, is_causal=True))
    mask = np.tril(np.ones((400, 300), bool))
    for first, last in ((0, 100), (17, 90), (130, 333), (333, 400)):
        part = fused(q[:, first:last], k, v, mask=mask[first:last])
        np.testing.assert_array_equal(part, whole[:, first:last])


def test_batching_repeats_nothing_that_broadcasts():
    q, k, v = operands_of(1, 4, 5, 2, 1, 8)
    several = np.stack([q, 2 * q, 3 * q])
    y = jax.jit(jax.vmap(fused, (0, None, None)))(several, k, v)
    for i in range(3):
        np.testing.assert_array_equal(y[i], fused((i + 1) * q, k, v))
    scales = np.array([0.5, 2.0], np.float32)
    y = jax.jit(jax.vmap(lambda scale: fused(q, k, v, scale=scale)))(scales)
    np.testing.assert_allclose(y[1], fused(q, k, v, scale=scales[1]), rtol=1e-5, atol=1e-6)


def test_gradient_of_many_logits_is_native():
    """Two native calls, and nothing composed."""
    operands = operands_of(1, 1100, 1000, 1, 1, 8)
    text = jax.jit(jax.grad(lambda *xs: (dot_product_attention(*xs) ** 2).sum())).lower(*operands).as_text()
    assert text.count("custom_call @jax_softmax2p_attention_v1") == 1
    assert text.count("custom_call @jax_softmax2p_attention_vjp_v1") == 1


def test_choice():
    """Small work in loops and the gradient of few queries are composed."""

    def choices(function, t, keys=4):
        operands = [jax.ShapeDtypeStruct((1, size, 1, 4), "float32") for size in (t, keys, keys)]
        found = [x for x in explain(function, *operands) if x.operation.startswith("softmax2p_attention")]
        assert all("multiply-adds" in x.reason or "queries" in x.reason for x in found)
        return [x.implementation for x in found]

    loop = lambda q, k, v: jax.lax.scan(lambda c, _: (dot_product_attention(c, k, v), None), q, length=3)[0]
    gradient = jax.grad(lambda *xs: dot_product_attention(*xs).sum(), 2)
    assert [choices(dot_product_attention, t) for t in (1, 9)] == [["native"], ["native"]]
    assert [choices(loop, t) for t in (1, 9)] == [["reference"], ["native"]]
    # A single query's products fuse, where two queries' have a kernel.
    assert [choices(loop, t, keys=64) for t in (1, 2)] == [["reference"], ["native"]]
    assert choices(loop, 1, keys=4096) == ["native"]
    assert [choices(gradient, t) for t in (1, 9)] == [["native", "reference"], ["native", "native"]]


def test_explain_says_why_attention_is_composed():
    """In gradients and under vmap, too, before the softmaxes that it is composed of."""
    attend = lambda x: dot_product_attention(x, x, x, query_block_size=2)
    x = jax.ShapeDtypeStruct((5, 3, 7, 2, 4), "float32")
    for function in (jax.vmap(attend), jax.grad(lambda x: jax.vmap(attend)(x).sum())):
        first, *others = explain(function, x)
        assert first[:3] == ("softmax2p_attention", (5, 3, 7, 2, 4), "float32")
        assert first[4:] == ("reference", "attention is composed: query_block_size is given")
        assert {choice.operation for choice in others} >= {"softmax2p"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_jacobian_in_a_loop(dtype):
    """The attention itself is composed there, and its gradient for all cotangents native."""
    q, k, v = operands_of(1, 4, 4, 1, 1, 4, dtype, size=3.0)
    f = lambda q: dot_product_attention(q, k, v).astype(np.float32)
    in_loop = jax.jit(lambda qs: jax.lax.map(jax.jacrev(f), qs))(jnp.stack([q, q]))
    found = [x.implementation for x in explain(lambda qs: jax.lax.map(jax.jacrev(f), qs), jnp.stack([q, q]))]
    assert found == ["reference", "native"]
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    exact = jax.jacrev(lambda q: formula(q, *wide[1:]))(wide[0])
    for jacobian in in_loop:
        assert_close(np.asarray(jacobian, np.float64), exact, 16 * EPS[dtype])


def test_vmap_over_nothing():
    k = jnp.zeros((3, 1, 8))
    for axes in ((0, None), (0, 0)):
        keys = k if axes[1] is None else jnp.zeros((0, *k.shape))
        mapped = jax.vmap(lambda q, k: dot_product_attention(q, k, k), axes)
        assert jax.jit(mapped)(jnp.zeros((0, 2, 1, 8)), keys).shape == (0, 2, 1, 8)
        gradients = jax.grad(lambda *xs, f=mapped: f(*xs).sum(), (0, 1))(jnp.zeros((0, 2, 1, 8)), keys)
        assert [x.shape for x in gradients] == [(0, 2, 1, 8), keys.shape]
        assert np.all(gradients[1] == 0)
