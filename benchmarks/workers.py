"""Contenders in processes of their own, of which only one runs at a time.

In one process, the memory that one library frees serves the others, and threads of one go on spinning while
the next has its turn. Here, whoever does not have the turn is stopped by a signal, threads and all.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.contenders import Contender

CHECKED = 2**16
"""How many elements of a result are compared."""


class Worker:
    """A contender in a process of its own, stopped except while it does what it is asked for.

    A context manager: the process ends with it.
    """

    def __init__(self, factory: Callable[[], Contender]):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, factory), daemon=True)
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

    def prepare(self, case: Case) -> np.ndarray:
        """Makes it ready for a case; returns the beginning of its result, as float32."""
        return self._ask(case)

    def seconds_per_call(self, calls: int) -> float:
        """The time of so many calls, by their number."""
        return self._ask(calls)

    @property
    def cpu_seconds(self) -> float:
        """Processor time that it has used, all threads together, until its last answer."""
        return self._cpu_seconds

    def _ask(self, question: Case | int) -> Any:
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


def fill(x: np.ndarray) -> None:
    """With standard normal numbers, always the same."""
    rng = np.random.default_rng(0)
    if x.dtype == np.float32:
        rng.standard_normal(dtype=np.float32, out=x)
    else:
        x[:] = rng.standard_normal(x.shape, np.float32)


def _serve(
    connection: "multiprocessing.connection.Connection[Any, Any]", factory: Callable[[], Contender]
) -> None:
    try:
        contender = factory()
    except ImportError as error:
        connection.send((str(error), time.process_time()))
        return
    connection.send(((contender.name, contender.computes), time.process_time()))
    call: Callable[[], Any] = lambda: None
    while True:
        question = connection.recv()
        if isinstance(question, Case):
            x = memory.aligned_empty(question.shape, question.dtype)
            fill(x)
            out = memory.aligned_empty(question.shape, question.dtype)
            out[...] = 0
            call = contender.bind(question, x, out)
            result = call()
            answer: Any = _beginning(result) if contender.computes else None
            del result
        else:
            answer = _seconds_per_call(call, question)
        connection.send((answer, time.process_time()))


def _beginning(result: Any) -> np.ndarray:
    """Of every array of a result."""
    arrays = result if isinstance(result, tuple) else (result,)
    return np.concatenate(
        [np.array(jnp.from_dlpack(array).ravel()[:CHECKED], np.float32) for array in arrays]
    )


def _seconds_per_call(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
