"""What is timed: one class for each implementation. A new peer is one class here."""

import abc
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.operations import GRADIENTS, OPERATIONS
from jax_softmax2p import native


def cores() -> int:
    """How many threads this process can run at once, which is how many JAX uses."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Contender(abc.ABC):
    """An implementation under its name in tables. The constructor raises ImportError where it cannot run."""

    name: str
    computes = True
    """Whether the result is the case's, to be checked; else this is something to compare with."""

    def bind(self, case: Case, x: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
        """What is called and timed.

        Args:
          case: what to compute, along which axis.
          x: the input, which stays as it is.
          out: where an implementation that can be given its output has to put it.

        Returns:
          A function that computes, waits for and returns the result: ``out``, or new arrays of the library's
          own.
        """
        return self._bind(case, x, out)

    @abc.abstractmethod
    def _bind(self, case: Case, x: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
        """What :meth:`bind` does."""


class Ours(Contender):
    """This package's function, in jit."""

    name = "ours"

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        return _jitted(operation.ours(case.axis), x, *operation.operands(case))


class OursPlain(Contender):
    """This package's softmax of x alone, in jit."""

    name = "plain"
    computes = False

    def _bind(self, case, x, out):
        return _jitted(OPERATIONS["softmax"].ours(case.axis), x)


class JaxNN(Contender):
    """JAX's own function, or optax's, in jit."""

    name = "jax.nn"

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        return _jitted(operation.jax_nn(case.axis), x, *operation.operands(case))


class AddOne(Contender):
    """jit(x + 1): what a call and its memory cost anyway."""

    name = "x + 1"
    computes = False

    def _bind(self, case, x, out):
        return _jitted(lambda x: x + 1, x)


class Torch(Contender):
    """torch with as many threads as JAX, in inference mode unless the operation has a gradient."""

    name = "torch"

    def __init__(self):
        self._torch = importlib.import_module("torch")
        self._torch.set_num_threads(cores())

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        tensors = [self._torch.from_dlpack(_device_array(v)) for v in (x, *operation.operands(case))]
        function = operation.torch(case.axis)
        differentiates = case.operation in GRADIENTS

        def call():
            with self._torch.inference_mode(not differentiates):
                return function(*tensors)

        return call


class OnnxRuntime(Contender):
    """onnxruntime's Softmax, as a model of one node, into a preallocated output."""

    name = "onnxruntime"

    def __init__(self, threads: int):
        self._runtime = importlib.import_module("onnxruntime")
        self._onnx = importlib.import_module("onnx")
        self._threads = threads

    def _bind(self, case, x, out):
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = self._runtime.InferenceSession(
            self._model(x.shape, case.axis), options, providers=["CPUExecutionProvider"]
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

    def _bind(self, case, x, out):
        def call():
            native.softmax_into(x, out, axis=case.axis, **self._options)
            return out

        return call


class EmptyCall(Contender):
    """A kernel's call from Python for one element, which is nearly all call."""

    name = "a call"
    computes = False

    def __init__(self, isa: str):
        self._isa = isa

    def _bind(self, case, x, out):
        one = memory.aligned_empty((1, 1), "float32")
        one[:] = 0
        return functools.partial(native.softmax_into, one, one, isa=self._isa)


class ReadAndCopy(Contender):
    """One read and one non-temporal copy of the same arrays, on one thread."""

    name = "read + copy"
    computes = False

    def __init__(self):
        memory.require()

    def _bind(self, case, x, out):
        def call():
            memory.read(x, 1)
            memory.copy(x, out, 1)

        return call


class Read(Contender):
    """One read of the array."""

    name = "read"
    computes = False

    def __init__(self, threads: int):
        memory.require()
        self._threads = threads

    def _bind(self, case, x, out):
        bits = x.view(np.float32)
        return functools.partial(memory.read, bits, self._threads)


class Copy(Contender):
    """One non-temporal copy of the same arrays."""

    name = "copy"
    computes = False

    def __init__(self, threads: int):
        memory.require()
        self._threads = threads

    def _bind(self, case, x, out):
        return functools.partial(memory.copy, x, out, self._threads)


def _device_array(x: np.ndarray) -> jax.Array:
    return jax.device_put(x, may_alias=True)


def _jitted(function: Callable[..., Any], *operands: np.ndarray) -> Callable[[], Any]:
    jitted, arrays = jax.jit(function), [_device_array(operand) for operand in operands]
    return lambda: jax.block_until_ready(jitted(*arrays))
