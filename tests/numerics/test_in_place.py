"""Derivatives that take the memory of an operand: the same bits, and nothing is copied."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import since

from jax_softmax2p import log_softmax, softmax
from jax_softmax2p.primitives.log_softmax import log_softmax_p, log_softmax_vjp_p
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.operands import OperandSpec
from jax_softmax2p.primitives.softmax_jacobian import softmax_jacobian_p

# Small rows and columns, rows with an incomplete vector and with several blocks, panels, and split rows.
SHAPES = [((300, 7), -1), ((9, 600), -1), ((2, 70_000), -1), ((33, 40), -2), ((2, 300, 500), -2)]


def normal(*shape, seed, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_same_bits(derivative, choices, *operands):
    """Asserts that the derivative has the same bits whatever it reuses, as derivative(choice, *operands)."""

    def of_temporaries(choice, *operands):
        # The memory of arguments is never taken.
        return derivative(choice, *(2 * x for x in operands))

    results = []
    for choice in choices:
        compiled = jax.jit(of_temporaries, static_argnums=0).lower(choice, *operands).compile()
        reuses = choice is not None and choice is not False
        assert ("output_to_operand_aliasing" in compiled.as_text()) == reuses
        results.append(compiled(*operands))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_jacobian_of_softmax(shape, axis, dtype):
    def jacobian(reuses, y, t):
        return softmax_jacobian_p.bind(y, t, axis=axis, implementation="native", reuses=reuses)

    y = softmax(normal(*shape, seed=0, dtype=dtype), axis)
    assert_same_bits(jacobian, (None, 0, 1), y, normal(*shape, seed=1, dtype=dtype))


@pytest.fixture
def always_in_place(monkeypatch):
    monkeypatch.setattr("jax_softmax2p.primitives.log_softmax.MIN_IN_PLACE_SIZE", 0)


@pytest.mark.usefixtures("always_in_place")
@pytest.mark.parametrize("names", [(), ("bias",)])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradient_of_log_softmax(shape, axis, dtype, names):
    params = {"axis": axis, "spec": OperandSpec(names), "implementation": "native"}

    def gradient(in_place, t, x, *bias):
        _, hi, lo = log_softmax_p.bind(x, *bias, **params)
        return log_softmax_vjp_p.bind(x, hi, lo, no_labels(), t, *bias, in_place=in_place, **params)

    operands = [normal(*shape, seed=seed, dtype=dtype) for seed in range(2 + len(names))]
    assert_same_bits(gradient, (False, True), *operands)


@since(jax, "0.10", "fusions that store nothing of this size")
@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_copies_nothing(function):
    """The result is needed for the value as well: the gradient takes the memory of its cotangent."""
    x = normal(2048, 1024, seed=0, dtype=np.float32)
    for axis in (-1, 0):
        value_and_grad = jax.value_and_grad(lambda x, axis=axis: jnp.sum(function(x, axis) ** 2))
        compiled = jax.jit(value_and_grad).lower(x).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * x.nbytes
        assert " copy(%softmax" not in compiled.as_text()


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_copies_no_cotangent_that_is_an_argument(function):
    x = normal(2048, 1024, seed=0, dtype=np.float32)
    pull_back = jax.jit(lambda x, t: jax.vjp(function, x)[1](t)[0]).lower(x, x).compile()
    assert pull_back.memory_analysis().temp_size_in_bytes < 0.5 * x.nbytes
    assert " copy(" not in pull_back.as_text()
