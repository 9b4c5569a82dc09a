"""The implementations that are timed, one class for each. A new peer is one class here.

Worker processes import this module, with an older revision of jax_softmax2p under ``--compare REVISION``: at
its top it uses public names of that package only.
"""

import abc
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import memory, operations, small
from benchmarks.cases import Case
from benchmarks.operations import GRADIENTS
from benchmarks.programs import PROGRAMS, TRACINGS, compiled, temporary_bytes
from jax_softmax2p import native

OPERATIONS = {**operations.OPERATIONS, **small.OPERATIONS}
"""Operations of all tables, by the name that a case gives."""


def cores() -> int:
    """The number of cores that this process may use, which is the number of threads of JAX."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Backend(abc.ABC):
    """An implementation. The constructor raises ImportError where it cannot run."""

    name: str
    """The heading of its column."""
    computes = True
    """Whether the result is that of the case, and checked; otherwise it is a baseline that computes something
    else."""
    rotates = False
    """Whether a call fills several outputs in turn that together exceed the last cache, so that each is out
    of the caches when it is written."""

    def bind(self, case: Case, x: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
        """Makes the function that is timed.

        Args:
          case: the operation and its axis.
          x: the input, which is not modified.
          out: the output of an implementation that accepts one; a stack of outputs if ``rotates``.

        Returns:
          A function that computes, waits for and returns the result: ``out``, or new arrays of the library.
        """
        return self._bind(case, x, out)

    @abc.abstractmethod
    def _bind(self, case: Case, x: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
        """Implements :meth:`bind`."""

    def temporary_bytes(self) -> int | None:
        """The temporary memory of what was bound last; None where that is unknown."""
        return None


class Ours(Backend):
    """This package's function, in jit or eagerly."""

    def __init__(self, name: str = "ours", *, jits: bool = True):
        self.name = name
        self._jits = jits

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        return _on_device(operation.ours(case.axis), x, *operation.operands(case), jits=self._jits)


class OursPlain(Backend):
    """This package's softmax of x alone, in jit."""

    name = "plain"
    computes = False

    def _bind(self, case, x, out):
        return _on_device(OPERATIONS["softmax"].ours(case.axis), x)


class JaxNN(Backend):
    """JAX's own function, or optax's, in jit or eagerly."""

    name = "jax.nn"

    def __init__(self, *, jits: bool = True):
        self._jits = jits

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        return _on_device(operation.jax_nn(case.axis), x, *operation.operands(case), jits=self._jits)


class TracedProgram(Backend):
    """A program of ``benchmarks.programs``, in jit, traced as one of its ``TRACINGS`` says.

    The program makes its own arguments from the case's shape.
    """

    def __init__(self, tracing: str):
        importlib.import_module("optax")
        self.name = tracing
        self._program: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def _bind(self, case, x, out):
        self._program = function, arguments = PROGRAMS[case.operation].instantiate(case.shape, case.dtype)
        jitted = jax.jit(function)
        with TRACINGS[self.name]():
            jitted(*arguments)  # Later calls take what this one has traced.
        return lambda: jax.block_until_ready(jitted(*arguments))

    def temporary_bytes(self):
        """See :meth:`Backend.temporary_bytes`."""
        if self._program is None:
            return None
        return temporary_bytes(compiled(*self._program, self.name))


class AddOne(Backend):
    """jit(x + 1), the cost of any call and its memory."""

    name = "x + 1"
    computes = False

    def _bind(self, case, x, out):
        return _on_device(lambda x: x + 1, x)


class Torch(Backend):
    """torch with as many threads as JAX, in inference mode unless the operation has a gradient."""

    name = "torch"

    def __init__(self):
        self._torch = importlib.import_module("torch")
        self._torch.set_num_threads(cores())

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        tensors = [self._torch.from_dlpack(_device_array(v)) for v in (x, *operation.operands(case))]
        assert operation.torch is not None
        function = operation.torch(case.axis)
        differentiates = case.operation in GRADIENTS

        def call():
            with self._torch.inference_mode(not differentiates):
                return function(*tensors)

        return call


class SciPy(Backend):
    """scipy.special, which computes on one thread."""

    name = "scipy"

    def __init__(self):
        importlib.import_module("scipy.special")

    def _bind(self, case, x, out):
        operation = OPERATIONS[case.operation]
        assert operation.scipy is not None
        return functools.partial(operation.scipy(case.axis), x, *operation.operands(case))


