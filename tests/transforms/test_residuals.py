"""What the forward pass saves for the backward pass, and the custom calls of both."""

import jax
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

import jax_softmax2p as s2p
from jax_softmax2p import Band


def residuals(function, *operands):
    """Shape and origin of all that the forward pass keeps for the backward one."""
    return [(value.shape, value.dtype, origin) for value, origin in saved_residuals(function, *operands)]


class TestResiduals:
    """What is kept of x's size or more; rows are cheap."""

    X = np.zeros((64, 1000), np.float32)
    MASK = np.ones((64, 1000), bool)

    def kept(self, function, *operands, arguments=False):
        x = operands[0] if operands else self.X
        return [
            dtype.name
            for shape, dtype, origin in residuals(function, x, *operands[1:])
            if np.prod(shape) >= x.size and (arguments or "from the argument" not in origin)
        ]

    def test_softmax_keeps_its_result_alone(self):
        assert residuals(s2p.softmax, self.X)
        assert self.kept(s2p.softmax, arguments=True) == ["float32"]

    def test_scale_and_bias_keep_no_more(self):
        """The scale's derivative needs x, and x is there anyway."""
        scale, bias = np.ones((64, 1), np.float32), np.zeros(1000, np.float32)
        g = lambda x, scale, bias: s2p.softmax(x, scale=scale, bias=bias)
        assert self.kept(g, self.X, scale, bias) == ["float32"]
        assert self.kept(lambda x: g(x, 2.0, bias), arguments=True) == ["float32"]

    def test_a_band_keeps_no_mask_of_floats(self):
        kept = self.kept(lambda x: s2p.softmax(x, where=Band()), arguments=True)
        assert sorted(kept) in (["float32"], ["bool", "float32"])

    def test_log_softmax_keeps_one_array(self):
        assert self.kept(s2p.log_softmax, arguments=True) == ["float32"]

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: s2p.logsumexp(x, -1),
            lambda x: s2p.logsumexp(x, -1, scale=2.0, bias=np.ones(1000, np.float32)),
            lambda x: s2p.sum_exp(x).log(),
            lambda x: s2p.softmax_cross_entropy_with_integer_labels(x, np.zeros(64, int)),
        ],
    )
    def test_log_sums_keep_nothing_but_x_itself(self, function):
        assert self.kept(function) == []
        assert self.kept(function, arguments=True) in (["float32"], [])

    def test_masks_of_log_sums_are_kept_as_they_are(self):
        for function in (
            lambda x, mask: s2p.logsumexp(x, -1, where=mask),
            lambda x, mask: s2p.softmax_cross_entropy_with_integer_labels(x, np.zeros(64, int), where=mask),
        ):
            assert self.kept(function, self.X, self.MASK) == []

    @pytest.mark.parametrize("function", [s2p.log_softmax, lambda x: s2p.logsumexp(x, -1)])
    def test_jitted(self, function):
        """Tracing through jit keeps the same."""
        g = jax.jit(function)
        assert len(self.kept(g, arguments=True)) == 1


def test_gradients_read_the_logits_and_write_the_result(implementation):
    """One kernel each way; the reference calls none."""
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
