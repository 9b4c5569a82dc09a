"""The compiled kernels: whether they can run here, which, and how to call them on NumPy arrays.

Importing this module loads the library and registers its FFI targets with XLA, so that programs
serialised by ``jax.export`` find them; unless jaxlib is older than the headers that the library was built
with, as the registration, which waits for XLA's start, would keep JAX from starting on the CPU at all.
Whether the runtime then accepts the targets is found out on first use, by a tiny call.
"""

import functools
import math
import pathlib
import re
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

SOFTMAX_TARGET = "jax_softmax2p_softmax_v1"
LOG_SOFTMAX_TARGET = "jax_softmax2p_log_softmax_v1"
LOG_SOFTMAX_VJP_TARGET = "jax_softmax2p_log_softmax_vjp_v1"
LOG_SUM_TARGET = "jax_softmax2p_log_sum_v1"
LOG_SUM_JVP_TARGET = "jax_softmax2p_log_sum_jvp_v1"
LOG_SUM_VJP_TARGET = "jax_softmax2p_log_sum_vjp_v1"
SOFTMAX_JACOBIAN_TARGET = "jax_softmax2p_softmax_jacobian_v1"

TARGETS = (
    SOFTMAX_TARGET,
    LOG_SOFTMAX_TARGET,
    LOG_SOFTMAX_VJP_TARGET,
    LOG_SUM_TARGET,
    LOG_SUM_JVP_TARGET,
    LOG_SUM_VJP_TARGET,
    SOFTMAX_JACOBIAN_TARGET,
)
"""The names of the FFI targets."""

ALGORITHMS = ("auto", "two_pass", "two_pass_reload", "three_pass_recompute", "three_pass_reload")
"""The names that ``algorithm`` may have."""

PASSES = ("max", "sum_exp", "exp_store", "scale", "extended_sum", "extended_write")
"""The passes of which the algorithms consist, for :func:`pass_into`."""

_DTYPE_NAMES = {np.dtype(d): np.dtype(d).name for d in (np.float32, np.float64, jnp.bfloat16, np.float16)}

DTYPES = tuple(_DTYPE_NAMES)
"""The dtypes that have native kernels."""


def _load() -> tuple[types.ModuleType | None, str]:
    """The library, if there is one, and why XLA cannot have it, if it cannot."""
    try:
        from jax_softmax2p import _native
    except ImportError as error:
        return None, f"the compiled library cannot be loaded: {error}"
    built, runtime = _native.FFI_API_VERSION, _runtime_ffi_api_version()
    if runtime is not None and runtime < built:
        versions = " and ".join(".".join(map(str, version)) for version in (built, runtime))
        return _native, f"it was built with a newer jaxlib than this one (FFI API versions {versions})"
    try:
        for target, capsule in _native.registrations().items():
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except Exception as error:  # XLA's, where it has started.
        return _native, f"its registration failed: {error}"
    return _native, ""


def _runtime_ffi_api_version() -> tuple[int, int] | None:
    """The (major, minor) XLA FFI API version of this jaxlib; None if it came without its headers."""
    try:
        header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    except OSError:
        return None
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return (int(numbers["MAJOR"]), int(numbers["MINOR"])) if len(numbers) == 2 else None


_library, _refusal = _load()
_probe_lock = threading.Lock()


def _library_or_raise() -> types.ModuleType:
    if _library is None:
        raise ImportError(f"jax_softmax2p: {_refusal}")
    return _library


@functools.cache
def _isas() -> tuple[str, ...]:
    return tuple(_library_or_raise().supported_isas())


def supported_isas() -> list[str]:
    """Instruction sets of this build that this CPU and operating system can execute, best first.

    Raises:
      ImportError: the compiled library cannot be loaded.

    Example:
      >>> "portable" in supported_isas()
      True
    """
    return list(_isas())


