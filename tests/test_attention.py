"""dot_product_attention: jax.nn's semantics against its formula in float64, and the memory that it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close, normal, weighted_sum
from jax.test_util import check_grads
from versions import has

from jax_softmax2p import dot_product_attention
from jax_softmax2p.attention import blocks

NAN, INF = float("nan"), float("inf")
DTYPES = [np.float32, np.float64, jnp.bfloat16, np.float16]
LOWEST = float(np.finfo(np.float32).min)
DEFAULT_MASK_VALUE = 0.7 * LOWEST


def inputs(b=2, t=7, s=9, n=4, k=2, h=8):
    return normal(b, t, n, h), normal(b, s, k, h, seed=1), normal(b, s, k, h, seed=2)


def combined_mask(t, s, mask, is_causal, query_lengths, key_lengths, window):
    """All of jax.nn's masks as one, which broadcasts to (B, N, T, S); None if there is none."""
    i, j = np.arange(t)[:, None], np.arange(s)
    masks = [] if mask is None else [mask]
    if is_causal:
        masks.append(j <= i)
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        masks.append((i - left <= j) & (j <= i + right))
    if query_lengths is not None:
        masks.append(i < query_lengths[:, None, None, None])
    if key_lengths is not None:
        masks.append(j < key_lengths[:, None, None, None])
    return functools.reduce(np.logical_and, masks) if masks else None


def formula(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    sinks=None,
    dropout_mask=None,
    return_residual=False,
):
    """jax.nn's definition in jax.numpy, computed in the dtype of the operands, which is to be float64.

    Sinks are one more key, as in gpt-oss. The mask of dropout multiplies the weights.
    """
    groups = query.shape[2] // key.shape[2]
    t, s = query.shape[1], key.shape[1]
    key, value = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)
    z = jnp.einsum("btnh,bsnh->bnts", query, key)
    z = z * (1 / np.sqrt(query.shape[-1]) if scale is None else scale)
    if logits_soft_cap is not None:
        z = logits_soft_cap * jnp.tanh(z / logits_soft_cap)
    if bias is not None:
        z = z + bias
    lengths = query_seq_lengths, key_value_seq_lengths
    combined = combined_mask(t, s, mask, is_causal, *lengths, local_window_size)
    if combined is not None:
        z = jnp.where(combined, z, DEFAULT_MASK_VALUE)
    if sinks is not None:
        column = jnp.broadcast_to(jnp.asarray(sinks)[:, None, None], (*z.shape[:-1], 1))
        z = jnp.concatenate([z, column.astype(z.dtype)], -1)
    e = jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True)))
    weights = (e / e.sum(-1, keepdims=True))[..., :s]
    if dropout_mask is not None:
        weights = weights * dropout_mask
    result = jnp.einsum("bnts,bsnh->btnh", weights, value)
    if query_seq_lengths is not None:
        result = result * (np.arange(t) < query_seq_lengths[:, None])[..., None, None]
    return (result, jnp.moveaxis(jax.nn.logsumexp(z, -1), 1, 2)) if return_residual else result


def lengths(*values):
    return np.array(values, np.int32)


SPARSE_MASK = normal(2, 4, 7, 9) > 0.8
SPARSE_MASK[1, :, 2] = False

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale and bias": {"scale": 0.3, "bias": normal(2, 4, 7, 9)},
    "bias of heads": {"bias": normal(1, 4, 1, 9), "is_causal": True},
    "bias of three dimensions": {"bias": normal(4, 7, 9)},
    "mask, some rows fully masked": {"mask": SPARSE_MASK},
    "mask of keys": {"mask": normal(2, 1, 1, 9) > 0},
    "mask for all": {"mask": normal(1, 1, 7, 9) > 0, "bias": normal(2, 1, 7, 1)},
    "mask and bias, causal": {"mask": SPARSE_MASK, "bias": normal(1, 4, 7, 9), "is_causal": True},
    "window": {"local_window_size": (1, 2)},
    "window, causal": {"local_window_size": 2, "is_causal": True},
    "window of the diagonal": {"local_window_size": 0, "bias": normal(1, 1, 7, 9)},
    "lengths": {"query_seq_lengths": lengths(3, 7), "key_value_seq_lengths": lengths(9, 4)},
    "lengths of 0, causal": {
        "query_seq_lengths": lengths(5, 0),
        "key_value_seq_lengths": lengths(0, 6),
        "is_causal": True,
    },
    "all": {
        "mask": SPARSE_MASK,
        "bias": normal(2, 4, 7, 9),
        "scale": 2.0,
        "query_seq_lengths": lengths(3, 7),
        "key_value_seq_lengths": lengths(9, 4),
        "local_window_size": (3, 2),
        "is_causal": True,
    },
}

