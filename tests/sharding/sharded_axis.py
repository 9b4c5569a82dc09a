"""axis_name: an axis sharded over eight devices takes one collective and gives the unsharded results."""

import functools

import cases
import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import versions
from devices import P, kinds, normal, run, value_and_vjp

import jax_softmax2p as s2p

NAN, INF = float("nan"), float("inf")
N = 64
SPECS = {
    "model": P("data", None, "model"),  # The batch is sharded as well.
    ("data", "model"): P(None, None, ("data", "model")),
    ("data",): P(None, "model", "data"),
}


def special_rows():
    """Rows with every edge case; some special values fill whole shards, and some lie in one shard only."""
    x = 3 * normal(4, 6, N)
    limits = np.finfo(np.float32)
    x[0, 0, : N // 2] = -INF
    x[0, 1] = -INF
    x[0, 2, 3] = NAN
    x[0, 3, 40] = INF
    x[0, 4, [5, 50]] = INF, NAN
    x[1, 0], x[1, 1] = limits.min, limits.max
    x[1, 2] += 1e6
    x[1, 3, ::2] = limits.min
    x[1, 4, : N - 1] = -INF
    x[1, 5, [0, N - 1]] = 1e30, -1e30
    x[2, 0, 7] = 60
    x[2, 1, N // 4 :] = -1e9
    return x


X = special_rows()
# Of rows at the format's limits, logsumexp minus the label's logit is log(n), which float64 cannot resolve.
X_OF_LOSSES = np.where((np.abs(X) > 1e38).all(-1, keepdims=True) & np.isfinite(X), 0.5, X)
FINITE = 3 * normal(4, 6, N, seed=1)
WHERE = normal(4, 6, N, seed=2) < 1
WHERE[1, 2] = False
WHERE[2, 3, : N // 2] = False
BIAS = normal(1, 1, N, seed=3)
LABELS = np.random.default_rng(0).integers(-N, N, (4, 6)).astype(np.int32)
LABELS[3] = [N, -N - 1, 2**31 - 1, 0, N - 1, -1]

# Functions of the axis name and of the local shards of x, where and labels.
OURS = {
    "softmax": lambda name, x, where, labels: s2p.softmax(x, axis_name=name),
    "softmax, masked": lambda name, x, where, labels: s2p.softmax(x, where=where, axis_name=name),
    "log_softmax": lambda name, x, where, labels: s2p.log_softmax(x, axis_name=name),
    "log_softmax, masked": lambda name, x, where, labels: s2p.log_softmax(x, where=where, axis_name=name),
    "logsumexp": lambda name, x, where, labels: s2p.logsumexp(x, -1, axis_name=name),
    "logsumexp, masked": lambda name, x, where, labels: s2p.logsumexp(x, -1, where=where, axis_name=name),
    "cross-entropy": lambda name, x, where, labels: s2p.softmax_cross_entropy_with_integer_labels(
        x, labels, axis_name=name
    ),
    "cross-entropy, masked": lambda name, x, where, labels: s2p.softmax_cross_entropy_with_integer_labels(
        x, labels, where=where, axis_name=name
    ),
}
THEIRS = {
    "softmax": lambda x, where, labels: jax.nn.softmax(x),
    "softmax, masked": lambda x, where, labels: jax.nn.softmax(x, where=where),
    "log_softmax": lambda x, where, labels: jax.nn.log_softmax(x),
    "log_softmax, masked": lambda x, where, labels: jax.nn.log_softmax(x, where=where),
    "logsumexp": lambda x, where, labels: jax.nn.logsumexp(x, -1),
    "logsumexp, masked": lambda x, where, labels: jax.nn.logsumexp(x, -1, where=where),
    "cross-entropy": lambda x, where, labels: optax.softmax_cross_entropy_with_integer_labels(x, labels),
    "cross-entropy, masked": lambda x, where, labels: optax.softmax_cross_entropy_with_integer_labels(
        x, labels, where=where
    ),
}


def sharded(f, name, spec, *, check_vma=True, reduced=False):
    """f(name, x, where, labels) inside shard_map; reduced results do not vary along the axis."""
    batch = P(*spec[:2])
    local = functools.partial(f, name)
    out = batch if reduced else spec
    return jax.shard_map(
        local,
        mesh=devices.make_mesh(),
        in_specs=(spec, spec, batch),
        out_specs=out,
        check_vma=check_vma,
    )


def is_reduced(operation):
    return operation.startswith(("logsumexp", "cross-entropy"))


def in_float64(f, *operands):
    return jax.jit(f)(*(jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else x for x in operands))


def close(actual, expected, tolerance=1e-6):
    actual, expected = np.asarray(actual), np.asarray(expected)
    with np.errstate(over="ignore"):  # finfo.max + log n may round to infinity.
        rounded = expected.astype(actual.dtype)
    np.testing.assert_allclose(actual, rounded, rtol=tolerance, atol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize("operation", OURS)
@pytest.mark.parametrize("name", SPECS)
def test_forward_takes_one_all_gather(name, operation):
    f = sharded(OURS[operation], name, SPECS[name], reduced=is_reduced(operation))
    x = X_OF_LOSSES if operation.startswith("cross") else X
    actual, found = run(f, x, WHERE, LABELS)
    assert kinds(found) == ["all-gather"]
    close(actual, in_float64(THEIRS[operation], x, WHERE, LABELS))


# The all-reduces of the backward pass: sums of cotangents over whole rows. The gradient of logsumexp needs
# none, because its factor is one number a row, which all devices have.
BACKWARD = {"softmax": 1, "log_softmax": 1, "logsumexp": 0, "cross-entropy": 0}


@pytest.mark.parametrize("operation", OURS)
def test_gradients(operation):
    name = "model"
    f = sharded(OURS[operation], name, SPECS[name], reduced=is_reduced(operation))
    y = jax.eval_shape(f, FINITE, WHERE, LABELS)
    cotangent = normal(*y.shape, seed=4)
    take = lambda f: value_and_vjp(lambda x: f(x, WHERE, LABELS))
    actual, found = run(take(f), FINITE, cotangent)
    expected = in_float64(take(functools.partial(THEIRS[operation])), FINITE, cotangent)
    jax.tree.map(functools.partial(close, tolerance=2e-6), actual, expected)
    assert kinds(found) == ["all-gather"] + ["all-reduce"] * BACKWARD[operation.split(",")[0]]


@pytest.mark.parametrize("operation", ["softmax, masked", "log_softmax", "logsumexp", "cross-entropy"])
def test_higher_derivatives_and_forward_mode(operation):
    name = "model"
    f = sharded(OURS[operation], name, SPECS[name], reduced=is_reduced(operation))
    labels = np.clip(LABELS, -N, N - 1)
    w = normal(4, 6, N, seed=5)

    w = w[..., 0] if is_reduced(operation) else w

    def second(f):
        g = jax.grad(lambda x: jnp.sum(jnp.sin(f(x, WHERE, labels)) * w))
        return lambda x, v: (jax.jvp(lambda x: f(x, WHERE, labels), (x,), (v,)), jax.jvp(g, (x,), (v,))[1])

    operands = FINITE, normal(4, 6, N, seed=6)
    actual = jax.jit(second(f))(*operands)
    expected = in_float64(second(THEIRS[operation]), *operands)
    jax.tree.map(functools.partial(close, tolerance=1e-5), actual, expected)


@pytest.mark.parametrize("operation", ["softmax, masked", "cross-entropy, masked"])
def test_without_check_vma(operation):
    """JAX then adds an all-reduce, as for its own psum; before 0.10 its result was wrong."""
    f = sharded(OURS[operation], "model", SPECS["model"], reduced=is_reduced(operation), check_vma=False)
    if jax.__version_info__ < (0, 10):
        with pytest.raises(ValueError, match="axis_name needs"):
            jax.jit(f)(FINITE, WHERE, LABELS)
        return
    actual, _ = run(f, FINITE, WHERE, LABELS)
    close(actual, in_float64(THEIRS[operation], FINITE, WHERE, LABELS))
    labels = LABELS % N
    take = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x, WHERE, labels))))
    close(jax.jit(take(f))(FINITE), in_float64(take(THEIRS[operation]), FINITE), 2e-6)


