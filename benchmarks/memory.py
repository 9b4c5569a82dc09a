"""The loops of memory.cc, compiled on first use, and aligned arrays for them and for the kernels."""

import ctypes
import functools
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import numpy as np

ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array whose data are aligned to 64 bytes, the size of a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def physical_bytes() -> int:
    """The machine's memory, or 8 GiB where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 2**33


LOOPS = ("read", "copy", "non-temporal copy", "scale")
"""The names of the loops. On CPUs other than x86-64 the non-temporal copy is a plain one."""


def run(loop: str, x: np.ndarray, out: np.ndarray, threads: int) -> None:
    """Runs one of :data:`LOOPS` from ``x`` to ``out``, or to each of several arrays that ``out`` stacks.

    Nothing is written by ``"read"``, which runs as often.
    """
    copies, library = out.size // x.size, _library()
    if loop == "read":
        library.read_all(_pointer(x), _count(x), copies, threads)
    else:
        function = {"copy": library.copy_all, "scale": library.scale_all}.get(loop, library.stream_copy_all)
        function(_pointer(x), _pointer(out), _count(x), copies, threads)


def multiply_add(count: int, threads: int) -> None:
    """Multiplies and adds so many floats, as fast as the machine can."""
    _library().multiply_add(count, threads)


def cycles_per_second() -> float:
    """The clock of the core that this thread is on, at this moment."""
    cycles, best = 2**18, math.inf
    for _ in range(5):
        start = time.perf_counter()
        _library().count_cycles(cycles)
        best = min(best, time.perf_counter() - start)
    return cycles / best


def require() -> None:
    """Compiles the loops.

    Raises:
      ImportError: there is no C++ compiler, or it fails.
    """
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise ImportError("the memory loops need a C++ compiler, and none is on PATH or named by CXX")
    source = pathlib.Path(__file__).with_name("memory.cc")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "memory.so")
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread"]
        command = [*compiler.split(), *flags, str(source), "-o", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            raise ImportError(f"the compiler {compiler} cannot be run: {error}") from error
        except subprocess.CalledProcessError as error:
            raise ImportError(f"{compiler} cannot compile {source.name}: {error.stderr}") from error
        library = ctypes.CDLL(str(path))
    sizes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    library.read_all.argtypes = [ctypes.c_void_p, *sizes]
    library.read_all.restype = ctypes.c_float
    for function in (library.copy_all, library.stream_copy_all, library.scale_all):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *sizes]
        function.restype = None
    library.multiply_add.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.multiply_add.restype = ctypes.c_float
    library.count_cycles.argtypes = [ctypes.c_size_t]
    library.count_cycles.restype = None
    return library


def _pointer(array: np.ndarray) -> int:
    if array.dtype != np.float32 or not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
        raise ValueError(f"an aligned C-contiguous float32 array is needed, got {array.dtype}")
    return array.ctypes.data


def _count(array: np.ndarray) -> int:
    if array.nbytes % ALIGNMENT:
        raise ValueError(f"a multiple of {ALIGNMENT} bytes is needed, got {array.nbytes}")
    return array.size