CASES_WITH_FULLY_MASKED_ROWS = ["mask, some rows fully masked", "lengths of 0, causal", "all"]

CASES_FOR_BLOCKS = ["plain", "mask and bias, causal", "lengths of 0, causal", "all"]

blocks_or_not = pytest.mark.parametrize("block", [None, 4])


def weighted_sum_of(function, *operands):
    return weighted_sum(function(*operands))


@functools.cache
def expected_value_and_gradients(case):
    """A weighted sum of the results, and its gradients in query, key and value."""
    function = functools.partial(weighted_sum_of, functools.partial(formula, **CASES[case]))
    return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(*inputs())


class TestValues:
    @pytest.mark.long
    @pytest.mark.parametrize(
        ("case", "block"), [(case, None) for case in CASES] + [(case, 4) for case in CASES_FOR_BLOCKS]
    )
    def test_values_and_gradients(self, case, block):
        """The whole computation is in float64, unlike jax.nn's."""
        ours = functools.partial(dot_product_attention, query_block_size=block, **CASES[case])
        actual = jax.jit(jax.value_and_grad(functools.partial(weighted_sum_of, ours), (0, 1, 2)))(*inputs())
        assert_close(actual, expected_value_and_gradients(case))

    @pytest.mark.long
    @pytest.mark.parametrize("case", ["plain", "all"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, case, dtype, implementation):
        """Computed in float32 at least, rounded once."""
        rounded = [x.astype(dtype) for x in inputs()]
        options = CASES[case] | {"return_residual": True}
        ours = functools.partial(dot_product_attention, implementation=implementation, **options)
        y, lse = jax.jit(ours)(*rounded)
        exact = formula(*(x.astype(np.float64) for x in rounded), **options)
        assert y.dtype == lse.dtype == dtype
        wide = max(float(jnp.finfo(dtype).eps), 2e-7 if dtype != np.float64 else 0)
        with np.errstate(over="ignore"):  # The lse of a masked row is beyond float16.
            expected = exact[0], np.asarray(exact[1]).astype(dtype)
        assert_close((y, lse), expected, 4 * wide)

    @pytest.mark.long
    @pytest.mark.parametrize("case", ["plain", *CASES_WITH_FULLY_MASKED_ROWS])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_agrees_with_jax(self, case, dtype, implementation):
        if dtype == np.float64 and case in CASES_WITH_FULLY_MASKED_ROWS and not has(jax, "0.10.1"):
            # jax.nn is wrong there; test_values_and_gradients compares ours with the formula.
            pytest.skip("rows of float64 without a key are not NaN in jax.nn since 0.10.1")
        options = CASES[case] | ({"return_residual": True} if has(jax, "0.8.1") else {})
        operands = [x.astype(dtype) for x in inputs()]
        actual = dot_product_attention(*operands, implementation=implementation, **options)
        expected = jax.nn.dot_product_attention(*operands, **options)
        assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
        assert_close(actual, expected, 3e-6)

    @pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 1), (6, 2)])
    @blocks_or_not
    def test_groups_of_heads(self, n, k, block):
        operands = inputs(n=n, k=k)
        actual = dot_product_attention(*operands, is_causal=True, query_block_size=block)
        assert_close(actual, formula(*operands, is_causal=True))

    @blocks_or_not
    def test_window_beyond_64_bits(self, block):
        q = normal(1, 5, 1, 8)
        options = {"local_window_size": (2**63, 2**70), "query_block_size": block}
        y = jax.jit(lambda q: dot_product_attention(q, q, q, **options))(q)
        assert_close(y, dot_product_attention(q, q, q))

    @pytest.mark.long
    @pytest.mark.parametrize(("t", "s"), [(9, 4), (4, 9), (5, 1)])
    @pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": (1, 1)}])
    @blocks_or_not
    def test_more_queries_than_keys_or_fewer(self, t, s, options, block):
        """Queries and keys are both counted from 0, so that some queries may have no key."""
        operands = inputs(t=t, s=s)
        options = options | {"return_residual": True}
        ours = functools.partial(dot_product_attention, query_block_size=block)
        assert_close(jax.jit(functools.partial(ours, **options))(*operands), formula(*operands, **options))

    @pytest.mark.long
    @pytest.mark.parametrize("size", [7, 64, 100, 1000])
    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": (5, 90)}])
    def test_sizes_of_blocks(self, size, options):
        """Ranges of a band in one block, in several, and with a smaller last one."""
        operands = inputs(b=1, t=300, s=270, n=2, k=1, h=4)
        actual = jax.jit(functools.partial(dot_product_attention, query_block_size=size, **options))
        assert_close(actual(*operands), formula(*operands, **options))

    def test_blocks_of_limited_size(self, monkeypatch):
        """Smaller limits than the default: a block has several examples, several heads, one head, or less."""
        bias, mask = normal(1, 4, 8, 10), normal(3, 1, 8, 10) > 0
        operands = inputs(b=3, t=8, s=10)
        expected = formula(*operands, bias, mask), formula(*operands, is_causal=True)
        monkeypatch.setattr(blocks, "MIN_BLOCK_QUERIES", 3)
        for limit in (700, 320, 160, 30):
            monkeypatch.setattr(blocks, "MAX_BLOCK_LOGITS", limit)
            # New functions, since JAX does not trace a known function again.
            with_bias = jax.jit(lambda *operands: dot_product_attention(*operands, bias, mask))
            causal = jax.jit(lambda *operands: dot_product_attention(*operands, is_causal=True))
            assert_close((with_bias(*operands), causal(*operands)), expected)

    def test_no_batch_dimension(self):
        q, k, v = (x[0] for x in inputs())
        options = {"bias": normal(4, 7, 9), "query_seq_lengths": lengths(5), "return_residual": True}
        actual = dot_product_attention(q, k, v, **options)
        expected = formula(q[None], k[None], v[None], **options)
        assert_close(actual, jax.tree.map(lambda x: x[0], expected))

    @pytest.mark.parametrize("sizes", [{"b": 0}, {"t": 0}, {"s": 0}, {"h": 0}])
    def test_empty_arrays(self, sizes):
        operands = inputs(**sizes)
        y = dot_product_attention(*operands, is_causal=True)
        assert y.shape == operands[0].shape
        np.testing.assert_array_equal(y, 0)


