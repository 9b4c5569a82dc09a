"""Contenders in processes of their own, of which only one runs at a time.

In one process, the memory that one library frees serves the others, and threads of one go on spinning while
the next has its turn. Here, whoever does not have the turn is stopped by a signal, threads and all.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks import memory
from benchmarks.cases import Case, fill
from benchmarks.contenders import Contender
from jax_softmax2p import measure, native

CHECKED = 2**16
"""How many elements of a result are compared."""


class Elsewhere(NamedTuple):
    """A contender out of another installation of this package, in a folder."""

    folder: pathlib.Path
    factory: Callable[[], Contender]


class Worker:
    """A contender in a process of its own, stopped except while it does what it is asked for.

    A context manager: the process ends with it.
    """

    def __init__(self, factory: Callable[[], Contender] | Elsewhere):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        make = factory.factory if isinstance(factory, Elsewhere) else factory
        self._process = context.Process(target=_serve, args=(other, make), daemon=True)
        with _first_on_path(factory.folder) if isinstance(factory, Elsewhere) else contextlib.nullcontext():
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
        """The contender's name, and whether it computes what a case says. To be called first, once.

        Raises:
          ImportError: the contender cannot run here.
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
        self._connection.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, self._cpu_seconds = self._connection.recv()
        except EOFError:
            raise RuntimeError("a contender's process ended; its error stands above") from None
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


class Prepared(NamedTuple):
    """What a contender says when it is ready for a case.

    Attributes:
      result: the beginning of its result, as float32; None if it computes something else.
      outputs: how many outputs a call fills.
    """

    result: np.ndarray | None
    outputs: int


@contextlib.contextmanager
def _first_on_path(folder: pathlib.Path) -> Iterator[None]:
    """A process that starts meanwhile finds modules there first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _serve(
    connection: "multiprocessing.connection.Connection[Any, Any]", factory: Callable[[], Contender]
) -> None:
    try:
        contender = factory()
    except ImportError as error:
        connection.send((str(error), time.process_time()))
        return
    connection.send(((contender.name, contender.computes), time.process_time()))
    bench = _Bench(contender)
    while True:
        connection.send((bench.answer(connection.recv()), time.process_time()))


class _Bench:
    """A contender with the case that it works on."""

    def __init__(self, contender: Contender):
        self._contender = contender
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
        self._x = memory.aligned_empty(case.shape, case.dtype)
        fill(self._x, case.data)
        outputs = _outputs_beyond_caches(self._x.nbytes) if self._contender.rotates else 1
        stack = (outputs,) if self._contender.rotates else ()
        out = memory.aligned_empty((*stack, *case.shape), case.dtype)
        out[...] = 0
        self._call = self._contender.bind(case, self._x, out)
        result = self._call()
        return Prepared(_beginning(result) if self._contender.computes else None, outputs)

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
