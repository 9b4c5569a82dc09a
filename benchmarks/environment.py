"""The environment of a run: versions, CPU and caches."""

import importlib.metadata
import pathlib
import re
import subprocess

from benchmarks.scaling import crossovers
from jax_softmax2p import native
from jax_softmax2p.demo.environment import describe_environment

PEERS = ("torch", "onnxruntime", "openvino", "scipy", "numpy", "optax", "flax")

_CACHES = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict[str, str]:
    """The facts of the environment, as text by name."""
    return {
        **describe_environment(),
        "caches": ", ".join(f"{name} {_size(size)}" for name, size in caches().items()),
        "peers": ", ".join(f"{name} {version}" for name in PEERS if (version := _version(name))),
        "commit": commit(),
    }


def caches() -> dict[str, int]:
    """The sizes in bytes of the caches that hold data of one core, by level."""
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction" and (kibibytes := re.fullmatch(r"(\d+)K", size)):
            sizes[f"L{level}"] = int(kibibytes[1]) * 1024
    return sizes or dict(zip(("L2", "last level"), native.cache_bytes(), strict=True))


def auto_crossovers() -> dict[str, list[int]]:
    """The crossovers of one row of n, and of a batch of rows of 1024; see ``results.Results``."""
    return {"n": crossovers(lambda n: (1, n, 1)), "batch": crossovers(lambda batch: (batch, 1024, 1))}


def commit() -> str:
    """The git revision of this checkout, marked as dirty if files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        found = subprocess.run(
            command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"
