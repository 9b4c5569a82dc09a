"""Interpreters of programs that JAX keeps apart from its core: jet, checkify, sparsify, Pallas and others."""

import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify, jet, sparse
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jax_softmax2p as s2p

INF = float("inf")


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))


MASK = np.array([[True, False, True, True, False], [True] * 5, [False, True, True, False, True]])
LABELS = np.array([0, 4, 2])
WEIGHTS = array(3, 5, seed=9)


def integer_loss(x, **options):
    return s2p.softmax_cross_entropy_with_integer_labels(x, LABELS, **options)


def gradient(f):
    return jax.grad(lambda x: jnp.sum(jnp.where(MASK, WEIGHTS * f(x), 0)))


# Ours, given an implementation, and the same in JAX's own functions, of one array (3, 5).
def sum_with_nothing(x, **options):
    chunks = jnp.concatenate([x, jnp.full_like(x[:1], -jnp.inf)])
    return s2p.sum_exp(chunks, **options).reduce().log()


PROGRAMS = {
    "softmax": (lambda x, **o: s2p.softmax(x, **o), jax.nn.softmax),
    "softmax, masked": (
        lambda x, **o: s2p.softmax(x, where=MASK, **o),
        lambda x: jax.nn.softmax(x, where=MASK),
    ),
    "softmax, scaled and biased": (
        lambda x, **o: s2p.softmax(x, scale=WEIGHTS[:, :1], bias=x[:1] ** 2, **o),
        lambda x: jax.nn.softmax(x * WEIGHTS[:, :1] + x[:1] ** 2),
    ),
    "log_softmax": (lambda x, **o: s2p.log_softmax(x, **o), jax.nn.log_softmax),
    "logsumexp": (lambda x, **o: s2p.logsumexp(x, -1, **o), lambda x: jax.nn.logsumexp(x, -1)),
    "logsumexp, masked": (
        lambda x, **o: s2p.logsumexp(x, -1, where=MASK, **o),
        lambda x: jax.nn.logsumexp(x, -1, where=MASK),
    ),
    "sum_exp": (lambda x, **o: s2p.sum_exp(x, **o).log(), lambda x: jax.nn.logsumexp(x, -1)),
    "cross-entropy": (
        lambda x, **o: s2p.softmax_cross_entropy(x, jax.nn.softmax(WEIGHTS), **o),
        lambda x: optax.softmax_cross_entropy(x, jax.nn.softmax(WEIGHTS)),
    ),
    "gradient of softmax": (
        lambda x, **o: gradient(lambda x: s2p.softmax(x, **o))(x),
        gradient(jax.nn.softmax),
    ),
    "gradient of log_softmax, masked": (
        lambda x, **o: gradient(lambda x: s2p.log_softmax(x, where=MASK, **o))(x),
        gradient(lambda x: jax.nn.log_softmax(x, where=MASK)),
    ),
    "tangent of log_softmax": (
        lambda x, **o: jax.jvp(lambda x: s2p.log_softmax(x, **o), (x,), (WEIGHTS,))[1],
        lambda x: jax.jvp(jax.nn.log_softmax, (x,), (WEIGHTS,))[1],
    ),
    "gradient of sum_exp, beside a chunk of -inf": (
        lambda x, **o: jax.grad(lambda x: sum_with_nothing(x, **o))(x),
        lambda x: jax.grad(lambda x: jax.nn.logsumexp(x))(x),
    ),
    "gradient of the loss of integer labels": (
        lambda x, **o: jax.grad(lambda x: integer_loss(x, **o).sum())(x),
        lambda x: jax.nn.softmax(x) - jax.nn.one_hot(LABELS, 5),
    ),
}

TERMS = [array(3, 5, seed=seed) for seed in (1, 2, 3)]


def derivatives(f, x):
    """Those of f along the curve x + t·a + t²·b/2 + t³·c/6 at t = 0, by nested jvp."""
    curve = lambda t: x + t * TERMS[0] + t**2 / 2 * TERMS[1] + t**3 / 6 * TERMS[2]
    along = lambda t: f(curve(t))
    for _ in TERMS:
        along = jax.jacfwd(along)
        yield along(0.0)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_jet(name, implementation, request):
    if (name, implementation) == ("cross-entropy", "native"):
        request.applymarker(pytest.mark.xfail(reason="jet cannot trace jax.custom_jvp", strict=True))
    x = array(3, 5)
    ours, theirs = PROGRAMS[name]
    value, series = jax.jit(
        lambda x: jet.jet(lambda x: ours(x, implementation=implementation), (x,), (TERMS,))
    )(x)
    np.testing.assert_allclose(value, theirs(x), atol=1e-12)
    for actual, expected in zip(series, jax.jit(lambda x: [*derivatives(theirs, x)])(x), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-11)


