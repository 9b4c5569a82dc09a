"""What runs inside a worker process: one backend, which a :class:`benchmarks.workers.Worker` drives.

The process may run an older revision of jax_softmax2p (``--compare REVISION``). So this module, and those
that it imports at its top, use public names of jax_softmax2p only; what else a measurement needs is imported
where it is used.
"""

import ctypes
import mmap
import multiprocessing.connection
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks import memory
from benchmarks.backends import Backend
from benchmarks.cases import Case, fill

CHECKED_ELEMENTS = 2**16
"""How many elements of a result are compared."""

RESERVED_MULTIPLE, MIN_RESERVED_BYTES = 6, 2**30
"""How much memory a process touches before a case is timed: this multiple of the case's size, and at least so
much.

Less is soon used up, because a small array that lies where a large one was leaves no room for the next large
one. No process touches more than an eighth of the machine's memory.
"""


class Prepared(NamedTuple):
    """The answer of a backend that is ready for a case.

    Attributes:
      result: the first elements of its result, as float32; None if it computes something else.
      outputs: how many outputs a call fills.
    """

    result: np.ndarray | None
    outputs: int


def serve(
    connection: "multiprocessing.connection.Connection[Any, Any]",
    factory: Callable[[], Backend],
    keeps_memory: bool,
) -> None:
    """Makes the backend, then answers requests until the process is terminated.

    Each answer is sent together with the processor time that the process has used. The first is the backend's
    name and whether it computes the case, or the reason why it cannot run.
    """
    try:
        backend = factory()
    except ImportError as error:
        connection.send((str(error), time.process_time()))
        return
    connection.send(((backend.name, backend.computes), time.process_time()))
    server = _Server(backend, keeps_memory)
    while True:
        connection.send((server.answer(connection.recv()), time.process_time()))


class _Server:
    """A backend and the case that it works on."""

    def __init__(self, backend: Backend, keeps_memory: bool):
        self._backend, self._keeps_memory = backend, keeps_memory
        self._x = np.empty(0)
        self._call: Callable[[], Any] = lambda: None

    def answer(self, request: Case | int | str) -> Any:
        """Prepares a case, times a number of calls, or measures what a string names."""
        if isinstance(request, Case):
            return self._prepare(request)
        if isinstance(request, int):
            return _seconds_per_call(self._call, request)
        measurements = {
            "peak_bytes": self._peak_bytes,
            "temporary_bytes": self._backend.temporary_bytes,
            "ulp_error": self._ulp_error,
        }
        return measurements[request]()

    def _prepare(self, case: Case) -> Prepared:
        self._call = lambda: None  # The previous call holds the arrays of the previous case.
        if self._keeps_memory:
            _reserve_memory(case)
        self._x = memory.aligned_empty(case.shape, case.dtype)
        fill(self._x, case.data)
        outputs = _outputs_beyond_caches(self._x.nbytes) if self._backend.rotates else 1
        stack = (outputs,) if self._backend.rotates else ()
        out = memory.aligned_empty((*stack, *case.shape), case.dtype)
        out[...] = 0
        self._call = self._backend.bind(case, self._x, out)
        result = self._call()
        return Prepared(_first_elements(result) if self._backend.computes else None, outputs)

    def _peak_bytes(self) -> int | None:
        if not os.path.exists("/proc/self/clear_refs"):
            return None
        _wait_for_threads()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # Freed memory would be used again unnoticed.
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # Resets the peak.
        before = _process_status_bytes("VmRSS")
        self._call()
        return max(0, _process_status_bytes("VmHWM") - before)

    def _ulp_error(self) -> float:
        from jax_softmax2p import measure

        y = np.asarray(_as_array(self._call()))
        return measure.ulp_error(y, measure.exact_softmax(self._x))


def _reserve_memory(case: Case) -> None:
    """Touches memory and frees it, so that the arrays that follow are placed there."""
    wanted = max(RESERVED_MULTIPLE * case.bytes, MIN_RESERVED_BYTES)
    size = min(wanted, memory.physical_bytes() // 8)
    memory.aligned_empty((size,), "uint8")[:: mmap.PAGESIZE] = 0


def _outputs_beyond_caches(nbytes: int) -> int:
    """How many outputs exceed the last cache together, as in XNNPACK's bench/f32-softmax.cc."""
    from jax_softmax2p import native

    return 1 + -(-native.cache_bytes()[1] // nbytes)


def _wait_for_threads() -> None:
    """Waits until the size of the process is stable: JAX frees the memory of results in its own thread."""
    last = None
    while last != (now := _process_status_bytes("VmRSS")):
        last = now
        time.sleep(0.05)


def _process_status_bytes(name: str) -> int:
    """A size from Linux's /proc/self/status."""
    with open("/proc/self/status") as lines:
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _first_elements(result: Any) -> np.ndarray:
    """The first elements of every array of a result, concatenated."""
    arrays = result if isinstance(result, tuple) else (result,)
    return np.concatenate(
        [np.array(_as_array(each).ravel()[:CHECKED_ELEMENTS], np.float32) for each in arrays]
    )


def _as_array(result: Any) -> Any:
    return np.asarray(result) if isinstance(result, np.ndarray | np.generic) else jnp.from_dlpack(result)


def _seconds_per_call(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
