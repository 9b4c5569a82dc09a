"""Whole workloads in a few lines each, as users of jax.nn and optax write them."""

from benchmarks.programs import compositions, losses, networks, sequences, transport
from benchmarks.programs.program import TRACINGS as TRACINGS
from benchmarks.programs.program import Program as Program
from benchmarks.programs.program import compiled as compiled
from benchmarks.programs.program import temporary_bytes as temporary_bytes

PROGRAMS: dict[str, Program] = {
    **sequences.PROGRAMS,
    **transport.PROGRAMS,
    **losses.PROGRAMS,
    **compositions.PROGRAMS,
    **networks.PROGRAMS,
}
"""By the name that a case gives."""
