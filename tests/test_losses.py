"""The cross-entropies have the values, gradients and semantics of optax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_softmax2p import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

NAN, INF = float("nan"), float("inf")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def check(ours, theirs, *operands, dtype=np.float64, argnums=0):
    """Asserts that values, and gradients of a weighted sum, equal those of optax in float64."""

    def both(loss, operands):
        def weighted(*operands):
            losses = loss(*operands)
            return jnp.sum(jnp.cos(jnp.arange(losses.size)).reshape(losses.shape) * losses), losses

        return jax.jit(jax.grad(weighted, argnums, has_aux=True))(*operands)

    def cast(v, dtype):
        return v.astype(dtype) if np.issubdtype(v.dtype, np.floating) else v

    rounded = [cast(v, dtype) for v in operands]
    actual = both(ours, rounded)
    expected = both(theirs, [cast(v, np.float64) for v in rounded])
    tolerance = 32 * np.finfo(dtype).eps

    def compare(actual, expected):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, actual, expected)


@pytest.fixture
def integer_loss(implementation):
    return functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)


@pytest.fixture
def soft_loss(implementation):
    return functools.partial(softmax_cross_entropy, implementation=implementation)


class TestIntegerLabels:
    @pytest.mark.long
    @pytest.mark.parametrize("n", [1, 10, 129, 5000])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_lengths(self, n, dtype, integer_loss):
        labels = np.array([0, n - 1, n // 2])
        check(
            integer_loss,
            optax.softmax_cross_entropy_with_integer_labels,
            3 * normal(3, n),
            labels,
            dtype=dtype,
        )

    @pytest.mark.long
    @pytest.mark.parametrize("axis", [0, (1,), (0, 2), (2, -3), (0, 1, 2)])
    def test_axes(self, axis, integer_loss):
        """With several axes, classes are counted in the order in which the axes are given."""
        x = 3 * normal(3, 4, 5)
        axes = axis if isinstance(axis, tuple) else (axis,)
        classes = np.prod([x.shape[a] for a in axes])
        batch = [size for i, size in enumerate(x.shape) if i not in [a % 3 for a in axes]]
        labels = np.random.default_rng(0).integers(classes, size=batch)
        check(
            functools.partial(integer_loss, axis=axis),
            functools.partial(optax.softmax_cross_entropy_with_integer_labels, axis=axis),
            x,
            labels,
        )

    @pytest.mark.parametrize("n", [5, 200])
    def test_negative_and_out_of_range_labels(self, n, integer_loss):
        """Negative labels count from the end. Out of range, the loss is NaN and the gradient the softmax."""
        labels = np.array([-1, -n, -n - 1, n, n - 1, n + 7, 2**31 - 1, -(2**31)])
        theirs = optax.softmax_cross_entropy_with_integer_labels
        check(integer_loss, theirs, normal(8, n), labels)
        outside = np.isin(np.arange(8), (2, 3, 5, 6, 7))
        losses = np.asarray(integer_loss(normal(8, n), labels))
        np.testing.assert_array_equal(np.isnan(losses), outside)

    @pytest.mark.parametrize("n", [3, 33])
    def test_special_rows_in_a_loop(self, n):
        """Small rows in loops keep the derivative. It is NaN where optax's is."""
        kinds = [(NAN,), (INF,), (-INF,), (INF, NAN), (INF, -INF), (-INF,) * n, (INF,) * n]
        rows = [np.concatenate([kind, normal(n)[len(kind) :]]).astype(np.float32) for kind in kinds]
        for label in (0, 1, n - 1, n):
            operands = np.stack(rows), np.full(len(rows), label)

            def in_loop(loss, *operands):
                return jax.lax.map(lambda row: jax.value_and_grad(loss)(*row), operands)

            actual = in_loop(softmax_cross_entropy_with_integer_labels, *operands)
            expected = in_loop(optax.softmax_cross_entropy_with_integer_labels, *operands)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected
            )

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
    def test_dtypes_of_labels(self, dtype, integer_loss):
        """There are more classes than the labels' dtype has numbers."""
        labels = np.array([0, 127, 100, 3], dtype)
        check(integer_loss, optax.softmax_cross_entropy_with_integer_labels, normal(4, 300), labels)
        if np.issubdtype(dtype, np.signedinteger):
            losses = integer_loss(normal(4, 300), np.full(4, -1, dtype))
            np.testing.assert_allclose(losses, integer_loss(normal(4, 300), np.full(4, 299)), rtol=1e-14)

    @pytest.mark.long
    @pytest.mark.parametrize("shape", [(4, 6), (4, 1), (1, 6), (4,)])
    def test_masks(self, shape, integer_loss):
        """Masks have the logits' shape or the labels'. Labels are not masked; fully masked rows give 0."""
        where = np.random.default_rng(3).random(shape) < 0.5
        labels = np.array([0, 5, 2, 1])
        if shape[0] == 4:
            where[1] = False
        check(
            functools.partial(integer_loss, where=where),
            functools.partial(optax.softmax_cross_entropy_with_integer_labels, where=where),
            normal(4, 6),
            labels,
        )

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("axis", "shape"), [((0, 2), (3, 4, 5)), ((1, 2), (3,)), ((2,), (3, 4)), (1, (3, 5))]
    )
    def test_masks_along_any_axis(self, axis, shape, integer_loss):
        where = np.random.default_rng(3).random(shape) < 0.7
        x = normal(3, 4, 5)
        axes = axis if isinstance(axis, tuple) else (axis,)
        batch = [size for i, size in enumerate(x.shape) if i not in axes]
        check(
            functools.partial(integer_loss, axis=axis, where=where),
            functools.partial(optax.softmax_cross_entropy_with_integer_labels, axis=axis, where=where),
            x,
            np.random.default_rng(0).integers(4, size=batch),
        )

    def test_special_rows(self, integer_loss):
        x = np.array([[0, NAN, 1], [0, INF, 1], [-INF, 0, 1], [-INF, 0, 1], [-INF, -INF, -INF]])
        labels = np.array([0, 0, 0, 1, 1])
        expected = optax.softmax_cross_entropy_with_integer_labels(x, labels)
        np.testing.assert_allclose(integer_loss(x, labels), expected, rtol=1e-14)
        g = jax.jit(jax.grad(lambda x: integer_loss(x, labels).sum()))(x)
        # Classes of probability 0 change nothing.
        np.testing.assert_allclose(g[3], [0, np.exp(0) / (1 + np.e) - 1, np.e / (1 + np.e)], rtol=1e-14)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
    @pytest.mark.parametrize("n", [21, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 5, 32))])
    def test_small_columns(self, n, dtype):
        """Many, with special ones among them, which harm no others, and labels of all kinds."""
        x = normal(2, n, 300).astype(dtype)
        large = 0.7 * float(jnp.finfo(dtype).max)
        x[0, :, 17], x[0, :, 44], x[0, :, 45] = -INF, -large, large
        for column, value in zip(range(3, 300, 40), (NAN, INF, -INF, large, -large, 60, -60, 0), strict=True):
            x[1, -1, column] = value
        labels = np.arange(600).reshape(2, 300) % (2 * n + 3) - n - 1
        loss = functools.partial(softmax_cross_entropy_with_integer_labels, axis=1, implementation="native")
        losses, vjp = jax.vjp(lambda x: loss(x, labels), x)
        cotangent = normal(2, 300, seed=1).astype(dtype)
        [gradient] = vjp(cotangent)
        wide = np.moveaxis(x.astype(np.float64), 1, 2)
        eps = float(jnp.finfo(dtype).eps)
        classes = np.where(labels < 0, labels + n, labels)[..., None]
        inside = (classes >= 0) & (classes < n)
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(wide)), np.where(inside, classes, 0), -1)
        # optax's losses lose the digits of large logits.
        is_finite = np.isfinite(wide.max(-1, keepdims=True))
        theirs = optax.softmax_cross_entropy_with_integer_labels(wide, labels)
        expected = np.where(is_finite[..., 0], -np.where(inside, log_p, NAN)[..., 0], theirs)
        np.testing.assert_allclose(losses.astype(np.float64), expected, rtol=4 * eps, atol=4 * eps)
        one_hot = np.arange(n) == classes
        exact = (np.asarray(jax.nn.softmax(wide)) - one_hot) * cotangent.astype(np.float64)[..., None]
        actual = np.moveaxis(np.asarray(gradient, np.float64), 1, 2)
        finite = np.broadcast_to(is_finite, exact.shape)
        np.testing.assert_allclose(actual[finite], exact[finite], rtol=4 * eps, atol=4 * eps)
        assert not np.isfinite(actual[0, 17]).any()

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
    def test_empty_batches(self, shape, integer_loss):
        losses = integer_loss(np.zeros(shape, np.float32), np.zeros(shape[:-1], int))
        assert (losses.shape, losses.dtype) == (shape[:-1], np.float32)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
    def test_half_precision(self, dtype):
        x, labels = (3 * normal(4, 50)).astype(dtype), np.arange(4)
        loss = softmax_cross_entropy_with_integer_labels
        expected = optax.softmax_cross_entropy_with_integer_labels(x.astype(np.float64), labels)
        assert loss(x, labels).dtype == dtype
        np.testing.assert_allclose(loss(x, labels).astype(float), expected, rtol=jnp.finfo(dtype).eps)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_no_loss_is_negative(self, dtype, integer_loss):
        """As in optax, since users take its square root and its logarithm."""
        x = normal(40, 7).astype(dtype)
        x[:, 3] += np.linspace(10, 300, 40)
        assert (np.asarray(integer_loss(x, np.full(40, 3))) >= 0).all()

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"logits": np.ones((2, 3), int)}, TypeError, "logits must be floating-point .* got dtype int64"),
            ({"labels": np.ones(2)}, TypeError, "labels must be integers, got dtype float64"),
            ({"labels": np.ones(2, bool)}, TypeError, "labels must be integers, got dtype bool"),
            ({"labels": np.ones(3, int)}, ValueError, r"labels must have .* \(2,\), got \(3,\)"),
            ({"labels": np.ones((2, 3), int)}, ValueError, r"labels must have .* \(2,\), got \(2, 3\)"),
            ({"labels": np.int64(1)}, ValueError, r"labels must have .* \(2,\), got \(\)"),
            ({"axis": 2}, ValueError, "axis 2 is out of range for an array of 2 dim"),
            ({"axis": (0, 0)}, ValueError, "axis names a dimension twice"),
            ({"where": np.ones((2, 3), int)}, ValueError, "where must be boolean, got dtype int64"),
            (
                {"where": np.ones((4, 3), bool)},
                ValueError,
                r"where must broadcast with the logits' shape \(2, 3\) .*\(4, 3\)",
            ),
            ({"implementation": "cuda"}, ValueError, "implementation must be None, 'native' .*'cuda'"),
        ],
    )
    def test_errors(self, arguments, error, words):
        good = {"logits": np.ones((2, 3), np.float32), "labels": np.ones(2, int)}
        with pytest.raises(error, match=words):
            softmax_cross_entropy_with_integer_labels(**{**good, **arguments})