class TestMasking:
    """Fully masked queries, and values at masked positions."""

    @blocks_or_not
    def test_bias_that_masks_whole_rows(self, block):
        """Rows of -inf are NaN without a mask, as in softmax, and the mean of the values with one."""
        q, k, v = inputs()
        ours = functools.partial(dot_product_attention, query_block_size=block)
        causal = functools.partial(ours, is_causal=True)
        plain_and_causal = jax.jit(lambda bias: (ours(q, k, v, bias), causal(q, k, v, bias)))
        gradients = jax.jit(jax.grad(functools.partial(weighted_sum_of, causal), (0, 1, 2, 3)))
        for fill in (-INF, LOWEST, DEFAULT_MASK_VALUE):
            bias = np.zeros((2, 1, 7, 9))
            bias[0, 0, 2], bias[1, 0, :3] = fill, fill
            plain, masked = plain_and_causal(bias)
            np.testing.assert_array_equal(np.isnan(plain[0, 2]), fill == -INF)
            expected = formula(q, k, v, bias, is_causal=True)
            assert_close(masked[:, 3:], expected[:, 3:])
            assert_close(masked[0, 2], np.repeat(v[0].mean(0), 2, 0))
            for x in gradients(q, k, v, bias):
                assert np.isfinite(x).all()

    @pytest.mark.parametrize("fill", [-INF, LOWEST, -1e30, -1e9])
    def test_masks_in_the_bias(self, fill):
        bias = np.where(normal(2, 4, 7, 9) > 0, 0, fill)
        bias[..., 0] = 0
        for options in ({}, {"is_causal": True}):
            actual = dot_product_attention(*inputs(), bias=bias, **options)
            assert_close(actual, formula(*inputs(), bias, **options))

    @blocks_or_not
    def test_padding_may_hold_nan(self, block):
        """In query and key, which reach only masked logits; in value it would spread, as in jax.nn."""
        q, k, v = inputs()
        options = {"query_seq_lengths": lengths(3, 7), "key_value_seq_lengths": lengths(9, 4)}
        expected = formula(q, k, v, **options)
        q[0, 3:], k[1, 4:] = NAN, INF
        assert_close(dot_product_attention(q, k, v, query_block_size=block, **options), expected)

    def test_keys_outside_the_band_of_a_block_are_not_read(self):
        q, k, v = inputs(t=9)
        v[:, 6:] = NAN
        y = dot_product_attention(q, k, v, is_causal=True, query_block_size=3)
        assert_close(y[:, :6], formula(q[:, :6], k[:, :6], v[:, :6], is_causal=True))
        assert np.isnan(y[:, 6:]).all()

    def test_nan_in_one_query(self):
        q, k, v = inputs()
        q[0, 2, 1] = NAN
        y = dot_product_attention(q, k, v)
        assert np.isnan(y[0, 2, 1]).all()
        assert np.isfinite(y).sum() == y.size - y.shape[-1]


