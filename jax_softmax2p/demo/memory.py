"""What keep_memory changes: large results in a process of their own, without it and with it.

Run as a module, this is such a process. It prints one JSON object.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jax_softmax2p
from jax_softmax2p.measure import alternating_medians

SHAPE = (20_000, 512)
ROUNDS = 20

Show = Callable[[str], None]


def measure_keep_memory(show: Show) -> dict[str, Any]:
    """Runs two processes, since what keep_memory does to a process cannot be undone.

    Args:
      show: is called with the lines of the report.

    Returns:
      Whether memory can be kept here, and if so, what :func:`measure_process` measures in either process.
    """
    kept = _run_process("--keep")
    if not kept["keeps"]:
        show("\nkeep_memory() changes nothing here: the process does not allocate by glibc's malloc")
        return {"keeps": False}
    default = _run_process()
    times = ", ".join(
        f"{name} {default['seconds'][name] * 1e3:.1f} → {kept['seconds'][name] * 1e3:.1f} ms"
        for name in kept["seconds"]
    )
    show(f"\nkeep_memory() lets a process keep what it frees (docs/memory.md). For {SHAPE[0]}×{SHAPE[1]}:")
    show(f"  {times}; memory {default['peak_bytes'] / 2**20:.0f} → {kept['peak_bytes'] / 2**20:.0f} MiB")
    return {"keeps": True, "default": default, "kept": kept}


def _run_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, *arguments]
    report: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return report


def measure_process(keep: bool) -> dict[str, Any]:
    """Median seconds of a call of ``x + 1`` and of softmax, in jit, and the peak of this process's memory.

    Args:
      keep: whether to call keep_memory first.
    """
    keeps = keep and jax_softmax2p.keep_memory()
    if keep and not keeps:
        return {"keeps": False}
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal(SHAPE, np.float32))
    functions = {"x + 1": jax.jit(lambda x: x + 1), "softmax": jax.jit(jax_softmax2p.softmax)}
    calls = {name: functools.partial(function, x) for name, function in functions.items()}
    seconds = alternating_medians(calls, rounds=ROUNDS)
    return {"keeps": keeps, "seconds": seconds, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """The most memory that this process has had. Memory is kept on Linux alone, whose file this is.

    ``resource.getrusage`` tells the peak of the process that started this one if that is higher.
    """
    with open("/proc/self/status") as lines:
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    print(json.dumps(measure_process("--keep" in sys.argv[1:])))
