"""jax.export: programs that run elsewhere, with shapes that are symbols."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest

import jax_softmax2p as s2p

B, N, T, S = jax.export.symbolic_shape("b, n, t, s")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, LABELS = normal(3, 7), np.array([0, 6, 2], np.int32)
MASK = np.arange(21).reshape(3, 7) % 3 > 0
LOGITS = (shape(B, N), X)
LABELLED = (LOGITS, (shape(B, dtype=jnp.int32), LABELS))
MASKED = (LOGITS, (shape(B, N, dtype=jnp.bool_), MASK))
INTEGER_LABELS = "softmax_cross_entropy_with_integer_labels"

# Ours; the same in jax.nn and optax; and the operands: their symbolic shapes, and what the export is called
# with.
FUNCTIONS = {
    "softmax": (s2p.softmax, jax.nn.softmax, (LOGITS,)),
    "softmax of axis 0": (lambda x: s2p.softmax(x, 0), lambda x: jax.nn.softmax(x, 0), (LOGITS,)),
    "softmax of all axes": (
        lambda x: s2p.softmax(x, None),
        lambda x: jax.nn.softmax(x, (0, 1)),
        (LOGITS,),
    ),
    "softmax, masked": (
        lambda x, m: s2p.softmax(x, where=m),
        lambda x, m: jax.nn.softmax(x, where=m),
        MASKED,
    ),
    "softmax in a band": (
        lambda x: s2p.softmax(x, where=s2p.Band(1, 1)),
        lambda x: jax.nn.softmax(x, where=np.abs(np.subtract.outer(np.arange(3), np.arange(7))) <= 1),
        (LOGITS,),
    ),
    "softmax, scaled and biased": (
        lambda x: s2p.softmax(x, scale=x[:, :1], bias=x[:1]),
        lambda x: jax.nn.softmax(x * x[:, :1] + x[:1]),
        (LOGITS,),
    ),
    "log_softmax": (s2p.log_softmax, jax.nn.log_softmax, (LOGITS,)),
    "logsumexp": (s2p.logsumexp, jax.nn.logsumexp, (LOGITS,)),
    "logsumexp with factors": (
        lambda x: s2p.logsumexp(x, -1, b=x * x, keepdims=True),
        lambda x: jax.nn.logsumexp(x, -1, b=x * x, keepdims=True),
        (LOGITS,),
    ),
    "sum_exp": (lambda x: s2p.sum_exp(x).reduce().log(), jax.nn.logsumexp, (LOGITS,)),
    "integer labels": (getattr(s2p, INTEGER_LABELS), getattr(optax, INTEGER_LABELS), LABELLED),
    "integer labels, masked": (
        lambda x, labels, m: getattr(s2p, INTEGER_LABELS)(x, labels, where=m),
        lambda x, labels, m: (
            -jnp.take_along_axis(
                jnp.where(m, x, x) - jax.nn.logsumexp(x, -1, where=m, keepdims=True), labels[:, None], -1
            )[:, 0]
        ),
        (*LABELLED, MASKED[1]),
    ),
    "soft labels": (
        lambda x, y: s2p.softmax_cross_entropy(x, jax.nn.softmax(y)),
        lambda x, y: optax.softmax_cross_entropy(x, jax.nn.softmax(y)),
        (LOGITS, (shape(B, N), 2 * X)),
    ),
}

QUERIES = (shape(B, T, 4, 8), normal(2, 5, 4, 8))
KEYS = (shape(B, S, 2, 8), normal(2, 6, 2, 8))
LENGTHS = (shape(B, dtype=jnp.int32), np.array([5, 3], np.int32))
BIAS = (shape(B, 4, T, S), normal(2, 4, 5, 6))
BATCH_ALONE = ((shape(B, 5, 4, 8), QUERIES[1]), (shape(B, 6, 2, 8), KEYS[1]))


def attention(q, k, bias=None, **options):
    return s2p.dot_product_attention(q, k, jnp.cos(k), bias, **options)


def attention_of_jax(q, k, bias=None, **options):
    return jax.nn.dot_product_attention(q, k, jnp.cos(k), bias, **options)


def both(options):
    return lambda *operands: attention(*operands, **options), lambda *operands: attention_of_jax(
        *operands, **options
    )


ATTENTION = {
    "attention": (*both({}), (QUERIES, KEYS)),
    "causal attention": (*both({"is_causal": True}), (QUERIES, KEYS)),
    "windowed attention": (*both({"local_window_size": (2, 1)}), (QUERIES, KEYS)),
    "attention with a bias": (*both({}), (QUERIES, KEYS, BIAS)),
    "attention with lengths": (
        lambda q, k, n: attention(q, k, query_seq_lengths=n, key_value_seq_lengths=n),
        lambda q, k, n: attention_of_jax(q, k, query_seq_lengths=n, key_value_seq_lengths=n),
        (QUERIES, KEYS, LENGTHS),
    ),
    "attention with a residual": (*both({"return_residual": True}), (QUERIES, KEYS)),
    "attention of a symbolic batch": (*both({"is_causal": True}), BATCH_ALONE),
    "attention in blocks": (
        lambda q, k: attention(q, k, query_block_size=2),
        attention_of_jax,
        BATCH_ALONE,
    ),
}

EVERYTHING = FUNCTIONS | ATTENTION


def with_gradient(f):
    """f's result, and the gradient of its sum in the first operand, which are floats."""

    def both(x, *operands):
        y, pullback = jax.vjp(lambda x: f(x, *operands), x)
        return y, pullback(jax.tree.map(jnp.ones_like, y))[0]

    return both