class TestTransforms:
    @pytest.mark.long(block=2)
    @pytest.mark.parametrize("block", [None, 2])
    def test_derivatives(self, block):
        """Of first and second order, in both modes, with fully masked queries."""
        mask = normal(1, 2, 3, 4) > 0
        mask[0, 0, 1] = False

        @jax.jit
        def f(q, k, v, bias, scale):
            options = {"query_block_size": block, "is_causal": True}
            return dot_product_attention(q, k, v, bias, mask, scale=scale, **options)

        operands = (*inputs(b=1, t=3, s=4, n=2, k=1, h=2), normal(1, 2, 3, 4), 0.4)
        check_grads(f, operands, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)

    def test_derivatives_of_blocks_of_all_keys(self):
        f = jax.jit(functools.partial(dot_product_attention, query_block_size=2))
        operands = inputs(b=1, t=5, s=3, n=2, k=2, h=2)
        check_grads(f, operands, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)

    @blocks_or_not
    def test_gradients_of_bias_and_scale(self, block):
        mask = CASES["all"]["mask"]
        for shape in ((2, 4, 7, 9), (1, 4, 1, 9), (2, 1, 7, 1)):
            operands = normal(*shape), jnp.array(0.3)

            def gradients(function, operands, **options):
                call = lambda bias, scale: function(
                    *inputs(), bias, mask, scale=scale, is_causal=True, **options
                )
                return jax.jit(jax.grad(functools.partial(weighted_sum_of, call), (0, 1)))(*operands)

            actual = gradients(dot_product_attention, operands, query_block_size=block)
            assert_close(actual, gradients(formula, operands))

    def test_residual_has_no_gradient(self):
        f = lambda *operands: dot_product_attention(*operands, return_residual=True)[1].sum()
        for g in jax.jit(jax.grad(f, (0, 1, 2, 3)))(*inputs(), normal(1, 4, 7, 9)):
            np.testing.assert_array_equal(g, 0)

    @pytest.mark.long
    @pytest.mark.parametrize("in_axes", [(0, None, None, None), (1, 0, 0, 0), (None, None, None, 0)])
    @blocks_or_not
    def test_vmap(self, in_axes, block):
        shapes = [(2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), (1, 4, 7, 9)]
        operands = [
            normal(*shape, seed=i) if axis is None else normal(*shape[:axis], 3, *shape[axis:], seed=i)
            for i, (shape, axis) in enumerate(zip(shapes, in_axes, strict=True))
        ]
        f = functools.partial(dot_product_attention, is_causal=True, query_block_size=block)
        actual = jax.jit(jax.vmap(f, in_axes))(*operands)
        for i in range(3):
            operands_of_one = [
                x if axis is None else np.take(x, i, axis) for x, axis in zip(operands, in_axes, strict=True)
            ]
            assert_close(actual[i], formula(*operands_of_one, is_causal=True))

    @blocks_or_not
    def test_checkpoint_and_loops(self, block):
        q, k, v = inputs(n=2, s=7)
        f = lambda q: q + dot_product_attention(q, k, v, query_block_size=block)
        g = lambda q: q + formula(q, k, v)
        actual = jax.jit(jax.grad(functools.partial(weighted_sum_of, jax.checkpoint(lambda q: f(f(q))))))(q)
        assert_close(actual, jax.jit(jax.grad(functools.partial(weighted_sum_of, lambda q: g(g(q)))))(q))
        looped = jax.jit(lambda q: jax.lax.fori_loop(0, 2, lambda _, q: f(q), q))
        assert_close(looped(q), g(g(q)))

    def test_implementations(self):
        """One kernel does all, or applies scale, bias, mask and softmax in place; the reference has none."""
        q, k, v = (x.astype(np.float32) for x in inputs())
        for implementation, block, calls in (("native", None, 1), ("native", 7, 1), ("reference", None, 0)):
            f = functools.partial(
                dot_product_attention,
                bias=normal(7, 9),
                is_causal=True,
                implementation=implementation,
                query_block_size=block,
            )
            text = jax.jit(f).lower(q, k, v).as_text()
            assert text.count("custom_call @jax_softmax2p") == calls
            assert text.count("custom_call @jax_softmax2p_attention") == (calls and block is None)
            assert ("output_operand_aliases" in text) == (block is not None)


