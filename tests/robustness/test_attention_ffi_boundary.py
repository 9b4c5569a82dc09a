"""Invalid calls of the FFI targets of attention raise errors with a clear message. See test_ffi_boundary."""

import numpy as np
import pytest
from ffi_calls import Call, assert_refused, name_of

from jax_softmax2p import native

B, T, S, N, K, H, W = 2, 3, 5, 4, 2, 6, 7


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


QUERY, KEY, VALUE = zeros(B, T, N, H), zeros(B, S, K, H), zeros(B, S, K, W)
OUTPUT, LSE, SCALE = zeros(B, T, N, W), zeros(B, T, N, 1), zeros(1)
PLAIN = {
    "operands": np.int64(0),
    "before": np.int64(-1),
    "after": np.int64(-1),
    "soft_cap": np.float64(0),
}
CALLS = [
    Call(native.ATTENTION_TARGET, (QUERY, KEY, VALUE, SCALE), (OUTPUT, LSE), PLAIN),
    Call(
        native.ATTENTION_VJP_TARGET,
        (QUERY, KEY, VALUE, SCALE, OUTPUT, LSE, OUTPUT),
        (QUERY, KEY, VALUE),
        PLAIN,
    ),
]
OPERANDS = (
    zeros(1, N, T, 1),
    zeros(B, 1, 1, S, dtype=bool),
    zeros(B, dtype=np.int32),
    zeros(B, dtype=np.int32),
    zeros(1, 1, T, S, dtype=bool),
)
WORDS = "must (be|have|broadcast)|have rank 4|wrong type|batches must"


@pytest.mark.parametrize("call", CALLS, ids=name_of)
class TestAttention:
    def test_valid_calls(self, call):
        call()
        call.with_operands(31, *OPERANDS, before=np.int64(2**62), after=np.int64(0), soft_cap=np.float64(3))()
        outside = [np.array([-1, 99], np.int32)] * 2
        call.with_operands(12, *outside)()

    def test_buffers(self, call):
        for replace, buffers in ((call.with_operand, call.operands), (call.with_result, call.results)):
            for index, buffer in enumerate(buffers):
                wrong = [buffer.astype(np.float64), buffer.astype(np.int32), buffer[..., 0]]
                if buffer.ndim == 4:
                    wrong += [buffer[:, :-1], buffer[:, :, :-1], buffer[..., :0], zeros(3, *buffer.shape[1:])]
                for x in wrong:
                    if x.size != buffer.size or x.dtype != buffer.dtype:
                        assert_refused(replace(index, x), "jax_softmax2p_attention|operands must be float32")

    def test_operands(self, call):
        bias, mask, lengths, _, dropout_mask = OPERANDS
        for flags, operand in (
            (1, bias.astype(np.float64)),
            (1, bias[0]),
            (1, zeros(1, 3, T, 1)),
            (2, mask.astype(np.int8)),
            (2, mask[..., :-1]),
            (4, lengths.astype(np.int64)),
            (8, lengths[:1]),
            (8, zeros(B, 1, dtype=np.int32)),
            (16, dropout_mask.astype(np.float32)),
            (16, dropout_mask[..., :-1]),
        ):
            assert_refused(call.with_operands(flags, operand), "jax_softmax2p_attention")
        for flags, *operands in ((1,), (0, bias), (64, bias), (-1, bias), (3, bias)):
            assert_refused(call.with_operands(flags, *operands), "operands must add up")

    def test_attributes(self, call):
        assert_refused(call.with_attributes(more=np.int64(0)), "Wrong number of attributes")
        for cap in (-1.0, np.inf, np.nan, 1e-50, 1e-39):
            assert_refused(
                call.with_attributes(soft_cap=np.float64(cap)), f"{call.target}: attribute soft_cap"
            )
        for name in call.attributes:
            assert_refused(call.without_attribute(name), "Wrong number of attributes")


def test_sinks():
    """Of attention alone; and errors name the target."""
    forward, backward = CALLS
    for batch in (1, B):
        forward.with_operands(32, zeros(batch, 1, N, 1))()
    for wrong in (zeros(3, 1, N, 1), zeros(1, 1, K, 1), zeros(N), zeros(1, 1, N, 1, dtype=np.float64)):
        assert_refused(forward.with_operands(32, wrong), f"{forward.target}: sinks must have shape")
    assert_refused(backward.with_operands(32, zeros(1, 1, N, 1)), f"{backward.target}: attribute operands")


@pytest.mark.parametrize("t", [0, T])
def test_gradients_without_queries_are_0(t):
    """Keys and values have gradients where there are no queries or no heads of them."""
    n = 0 if t else N
    query, output, lse = zeros(B, t, n, H), zeros(B, t, n, W), zeros(B, t, n, 1)
    operands = (query, KEY + 1, VALUE + 1, SCALE, output, lse, output)
    for gradient in Call(native.ATTENTION_VJP_TARGET, operands, (query, KEY, VALUE), PLAIN)():
        assert not np.any(gradient)


def test_batches_of_1():
    """They broadcast in the forward pass alone."""
    forward, backward = CALLS
    for index in range(3):
        forward.with_operand(index, forward.operands[index][:1])()
        assert_refused(backward.with_operand(index, backward.operands[index][:1]), "like their arrays")