def test_loss_allocates_no_array_of_logits_size():
    """Temporaries take less than 1% of the logits; the gradient allocates only its result."""
    logits = jax.ShapeDtypeStruct((64, 32000), np.float32)
    labels = jax.ShapeDtypeStruct((64,), np.int32)
    loss = lambda x, labels: softmax_cross_entropy_with_integer_labels(x, labels).mean()
    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(logits, labels).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.01 * 64 * 32000 * 4


class TestSoftLabels:
    @pytest.mark.long
    @pytest.mark.parametrize("n", [1, 10, 129, 5000])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_lengths(self, n, dtype, soft_loss):
        labels = np.random.default_rng(0).dirichlet(np.ones(n), 3)
        check(soft_loss, optax.softmax_cross_entropy, 3 * normal(3, n), labels, dtype=dtype, argnums=(0, 1))

    @pytest.mark.long
    @pytest.mark.parametrize("axis", [1, (0, -1), None])
    def test_axes(self, axis, soft_loss):
        check(
            functools.partial(soft_loss, axis=axis),
            functools.partial(optax.softmax_cross_entropy, axis=axis),
            3 * normal(3, 4, 5),
            np.abs(normal(3, 4, 5, seed=1)),
            argnums=(0, 1),
        )

    @pytest.mark.long
    @pytest.mark.parametrize("shape", [(6,), (1, 6), (4, 1), (2, 4, 6)])
    def test_labels_broadcast(self, shape, soft_loss):
        check(soft_loss, optax.softmax_cross_entropy, normal(4, 6), normal(*shape, seed=1), argnums=(0, 1))

    @pytest.mark.long
    @pytest.mark.parametrize("shape", [(4, 6), (1, 6), (4, 1), (4,)])
    def test_masks(self, shape, soft_loss):
        where = np.random.default_rng(3).random(shape) < 0.6
        where.flat[0] = True
        check(
            functools.partial(soft_loss, where=where),
            functools.partial(optax.softmax_cross_entropy, where=where),
            normal(4, 6),
            np.abs(normal(4, 6, seed=1)),
        )

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("axis", "shape"), [(0, (4, 5)), ((0, 2), (4,)), (1, (3, 4, 5)), (None, (3, 4, 5))]
    )
    def test_masks_along_any_axis(self, axis, shape, soft_loss):
        where = np.random.default_rng(3).random(shape) < 0.7
        check(
            functools.partial(soft_loss, axis=axis, where=where),
            functools.partial(optax.softmax_cross_entropy, axis=axis, where=where),
            normal(3, 4, 5),
            np.abs(normal(3, 4, 5, seed=1)),
        )

    def test_integer_and_one_hot_labels(self, soft_loss):
        """One-hot labels may be integers or floats."""
        x, labels = normal(4, 6).astype(np.float32), np.eye(6, dtype=int)[[0, 5, 2, 1]]
        expected = optax.softmax_cross_entropy_with_integer_labels(x, np.array([0, 5, 2, 1]))
        np.testing.assert_allclose(soft_loss(x, labels), expected, rtol=1e-6)
        np.testing.assert_allclose(soft_loss(x, labels.astype(np.float32)), expected, rtol=1e-6)

    def test_special_rows(self, soft_loss):
        x = np.array([[0, NAN, 1], [0, INF, 1], [-INF, 0, 1], [-INF, -INF, -INF]])
        labels = np.array([[0.2, 0.5, 0.3]])
        np.testing.assert_allclose(soft_loss(x, labels), optax.softmax_cross_entropy(x, labels), rtol=1e-14)

    @pytest.mark.parametrize("x_dtype", [jnp.bfloat16, np.float32])
    @pytest.mark.parametrize("labels_dtype", [jnp.bfloat16, np.float32, np.float64, np.int32])
    def test_dtypes(self, x_dtype, labels_dtype):
        shapes = jax.ShapeDtypeStruct((4, 6), x_dtype), jax.ShapeDtypeStruct((4, 6), labels_dtype)
        expected = jax.eval_shape(optax.softmax_cross_entropy, *shapes)
        actual = jax.eval_shape(softmax_cross_entropy, *shapes)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"logits": np.ones((2, 3), int)}, TypeError, "logits must be floating-point .* got dtype int64"),
            ({"axis": 2}, ValueError, "axis 2 is out of range for an array of 2 dim"),
            ({"where": np.ones((2, 3), int)}, ValueError, "where must be boolean, got dtype int64"),
            (
                {"where": np.ones((4, 3), bool)},
                ValueError,
                r"where must broadcast with the logits' shape \(2, 3\) .*\(4, 3\)",
            ),
            ({"implementation": "cuda"}, ValueError, "implementation must be None, 'native' .*'cuda'"),
        ],
    )
    def test_errors(self, arguments, error, words):
        good = {"logits": np.ones((2, 3), np.float32), "labels": np.ones((2, 3), np.float32)}
        with pytest.raises(error, match=words):
            softmax_cross_entropy(**{**good, **arguments})


