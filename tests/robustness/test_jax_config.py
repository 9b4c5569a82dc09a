"""The whole public API under JAX's checking modes: what jax.nn and optax do there, ours does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import versions
from comparison import quick_jit, weighted_sum
from flax import linen

import jax_softmax2p as s2p
from jax_softmax2p import integrations


def operands(dtype):
    normal = lambda *shape: np.random.default_rng(shape).standard_normal(shape)
    floats = {
        "x": normal(3, 8),
        "scale": normal(3, 1),
        "bias": normal(1, 8),
        "soft": np.full((3, 8), 1 / 8),
        "q": normal(2, 5, 4, 8),
        "k": normal(2, 6, 2, 8),
        "v": normal(2, 6, 2, 8),
        "added": normal(2, 4, 5, 6),
    }
    others = {
        "labels": np.array([0, 3, 7], np.int32),
        "mask": np.arange(24).reshape(3, 8) % 3 > 0,
        "band": np.abs(np.subtract.outer(np.arange(3), np.arange(8))) <= 1,
        "rows": np.array([True, False, True]),
        "kept": np.arange(240).reshape(2, 4, 5, 6) % 7 > 0,
        "t": np.array([5, 3], np.int32),
        "s": np.array([6, 2], np.int32),
    }
    return {name: jnp.asarray(x, dtype) for name, x in floats.items()} | jax.tree.map(jnp.asarray, others)


integer_labels = "softmax_cross_entropy_with_integer_labels"
ours_with_labels, theirs_with_labels = getattr(s2p, integer_labels), getattr(optax, integer_labels)


def masked_loss(logits, labels, rows):
    return jnp.where(rows, theirs_with_labels(logits, labels), jnp.zeros_like(logits[:, 0]))


def flax_attention(q, k, v, **options):
    twice = lambda x: jnp.repeat(x, 2, -2)
    return linen.dot_product_attention(q, twice(k), twice(v), **options)


# Ours, given an implementation; what it replaces; and the names of the operands.
FUNCTIONS = {
    "softmax": (s2p.softmax, jax.nn.softmax, "x"),
    "softmax of two axes": (
        lambda x, **o: s2p.softmax(x, (0, 1), **o),
        lambda x: jax.nn.softmax(x, (0, 1)),
        "x",
    ),
    "softmax, masked": (
        lambda x, m, **o: s2p.softmax(x, where=m, **o),
        lambda x, m: jax.nn.softmax(x, where=m),
        "x mask",
    ),
    "softmax in a band": (
        lambda x, m, **o: s2p.softmax(x, where=s2p.Band(1, 1), **o),
        lambda x, m: jax.nn.softmax(x, where=m),
        "x band",
    ),
    "softmax, scaled and biased": (
        lambda x, scale, bias, m, **o: s2p.softmax(x, scale=scale, bias=bias, where=m, **o),
        lambda x, scale, bias, m: jax.nn.softmax(x * scale + bias, where=m),
        "x scale bias mask",
    ),
    "log_softmax": (s2p.log_softmax, jax.nn.log_softmax, "x"),
    "log_softmax, scaled and biased": (
        lambda x, scale, bias, **o: s2p.log_softmax(x, scale=scale, bias=bias, **o),
        lambda x, scale, bias: jax.nn.log_softmax(x * scale + bias),
        "x scale bias",
    ),
    "logsumexp": (
        lambda x, **o: s2p.logsumexp(x, 0, keepdims=True, return_sign=True, **o),
        lambda x: jax.nn.logsumexp(x, 0, keepdims=True, return_sign=True),
        "x",
    ),
    "logsumexp, masked": (
        lambda x, m, **o: s2p.logsumexp(x, -1, where=m, **o),
        lambda x, m: jax.nn.logsumexp(x, -1, where=m),
        "x mask",
    ),
    "logsumexp with factors": (
        lambda x, b, g, **o: s2p.logsumexp(x, -1, b=b, bias=g, **o),
        lambda x, b, g: jax.nn.logsumexp(x + g, -1, b=b),
        "x soft bias",
    ),
    "softmax with two biases": (
        lambda x, f, g, m, **o: s2p.softmax(x, bias=(f, g), where=m, **o),
        lambda x, f, g, m: jax.nn.softmax(x + f + g, where=m),
        "x scale bias mask",
    ),
    "logsumexp with two biases": (
        lambda x, f, g, **o: s2p.logsumexp(x, -1, bias=(f, g), **o),
        lambda x, f, g: jax.nn.logsumexp(x + f + g, -1),
        "x scale bias",
    ),
    "sum_exp": (
        lambda x, **o: s2p.sum_exp(x, **o).combine(s2p.SumExp.empty((3,))).reduce().log().astype(x.dtype),
        lambda x: jax.nn.logsumexp(x),
        "x",
    ),
    "integer labels": (ours_with_labels, theirs_with_labels, "x labels"),
    "integer labels, masked rows": (
        lambda x, labels, rows, **o: ours_with_labels(x, labels, where=rows, **o),
        masked_loss,
        "x labels rows",
    ),
    "soft labels": (s2p.softmax_cross_entropy, optax.softmax_cross_entropy, "x soft"),
    "soft labels, masked": (
        lambda x, soft, m, **o: s2p.softmax_cross_entropy(x, soft, where=m, **o),
        lambda x, soft, m: (
            -jnp.sum(
                jnp.where(m, soft * jax.nn.log_softmax(x, where=jnp.where(m, m, m)), jnp.zeros_like(x)), -1
            )
        ),
        "x soft mask",
    ),
    "attention": (s2p.dot_product_attention, jax.nn.dot_product_attention, "q k v"),
    "attention, biased and masked": (
        s2p.dot_product_attention,
        jax.nn.dot_product_attention,
        "q k v added kept",
    ),
    "causal attention with lengths": (
        lambda q, k, v, t, s, **o: s2p.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=t, key_value_seq_lengths=s, **o
        ),
        lambda q, k, v, t, s: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=t, key_value_seq_lengths=s
        ),
        "q k v t s",
    ),
    "windowed attention in blocks": (
        lambda q, k, v, added, m, **o: s2p.dot_product_attention(
            q, k, v, added, m, local_window_size=2, query_block_size=2, **o
        ),
        lambda q, k, v, added, m: jax.nn.dot_product_attention(q, k, v, added, m, local_window_size=2),
        "q k v added kept",
    ),
    "flax's attention": (
        lambda q, k, v, added, m, **o: integrations.flax_attention(q, k, v, added, m),
        lambda q, k, v, added, m: flax_attention(q, k, v, bias=added, mask=m),
        "q k v added kept",
    ),
}


if not versions.has(jax, "0.10.1"):
    # jax.nn had other numbers in rows of float64 without a key.
    del FUNCTIONS["causal attention with lengths"]


def with_gradients(function, operands):
    """The result, and the pullback of ones to every floating-point operand."""
    floats = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]

    def call(*given):
        merged = dict(enumerate(operands)) | dict(zip(floats, given, strict=True))
        return function(*merged.values())

    y, pullback = jax.vjp(call, *(operands[i] for i in floats))
    return y, pullback(jax.tree.map(jnp.ones_like, y))


def everything(ours, implementation, operands, chosen=tuple(FUNCTIONS)):
    results = {}
    for name in chosen:
        mine, theirs, names = FUNCTIONS[name]
        function = functools.partial(mine, implementation=implementation) if ours else theirs
        results[name] = with_gradients(function, [operands[key] for key in names.split()])
    return results


@functools.cache
def expected(dtype):
    """Of jax.nn and optax in float64, for the operands as the dtype has them."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, operands(dtype)
        )
        return jax.tree.map(np.asarray, jax.jit(functools.partial(everything, False, None))(wide))


