"""softmax under every transformation of JAX, against jax.nn.softmax in float64 and the untransformed call."""

import functools
import pickle

import cloudpickle
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_softmax2p
from jax_softmax2p import softmax
from jax_softmax2p.primitives.softmax import softmax_p
from jax_softmax2p.primitives.softmax_jacobian import softmax_jacobian_p

# The longest rows have several blocks and an incomplete vector.
LENGTHS = [5, 37, 1100]


@pytest.fixture
def f(implementation):
    return functools.partial(softmax, implementation=implementation)


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def assert_close(actual, expected, tolerance=1e-13):
    expected = np.asarray(expected)
    scale = max(np.abs(expected).max(initial=0), 1e-300)
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None])
def test_check_grads_to_order_2(f, axis):
    x = array(3, 4, 5)
    check_grads(lambda x: f(x, axis), (x,), order=2, modes=("fwd", "rev"))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_check_grads_with_mask(f, dtype):
    x, mask = array(3, 11).astype(dtype), np.arange(11) % 3 > 0
    tolerance = 0.05 if dtype == jnp.float32 else None
    check_grads(lambda x: f(x, where=mask), (x,), order=2, modes=("fwd", "rev"), rtol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize("n", LENGTHS)
def test_first_derivatives(f, n):
    x, v = array(2, n), array(2, n, seed=1)
    g = jax.nn.softmax
    tangent, cotangent = jax.jit(lambda x, v: (jax.jvp(g, (x,), (v,))[1], jax.vjp(g, x)[1](v)[0]))(x, v)
    for transform in (jax.jit, lambda h: h):
        assert_close(transform(lambda x, v: jax.jvp(f, (x,), (v,))[1])(x, v), tangent)
        assert_close(transform(lambda x, v: jax.vjp(f, x)[1](v)[0])(x, v), cotangent)
        assert_close(transform(lambda x, v: jax.linearize(f, x)[1](v))(x, v), tangent)


def test_jacobians_and_hessian(f):
    x, weights = array(3, 7), array(3, 7, seed=1)

    def loss(softmax):
        return lambda x: jnp.sum(weights * softmax(x) ** 2)

    expected = jax.jit(jax.jacrev(jax.nn.softmax))(x)
    assert_close(jax.jit(jax.jacfwd(f))(x), expected)
    assert_close(jax.jit(jax.jacrev(f))(x), expected)
    expected = jax.jit(jax.hessian(loss(jax.nn.softmax)))(x)
    for second in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        assert_close(jax.jit(second(loss(f)))(x), expected)


def test_linear_transpose_equals_the_jacobian_product(f):
    x, t = array(2, 9), array(2, 9, seed=1)
    _, pushforward = jax.linearize(f, x)
    (pulled,) = jax.linear_transpose(pushforward, x)(t)
    assert_close(pulled, pushforward(t))


def test_forward_saves_only_the_output():
    x = array(4, 100).astype(jnp.float32)
    _, pullback = jax.vjp(softmax, x)
    residuals = [r for r in jax.tree.leaves(pullback) if getattr(r, "size", 0) > 1]
    assert [r.shape for r in residuals] == [x.shape]


@pytest.mark.long
@pytest.mark.parametrize("in_axes", [0, 1, 2, -1])
@pytest.mark.parametrize("out_axes", [0, 1, -1])
def test_vmap_axes(f, in_axes, out_axes):
    x = array(3, 4, 5)
    for axis in (0, 1, -1):
        g = functools.partial(f, axis=axis)
        expected = jax.jit(jax.vmap(functools.partial(jax.nn.softmax, axis=axis), in_axes, out_axes))(x)
        assert_close(jax.jit(jax.vmap(g, in_axes, out_axes))(x), expected)
        assert_close(jax.jit(jax.vmap(g, in_axes, out_axes))(x), expected)


def test_nested_vmap_with_gradients(f):
    x = array(2, 3, 4, 5)

    def grads(softmax):
        loss = lambda x, w: jnp.sum(w[:, None] * softmax(x, axis=0) ** 3)
        over_w = jax.vmap(jax.grad(loss), (None, 1), 2)
        nested = jax.vmap(jax.vmap(over_w, (1, None), 1), (0, None))
        return jax.jit(nested)(x, array(3, 6, seed=3))

    assert_close(grads(f), grads(jax.nn.softmax))


def test_vmap_of_either_operand_of_the_jacobian():
    y, t = jax.nn.softmax(array(4, 6)), array(4, 6, seed=1)
    bind = functools.partial(softmax_jacobian_p.bind, axis=-1, implementation=None, reuses=None)
    expected = y * (t - jnp.sum(y * t, -1, keepdims=True))
    assert_close(jax.jit(jax.vmap(bind))(y, t), expected)
    assert_close(jax.jit(jax.vmap(bind, (None, 0)))(y[0], t), y[0] * (t - (t @ y[0])[:, None]))
    assert_close(jax.jit(jax.vmap(bind, (0, None)))(y, t[0]), y * (t[0] - (y @ t[0])[:, None]))
    assert_close(jax.jit(jax.vmap(bind, (1, 0), 1))(y.T.T.T, t), expected.T)


def test_checkpoint(f):
    x = array(3, 40)
    loss = lambda x: jnp.sum(jnp.sin(f(f(x) * 10)))
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(x), jax.jit(jax.grad(loss))(x), 1e-11)


