"""The compiled library: loading it, registering its FFI targets, and finding out whether they run here.

Importing this module loads the library and registers its FFI targets with XLA, so that programs
serialised by ``jax.export`` find them. Registration is skipped when jaxlib is older than the headers that the
library was built with; it would stop JAX's CPU client from starting. Whether the runtime then accepts the
targets is found out on first use, by a tiny call.
"""

import functools
import os
import pathlib
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable

import jax
import jax.export
import numpy as np

from jax_softmax2p.native.names import DTYPES, SOFTMAX_TARGET, TARGETS


def _load() -> tuple[types.ModuleType | None, str]:
    """The library, or None; and why XLA cannot use it, or nothing."""
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


_library, _load_failure = _load()
_probe_lock = threading.Lock()


def require() -> types.ModuleType:
    """The library.

    Raises:
      ImportError: it cannot be loaded.
    """
    if _library is None:
        raise ImportError(f"jax_softmax2p: {_load_failure}")
    return _library


@functools.cache
def _isas() -> tuple[str, ...]:
    return tuple(require().supported_isas())


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
    return str(require().active_isa())


def ffi_api_version() -> tuple[int, int]:
    """The (major, minor) XLA FFI API version that the library was built with.

    Raises:
      ImportError: the compiled library cannot be loaded.
    """
    major, minor = require().FFI_API_VERSION
    return major, minor


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What ``jax.export.export(..., disabled_checks=...)`` needs to export native kernels.

    Exported programs take the reference, which needs nothing of this, unless implementation="native" is asked
    for. The program that loads such an export must import ``jax_softmax2p``, which registers the kernels.

    Example:
      >>> import jax, jax.export
      >>> import jax_softmax2p
      >>> checks = jax_softmax2p.export_disabled_checks()
      >>> f = jax.jit(lambda x: jax_softmax2p.softmax(x, implementation="native"))
      >>> exported = jax.export.export(f, disabled_checks=checks)(jax.ShapeDtypeStruct((4,), "f4"))
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]


def unsupported_reason(dtype: np.dtype) -> str | None:
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
    reason = _load_failure
    if not reason:
        # Warnings of JAX's are none of ours, even where they are errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = _in_other_thread(_try_tiny_call)
    if reason:
        warnings.warn(
            f"jax_softmax2p runs its jax.numpy reference, not its native kernels: {reason}",
            RuntimeWarning,
            stacklevel=_stacklevel_of_caller(),
        )
    return reason or None


def _stacklevel_of_caller() -> int:
    """The stacklevel with which a warning concerns the first frame outside of this package and of JAX."""
    packages = (
        str(pathlib.Path(__file__).parents[1]) + os.sep,
        str(pathlib.Path(jax.__file__).parent) + os.sep,
    )
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(packages):
        frame, level = frame.f_back, level + 1
    return level


def _in_other_thread(function: Callable[[], str]) -> str:
    """The result of a function that no trace, mesh or thread-local setting of the caller's reaches.

    Where Python starts no thread, as when it shuts down, it runs in the caller's. It must not raise.
    """
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    try:
        thread.start()
    except RuntimeError:
        return function()
    thread.join()
    return results[0]


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
            no_operands = {"operands": np.int64(0), "before": np.int64(-1), "after": np.int64(-1)}
            attributes = {"axis": np.int64(-1), "algorithm": "auto", **no_operands}
            y = np.asarray(jax.jit(functools.partial(call, **attributes))(x))
    except Exception as error:  # Whatever XLA raises is a reason; it has no narrower class of its own.
        return f"a trial call failed: {error}"
    if not np.allclose(y, [0.25, 0.75]):
        return f"a trial call gave {y} for softmax(log([1, 3]))"
    return ""
