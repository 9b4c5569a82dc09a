"""Invalid calls of the FFI targets raise errors with a clear message.

No function of this package makes such calls, but a program that was serialised elsewhere, or damaged, may.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ffi_calls import Call, assert_refused, name_of

from jax_softmax2p import native

X, ROW = np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
LABELS, NO_LABELS = np.zeros(2, np.int32), np.zeros(0, np.int32)
SCALE, BIAS, WHERE = np.ones((2, 1), np.float32), np.zeros((1, 3), np.float32), np.ones((2, 3), bool)

AXIS = {"axis": np.int64(-1)}
PLAIN = AXIS | {"operands": np.int64(0), "before": np.int64(-1), "after": np.int64(-1)}
CALLS = [
    Call(native.SOFTMAX_TARGET, (X,), (X,), PLAIN | {"algorithm": "auto"}),
    Call(native.LOG_SOFTMAX_TARGET, (X,), (X, ROW, ROW), PLAIN),
    Call(native.LOGSUMEXP_TARGET, (X,), (ROW, ROW), PLAIN),
    Call(native.LOGSUMEXP_JVP_TARGET, (X, ROW, ROW, LABELS, X), (ROW,), PLAIN),
    Call(native.LOGSUMEXP_VJP_TARGET, (X, ROW, ROW, LABELS, ROW), (X,), PLAIN),
    Call(native.LOG_SOFTMAX_VJP_TARGET, (X, ROW, ROW, NO_LABELS, X), (X,), PLAIN),
    Call(native.SOFTMAX_JACOBIAN_TARGET, (X, X), (X,), AXIS),
]
CALLS_WITH_OPERANDS = CALLS[:-1]
CALLS_WITH_LABELS = CALLS[3:5]


def test_calls_cover_every_target():
    attention = {native.ATTENTION_TARGET, native.ATTENTION_VJP_TARGET}  # In test_attention_ffi_boundary.
    assert {call.target for call in CALLS} | attention == set(native.TARGETS)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
class TestEveryTarget:
    def test_valid_call(self, call):
        """The call is valid before a part is replaced, so that later errors are due to that part."""
        call()

    def test_buffers(self, call):
        words = "must (have rank 1 at least|agree|have one element a row)|must be no labels"
        for index in range(len(call.operands)):
            for operand in (X[0, 0], X[:1], X.astype(np.float64)):
                assert_refused(call.with_operand(index, operand), words)
        for index in range(len(call.results)):
            for result in (X[0, 0], X[:1], X.astype(np.float64)):
                assert_refused(call.with_result(index, result), words)

    def test_dtypes_without_kernels(self, call):
        for dtype in (np.int32, np.complex64, bool, jnp.float8_e4m3fn):
            cast = lambda buffers, dtype=dtype: tuple(
                b.astype(dtype) if b.dtype == np.float32 else b for b in buffers
            )
            replaced = dataclasses.replace(call, operands=cast(call.operands), results=cast(call.results))
            assert_refused(replaced, "operands must be float32, float64|of the type that goes with x's")

    def test_number_of_buffers(self, call):
        fewer = dataclasses.replace(call, operands=call.operands[:-1])
        assert_refused(fewer, "Wrong number of arguments")
        more = dataclasses.replace(call, operands=(*call.operands, X))
        assert_refused(more, "Wrong number of arguments|operands must add up")
        for results in (call.results[:-1], (*call.results, X)):
            assert_refused(dataclasses.replace(call, results=results), "Wrong number of results")

    def test_attributes(self, call):
        for axis in (0, 1, 2, -3, 2**63 - 1, -(2**63)):
            assert_refused(call.with_attributes(axis=np.int64(axis)), "axis must be from -2 to -1, not")
        assert_refused(call.with_attributes(more=np.int64(0)), "Wrong number of attributes")
        for name in call.attributes:
            assert_refused(call.without_attribute(name), "Wrong number of attributes")
            for value in (np.int32(-1), np.float64(-1), np.zeros(1, np.int64), "text", True):
                if name == "algorithm" and value == "text":
                    continue
                assert_refused(call.with_attributes(**{name: value}), "Wrong (scalar data|attribute) type")


@pytest.mark.parametrize("call", CALLS_WITH_OPERANDS, ids=name_of)
class TestOperands:
    def test_valid_call(self, call):
        call.with_operands(7, SCALE, BIAS, WHERE, after=np.int64(0))()

    def test_operands(self, call):
        varying = np.ones((2, 3), np.float32)
        for flags, operand, words in (
            (1, varying, "scale must have size 1 along the axis"),
            (1, SCALE.astype(np.float64), "scale must have the element type that goes with x's"),
            (2, BIAS.astype(np.float16), "bias must have the element type that goes with x's"),
            (4, WHERE.astype(np.int8), "where must have the element type that goes with x's"),
            (2, BIAS[0], "bias must have x's rank"),
            (4, WHERE[None], "where must have x's rank"),
            (2, np.zeros((3, 3), np.float32), "bias must broadcast to x"),
            (4, WHERE[:, :2], "where must broadcast to x"),
        ):
            assert_refused(call.with_operands(flags, operand), words)

    def test_number_of_operands(self, call):
        for flags, *operands in ((1,), (7, SCALE, BIAS), (0, BIAS), (2, BIAS, BIAS)):
            assert_refused(call.with_operands(flags, *operands), "operands must add up")
        for unknown in (8, 9, -1, 2**62):
            assert_refused(call.with_operands(unknown, SCALE, BIAS, WHERE), "operands must add up")


@pytest.mark.parametrize("limits", [{"after": 0}, {"before": 0}, {"before": 2**62, "after": 2**62}])
@pytest.mark.parametrize(("x", "axis"), [(X[0], -1), (X, -2)])
def test_bands(x, axis, limits):
    call = CALLS[0].with_attributes(axis=np.int64(axis), **{name: np.int64(v) for name, v in limits.items()})
    banded = dataclasses.replace(call, operands=(x,), results=(x,))
    assert_refused(banded, "a band needs rank 2 at least, and axis -1")


@pytest.mark.parametrize("call", CALLS_WITH_LABELS, ids=name_of)
def test_labels(call):
    for labels in (LABELS.astype(np.int64), LABELS.astype(np.float32), LABELS[:1], np.zeros(6, np.int32)):
        assert_refused(call.with_operand(3, labels), "labels must have one element a row")
    for label in (-3, 0, 2):
        finite = call.with_operand(3, LABELS + np.int32(label))()
        assert np.isfinite(finite[0]).all()
    # These labels are out of range.
    for label in (-4, 3, 2**31 - 1, -(2**31)):
        call.with_operand(3, LABELS + np.int32(label))()


def test_unknown_algorithm():
    assert_refused(CALLS[0].with_attributes(algorithm="fast"), "fast.*two_pass_reload")


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (2**31, 0, 2**32), (2**32, 0, 2**32)])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_sizes_whose_product_overflows(shape, axis):
    """Arrays without elements are the only ones of such shapes that XLA makes."""
    x = jax.jit(lambda: jnp.zeros(shape, np.float32))()
    for call in (CALLS[0], CALLS[-1]):
        call = dataclasses.replace(call, operands=(x,) * len(call.operands), results=(x,))
        assert_refused(call.with_attributes(axis=np.int64(axis)), "operands must have .* no more than")