class OnnxRuntime(Backend):
    """onnxruntime, into a preallocated output."""

    name = "onnxruntime"

    def __init__(self, threads: int):
        self._runtime = importlib.import_module("onnxruntime")
        importlib.import_module("onnx")
        self._threads = threads

    def _bind(self, case, x, out):
        arrays = _onnx_inputs(case, x)
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = self._runtime.InferenceSession(
            _onnx_model(case, arrays), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        y = _like(session.run(None, arrays)[0], out)
        binding.bind_output("y", "cpu", 0, y.dtype.type, y.shape, y.ctypes.data)

        return _keeping_alive(arrays, lambda: session.run_with_iobinding(binding), y)


class OpenVino(Backend):
    """openvino with the same model as onnxruntime, in float32, into a preallocated output."""

    name = "openvino"

    def __init__(self, threads: int):
        self._openvino = importlib.import_module("openvino")
        importlib.import_module("onnx")
        self._threads = threads

    def _bind(self, case, x, out):
        arrays = _onnx_inputs(case, x)
        core = self._openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = core.read_model(_onnx_model(case, arrays), b"")
        request = core.compile_model(model, "CPU", options).create_infer_request()
        for name, array in arrays.items():
            request.set_tensor(name, self._openvino.Tensor(array, shared_memory=True))
        request.infer()
        y = _like(request.get_output_tensor().data, out)
        request.set_output_tensor(self._openvino.Tensor(y, shared_memory=True))

        return _keeping_alive(arrays, request.infer, y)


class Kernel(Backend):
    """A kernel of this package without JAX, into a preallocated output."""

    def __init__(
        self,
        name: str,
        *,
        algorithm: str = "auto",
        isa: str | None = None,
        threads: int = 1,
        rotates: bool = False,
    ):
        self.name = name
        self.rotates = rotates
        self._options: dict[str, Any] = {"algorithm": algorithm, "isa": isa, "threads": threads}

    def _bind(self, case, x, out):
        def call():
            native.softmax_into(x, out, axis=case.axis, **self._options)
            return out

        return call


class EmptyCall(Backend):
    """A kernel called for a single element: the overhead of a call."""

    name = "a call"
    computes = False

    def __init__(self, isa: str):
        self._isa = isa

    def _bind(self, case, x, out):
        one = memory.aligned_empty((1, 1), "float32")
        one[:] = 0
        return functools.partial(native.softmax_into, one, one, isa=self._isa)


class Pass(Backend):
    """A pass of the algorithms by itself, on one thread."""

    computes = False
    rotates = True

    def __init__(self, name: str, isa: str):
        self.name = name
        self._isa = isa

    def _bind(self, case, x, out):
        row, rows = x.reshape(-1), out.reshape(len(out), -1)
        run = functools.partial(native.pass_into, x=row, out=rows, maximum=float(x.max()), isa=self._isa)
        run("exp_store")  # The pass "scale" reads its output.
        return functools.partial(run, self.name)


class ReadAndCopy(Backend):
    """One read and one non-temporal copy of the same arrays, on one thread."""

    name = "read + copy"
    computes = False

    def __init__(self):
        memory.require()

    def _bind(self, case, x, out):
        def call():
            memory.run("read", x, out, 1)
            memory.run("non-temporal copy", x, out, 1)

        return call


class MultiplyAdds(Backend):
    """As many multiply-adds as the products of the operation, as fast as the machine can."""

    name = "multiply-adds"
    computes = False

    def __init__(self, threads: int):
        memory.require()
        self._threads = threads

    def _bind(self, case, x, out):
        count = OPERATIONS[case.operation].multiply_adds
        assert count is not None
        return functools.partial(memory.multiply_add, count(case), self._threads)


class MemoryLoop(Backend):
    """One of ``memory.LOOPS`` over the same arrays."""

    computes = False

    def __init__(self, loop: str, *, label: str | None = None, threads: int = 1, rotates: bool = False):
        memory.require()
        self.name = label or loop
        self.rotates = rotates
        self._loop = loop
        self._threads = threads

    def _bind(self, case, x, out):
        return functools.partial(
            memory.run, self._loop, x.view(np.float32), out.view(np.float32), self._threads
        )


def _onnx_inputs(case: Case, x: np.ndarray) -> dict[str, np.ndarray]:
    operands = OPERATIONS[case.operation].operands(case)
    return {"x": x, **{f"operand {i}": operand for i, operand in enumerate(operands)}}


def _onnx_model(case: Case, arrays: dict[str, np.ndarray]) -> bytes:
    helper = importlib.import_module("onnx").helper
    make_nodes = OPERATIONS[case.operation].onnx
    assert make_nodes is not None
    value = lambda name, dtype, shape: helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )
    graph = helper.make_graph(
        make_nodes(helper.make_node, case),
        "graph",
        [value(name, array.dtype, array.shape) for name, array in arrays.items()],
        [value("y", case.dtype, None)],
    )
    # Old versions of the operators and of the format, which every current runtime reads.
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def _keeping_alive(arrays: Any, run: Callable[[], Any], y: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that runs and returns y. It holds the arrays, whose addresses alone the library has."""

    def call(_=arrays):
        run()
        return y

    return call


def _like(result: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``out`` if it has the result's shape, otherwise a new array that has."""
    return out if result.shape == out.shape else np.empty_like(result)


def _device_array(x: np.ndarray) -> jax.Array:
    return jax.device_put(x, may_alias=True)


def _on_device(function: Callable[..., Any], *operands: np.ndarray, jits: bool = True) -> Callable[[], Any]:
    """A call of the function, in jit or eagerly, with operands on the device."""
    called = jax.jit(function) if jits else function
    arrays = [_device_array(operand) for operand in operands]
    return lambda: jax.block_until_ready(called(*arrays))
