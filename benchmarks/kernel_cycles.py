"""Measures the cycles of pass 1, of pass 2 and of whole rows, by another build and by the installed one.

pip wheel . --no-deps -w before
python -m benchmarks.kernel_cycles before/jax_softmax2p-*.whl

Figures are core cycles for each vector of the instruction set (of float32, for every element type): one
thread, preallocated arrays in the caches, both builds alternately in one process. Passes are exp_store and
scale of pass_into, whose fixed costs are not those of rows; pass 1 of a row also finds the maximum. Given no
other build, only the installed one is measured.
"""

import argparse
import statistics
import types

import numpy as np

from benchmarks import memory
from benchmarks.guard_cost import load_library
from benchmarks.options import positive_integer
from jax_softmax2p import _native, measure

LENGTHS = (64, 136, 512, 1000, 4096, 65536)
LANES = {"avx512": 16, "avx2": 8, "neon": 4, "portable": 4}
CALL = 2**16
"""About the number of elements of a call, in arrays that a second-level cache holds."""


def main() -> None:
    """Prints a line for every instruction set, element type and length."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_cycles", description=__doc__.split("\n")[0]
    )
    parser.add_argument("other", nargs="?", help="a wheel, or a native module, to be compared with")
    parser.add_argument("--isa", action="append", help="an instruction set; all by default")
    parser.add_argument("--dtype", action="append", help="of whole rows; float32 by default")
    parser.add_argument("--n", action="append", type=positive_integer, help="a length; several by default")
    parser.add_argument("--algorithm", default="auto", help="of whole rows")
    arguments = parser.parse_args()
    libraries = {"installed": _native}
    if arguments.other:
        libraries = {"other": load_library(arguments.other), **libraries}
    print(f"{measure.cpu_name()}: cycles for each vector, {' and '.join(libraries)}, and their ratio")
    for isa in arguments.isa or _native.supported_isas():
        for dtype in arguments.dtype or ["float32"]:
            for n in arguments.n or LENGTHS:
                print(line(libraries, isa, dtype, n, arguments.algorithm), flush=True)


def line(libraries: dict[str, types.ModuleType], isa: str, dtype: str, n: int, algorithm: str) -> str:
    """What was measured of rows of n elements."""
    cells = []
    whats = ("rows", "pass 1", "pass 2") if dtype == "float32" else ("rows",)
    for what in whats:
        calls = {name: call(library, isa, dtype, n, algorithm, what) for name, library in libraries.items()}
        times = list(cycles({name: function for name, (function, _) in calls.items()}).values())
        elements = next(iter(calls.values()))[1]
        per_vector = [time / elements * LANES[isa] for time in times]
        ratio = f" {per_vector[0] / per_vector[-1]:.2f}x" if len(times) == 2 else ""
        cells.append(f"{what} " + " ".join(f"{c:6.2f}" for c in per_vector) + ratio)
    return f"{isa:>8} {dtype} {n:>6}: " + "   ".join(cells)


def call(library: types.ModuleType, isa: str, dtype: str, n: int, algorithm: str, what: str):
    """A function that computes rows, or a pass of one row several times, and the elements that it takes."""
    rows = max(1, CALL // 4 // n) if what == "rows" else 1
    copies = max(1, CALL // n // rows)
    values = np.random.default_rng(0).standard_normal((rows, n), np.float32) * 4
    x = memory.aligned_empty((rows, n), "float32" if dtype == "float32" else _storage(dtype))
    x[...] = values if dtype in ("float32", "float64", "float16") else values.view(np.uint32) >> 16
    if dtype == "float16":
        x = x.view(np.uint16)
    out = memory.aligned_empty((copies, rows, n), str(x.dtype))
    out[...] = 0
    largest = float(values.max())
    if what == "rows":
        function = lambda: library.softmax_into(x, out, dtype, copies, rows, n, 1, algorithm, isa, 1)
    else:
        measured = library.measurement
        name = "exp_store" if what == "pass 1" else "scale"
        measured.pass_into("exp_store", x[0], out, copies, n, largest, isa, 1)
        function = lambda: measured.pass_into(name, x[0], out, copies, n, largest, isa, 1)
    return function, copies * rows * n


def _storage(dtype: str) -> str:
    return {"bfloat16": "uint16"}.get(dtype, dtype)


def cycles(functions, rounds: int = 41) -> dict[str, float]:
    """The median cycles of a call of each function, called in turn; the clock is measured in every round."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        clock = memory.cycles_per_second()
        for name, function in functions.items():
            function()
            times = measure.alternating_medians({name: function}, rounds=3, seconds=0.002)
            taken[name].append(times[name] * clock)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