def test_control_flow(f):
    x = array(4, 30)
    twice = f(f(x))
    assert_close(jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0], twice)
    assert_close(jax.lax.fori_loop(0, 2, lambda _, c: f(c), x), twice)
    assert_close(jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(s[1])), (0, x))[1], twice)
    assert_close(jax.lax.map(f, x), f(x))
    for flag in (True, False):
        assert_close(jax.jit(lambda p, x: jax.lax.cond(p, f, lambda x: x, x))(flag, x), f(x) if flag else x)

    def loss(x):
        return jnp.sum(jax.lax.scan(lambda c, w: (f(c * w), None), x, array(3))[0] ** 2)

    check_grads(jax.jit(loss), (x,), order=1, modes=("fwd", "rev"))


def test_inside_custom_vjp(f):
    @jax.custom_vjp
    def clipped(x):
        return f(x)

    clipped.defvjp(lambda x: jax.vjp(f, x), lambda pullback, t: pullback(jnp.clip(t, -1, 1)))
    x, t = array(3, 9), 5 * array(3, 9, seed=1)
    assert_close(jax.vjp(clipped, x)[1](t)[0], jax.vjp(f, x)[1](jnp.clip(t, -1, 1))[0])


def test_shapes_without_computation(f):
    x = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    assert jax.eval_shape(f, x) == x
    jaxpr = str(jax.make_jaxpr(softmax)(np.ones((2, 3), np.float32)))
    assert softmax_p.name in jaxpr
    assert "f32[2,3]" in jaxpr


def test_ahead_of_time(f):
    x = array(8, 33)
    lowered = jax.jit(jax.value_and_grad(lambda x: f(x)[0, 0])).lower(x)
    value, grad = lowered.compile()(x)
    assert_close(value, f(x)[0, 0])
    assert grad.shape == x.shape


def test_native_lowers_to_one_custom_call_in_each_direction():
    x = array(64, 1000)
    text = jax.jit(softmax).lower(x).as_text()
    assert text.count("stablehlo.custom_call @jax_softmax2p_softmax_v1") == 1
    text = jax.jit(lambda x, t: jax.vjp(softmax, x)[1](t)).lower(x, x).as_text()
    assert text.count("custom_call @jax_softmax2p_softmax_v1") == 1
    assert text.count("custom_call @jax_softmax2p_softmax_jacobian_v1") == 1
    assert (
        "custom_call"
        not in jax.jit(functools.partial(softmax, implementation="reference")).lower(x).as_text()
    )


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_other_platforms_lower_to_the_reference(platform):
    x = jax.ShapeDtypeStruct((8, 33), jnp.float32)
    for g in (softmax, jax.grad(lambda x: softmax(x)[0, 0])):
        exported = jax.export.export(jax.jit(g), platforms=[platform])(x)
        assert "custom_call @jax_softmax2p" not in exported.mlir_module()
    with pytest.raises(ValueError, match=r"implementation='native' cannot run: .*for CPUs only"):
        jax.export.export(jax.jit(functools.partial(softmax, implementation="native")), platforms=[platform])(
            x
        )


def test_one_sum_on_accelerators():
    """XLA makes one kernel of a softmax there if it has one maximum and one sum; tests cannot run one."""
    x = jax.ShapeDtypeStruct((8, 33), jnp.float32)
    for call, count in ((softmax, 2), (functools.partial(softmax, implementation="reference"), 3)):
        exported = jax.export.export(jax.jit(call), platforms=["cuda"])(x)
        assert exported.mlir_module().count("stablehlo.reduce(") == count


