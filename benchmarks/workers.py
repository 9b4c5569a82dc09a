"""Backends in processes of their own, of which only one runs at a time.

In one process, the memory that one library frees would serve the others, and the threads of one would go on
spinning while the next is timed. So every backend has a process, and a signal stops it, with all its threads,
except while it answers a request.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks import worker_process
from benchmarks.backends import Backend
from benchmarks.cases import Case
from benchmarks.worker_process import Prepared

KEEPS_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Environment variables that make glibc keep freed memory for later results, as allocators made for speed do.

By default, glibc returns a result of more than 32 MiB to the system, and a smaller one if it happens to lie
at the end of the heap: then the next call receives its pages one by one, and whether that happens is chance.
Other systems ignore these variables.
"""


COMPILATION_CACHE_OPTIONS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Environment variables with which JAX's compilation cache keeps every program."""


class InstalledBackend(NamedTuple):
    """A backend of another installation of this package, which lies in a folder."""

    folder: pathlib.Path
    factory: Callable[[], Backend]


class Worker:
    """A backend in a process of its own, which is stopped except while it answers a request.

    A context manager: the process ends with it.

    Args:
      factory: makes the backend, inside the process.
      keeps_memory: whether results lie in memory that the process already has, in huge pages where the system
        gives them (see :data:`KEEPS_MEMORY`); otherwise the C library decides.
    """

    def __init__(self, factory: Callable[[], Backend] | InstalledBackend, keeps_memory: bool = True):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        make = factory.factory if isinstance(factory, InstalledBackend) else factory
        self._process = context.Process(
            target=worker_process.serve, args=(other, make, keeps_memory), daemon=True
        )
        with contextlib.ExitStack() as inherited:
            if isinstance(factory, InstalledBackend):
                inherited.enter_context(_first_on_path(factory.folder))
            if keeps_memory:
                inherited.enter_context(_environment(KEEPS_MEMORY))
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
        """Returns the backend's name, and whether it computes the case. Must be called first, and once.

        Raises:
          ImportError: the backend cannot run here.
        """
        answer = self._receive()
        if isinstance(answer, str):
            raise ImportError(answer)
        return answer

    def prepare(self, case: Case) -> Prepared:
        """Makes the backend ready for a case, and calls it once."""
        return self._request(case)

    def seconds_per_call(self, calls: int) -> float:
        """Returns the mean time of that many calls."""
        return self._request(calls)

    def peak_bytes(self) -> int | None:
        """Returns by how much the process grows during a call; None where the system does not tell."""
        return self._request("peak_bytes")

    def temporary_bytes(self) -> int | None:
        """Returns the temporary memory of the compiled call; None where that is unknown."""
        return self._request("temporary_bytes")

    def ulp_error(self) -> float:
        """Returns the largest error of a softmax against float64, in units of the last place."""
        return self._request("ulp_error")

    @property
    def cpu_seconds(self) -> float:
        """The processor time of all threads of the process, up to its last answer."""
        return self._cpu_seconds

    def _request(self, request: Case | int | str) -> Any:
        self._signal(signal.SIGCONT)
        with _explained():
            self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        with _explained():
            answer, self._cpu_seconds = self._connection.recv()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """Workers that start inside share the programs that they compile.

    Every sweep has new processes, and half of their time went into compiling what an earlier sweep had. The
    programs are the same machine code, whether they were compiled or loaded.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        _environment({"JAX_COMPILATION_CACHE_DIR": folder, **COMPILATION_CACHE_OPTIONS}),
    ):
        yield


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns the loss of a connection into an error that says what it means."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise RuntimeError(
            "a backend's process ended: its error stands above, or the system killed it for want of memory"
        ) from None


@contextlib.contextmanager
def _first_on_path(folder: pathlib.Path) -> Iterator[None]:
    """Processes that start inside look for modules in this folder first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that start inside have these environment variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
