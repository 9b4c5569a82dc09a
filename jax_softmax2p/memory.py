"""Letting a process keep the memory that it frees, instead of faulting it in again."""

import ctypes
import sys
from typing import Any

from jax_softmax2p.scalars import as_index

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
"""The options of mallopt, from glibc's malloc.h."""

_DEFAULT_MMAP_MAX = 65_536
_DEFAULT_THRESHOLD = 128 << 10
"""Glibc's own thresholds and pad, in bytes."""

_MAX_INT = 2**31 - 1


def keep_memory(max_bytes: int | None = None) -> bool:
    """Lets this process keep the memory that it frees, which makes large JAX programs faster.

    By default glibc, the C library of most Linux systems, returns large blocks to the system when they are
    freed. Each new result of JAX then consists of fresh pages, and the system clears each page when it is
    touched first. That takes longer than to compute ``x + 1``. After this call glibc keeps what is freed, and
    uses it for what is allocated next. Nothing else changes, and results are the same to the bit. This
    package never calls it by itself.

    Call it at the start of the program, before JAX computes anything: a thread that has allocated memory
    before keeps a heap of its own, from which large blocks are returned as before.

    What it costs: a process that needs memory once holds it to its end, and blocks of different sizes leave
    gaps between them, so that it needs about twice as much memory, or three times. All threads allocate from
    one heap, and may wait for one another there. It cannot be undone: glibc has no way back to the
    thresholds that it adapts by itself, nor does it move what has been allocated. ``docs/memory.md`` says
    what it sets.

    Measured on a Zen 4 with 2 cores that were shared, in processes that ran by turns, for float32 of
    (20000, 512), 41 MB: ``x + 1`` took 37 to 61 ms, and 6 to 9 ms in kept memory; softmax 17 to 39 ms, and 10
    to 13 ms. The peak of the process went from 325 to 600–750 MiB, and for softmax from 310 to 460–620 MiB.

    Args:
      max_bytes: blocks of more bytes than this are returned when they are freed, as is what lies free at the
        end of the heap beyond this. Gaps between smaller blocks are kept in any case. At least 128 KiB are
        kept. None: everything is kept.

    Returns:
      Whether memory is kept from now on. False where the C library is not glibc (macOS, Windows, musl) or
      another allocator replaces its malloc (jemalloc, tcmalloc, sanitizers): nothing has changed then. Also
      False where glibc refuses a setting, beside others that it took.

    Raises:
      TypeError: max_bytes is neither an integer nor None.
      ValueError: max_bytes is negative, or exceeds 2^31 - 1, the largest number that glibc takes.

    Example:
      >>> import jax_softmax2p
      >>> jax_softmax2p.keep_memory()  # doctest: +SKIP
      True
    """
    kept = None if max_bytes is None else max(_checked_bytes(max_bytes), _DEFAULT_THRESHOLD)
    libc = _glibc_that_allocates()
    if libc is None:
        return False
    if kept is None:
        # Without mapped blocks all lie in the heap. A threshold of -1 means that it never shrinks.
        options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _DEFAULT_THRESHOLD}
    else:
        # The pad is what remains when the end of the heap is returned.
        options = {_M_MMAP_MAX: _DEFAULT_MMAP_MAX, _M_TRIM_THRESHOLD: kept, _M_TOP_PAD: kept}
        if not libc.mallopt(_M_MMAP_THRESHOLD, kept):
            # Before 2.35 glibc refuses more than 32 MiB.
            options[_M_MMAP_MAX] = 0
    options[_M_ARENA_MAX] = 1
    accepted = [libc.mallopt(option, value) for option, value in options.items()]
    return all(accepted)


def _checked_bytes(max_bytes: int) -> int:
    """max_bytes as an int that mallopt takes, or an error."""
    checked = as_index(max_bytes)
    if checked is None:
        raise TypeError(f"max_bytes must be an integer or None, got {max_bytes!r}")
    if not 0 <= checked <= _MAX_INT:
        raise ValueError(f"max_bytes must be from 0 to {_MAX_INT}, got {checked}")
    return checked


def _glibc_that_allocates() -> Any:
    """Glibc, if this process has it and allocates by its malloc; else None."""
    if not sys.platform.startswith("linux"):
        return None
    process = ctypes.CDLL(None)
    if not hasattr(process, "gnu_get_libc_version"):
        return None
    libc = ctypes.CDLL("libc.so.6")
    address = lambda function: ctypes.cast(function, ctypes.c_void_p).value
    return libc if address(process.malloc) == address(libc.malloc) else None