def active_isa() -> str:
    """The instruction set whose kernels run inside JAX programs.

    It is the first of :func:`supported_isas`, or the one that the environment variable
    ``JAX_SOFTMAX2P_ISA`` named when it was first asked for; it stays the same from then on.

    Raises:
      ImportError: the compiled library cannot be loaded.
      ValueError: ``JAX_SOFTMAX2P_ISA`` names an instruction set that is unknown or not supported
        here.
    """
    return str(_library_or_raise().active_isa())


def ffi_api_version() -> tuple[int, int]:
    """The (major, minor) XLA FFI API version that the library was built with.

    Raises:
      ImportError: the compiled library cannot be loaded.
    """
    major, minor = _library_or_raise().FFI_API_VERSION
    return major, minor


def softmax_into(
    x: np.ndarray,
    out: np.ndarray,
    *,
    axis: int = -1,
    algorithm: str = "auto",
    isa: str | None = None,
    threads: int = 1,
) -> None:
    """Runs a softmax kernel over an axis of a NumPy array. For tests and measurement.

    Args:
      x: C-contiguous array of one of :data:`DTYPES`.
      out: writable array like ``x``, for the result; may be ``x`` itself. Or several of them, stacked along a
        new first axis: the kernel runs once for each, without Python in between.
      axis: the axis of ``x`` whose elements sum to one.
      algorithm: one of :data:`ALGORITHMS`.
      isa: one of :func:`supported_isas`; None is :func:`active_isa`.
      threads: how many threads share the work, the caller's included; no more than 64 do.

    Raises:
      ImportError: the compiled library cannot be loaded.
      TypeError: ``x`` or ``out`` is not such an array.
      ValueError: shapes differ, or an argument is not one of those listed.

    Example:
      >>> x = np.zeros((2, 4), np.float32)
      >>> softmax_into(x, x)
      >>> x[0].tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
    library = _library_or_raise()
    copies = _checked_copies(x, out)
    check_algorithm(algorithm)
    library.softmax_into(
        _as_integers(x),
        _as_integers(out),
        _DTYPE_NAMES[x.dtype],
        copies,
        *_layout(x, axis),
        algorithm,
        _checked_isa(isa),
        _checked_threads(threads),
    )


def pass_into(
    name: str,
    x: np.ndarray,
    out: np.ndarray,
    *,
    maximum: float,
    isa: str | None = None,
    threads: int = 1,
) -> float | None:
    """Runs one pass of an algorithm alone, over a row. For measurement.

    Args:
      name: one of :data:`PASSES`. ``"max"``, ``"sum_exp"`` and ``"extended_write"`` make up
        ``three_pass_recompute``; ``"max"``, ``"exp_store"`` and ``"scale"`` ``three_pass_reload``;
        ``"extended_sum"`` and ``"extended_write"`` ``two_pass``; ``two_pass_reload`` has a pass like
        ``"exp_store"`` that finds the maximum itself.
      x: C-contiguous float32 array of one dimension.
      out: as in :func:`softmax_into`. ``"extended_write"`` writes e^x·2^-k there, with k the largest integer
        not above maximum·log2 e; ``"scale"`` does so from what ``"exp_store"`` has left there.
      maximum: of ``x``.
      isa: as in :func:`softmax_into`.
      threads: as in :func:`softmax_into`.

    Returns:
      The maximum or the sum of e^x, if the pass finds one.

    Raises:
      ImportError, TypeError, ValueError: as :func:`softmax_into`.

    Example:
      >>> x = np.zeros(4, np.float32)
      >>> pass_into("extended_sum", x, np.empty_like(x), maximum=0.0)
      4.0
    """
    library = _library_or_raise()
    copies = _checked_copies(x, out)
    if name not in PASSES:
        raise ValueError(f"name must be one of {', '.join(PASSES)}; got {name!r}")
    if x.dtype != np.float32 or x.ndim != 1:
        raise TypeError(f"x must be float32 of one dimension, got {x.dtype} of {x.ndim}")
    found = library.measurement.pass_into(
        name, x, out, copies, x.size, maximum, _checked_isa(isa), _checked_threads(threads)
    )
    return None if found is None else float(found)


def softmax_plan(
    shape: tuple[int, int, int],
    *,
    dtype: np.dtype | type = np.float32,
    algorithm: str = "auto",
    isa: str | None = None,
) -> dict[str, bool]:
    """How an algorithm computes an array. For tests and measurement.

    Args:
      shape: the sizes of what lies outside, along and inside of the axis.
      dtype: one of :data:`DTYPES`.
      algorithm: one of :data:`ALGORITHMS`.
      isa: as in :func:`softmax_into`.

    Returns:
      Whether the maximum comes first (``"maximum_first"``), whether the exponentials of pass 1 are kept
      (``"reload"``), and whether the result is written past the caches (``"stream"``).

    Raises:
      ImportError: the compiled library cannot be loaded.
      TypeError, ValueError: an argument is not one of those listed.

    Example:
      >>> softmax_plan((1, 1000, 1), algorithm="two_pass")
      {'maximum_first': False, 'reload': False, 'stream': False}
    """
    library = _library_or_raise()
    check_algorithm(algorithm)
    if (dtype := np.dtype(dtype)) not in _DTYPE_NAMES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype}")
    return dict(library.measurement.softmax_plan(_DTYPE_NAMES[dtype], *shape, algorithm, _checked_isa(isa)))


def cache_bytes() -> tuple[int, int]:
    """The sizes of the second-level and of the last cache that the kernels go by.

    Raises:
      ImportError: the compiled library cannot be loaded.
    """
    second, last = _library_or_raise().measurement.cache_bytes()
    return second, last


def softmax_jacobian_into(
    y: np.ndarray,
    t: np.ndarray,
    out: np.ndarray,
    *,
    axis: int = -1,
    isa: str | None = None,
    threads: int = 1,
) -> None:
    """Runs the kernel of J(y, t) = y·(t - <y, t>) over an axis of NumPy arrays.

    Args:
      y: C-contiguous array of one of :data:`DTYPES`, a softmax along the axis.
      t: array like ``y``, a tangent or cotangent.
      out: writable array like ``y``, for the result; may be ``y`` or ``t`` itself.
      axis: as in :func:`softmax_into`.
      isa: as in :func:`softmax_into`.
      threads: as in :func:`softmax_into`.

    Raises:
      ImportError, TypeError, ValueError: as :func:`softmax_into`.
    """
    library = _library_or_raise()
    _check_arrays(y=y, t=t, out=out)
    arrays = (_as_integers(y), _as_integers(t), _as_integers(out))
    library.softmax_jacobian_into(
        *arrays, _DTYPE_NAMES[y.dtype], *_layout(y, axis), _checked_isa(isa), _checked_threads(threads)
    )


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What ``jax.export.export(..., disabled_checks=...)`` needs to let our custom calls through.

    The program that loads the export must import ``jax_softmax2p`` to register them.

    Example:
      >>> import jax, jax.export
      >>> import jax_softmax2p
      >>> checks = jax_softmax2p.export_disabled_checks()
      >>> f = jax.jit(jax_softmax2p.softmax)
      >>> exported = jax.export.export(f, disabled_checks=checks)(jax.ShapeDtypeStruct((4,), "f4"))
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]


def check_algorithm(algorithm: str) -> None:
    """Raises ValueError unless ``algorithm`` is one of :data:`ALGORITHMS`."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")


