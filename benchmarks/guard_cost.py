"""Measures the cost of the guard for masks and large inputs, against the same kernels built without it.

pip wheel . --no-deps -w unguarded -Ccmake.define.JAX_SOFTMAX2P_UNGUARDED=ON
python -m benchmarks.guard_cost unguarded/jax_softmax2p-*.whl
"""

import argparse
import importlib.util
import itertools
import statistics
import sys
import tempfile
import types
import zipfile

import numpy as np

from jax_softmax2p import _native, measure

SHAPES = ((1024, 64), (16, 4096), (1, 65536), (1, 2**20), (16384, 512), (1, 2**26))


def main() -> None:
    """Prints the ratio of times for every instruction set, algorithm and shape."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard_cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("wheel", help="a wheel built with JAX_SOFTMAX2P_UNGUARDED=ON")
    unguarded = load_library(parser.parse_args().wheel)
    if not _native.measurement.GUARDED or unguarded.measurement.GUARDED:
        sys.exit("the installed library must have the guard, and the wheel's must not")
    print(f"{measure.cpu_name()}, float32, one thread, guarded / unguarded time:")
    for isa, algorithm in itertools.product(_native.supported_isas(), ("auto", "two_pass")):
        ratios = [ratio(unguarded, isa, algorithm, shape) for shape in SHAPES]
        print(
            f"  {isa:>9} {algorithm:<8} {'  '.join(f'{r:.3f}' for r in ratios)}"
            f"   geometric mean {statistics.geometric_mean(ratios):.3f}",
            flush=True,
        )


def load_library(path: str) -> types.ModuleType:
    """Loads the native module of a wheel, or one that lies in a file, beside the installed one."""
    with tempfile.TemporaryDirectory() as folder:
        if path.endswith(".whl"):
            with zipfile.ZipFile(path) as archive:
                (name,) = (
                    n
                    for n in archive.namelist()
                    if n.startswith("jax_softmax2p/_native.") and n.endswith(".so")
                )
                path = archive.extract(name, folder)
        spec = importlib.util.spec_from_file_location("_native", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def ratio(unguarded: types.ModuleType, isa: str, algorithm: str, shape: tuple[int, int]) -> float:
    """The ratio of guarded to unguarded time, on normal data, which do not need the guard."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    out = np.empty_like(x)

    def call(library):
        return lambda: library.softmax_into(x, out, "float32", 1, *shape, 1, algorithm, isa, 1)

    times = measure.alternating_medians(
        {"guarded": call(_native), "unguarded": call(unguarded)}, rounds=15, seconds=0.4
    )
    return times["guarded"] / times["unguarded"]


if __name__ == "__main__":
    main()
