"""Operations and cases of the section ``small``, where the cost of calls and XLA's fusion decide.

An operation is a function that this package shares with jax.nn or optax, and the form in which it is called:
by itself, differentiated, or many times inside a loop.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import operations
from benchmarks.cases import Case
from benchmarks.operations import Function, Operation

STEPS = 256
"""How often a loop over the same array runs."""


class _SharedFunction(NamedTuple):
    """A function that this package shares with another, under one name.

    Attributes:
      peer: the other package.
      make: makes a function of an array and operands from the name of a package and an axis.
      operands: makes the operands from the case.
    """

    peer: str
    make: Callable[[str, int], Function]
    operands: Callable[[Case], Sequence[np.ndarray]]

    def operation(self, form: Callable[[Function], Function]) -> Operation:
        """The function of both packages, called in a form."""
        of = lambda package: lambda axis: form(self.make(package, axis))
        return Operation(self.operands, of("jax_softmax2p"), of(self.peer))


def _named(name: str) -> Callable[[str, int], Function]:
    def make(package: str, axis: int) -> Function:
        return lambda x, *operands: getattr(importlib.import_module(package), name)(x, *operands, axis=axis)

    return make


def _log_space_product(package: str, axis: int) -> Function:
    """The product of a vector and a matrix whose logarithms are given, as in a hidden Markov model."""
    return lambda matrix, vector: importlib.import_module(package).logsumexp(vector[:, None] + matrix, axis=0)


def _no_operands(case: Case) -> Sequence[np.ndarray]:
    return ()


def _labels(case: Case) -> Sequence[np.ndarray]:
    shape = np.delete(case.shape, case.axis)
    return (np.asarray(np.random.default_rng(1).integers(case.shape[case.axis], size=shape), np.int32),)


def _distributions(case: Case) -> Sequence[np.ndarray]:
    weights = np.random.default_rng(1).random(case.shape, np.float32)
    return (weights / weights.sum(case.axis, keepdims=True),)


def _vector(case: Case) -> Sequence[np.ndarray]:
    return (np.random.default_rng(1).standard_normal(case.shape[0], np.float32),)


_ROW_FUNCTIONS = {
    "softmax": _SharedFunction("jax.nn", _named("softmax"), _no_operands),
    "log_softmax": _SharedFunction("jax.nn", _named("log_softmax"), _no_operands),
    "logsumexp": _SharedFunction("jax.nn", _named("logsumexp"), _no_operands),
    "cross-entropy of labels": _SharedFunction(
        "optax", _named("softmax_cross_entropy_with_integer_labels"), _labels
    ),
    "cross-entropy of distributions": _SharedFunction(
        "optax", _named("softmax_cross_entropy"), _distributions
    ),
}

_PRODUCT = _SharedFunction("jax.nn", _log_space_product, _vector)


def _once(function: Function) -> Function:
    return function


def _gradient(function: Function) -> Function:
    """Value and gradient of the sum of squares, which costs little beside the function."""
    return jax.value_and_grad(lambda x, *operands: jnp.sum(function(x, *operands) ** 2))


def _over_rows(function: Function) -> Function:
    """A scan over the leading axis; every step needs the result of the one before."""

    def scan(x, *operands):
        def step(shift, inputs):
            row, *of_row = inputs
            y = function(row + shift, *of_row)
            return 1e-3 * y.sum(), y

        return jax.lax.scan(step, jnp.zeros((), x.dtype), (x, *operands))[1]

    return scan


def _repeated(function: Function) -> Function:
    """A loop over the same array, shifted by the result of the step before."""

    def loop(x, *operands):
        step = lambda _, shift: 1e-3 * function(x + shift, *operands).sum()
        return jax.lax.fori_loop(0, STEPS, step, jnp.zeros((), x.dtype))

    return loop


def _recurrent(function: Function) -> Function:
    """A scan that feeds a vector back."""

    def scan(x, vector):
        step = lambda vector, _: (function(x, vector) - jnp.log(len(x)).astype(x.dtype), None)
        return jax.lax.scan(step, vector, length=STEPS)[0]

    return scan


_ROW_FORMS: dict[str, Callable[[Function], Function]] = {
    "{}": _once,
    "gradient of {}": _gradient,
    "{} in a scan": _over_rows,
    "gradient of {} in a scan": lambda function: _gradient(_over_rows(function)),
    "{} in a loop": _repeated,
}

_PRODUCT_FORMS: dict[str, Callable[[Function], Function]] = {
    "log-space product": _once,
    "log-space products in a scan": _recurrent,
    "gradient of log-space products in a scan": lambda function: _gradient(_recurrent(function)),
}

OPERATIONS = {
    **{
        operation: shared.operation(transform)
        for form, transform in _ROW_FORMS.items()
        for name, shared in _ROW_FUNCTIONS.items()
        if (operation := form.format(name)) not in operations.OPERATIONS
    },
    **{name: _PRODUCT.operation(transform) for name, transform in _PRODUCT_FORMS.items()},
}
"""Operations beside those of ``benchmarks.operations``, by the name that a case gives."""


def _of_all_functions(forms: Sequence[str], *cases: Case) -> tuple[Case, ...]:
    return tuple(
        case._replace(operation=form.format(name))
        for name in _ROW_FUNCTIONS
        for form in forms
        for case in cases
    )


_IN_JIT = ("{}", "gradient of {}")

AXIS_0 = Case((2000, 1500), axis=0)

EAGER_SOFTMAX = Case((8, 128))
"""The case in which an eager call of ours is compared with a jitted one."""

CASES = {
    "eager": (
        *_of_all_functions(_IN_JIT, EAGER_SOFTMAX),
        *_of_all_functions(("{}",), Case((1000, 3))),
    ),
    "tiny": _of_all_functions(_IN_JIT, Case((3,)), Case((8,)), Case((8, 128))),
    "loops": (
        *_of_all_functions(
            ("{} in a scan", "gradient of {} in a scan"), Case((256, 3)), Case((256, 10)), Case((256, 128))
        ),
        *_of_all_functions(("{} in a loop",), Case((3,)), Case((8, 128))),
    ),
    "other axes": _of_all_functions(
        _IN_JIT, AXIS_0, Case((4, 21, 64, 64), axis=1), Case((64, 256, 49), axis=1)
    ),
    "short rows": _of_all_functions(
        _IN_JIT, *(Case(shape) for shape in ((1000, 3), (256, 10), (50000, 7), (10000, 5), (4000, 4)))
    ),
    "log-space products": tuple(
        Case((size, size), operation=name) for name in _PRODUCT_FORMS for size in (2, 3, 8, 32, 64, 128)
    ),
}
"""The cases of each table of the section."""