def test_band_scale_and_bias():
    """A band counts the columns of all shards; the gradient of a scale sums over shards."""
    mesh = devices.make_mesh()
    scale = np.abs(normal(4, 6, 1, seed=7))
    specs = P("data", None, "model"), P("data"), P(None, None, "model")
    f = lambda name, x, scale, bias: s2p.softmax(
        x, where=s2p.Band(before=40, after=3), scale=scale, bias=bias, axis_name=name
    )
    g = jax.shard_map(functools.partial(f, "model"), mesh=mesh, in_specs=specs, out_specs=specs[0])
    inside = np.arange(N) - np.arange(6)[:, None]
    theirs = lambda x, scale, bias: jax.nn.softmax(x * scale + bias, where=(inside <= 3) & (inside >= -40))
    cotangent = normal(4, 6, N, seed=8)
    actual = jax.jit(value_and_vjp(g))(FINITE, scale, BIAS, cotangent)
    expected = in_float64(value_and_vjp(theirs), FINITE, scale, BIAS, cotangent)
    jax.tree.map(functools.partial(close, tolerance=5e-6), actual, expected)


def on_eight(f):
    """f inside shard_map on a mesh of one axis, which shards the last dimension."""
    mesh = jax.make_mesh((8,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=P(None, "v"), out_specs=P(None, "v"))
    # Shards of one element take the reference, and the exponential of XLA, which is off by more ULP where
    # nothing is optimised.
    return jax.jit(sharded, compiler_options={"xla_backend_optimization_level": 3})


@pytest.mark.long
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("n", [8, 40_000])
def test_accuracy(n, dtype):
    """The contract of the unsharded operation."""
    rows = np.stack([cases.make(name, n, dtype) for name in cases.ROW_CLASSES])
    y = np.asarray(on_eight(functools.partial(s2p.softmax, axis_name="v"))(rows))
    assert y.dtype == dtype
    assert cases.ulp_error(y, cases.exact_softmax(rows)) <= cases.CONTRACT_ULP[dtype]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accuracy_of_logarithms_and_gradients(dtype):
    names = ("normal", "uniform ±1000", "spike", "drift by 3000")
    rows = np.stack([cases.make(name, 40_000, dtype) for name in names])
    cotangent = np.random.default_rng(1).standard_normal(rows.shape).astype(dtype)

    def all_of(x, t):
        y, vjp = jax.vjp(functools.partial(s2p.log_softmax, axis_name="v"), x)
        return y, vjp(t)[0], jax.vjp(functools.partial(s2p.softmax, axis_name="v"), x)[1](t)[0]

    y, *gradients = map(np.asarray, on_eight(all_of)(rows, cotangent))
    largest = np.abs(rows).max(-1, keepdims=True)
    assert cases.log_error(y, cases.exact_log_softmax(rows), largest) <= 1
    p, t = cases.exact_softmax(rows), cotangent.astype(np.longdouble)
    expected = t - p * t.sum(-1, keepdims=True), p * (t - (p * t).sum(-1, keepdims=True))
    # XLA sums the cotangents: without compensation for log_softmax; for softmax the sum is rounded, which
    # matters where p is almost 1 and t - <p, t> is of the size of that rounding.
    scales = expected[0], p * t
    for gradient, exact, scale, ulp in zip(gradients, expected, scales, (32, 4), strict=True):
        allowed = ulp * np.finfo(dtype).eps * np.abs(scale).max(-1, keepdims=True)
        assert (np.abs(gradient - exact) <= allowed).all()


@pytest.mark.parametrize("operation", ["softmax, masked", "cross-entropy, masked"])
def test_reference_implementation(operation, monkeypatch):
    for name in ("softmax", "softmax_cross_entropy_with_integer_labels"):
        monkeypatch.setattr(s2p, name, functools.partial(getattr(s2p, name), implementation="reference"))
    f = sharded(OURS[operation], "model", SPECS["model"], reduced=is_reduced(operation))
    x = X_OF_LOSSES if operation.startswith("cross") else X
    actual, found = run(f, x, WHERE, LABELS)
    assert kinds(found) == ["all-gather"]
    close(actual, in_float64(THEIRS[operation], x, WHERE, LABELS))
    assert "jax_softmax2p_" not in jax.jit(f).lower(x, WHERE, LABELS).as_text()


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, np.int32])
def test_other_dtypes(dtype):
    x = np.arange(16).reshape(2, 8).astype(dtype)
    y, expected = on_eight(functools.partial(s2p.softmax, axis_name="v"))(x), jax.nn.softmax(x.astype(float))
    assert y.dtype == jax.eval_shape(jnp.exp, x).dtype
    np.testing.assert_allclose(y.astype(float), expected, rtol=0.1 if dtype != np.int32 else 1e-6, atol=1e-2)