def test_several_axes_of_classes_and_masks():
    """As a list or a tuple; masks of rows that broadcast, and masks that broadcast along the classes."""
    x, labels = jnp.asarray(normal(4, 3, 5, seed=1)), jnp.array([0, 3, 7, 14])
    flat = x.reshape(4, 15)
    loss = softmax_cross_entropy_with_integer_labels
    expected = optax.softmax_cross_entropy_with_integer_labels(flat, labels)
    for axis in ([1, 2], (1, 2), (-2, -1)):
        np.testing.assert_allclose(loss(x, labels, axis), expected, rtol=1e-6)
    mask = jnp.array([True, False, True, True, True])
    wide = jnp.broadcast_to(mask, x.shape)
    masked = optax.softmax_cross_entropy_with_integer_labels(
        jnp.where(wide, x, -jnp.inf).reshape(4, 15), labels
    )
    np.testing.assert_allclose(loss(x, labels, (1, 2), where=mask[None, None]), masked, rtol=1e-6)
    rows = jnp.array([True, False, True])
    of_rows = loss(x.swapaxes(1, 2), jnp.zeros((4, 3), int), 1, where=rows)
    plain = optax.softmax_cross_entropy_with_integer_labels(x, jnp.zeros((4, 3), int))
    np.testing.assert_allclose(of_rows, jnp.where(rows, plain, 0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (3, 2400), (8, 300)])