def test_jet_of_attention():
    x = array(6, 2, 4)
    f = lambda attention: lambda x: attention(x, x, jnp.sin(x), is_causal=True)
    terms = [[array(6, 2, 4, seed=1), array(6, 2, 4, seed=2)]]
    # jax.nn's softmax in attention is float32's.
    for actual, expected in zip(
        jax.tree.leaves(jax.jit(lambda x: jet.jet(f(s2p.dot_product_attention), (x,), terms))(x)),
        jax.tree.leaves(jax.jit(lambda x: jet.jet(f(jax.nn.dot_product_attention), (x,), terms))(x)),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.xfail(reason="jet cannot trace jax.custom_jvp, jax.nn.relu included", strict=True)
def test_jet_of_the_loss_of_integer_labels():
    jet.jet(integer_loss, (array(3, 5),), (TERMS,))


def float_error(f, *operands):
    error, _ = checkify.checkify(jax.jit(f), errors=checkify.float_checks)(*operands)
    return error.get()


# JAX's own are decomposed: the NaN is that of inf - inf.
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_checkify_sees_a_nan(name, value, implementation):
    x = jnp.full((2, 3), value)
    assert "nan generated" in float_error(getattr(jax.nn, name), x)
    error = float_error(lambda x: getattr(s2p, name)(x, implementation=implementation), x)
    assert "nan generated" in error or "division by zero" in error
    if implementation == "native":
        assert re.search(r"primitive: softmax2p\w*\.", error)


def test_checkify_sees_a_nan_of_a_gradient():
    x = jnp.array([0.0, INF])
    assert "nan generated" in float_error(jax.grad(lambda x: s2p.logsumexp(x)), x)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_checkify_passes_good_data(name, implementation):
    assert float_error(lambda x: PROGRAMS[name][0](x, implementation=implementation), array(3, 5)) is None


def test_checkify_passes_what_is_finite_of_infinities():
    x = jnp.array([[0.0, -INF], [1.0, 2.0]])
    assert float_error(s2p.softmax, x) is None
    assert float_error(lambda x: s2p.logsumexp(x, -1), jnp.full((2, 3), -INF)) is None


def test_sparsify_of_a_program_with_dense_logits():
    x, y = array(4, 5), array(5, 3)
    f = lambda softmax: sparse.sparsify(lambda x, y: softmax(x @ y))(sparse.BCOO.fromdense(x), y)
    np.testing.assert_allclose(f(s2p.softmax), f(jax.nn.softmax), rtol=1e-12)


def test_callbacks(implementation):
    seen = []

    @jax.jit
    def f(x):
        y = s2p.softmax(x, implementation=implementation)
        jax.debug.callback(seen.append, y)
        rows = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
        return y, jax.pure_callback(lambda y: np.asarray(y).sum(-1), rows, y)

    x = array(3, 5)
    y, sums = f(x)
    jax.effects_barrier()
    np.testing.assert_allclose(y, jax.nn.softmax(x), rtol=1e-12)
    np.testing.assert_array_equal(seen[0], y)
    np.testing.assert_allclose(sums, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_jaxpr_that_is_evaluated(name):
    x = array(3, 5)
    ours, theirs = PROGRAMS[name]
    (result,) = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(ours)(x))(x)
    np.testing.assert_allclose(result, theirs(x), atol=1e-12)


def test_linearize_of_a_vmapped_sharded_call():
    mesh = jax.make_mesh((1,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "classes")
    sharded = jax.shard_map(
        lambda x: s2p.log_softmax(x, axis_name="classes"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x, t = array(2, 3, 5), array(2, 3, 5, seed=1)

    @jax.jit  # Eagerly each of some hundred operations would be compiled for the mesh.
    def ours(x, t):
        value, pushforward = jax.linearize(jax.vmap(sharded), x)
        (pulled,) = jax.linear_transpose(pushforward, x)(t)
        return value, pushforward(t), pulled

    plain = jax.nn.log_softmax
    theirs = (*jax.jvp(plain, (x,), (t,)), jax.vjp(plain, x)[1](t)[0])
    for actual, expected in zip(ours(x, t), theirs, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def softmax_kernel(softmax):
    def kernel(x, y):
        y[...] = softmax(x[...])

    return kernel


def on_tiles(kernel, **options):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), **options)


def test_a_pallas_kernel_that_is_interpreted():
    x = array(8, 128).astype(jnp.float32)
    y = on_tiles(softmax_kernel(s2p.softmax), interpret=True)(x)
    np.testing.assert_allclose(y, jax.nn.softmax(x), rtol=1e-5, atol=1e-9)


def exported_for_tpu(f):
    return jax.export.export(jax.jit(f), platforms=["tpu"])(jax.ShapeDtypeStruct((8, 128), jnp.float32))


def test_a_pallas_kernel_holds_the_reference():
    assert "tpu_custom_call" in exported_for_tpu(on_tiles(softmax_kernel(s2p.softmax))).mlir_module()


def test_a_pallas_kernel_that_calls_jax_nn_is_patched():
    with s2p.patch_jax_nn():
        kernel = softmax_kernel(lambda x: jax.nn.softmax(x))
        assert "tpu_custom_call" in exported_for_tpu(on_tiles(kernel)).mlir_module()
        # Around the kernel, native calls stay.
        assert "softmax2p" in str(
            jax.make_jaxpr(lambda x: on_tiles(kernel)(jax.nn.softmax(x)))(jnp.ones((8, 128), jnp.float32))
        )