class TestMemory:
    """The memory that XLA allocates besides inputs and outputs."""

    @staticmethod
    def temporaries(function, *shapes):
        operands = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        return jax.jit(function).lower(*operands).compile().memory_analysis().temp_size_in_bytes

    def test_logits_are_normalised_in_place(self):
        """One block takes one array of logits, not two."""
        logits = 4 * blocks.MAX_BLOCK_LOGITS
        shape = (1, 1024, 1, 8)
        assert self.temporaries(dot_product_attention, shape, shape, shape) < 1.2 * logits
        # The gradient has the weights and their cotangents.
        gradient = jax.grad(lambda *operands: dot_product_attention(*operands).sum(), (0, 1, 2))
        assert self.temporaries(gradient, shape, shape, shape) < 2.2 * logits

    @pytest.mark.parametrize("options", [{}, {"is_causal": True}])
    def test_is_bounded_by_a_block(self, options):
        """All logits would be 8 GiB, as would their gradient; query, key and value have 32 MiB each."""
        shape = (1, 16384, 8, 64)
        f = functools.partial(dot_product_attention, **options)
        assert self.temporaries(f, shape, shape, shape) < 2**28
        gradient = jax.grad(lambda *operands: f(*operands).sum(), (0, 1, 2))
        assert self.temporaries(gradient, shape, shape, shape) < 2**29


ERRORS = [
    ({"query": "text"}, TypeError, "query must be an array or a number, got str"),
    ({"key": np.ones((2, 9, 2, 8), int)}, TypeError, "key must be floating-point numbers, got dtype int64"),
    ({"value": np.ones((9, 8))}, ValueError, r"value must have 3 or 4 dimensions, got shape \(9, 8\)"),
    ({"key": normal(3, 9, 2, 8)}, ValueError, "key must have query's batch 2 and head size 8"),
    ({"value": normal(2, 8, 2, 8)}, ValueError, r"value must have key's shape \(2, 9, 2, 8\)"),
    ({"value": np.ones((2, 9, 2, 8), np.float32)}, ValueError, "value must have query's dtype float64"),
    ({"query": normal(2, 7, 3, 8)}, ValueError, "query must have a multiple of key's 2 heads, got 3"),
    ({"bias": normal(2, 2, 7, 9)}, ValueError, r"bias must broadcast to \(B, N, T, S\) = \(2, 4, 7, 9\)"),
    ({"bias": np.ones((7, 9), bool)}, TypeError, "bias must be an array of numbers, got dtype bool"),
    ({"mask": np.ones((7, 9), int)}, ValueError, "mask must be boolean, got dtype int64"),
    ({"mask": np.ones((1, 2, 4, 7, 9), bool)}, ValueError, "mask must broadcast"),
    ({"scale": normal(2)}, ValueError, r"scale must be one number, got shape \(2,\)"),
    ({"scale": 1j}, TypeError, "scale must be real, got dtype complex128"),
    ({"query_seq_lengths": np.array([1, 2])}, ValueError, r"query_seq_lengths must be int32 of shape \(2,\)"),
    ({"key_value_seq_lengths": lengths(1)}, ValueError, "key_value_seq_lengths must be int32"),
    ({"local_window_size": (1, -1)}, ValueError, r"local_window_size must not be negative, got \(1, -1\)"),
    *(
        ({"local_window_size": size}, ValueError, "local_window_size must be an integer or two, got")
        for size in (1.5, True, (1,), (1, 2, 3), (1, None), "12")
    ),
    ({"sinks": normal(3)}, ValueError, r"sinks must have shape \(4,\), one for each head of query, got .*3"),
    ({"sinks": normal(4, 1)}, ValueError, r"sinks must have shape \(4,\), .* got shape \(4, 1\)"),
    ({"sinks": np.ones(4, int)}, TypeError, "sinks must be floating-point numbers, got dtype int64"),
    *(
        (
            {"logits_soft_cap": cap},
            ValueError,
            "logits_soft_cap must be None or a positive finite number that is known outside of jit, got",
        )
        for cap in (0, -5.0, NAN, INF, 1e-60, "50", np.ones(1), True, 1j)
    ),
    ({"query_block_size": 0}, ValueError, "query_block_size must be a positive integer or None, got 0"),
    ({"implementation": "cudnn"}, ValueError, "implementation='cudnn' is jax.nn's alone"),
    (
        {"implementation": "cuda"},
        ValueError,
        "implementation must be None, 'native' or 'reference'; got 'cuda'",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "words"), ERRORS)
def test_errors(arguments, error, words):
    good = dict(zip(("query", "key", "value"), inputs(), strict=True))
    with pytest.raises(error, match=words):
        dot_product_attention(**good | arguments)