def test_nan_among_many_rows(shape, implementation):
    """XLA's maximum of a large array loses NaNs."""
    x = np.zeros(shape, np.float32)
    x[:, 5] = np.nan
    loss = softmax_cross_entropy_with_integer_labels(x, np.full(shape[0], 2), implementation=implementation)
    assert np.all(np.isnan(loss))


def test_nearly_certain_rows_that_labels_share(implementation):
    """The gradient is p times the number of labels, minus the number of those that name the class."""
    x = np.array([[[20.0, 0.0, -1.0]], [[3.0, 40.0, -2.0]], [[0.5, 0.0, 1.0]]], np.float32)
    labels = np.array([[0, 0, 0, 0], [1, 1, 2, 1], [2, 0, 1, 2]])
    f = functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: f(x, labels).sum()))(x)
    e = np.exp(x[:, 0].astype(np.float64))
    others = e.sum(-1, keepdims=True) - e
    counts = (labels[..., None] == np.arange(3)).sum(1)
    # counts.sum()·p - counts, without a difference of what is nearly the same.
    expected = ((counts.sum(-1, keepdims=True) - counts) * e - counts * others) / e.sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient[:2, 0], expected[:2], rtol=2e-6)
    np.testing.assert_allclose(gradient[2, 0], expected[2], atol=1e-6)
    exact = np.log(e.sum(-1)) * labels.shape[1] - (counts * x[:, 0]).sum(-1)
    np.testing.assert_allclose(loss, exact.sum(), rtol=1e-6)
    masked = jax.grad(lambda x: f(x, labels, where=np.array([[[True, True, False]]])).sum())(x)
    p = e[0, 1] / e[0, :2].sum()
    np.testing.assert_allclose(masked[0, 0], [-4 * p, 4 * p, 0], rtol=2e-6)