def test_donation(f):
    x = array(64, 1000).astype(jnp.float32)
    expected = np.asarray(f(x))
    donating = jax.jit(f, donate_argnums=0)
    for _ in range(3):
        np.testing.assert_allclose(donating(jnp.array(x)), expected, rtol=1e-6)


def test_disable_jit(f):
    x = array(3, 8)
    expected, gradient = f(x), jax.grad(lambda x: f(x)[0, 0])(x)
    with jax.disable_jit():
        assert_close(f(x), expected)
        assert_close(jax.grad(lambda x: f(x)[0, 0])(x), gradient)
        assert_close(jax.vmap(f)(x), expected)


def test_debug_nans(f):
    with jax.debug_nans(True):
        f(array(3, 8)).block_until_ready()
        for g in (f, jax.jit(f)):
            with pytest.raises(FloatingPointError):
                g(jnp.array([1.0, jnp.inf])).block_until_ready()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_export_of_native_kernels(dtype):
    x = jnp.asarray(array(5, 70), dtype)
    g = jax.jit(lambda x: jax.value_and_grad(lambda x: softmax(x, 0, implementation="native")[1, 1])(x))
    checks = jax_softmax2p.export_disabled_checks()
    exported = jax.export.export(g, disabled_checks=checks)(x)
    restored = jax.export.deserialize(exported.serialize())
    for actual, expected in zip(restored.call(x), g(x), strict=True):
        np.testing.assert_array_equal(actual, expected)


def model(x):
    return softmax(x) + 1


def test_pickling(f):
    x = array(2, 6)
    for g in (softmax, model, f):
        assert_close(pickle.loads(pickle.dumps(g))(x), g(x))
    g = lambda x: jax.grad(lambda x: f(x)[0, 0])(x)
    assert_close(cloudpickle.loads(cloudpickle.dumps(g))(x), g(x))
    assert_close(cloudpickle.loads(cloudpickle.dumps(jax.jit(g)))(x), g(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_every_dtype_has_its_derivative(dtype):
    x = jnp.asarray(array(3, 7), dtype)
    y, v = jax.jvp(softmax, (x,), (jnp.ones_like(x),))
    assert y.dtype == v.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(v, np.complex128), 0, atol=4 * float(jnp.finfo(dtype).eps))


def test_shard_map_keeps_track_of_varying_axes():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    x = array(4, 9)
    # The tangent ones_like(x) does not vary over the mesh, but x does.
    g = lambda x: jax.vjp(softmax, x)[1](jnp.cos(x))[0] + jax.jvp(softmax, (x,), (jnp.ones_like(x),))[1]
    sharded = jax.jit(jax.shard_map(g, mesh=mesh, in_specs=spec, out_specs=spec))
    assert_close(sharded(x), g(x))
    bind = functools.partial(softmax_jacobian_p.bind, axis=-1, implementation=None, reuses=None)
    assert bind(x, x).shape == x.shape


def test_weak_types_and_dtypes_as_in_jax_nn():
    for x in (jnp.asarray([1.0, 2.0]), np.array([1.0, 2.0], np.float32), jnp.full(3, 2.0)):
        y, expected = softmax(x), jax.nn.softmax(x)
        assert (y.dtype, y.weak_type) == (expected.dtype, False)


@pytest.mark.long(dtype=np.float32, n=16, axis=-1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [5, 16, 64, 1100])
@pytest.mark.parametrize("axis", [-1, 0])
def test_infinite_tangents_and_cotangents(dtype, n, axis):
    """The results are infinite and NaN where those of jax.nn are."""
    x, t = np.zeros((n, n), dtype), np.zeros((n, n), dtype)
    t[0, 0] = np.inf
    for name in ("softmax", "logsumexp", "log_softmax"):
        f = functools.partial(getattr(jax_softmax2p, name), axis=axis, implementation="native")
        expected = functools.partial(getattr(jax.nn, name), axis=axis)
        jvps = [jax.jit(lambda x, t, g=g: jax.jvp(g, (x,), (t,))[1]) for g in (f, expected)]
        for tangent in (t, -t):
            np.testing.assert_allclose(*(jvp(x, tangent) for jvp in jvps), rtol=1e-5)
    vjps = [
        jax.jit(lambda x, t, g=g: jax.vjp(functools.partial(g, axis=axis), x)[1](t)[0])
        for g in (functools.partial(softmax, implementation="native"), jax.nn.softmax)
    ]
    np.testing.assert_allclose(*(vjp(x, t) for vjp in vjps), rtol=1e-5)