def reason_against(dtype: np.dtype) -> str | None:
    """Why arrays of ``dtype`` cannot run natively on this machine's CPU; None where they can.

    Raises:
      ValueError: as :func:`active_isa`.
    """
    if dtype not in DTYPES:
        return f"there is no native kernel for dtype {dtype}"
    return unavailable_reason()


def unavailable_reason() -> str | None:
    """Why the native kernels cannot run on this machine's CPU; None where they can.

    Warns once if they cannot.

    Raises:
      ValueError: as :func:`active_isa`.
    """
    if _library is not None:
        active_isa()
    with _probe_lock:
        return _probe()


@functools.cache
def _probe() -> str | None:
    reason = _refusal
    if not reason:
        # In a thread of its own no trace, mesh or thread-local setting of the caller's reaches the call.
        # Warnings of JAX's are none of ours, even where they are errors.
        with warnings.catch_warnings(), ThreadPoolExecutor(1) as thread:
            warnings.simplefilter("ignore")
            reason = thread.submit(_try_tiny_call).result()
    if reason:
        warnings.warn(
            f"jax_softmax2p runs its jax.numpy reference, not its native kernels: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason or None


def _try_tiny_call() -> str:
    """Runs a kernel through XLA. Returns what went wrong, or nothing."""
    x = np.log(np.array([1.0, 3.0], np.float32))
    try:
        call = jax.ffi.ffi_call(SOFTMAX_TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
        with (
            jax.default_device(jax.local_devices(backend="cpu")[0]),
            jax.disable_jit(False),
            jax.transfer_guard("allow"),
        ):
            none = {"operands": np.int64(0), "before": np.int64(-1), "after": np.int64(-1)}
            attributes = {"axis": np.int64(-1), "algorithm": "auto", **none}
            y = np.asarray(jax.jit(functools.partial(call, **attributes))(x))
    except Exception as error:  # Whatever XLA raises is a reason; it has no narrower class of its own.
        return f"a trial call failed: {error}"
    if not np.allclose(y, [0.25, 0.75]):
        return f"a trial call gave {y} for softmax(log([1, 3]))"
    return ""


def _layout(x: np.ndarray, axis: int) -> tuple[int, int, int]:
    """The sizes of what lies outside, along and inside of an axis."""
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be an integer from {-x.ndim} to {x.ndim - 1}, got {axis!r}")
    return math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis:][1:])