def test_16_bit_logits_and_float32_labels(implementation):
    """Nothing is rounded to 16 bits, which the result has not."""
    x = jnp.array([[0.0, 1.3, 2.7], [5.0, -3.0, 0.1]], jnp.bfloat16)
    labels = np.full((2, 3), 1 / 3, np.float32)
    losses = softmax_cross_entropy(x, labels, implementation=implementation)
    assert losses.dtype == np.float32
    wide = np.asarray(x, np.float64)
    exact = np.log(np.exp(wide).sum(-1)) - wide.mean(-1)
    np.testing.assert_allclose(losses, exact, rtol=1e-6)


def test_a_label_of_no_classes_is_out_of_range(implementation):
    x = np.ones((2, 0), np.float32)
    f = functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)
    assert np.all(np.isnan(f(x, np.zeros(2, int))))
    assert np.all(np.isnan(f(x[:1], np.zeros(2, int))))


def test_all_axes_of_labels_with_more_dimensions(implementation):
    x, labels = normal(3, 4).astype(np.float32), normal(2, 3, 4, seed=1).astype(np.float32)
    loss = softmax_cross_entropy(x, labels, None, implementation=implementation)
    expected = optax.softmax_cross_entropy(x.astype(np.float64), labels.astype(np.float64), None)
    assert loss.shape == expected.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_gradient_of_16_bit_logits_and_float32_labels(implementation):
    """Of labels near the probabilities: rounded to 16 bits, the labels would leave 11 times as much."""
    x = jnp.array([[0.0, 0.84765625]], jnp.bfloat16)
    labels = np.array([[0.3, 0.7]], np.float32)
    loss = lambda x: softmax_cross_entropy(x, labels, implementation=implementation).sum()
    gradient = jax.jit(jax.grad(loss))(x)
    assert gradient.dtype == jnp.bfloat16
    e, wide = np.exp(np.asarray(x, np.float64)), labels.astype(np.float64)
    expected = e / e.sum() * wide.sum() - wide
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-7)


def test_gradient_at_a_label_of_minus_infinity(implementation):
    x = np.array([[0.0, -INF]], np.float32)
    loss = lambda x: softmax_cross_entropy_with_integer_labels(
        x, np.array([1]), implementation=implementation
    )[0]
    value, gradient = jax.value_and_grad(loss)(x)
    assert value == INF
    np.testing.assert_array_equal(gradient, [[1, -1]])