def test_list_of_axis_names():
    f = functools.partial(s2p.softmax, axis_name=["v"])
    np.testing.assert_array_equal(on_eight(f)(np.zeros((1, 8))), np.full((1, 8), 1 / 8))


def test_under_vmap():
    f = sharded(OURS["softmax"], "model", SPECS["model"])
    x = np.stack([FINITE, X])
    close(jax.jit(jax.vmap(f, (0, None, None)))(x, WHERE, LABELS), in_float64(jax.nn.softmax, x))
    y = jax.vmap(functools.partial(s2p.softmax, axis_name="i"), axis_name="i")(x.reshape(-1, 6, N))
    close(y, in_float64(lambda x: jax.nn.softmax(x, (0, 2)), x.reshape(-1, 6, N)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda x: s2p.softmax(x, axis_name="rows"),
            ValueError,
            "axis_name must name axes of the mesh .* 'rows'",
        ),
        (lambda x: s2p.softmax(x, axis_name=3), ValueError, "axis_name must name axes of the mesh .* 3"),
        (lambda x: s2p.softmax(x * 1j, axis_name="v"), TypeError, "x must be real where axis_name is given"),
        (
            lambda x: s2p.softmax(x, axis_name="v", algorithm="two_pass"),
            ValueError,
            "algorithm must be 'auto' where axis_name is given, got 'two_pass'",
        ),
        (lambda x: s2p.logsumexp(x, b=x, axis_name="v"), ValueError, "axis_name cannot be combined with b"),
        (
            lambda x: s2p.softmax_cross_entropy_with_integer_labels(
                x[None], jnp.zeros(x.shape[:1], int), axis=(0, 2), axis_name="v"
            ),
            ValueError,
            r"axis must be one integer where axis_name is given, got \(0, 2\)",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        on_eight(call)(np.ones((2, 8), np.float32))


def test_outside_shard_map():
    with pytest.raises(ValueError, match=r"axis_name must name axes of the mesh .* jax\.shard_map"):
        s2p.softmax(np.ones(3), axis_name="v")


@pytest.mark.skipif(
    versions.has(jax, "0.11") and not versions.has(jax, "0.12"),
    reason="jaxlib 0.11 crashes as it removes unused operands of the gradient's shard_map",
)
@pytest.mark.parametrize("operation", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("name", [None, "model"])
def test_several_biases(name, operation):
    """Biases of rows and of columns, where rows are sharded and where columns are; some are not finite."""
    x, f, g = 3 * normal(8, 16), normal(8, 1), normal(16)
    x[1, 2], f[1], f[3], f[4], g[9] = -INF, INF, INF, NAN, -INF
    ours = functools.partial(getattr(s2p, operation), axis=1, axis_name=name)
    theirs = functools.partial(getattr(jax.nn, operation), axis=1)
    spec, rows, columns = (
        (P("model", None), P("model"), P()) if name is None else (P(None, name), P(), P(name))
    )

    def loss(x, f, g):
        return jax.shard_map(
            lambda x, f, g: ours(x, bias=(f, g)),
            mesh=devices.make_mesh(),
            in_specs=(spec, rows, columns),
            out_specs=rows if operation == "logsumexp" else spec,
        )(x, f, g)

    with np.errstate(invalid="ignore"):
        z = x.astype(float) + f + g
    close(jax.jit(loss)(x, f, g), theirs(z))
    f, g = np.nan_to_num(f, posinf=1), np.nan_to_num(g, neginf=1)
    t = normal(*jax.eval_shape(loss, x, f, g).shape)
    actual = jax.jit(jax.grad(lambda *operands: jnp.sum(t * loss(*operands)), (0, 1, 2)))(x, f, g)
    expected = in_float64(
        jax.grad(lambda x, f, g: jnp.sum(t * theirs(x + f + g)), (0, 1, 2)),
        np.nan_to_num(x, neginf=-300),
        f,
        g,
    )
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 1e-5)


@pytest.mark.parametrize("operation", ["softmax", "logsumexp"])
def test_several_biases_of_arrays_that_jit_partitions(operation):
    """Neither rows nor columns, nor the biases, are gathered to the size of x."""
    mesh = devices.make_mesh()
    x, f, g = 3 * normal(8, 16), normal(8, 1), normal(16)
    f[3] = INF
    for spec in (("data", None), (None, "model"), ("data", "model")):
        operands = (
            devices.place(x, mesh, *spec),
            devices.place(f, mesh, *spec),
            devices.place(g, mesh, spec[1]),
        )
        y, found = run(lambda x, f, g: getattr(s2p, operation)(x, axis=1, bias=(f, g)), *operands)
        assert "all-gather" not in kinds(found) or spec[1]
        close(y, getattr(jax.nn, operation)(x.astype(float) + f + g, axis=1))
