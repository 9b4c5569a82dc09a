"""Backends in processes of their own, of which only one runs at a time.

In one process, the memory that one library frees serves the others, and threads of one go on spinning while
the next has its turn. Here, whoever does not have the turn is stopped by a signal, threads and all.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks import memory
from benchmarks.backends import Backend
from benchmarks.cases import Case, fill
from jax_softmax2p import measure, native

CHECKED = 2**16
"""How many elements of a result are compared."""

KEEPS_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Makes glibc keep what is freed for what comes next, as allocators made for speed do.

Left alone, it gives a result of more than 32 MiB back to the system, and one of a few MiB if it happens to
lie at the heap's end: then the next call is given its pages one by one, and where that happens is chance.
Other systems do not know these variables.
"""

RESERVE = 6, 2**30
"""How much memory a process has for a case before it is timed: so many times its size, and this at least.

Less is soon used up: a small array that lies where a large one was leaves no room for the next large one. No
process takes more than an eighth of the machine's memory beforehand.
"""


class Elsewhere(NamedTuple):
    """A backend out of another installation of this package, in a folder."""

    folder: pathlib.Path
    factory: Callable[[], Backend]


class Worker:
    """A backend in a process of its own, stopped except while it does what it is asked for.

    A context manager: the process ends with it.

    Args:
      factory: makes the backend, in that process.
      keeps_memory: whether results lie in memory that the process has had before, in huge pages where the
        system gives them, see :data:`KEEPS_MEMORY`; else wherever the C library puts them.
    """

    def __init__(self, factory: Callable[[], Backend] | Elsewhere, keeps_memory: bool = True):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        make = factory.factory if isinstance(factory, Elsewhere) else factory
        self._process = context.Process(target=_serve, args=(other, make, keeps_memory), daemon=True)
        with contextlib.ExitStack() as inherited:
            if isinstance(factory, Elsewhere):
                inherited.enter_context(_first_on_path(factory.folder))
            if keeps_memory:
                inherited.enter_context(_in_environment(KEEPS_MEMORY))
            self._process.start()
        other.close()
        self._cpu_seconds = 0.0

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        self._process.terminate()
        self._process.join()

    def introduce(self) -> tuple[str, bool]:
        """The backend's name, and whether it computes what a case says. To be called first, once.

        Raises:
          ImportError: the backend cannot run here.
        """
        answer = self._answer()
        if isinstance(answer, str):
            raise ImportError(answer)
        return answer

    def prepare(self, case: Case) -> "Prepared":
        """Makes it ready for a case."""
        return self._ask(case)

    def seconds_per_call(self, calls: int) -> float:
        """The time of so many calls, by their number."""
        return self._ask(calls)

    def peak_bytes(self) -> int | None:
        """By how much a call makes the process grow while it runs; None where the system does not tell."""
        return self._ask("peak_bytes")

    def ulp_error(self) -> float:
        """The largest error of a softmax, in units of the last place, against float64."""
        return self._ask("ulp_error")

    @property
    def cpu_seconds(self) -> float:
        """Processor time that it has used, all threads together, until its last answer."""
        return self._cpu_seconds

    def _ask(self, question: Case | int | str) -> Any:
        self._signal(signal.SIGCONT)
        with _explained():
            self._connection.send(question)
        return self._answer()

    def _answer(self) -> Any:
        with _explained():
            answer, self._cpu_seconds = self._connection.recv()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


class Prepared(NamedTuple):
    """What a backend says when it is ready for a case.

    Attributes:
      result: the beginning of its result, as float32; None if it computes something else.
      outputs: how many outputs a call fills.
    """

    result: np.ndarray | None
    outputs: int


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says what it means that the other end of a connection is gone."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise RuntimeError(
            "a backend's process ended: its error stands above, or the system killed it for want of memory"
        ) from None


@contextlib.contextmanager
def _first_on_path(folder: pathlib.Path) -> Iterator[None]:
    """A process that starts meanwhile finds modules there first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A process that starts meanwhile has these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    connection: "multiprocessing.connection.Connection[Any, Any]",
    factory: Callable[[], Backend],
    keeps_memory: bool,
) -> None:
    try:
        backend = factory()
    except ImportError as error:
        connection.send((str(error), time.process_time()))
        return
    connection.send(((backend.name, backend.computes), time.process_time()))
    bench = _Bench(backend, keeps_memory)
    while True:
        connection.send((bench.answer(connection.recv()), time.process_time()))


class _Bench:
    """A backend with the case that it works on."""

    def __init__(self, backend: Backend, keeps_memory: bool):
        self._backend, self._keeps_memory = backend, keeps_memory
        self._x = np.empty(0)
        self._call: Callable[[], Any] = lambda: None

    def answer(self, question: Case | int | str) -> Any:
        if isinstance(question, Case):
            return self._prepare(question)
        if isinstance(question, int):
            return _seconds_per_call(self._call, question)
        return {"peak_bytes": self._peak_bytes, "ulp_error": self._ulp_error}[question]()

    def _prepare(self, case: Case) -> Prepared:
        self._call = lambda: None  # It holds the arrays of the case before.
        if self._keeps_memory:
            _reserve(case)
        self._x = memory.aligned_empty(case.shape, case.dtype)
        fill(self._x, case.data)
        outputs = _outputs_beyond_caches(self._x.nbytes) if self._backend.rotates else 1
        stack = (outputs,) if self._backend.rotates else ()
        out = memory.aligned_empty((*stack, *case.shape), case.dtype)
        out[...] = 0
        self._call = self._backend.bind(case, self._x, out)
        result = self._call()
        return Prepared(_beginning(result) if self._backend.computes else None, outputs)

    def _peak_bytes(self) -> int | None:
        if not os.path.exists("/proc/self/clear_refs"):
            return None
        _wait_for_threads()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # What was freed would be used again unnoticed.
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # The peak is counted anew.
        before = _status("VmRSS")
        self._call()
        return max(0, _status("VmHWM") - before)

    def _ulp_error(self) -> float:
        y = np.asarray(_array(self._call()))
        return measure.ulp_error(y, measure.exact_softmax(self._x))


def _reserve(case: Case) -> None:
    """Touches memory and frees it, for what comes next to lie there."""
    times, least = RESERVE
    most = memory.physical_bytes() // 8
    memory.aligned_empty((min(max(times * case.bytes, least), most),), "uint8")[:: mmap.PAGESIZE] = 0


def _outputs_beyond_caches(nbytes: int) -> int:
    """As the authors of the paper have it in XNNPACK's bench/f32-softmax.cc."""
    return 1 + -(-native.cache_bytes()[1] // nbytes)


def _wait_for_threads() -> None:
    """Until the process's memory stays the same: JAX frees that of a result in a thread of its own."""
    last = None
    while last != (now := _status("VmRSS")):
        last = now
        time.sleep(0.05)


def _status(name: str) -> int:
    """A size in bytes that Linux knows of this process."""
    with open("/proc/self/status") as lines:
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _beginning(result: Any) -> np.ndarray:
    """Of every array of a result."""
    arrays = result if isinstance(result, tuple) else (result,)
    return np.concatenate([np.array(_array(each).ravel()[:CHECKED], np.float32) for each in arrays])


def _array(result: Any) -> Any:
    return np.asarray(result) if isinstance(result, np.ndarray | np.generic) else jnp.from_dlpack(result)


def _seconds_per_call(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
