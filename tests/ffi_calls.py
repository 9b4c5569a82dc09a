"""Calls of FFI targets, for tests of those that must be refused."""

import dataclasses

import jax
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an FFI target: a valid one, of which a test replaces a part."""

    target: str
    operands: tuple
    results: tuple
    attributes: dict

    def __call__(self):
        results = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in self.results]
        # With a side effect XLA executes the call even if it has no results that are used.
        call = jax.ffi.ffi_call(self.target, results, has_side_effect=True)
        jitted = jax.jit(lambda *operands: call(*operands, **self.attributes))
        return jax.block_until_ready(jitted(*self.operands))

    def with_operand(self, index, operand):
        return dataclasses.replace(self, operands=_replaced(self.operands, index, operand))

    def with_result(self, index, result):
        return dataclasses.replace(self, results=_replaced(self.results, index, result))

    def with_attributes(self, **attributes):
        return dataclasses.replace(self, attributes=self.attributes | attributes)

    def with_operands(self, flags, *operands, **attributes):
        """The call with scale, bias, where or other arrays as further operands, and with their flags."""
        extended = dataclasses.replace(self, operands=self.operands + operands)
        return extended.with_attributes(operands=np.int64(flags), **attributes)

    def without_attribute(self, name):
        attributes = {key: value for key, value in self.attributes.items() if key != name}
        return dataclasses.replace(self, attributes=attributes)


def _replaced(items, index, item):
    return (*items[:index], item, *items[index + 1 :])


def name_of(call):
    return call.target.removeprefix("jax_softmax2p_")


def assert_refused(call, words):
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        call()
