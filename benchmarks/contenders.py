"""What is timed: one class for each implementation. A new peer is one class here."""

import abc
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jax_softmax2p
from benchmarks import memory
from jax_softmax2p import native


def cores() -> int:
    """How many threads this process can run at once, which is how many JAX uses."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Contender(abc.ABC):
    """An implementation under its name in tables. The constructor raises ImportError where it cannot run."""

    name: str
    is_softmax = True
    """Whether the result is a softmax, to be checked; else this is something to compare with."""

    def bind(self, x: np.ndarray, out: np.ndarray, axis: int) -> Callable[[], Any]:
        """What is called and timed.

        Args:
          x: the input, which stays as it is.
          out: where an implementation that can be given its output has to put it.
          axis: the axis whose elements sum to one.

        Returns:
          A function that computes, waits for and returns the result: ``out`` or a new array of the library's
          own.
        """
        return self._bind(x, out, axis)

    @abc.abstractmethod
    def _bind(self, x: np.ndarray, out: np.ndarray, axis: int) -> Callable[[], Any]:
        """What :meth:`bind` does."""


class Ours(Contender):
    """This package's softmax, in jit."""

    name = "ours"

    def _bind(self, x, out, axis):
        return _jitted(functools.partial(jax_softmax2p.softmax, axis=axis), x)


class JaxNN(Contender):
    """JAX's own softmax, in jit."""

    name = "jax.nn"

    def _bind(self, x, out, axis):
        return _jitted(functools.partial(jax.nn.softmax, axis=axis), x)


class AddOne(Contender):
    """jit(x + 1): what a call and its memory cost anyway."""

    name = "x + 1"
    is_softmax = False

    def _bind(self, x, out, axis):
        return _jitted(lambda x: x + 1, x)


class Torch(Contender):
    """torch.softmax with as many threads as JAX, in inference mode."""

    name = "torch"

    def __init__(self):
        self._torch = importlib.import_module("torch")
        self._torch.set_num_threads(cores())

    def _bind(self, x, out, axis):
        tensor = self._torch.from_dlpack(_device_array(x))

        @self._torch.inference_mode()
        def call():
            return self._torch.softmax(tensor, axis)

        return call


class OnnxRuntime(Contender):
    """onnxruntime's Softmax, as a model of one node, into a preallocated output."""

    name = "onnxruntime"

    def __init__(self, threads: int):
        self._runtime = importlib.import_module("onnxruntime")
        self._onnx = importlib.import_module("onnx")
        self._threads = threads

    def _bind(self, x, out, axis):
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = self._runtime.InferenceSession(
            self._model(x.shape, axis), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)

        def call():
            session.run_with_iobinding(binding)
            return out

        return call

    def _model(self, shape: tuple[int, ...], axis: int) -> bytes:
        helper, types = self._onnx.helper, self._onnx.TensorProto
        graph = helper.make_graph(
            [helper.make_node("Softmax", ["x"], ["y"], axis=axis)],
            "softmax",
            [helper.make_tensor_value_info("x", types.FLOAT, shape)],
            [helper.make_tensor_value_info("y", types.FLOAT, shape)],
        )
        # Old versions of the operator and of the format, which every runtime of today reads.
        opset = helper.make_opsetid("", 13)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


class Kernel(Contender):
    """A kernel of ours without JAX, into a preallocated output."""

    def __init__(self, name: str, *, algorithm: str = "auto", isa: str | None = None, threads: int = 1):
        self.name = name
        self._options: dict[str, Any] = {"algorithm": algorithm, "isa": isa, "threads": threads}

    def _bind(self, x, out, axis):
        def call():
            native.softmax_into(x, out, axis=axis, **self._options)
            return out

        return call


class EmptyCall(Contender):
    """A kernel's call from Python for one element, which is nearly all call."""

    name = "a call"
    is_softmax = False

    def __init__(self, isa: str):
        self._isa = isa

    def _bind(self, x, out, axis):
        one = memory.aligned_empty((1, 1), "float32")
        one[:] = 0
        return functools.partial(native.softmax_into, one, one, isa=self._isa)


class ReadAndCopy(Contender):
    """One read and one non-temporal copy of the same arrays, on one thread."""

    name = "read + copy"
    is_softmax = False

    def __init__(self):
        memory.require()

    def _bind(self, x, out, axis):
        def call():
            memory.read(x)
            memory.copy(x, out, 1)

        return call


class Copy(Contender):
    """One non-temporal copy of the same arrays."""

    name = "copy"
    is_softmax = False

    def __init__(self, threads: int):
        memory.require()
        self._threads = threads

    def _bind(self, x, out, axis):
        return functools.partial(memory.copy, x, out, self._threads)


def _device_array(x: np.ndarray) -> jax.Array:
    return jax.device_put(x, may_alias=True)


def _jitted(function: Callable[[jax.Array], jax.Array], x: np.ndarray) -> Callable[[], jax.Array]:
    jitted, operand = jax.jit(function), _device_array(x)
    return lambda: jitted(operand).block_until_ready()