def _as_integers(array: np.ndarray) -> np.ndarray:
    """Of 16-bit elements: the buffer protocol has no name for bfloat16."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _check_arrays(**arrays: np.ndarray) -> None:
    shape, dtype = None, None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
        if array.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}; got {array.dtype}")
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise ValueError(f"{name} must be C-contiguous and aligned to its elements")
        if array.ndim == 0:
            raise ValueError(f"{name} must have one dimension at least, got a scalar")
        shape, dtype = shape or array.shape, dtype or array.dtype
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} must have shape {shape} and dtype {dtype} as the others, "
                f"got {array.shape} and {array.dtype}"
            )
    out = arrays["out"]
    for name, array in arrays.items():
        if array is out or not np.may_share_memory(array, out):
            continue
        if array.ctypes.data != out.ctypes.data:
            raise ValueError(f"out must be {name} itself or share no memory with it, got a partial overlap")
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")


def _checked_copies(x: np.ndarray, out: np.ndarray) -> int:
    """How many arrays like ``x`` there are in ``out``."""
    arrays = isinstance(x, np.ndarray) and isinstance(out, np.ndarray)
    if not arrays or out.ndim != x.ndim + 1 or len(out) == 0:
        _check_arrays(x=x, out=out)
        return 1
    _check_arrays(x=x, out=out[0])
    if not out.flags.c_contiguous or np.may_share_memory(x, out):
        raise ValueError("out must be C-contiguous and share no memory with x, where it is a stack of arrays")
    return len(out)


def _checked_isa(isa: str | None) -> str:
    if isa is None:
        return active_isa()
    if isa not in _isas():
        raise ValueError(f"isa must be one of {', '.join(supported_isas())}; got {isa!r}")
    return isa


def _checked_threads(threads: int) -> int:
    if not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be an integer from 1 to 1024, got {threads!r}")
    return threads