def exported(f, operands, **options):
    program = jax.export.export(jax.jit(f), **options)(*(symbolic for symbolic, _ in operands))
    return jax.export.deserialize(program.serialize()), [value for _, value in operands]


def assert_close(actual, expected):
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_function_exports_with_symbolic_shapes(name):
    ours, theirs, operands = EVERYTHING[name]
    program, values = exported(with_gradient(ours), operands)
    assert_close(program.call(*values), jax.jit(with_gradient(theirs))(*values))


@pytest.mark.parametrize("name", ["softmax", "integer labels", "attention"])
def test_an_exported_program_takes_the_reference(name):
    """It may run where this package is not installed."""
    ours, _, operands = EVERYTHING[name]
    sizes = [(value, value) for _, value in operands]
    for chosen in (operands, sizes):
        program, _ = exported(with_gradient(ours), chosen)
        assert "custom_call @jax_softmax2p" not in program.mlir_module()


def test_native_in_an_exported_program_needs_its_check_disabled():
    f = lambda x: s2p.softmax(x, implementation="native")
    with pytest.raises(ValueError, match="jax_softmax2p_softmax_v1"):
        exported(f, (LOGITS,))
    program, (x,) = exported(f, (LOGITS,), disabled_checks=s2p.export_disabled_checks())
    assert "custom_call @jax_softmax2p_softmax_v1" in program.mlir_module()
    np.testing.assert_array_equal(program.call(x), f(x))


def test_an_exported_program_for_several_platforms():
    program, (x,) = exported(s2p.softmax, (LOGITS,), platforms=["cpu", "cuda", "tpu"])
    np.testing.assert_allclose(program.call(x), jax.nn.softmax(x), rtol=1e-6)


def test_ahead_of_time_compilation_is_no_export():
    lowered = jax.jit(lambda x: s2p.softmax(x, implementation="native")).lower(X)
    assert "custom_call @jax_softmax2p_softmax_v1" in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(X), jax.nn.softmax(X), rtol=1e-6)


CACHED = """
import jax
import jax.numpy as jnp
import jax_softmax2p

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
x = jnp.linspace(-3, 3, 3000, dtype=jnp.float32)
f = jax.value_and_grad(lambda x: jax_softmax2p.logsumexp(x, implementation="native"))
value, gradient = jax.jit(f)(x)
print("/jax/compilation_cache/cache_hits" in events, value, gradient.sum())
"""


def test_compilation_cache_on_disk(tmp_path):
    """A program that another process has compiled calls the kernels of this one."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    runs = [processes.run_python(CACHED, **environment) for _ in range(2)]
    (compiled, *expected), (cached, *results) = (run.stdout.split() for run in runs)
    assert (compiled, cached) == ("False", "True"), runs[1].stderr[-3000:]
    assert results == expected
