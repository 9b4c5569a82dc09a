"""This package's JAX code, which is what runs on a GPU or TPU, against jax.nn and optax: times and errors.

    python -m benchmarks.accelerators --rounds 7

It takes JAX's default device. All formulations run in one process, by turns. Calls are queued, as in a
program, so that a launch hides behind the call before it. Times are medians over rounds.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p as s2p
from benchmarks.cases import Case, fill
from benchmarks.operations import OPERATIONS
from benchmarks.options import positive_integer
from jax_softmax2p.measure import alternating_medians, exact_softmax, ulp_error

SHAPES = {
    "softmax": ((64, 64), (1024, 1024), (8192, 4096), (49152, 512), (256, 128256), (1, 2**26)),
    "log_softmax": ((8192, 4096), (256, 128256)),
    "logsumexp": ((8192, 4096), (256, 128256)),
    "softmax and VJP": ((8192, 4096), (256, 128256)),
    "masked softmax": ((8, 12, 512, 512),),
    "cross-entropy and gradient": ((8192, 1000), (4096, 32000), (2048, 128256)),
    "attention": ((4, 1024, 12, 64), (1, 4096, 8, 64)),
    "gradient of causal attention": ((4, 1024, 12, 64), (1, 4096, 8, 64)),
    "decode": ((4, 7000, 16, 64),),
}
"""The shapes of each operation of ``benchmarks.operations``."""

CASES = [
    Case(shape, dtype=dtype, operation=operation)
    for dtype in ("float32", "bfloat16")
    for operation, shapes in SHAPES.items()
    for shape in shapes
]

ACCURACY_SHAPES = ((1024, 64), (512, 1024), (64, 32000))
"""Rows whose errors are compared with float64."""

QUEUED_CALLS = 20

Call = Callable[[], Any]


def formulations(case: Case) -> dict[str, Call]:
    """Compiled calls of the case by each formulation, on arrays of the default device."""
    operation = OPERATIONS[case.operation]
    x = np.empty(case.shape, case.dtype)
    fill(x, case.data)
    operands = [jnp.asarray(operand) for operand in (x, *operation.operands(case))]
    functions = {"jax.nn": operation.jax_nn(case.axis), "ours": operation.ours(case.axis)}
    return {
        name: functools.partial(jax.jit(function).lower(*operands).compile(), *operands)
        for name, function in functions.items()
    }


def queued(call: Call) -> Any:
    """The result of the last of several calls, of which none waits for the one before."""
    for _ in range(QUEUED_CALLS - 1):
        call()
    return call()


def report_times(cases: Sequence[Case], rounds: int) -> None:
    """Prints one line a case."""
    print(f"\n{'case':>52}  {'jax.nn':>10}  {'ours':>10}  jax.nn / ours")
    for case in cases:
        calls = {name: functools.partial(queued, call) for name, call in formulations(case).items()}
        medians = alternating_medians(calls, rounds=rounds)
        times = [f"{1e3 * medians[name] / QUEUED_CALLS:7.3f} ms" for name in ("jax.nn", "ours")]
        ratio = medians["jax.nn"] / medians["ours"]
        print(f"{case.name:>52}  {'  '.join(times)}  {ratio:.2f}", flush=True)


def report_errors() -> None:
    """Prints the largest errors of softmax, in ULP of float32 against float64."""
    print(f"\n{'largest error of softmax, float32':>52}  {'jax.nn':>10}  {'ours':>10}")
    for shape in ACCURACY_SHAPES:
        x = 10 * np.random.default_rng(0).standard_normal(shape, np.float32)
        exact = exact_softmax(x)
        errors = [
            ulp_error(np.asarray(jax.jit(softmax)(x)), exact) for softmax in (jax.nn.softmax, s2p.softmax)
        ]
        print(f"{shape!s:>52}  {'  '.join(f'{error:6.1f} ULP' for error in errors)}", flush=True)


def main() -> None:
    """Measures all cases on the default device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerators", description=__doc__)
    parser.add_argument("--rounds", type=positive_integer, default=7)
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    report_times([case for case in CASES if options.only in case.name], options.rounds)
    report_errors()


if __name__ == "__main__":
    main()
