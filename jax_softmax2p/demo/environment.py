"""What runs here: versions, machine, instruction set."""

import os
import platform

import jax

import jax_softmax2p
from jax_softmax2p import measure, native


def describe_environment() -> dict[str, str]:
    """What runs here, by name."""
    reason = native.unavailable_reason()
    facts = {
        "jax_softmax2p": jax_softmax2p.__version__,
        "jax / jaxlib": f"{jax.__version__} / {jax.lib.__version__}",
        "Python": platform.python_version(),
        "CPU": measure.cpu_name(),
        "threads": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "JAX platform": jax.default_backend(),
    }
    if reason is None:
        facts["runs"] = "native kernels"
        facts["instruction set"] = f"{native.active_isa()} (supported: {', '.join(native.supported_isas())})"
        facts["FFI API"] = ".".join(map(str, native.ffi_api_version()))
    else:
        facts["runs"] = f"the jax.numpy reference: {reason}"
    return facts


def format_environment(facts: dict[str, str]) -> str:
    """The facts as text, one a line."""
    return "\n".join(f"{name:>16}  {fact}" for name, fact in facts.items())