TOLERANCES = {"float32": 1e-5, "float64": 1e-6, "bfloat16": 0.06}
"""Relative to 1 + |expected|. jax.nn's attention computes its softmax in float32 for float64, too."""


def assert_as_expected(results, dtype):
    for name, result in results.items():
        for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected(dtype)[name]), strict=True):
            assert ours.dtype == dtype, name
            # Where optax has NaN, at what is masked, ours has 0.
            error = np.abs(np.asarray(ours, np.float64) - np.where(np.isnan(theirs), 0, theirs))
            assert (error <= TOLERANCES[dtype] * (1 + np.abs(np.nan_to_num(theirs)))).all(), name


@pytest.fixture(params=["native", "reference"])
def program(request):
    """All functions in one program: operands -> results."""
    return functools.partial(everything, True, request.param)


# Errors of these modes are raised while a program is traced and lowered.
TRACED = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "tracer leaks": jax.checking_leaks,
    "checks of types": lambda: jax.enable_checks(True),
    "no x64": lambda: jax.enable_x64(False),
    "old random bits": lambda: jax.threefry_partitionable(False),
}


def run(program, given):
    return quick_jit(program)(given)


@pytest.mark.long
@pytest.mark.parametrize("mode", TRACED)
def test_traced(mode, program):
    with TRACED[mode]():
        jax.jit(program).lower(operands("float32"))


def test_16_bit_operands_under_strict_promotion(program):
    with jax.numpy_dtype_promotion("strict"):
        results = run(program, operands("bfloat16"))
    assert_as_expected(results, "bfloat16")


# One implementation is enough for what is compiled: they differ in what is traced and lowered.
native_program = functools.partial(everything, True, "native")


def test_without_x64():
    with jax.enable_x64(False):
        results = run(native_program, operands("float32"))
    assert_as_expected(results, "float32")


def test_float64():
    assert_as_expected(run(native_program, operands("float64")), "float64")


def test_compiled_without_transfers():
    given = jax.block_until_ready(operands("float32"))
    with jax.transfer_guard("disallow"):
        results = run(native_program, given)
    assert_as_expected(results, "float32")


