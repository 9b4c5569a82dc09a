"""What the forward pass saves for the backward pass, and the custom calls of both."""

import jax
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

import jax_softmax2p as s2p
from jax_softmax2p import Band


def residuals(function, *operands):
    """The shape, dtype and origin of everything that the forward pass saves for the backward pass."""
    return [(value.shape, value.dtype, origin) for value, origin in saved_residuals(function, *operands)]


class TestResiduals:
    """Residuals of x's size or more are counted; residuals of one number a row are cheap.

    Below the threshold of its derivative, a logsumexp saves its softmax as well.
    """

    X = np.zeros((128, 1000), np.float32)
    MASK = np.ones((128, 1000), bool)

    def saved(self, function, *operands, arguments=False):
        x = operands[0] if operands else self.X
        return [
            dtype.name
            for shape, dtype, origin in residuals(function, x, *operands[1:])
            if np.prod(shape) >= x.size and (arguments or "from the argument" not in origin)
        ]

    def test_softmax_saves_only_its_result(self):
        assert residuals(s2p.softmax, self.X)
        assert self.saved(s2p.softmax, arguments=True) == ["float32"]

    def test_scale_and_bias_save_nothing_more(self):
        """The scale's derivative needs x, which as an argument is saved without a copy."""
        scale, bias = np.ones((128, 1), np.float32), np.zeros(1000, np.float32)
        g = lambda x, scale, bias: s2p.softmax(x, scale=scale, bias=bias)
        assert self.saved(g, self.X, scale, bias) == ["float32"]
        assert self.saved(lambda x: g(x, 2.0, bias), arguments=True) == ["float32"]

    def test_band_saves_no_float_mask(self):
        saved = self.saved(lambda x: s2p.softmax(x, where=Band()), arguments=True)
        assert sorted(saved) in (["float32"], ["bool", "float32"])

    def test_log_softmax_saves_one_array(self):
        assert self.saved(s2p.log_softmax, arguments=True) == ["float32"]

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: s2p.logsumexp(x, -1),
            lambda x: s2p.logsumexp(x, -1, scale=2.0, bias=np.ones(1000, np.float32)),
            lambda x: s2p.sum_exp(x).log(),
            lambda x: s2p.softmax_cross_entropy_with_integer_labels(x, np.zeros(128, int)),
        ],
    )
    def test_logsumexp_saves_only_x(self, function):
        assert self.saved(function) == []
        assert self.saved(function, arguments=True) in (["float32"], [])

    def test_logsumexp_saves_no_copy_of_masks(self):
        for function in (
            lambda x, mask: s2p.logsumexp(x, -1, where=mask),
            lambda x, mask: s2p.softmax_cross_entropy_with_integer_labels(x, np.zeros(128, int), where=mask),
        ):
            assert self.saved(function, self.X, self.MASK) == []

    @pytest.mark.parametrize("function", [s2p.log_softmax, lambda x: s2p.logsumexp(x, -1)])
    def test_jitted(self, function):
        """Inside jit, the same residuals are saved."""
        g = jax.jit(function)
        assert len(self.saved(g, arguments=True)) == 1


def test_gradient_takes_one_custom_call_in_each_direction(implementation):
    """Forward and backward pass are one custom call each, and none with the reference."""
    x, labels = np.random.default_rng(0).standard_normal((8, 33)), np.arange(8)
    loss = lambda x: s2p.softmax_cross_entropy_with_integer_labels(
        x, labels, implementation=implementation
    ).sum()
    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    calls = 1 if implementation == "native" else 0
    assert text.count("custom_call @jax_softmax2p_log_sum_v1") == calls
    assert text.count("custom_call @jax_softmax2p_log_sum_vjp_v1") == calls
    assert text.count("custom_call @jax_softmax2p") == 2 * calls
    assert "scatter" not in text or implementation == "reference"