# Functions that are left out, since they have NaNs or infinities in between: the logarithm of an empty sum is
# -inf, and its derivative, in optax as in the reference, is NaN.
NANS_IN_REFERENCE = ("integer labels, masked rows",)
INFS = ("logsumexp with factors", "integer labels, masked rows", "sum_exp")
# The reference masks with -inf, one operation at a time, as jax.nn.softmax does.
MASKED_OR_BIASED = tuple(
    name
    for name, (_, _, names) in FUNCTIONS.items()
    if {"mask", "band", "added", "t"} & set(names.split()) and name != "flax's attention"
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("context", "implementation", "left_out"),
    [
        (lambda: jax.debug_nans(True), "native", ()),
        (lambda: jax.debug_nans(True), "reference", NANS_IN_REFERENCE),
        (lambda: jax.debug_infs(True), "native", INFS),
        (lambda: jax.debug_infs(True), "reference", INFS + MASKED_OR_BIASED),
        # Without jit Python runs the loops over blocks.
        (jax.disable_jit, "native", ("windowed attention in blocks",)),
    ],
    ids=["nans-native", "nans-reference", "infs-native", "infs-reference", "disable_jit"],
)
def test_one_operation_at_a_time(context, implementation, left_out):
    """Good data pass the checks of every intermediate result."""
    chosen = [name for name in FUNCTIONS if name not in left_out]
    given = operands("float32")
    with context():
        results = everything(True, implementation, given, chosen)
    assert_as_expected(results, "float32")


@pytest.mark.parametrize("name", ["sum_exp", "logsumexp"])
def test_empty_sums_and_masked_rows_are_no_nans(name, implementation):
    x, mask = jnp.zeros((2, 3), jnp.float32), np.array([[True] * 3, [False] * 3])
    with jax.debug_nans(True):
        if name == "sum_exp":
            log = s2p.sum_exp(x, where=mask, implementation=implementation).log()
        else:
            log = s2p.logsumexp(x, -1, where=mask, implementation=implementation)
    np.testing.assert_allclose(log, [np.log(3), -np.inf], rtol=1e-6)


def test_names_in_the_messages_of_checks():
    """They are those of operations, not of functions that run them."""
    x = jnp.array([jnp.inf, 0.0], jnp.float32)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"encountered in softmax2p\b(?!\.)"):
        s2p.softmax(x, implementation="native")


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_tangents_without_transfers(name):
    """Outside jit, where an array that is made on the host is a transfer."""
    x = operands("float32")["x"]
    with jax.transfer_guard("disallow"):
        _, tangent = jax.jvp(lambda x: getattr(s2p, name)(x, implementation="native"), (x,), (x,))
    np.testing.assert_allclose(tangent, jax.jvp(getattr(jax.nn, name), (x,), (x,))[1], atol=1e-6)


def test_sums_in_parts_without_transfers():
    total = s2p.sum_exp(operands("float32")["x"])
    with jax.transfer_guard("disallow"):
        log = total.combine(total).reduce().log()
    np.testing.assert_allclose(log, total.reduce().log() + np.log(2), rtol=1e-6)


def test_strict_promotion_refuses_what_jax_refuses():
    x = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(ValueError, match="promotion"):
            s2p.softmax(x, scale=jnp.float32(2))
        assert s2p.softmax(x, scale=2.0).dtype == x.dtype


@pytest.mark.parametrize(
    "function",
    [
        lambda x, scale: s2p.linear_softmax_cross_entropy(x, x.T, jnp.arange(2), scale=scale),
        lambda x, scale: s2p.logsumexp_of_products(x, x, scale=scale),
    ],
)
def test_scales_of_products_under_strict_promotion(function):
    x = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(ValueError, match="promotion"):
            function(x, jnp.float32(2))
        assert function(x, 2.0).dtype == x.dtype


@pytest.mark.parametrize(
    "options",
    [
        {"query_seq_lengths": np.array([1], np.int32)},
        {"key_value_seq_lengths": np.array([0], np.int32)},
        {"mask": np.array([[True, True], [False, False]])[None, None]},
    ],
)
def test_queries_that_attend_to_sinks_alone_are_no_nans(options, implementation):
    q = operands("float32")["q"][:1, :2]

    def loss(q):
        sinks = jnp.zeros(4, jnp.float32)
        y = s2p.dot_product_attention(q, q, q, sinks=sinks, implementation=implementation, **options)
        return weighted_sum(y)

    with jax.debug_nans(True):
        gradient = jax.grad(loss)(q)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(loss))(q), atol=1e-6)


def test_the_patch_is_taken_under_strict_promotion():
    x = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), s2p.patch_jax_nn():
        for name in ("softmax", "log_softmax", "logsumexp"):
            jaxpr = jax.make_jaxpr(lambda x, name=name: getattr(jax.nn, name)(x))(x)
            assert "softmax2p" in str(jaxpr), name
