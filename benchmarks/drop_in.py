"""The tables of the sections ``small`` and ``programs``, where this package must not be slower than JAX."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.backends import Backend, JaxNN, Ours, TracedProgram
from benchmarks.cases import Case
from benchmarks.programs import PROGRAMS
from benchmarks.ratios import (
    JAX_OVER_OUR_LOSSES,
    JAX_OVER_OURS,
    JAX_OVER_PATCHED,
    OUR_LOSSES_MEMORY,
    OURS_OVER_JITTED,
    PATCHED_GROWTH,
    PATCHED_MEMORY,
)
from benchmarks.runner import Goal, Ratio, Summary, Table
from benchmarks.small import AXIS_0, CASES, EAGER_SOFTMAX

NOT_SLOWER = Goal("minimum", 0.95)

TITLES = {
    "tiny": "arrays that are tiny",
    "loops": "calls in scans and loops",
    "other axes": "axes that are not the last",
    "short rows": "many short rows",
    "log-space products": "products of a vector and a matrix in log space",
}

LARGE = 2**22
"""The number of elements from which on the growth of the process in a call is measured as well: XLA's plan
leaves out what its fusions allocate while they run."""


def small(isas: Sequence[str]) -> list[Table]:
    """Short calls, eager and in jit, and work on short rows and along other axes."""
    return [_eager(), *(_in_jit(name) for name in TITLES)]


def programs(isas: Sequence[str]) -> list[Table]:
    """Whole programs as they are written and patched, and what memory they need."""
    every = _program_cases(lambda case: True)
    with_losses = _program_cases(lambda case: PROGRAMS[case.operation].has_our_losses)
    patched = (partial(TracedProgram, "jax.nn"), partial(TracedProgram, "patched"))
    our_losses = (partial(TracedProgram, "jax.nn"), partial(TracedProgram, "our losses"))
    return [
        Table(
            "Programs, in jit: jax.nn and optax, and the same inside patch_jax_nn()",
            every,
            patched,
            (JAX_OVER_PATCHED,),
            (
                Summary(JAX_OVER_PATCHED, (NOT_SLOWER, Goal("geometric mean", 1.15))),
                *(_program_goal(*goal) for goal in _PROGRAM_GOALS),
            ),
        ),
        Table(
            "Programs, in jit: optax's losses and ours",
            with_losses,
            our_losses,
            (JAX_OVER_OUR_LOSSES,),
            (Summary(JAX_OVER_OUR_LOSSES, (NOT_SLOWER,)),),
        ),
        _memory("temporaries", "Temporaries of programs, as XLA plans them", every, patched, PATCHED_MEMORY),
        _memory("temporaries", "The same with our losses", with_losses, our_losses, OUR_LOSSES_MEMORY),
        _memory(
            "bytes",
            "Growth of the process in a call of a large program, results included",
            tuple(case for case in every if case.elements >= LARGE),
            patched,
            PATCHED_GROWTH,
        ),
    ]


_PROGRAM_GOALS = (
    ("HMM forward", None, 1.0),
    ("gradient of HMM forward", None, 1.0),
    ("Sinkhorn", (2048, 2048), 1.5),
    ("contrastive", None, 1.2),
)
"""The name of a program, its shape where the goal is for a single one, and the goal."""


def _program_goal(name: str, shape: tuple[int, ...] | None, target: float) -> Summary:
    includes = lambda case: case.operation == name and shape in (None, case.shape)
    note = f", {name}" + (f" {shape}" if shape else "")
    return Summary(JAX_OVER_PATCHED, (Goal("minimum", target),), note, includes)


def _program_cases(includes: Callable[[Case], bool]) -> tuple[Case, ...]:
    cases = (Case(shape, operation=name) for name, program in PROGRAMS.items() for shape in program.shapes)
    return tuple(filter(includes, cases))


def _memory(
    quantity: str,
    title: str,
    cases: tuple[Case, ...],
    backends: tuple[Callable[[], Backend], ...],
    ratio: Ratio,
) -> Table:
    summary = Summary(ratio, (Goal("maximum", 1.3),), f", {quantity}")
    return Table(title, cases, backends, (ratio,), (summary,), quantity)


def _eager() -> Table:
    of_softmax = lambda case: case == EAGER_SOFTMAX
    return Table(
        "Eager calls, and ours in jit",
        CASES["eager"],
        (partial(Ours, jits=False), partial(JaxNN, jits=False), partial(Ours, "ours in jit")),
        (JAX_OVER_OURS, OURS_OVER_JITTED),
        (
            Summary(JAX_OVER_OURS, (NOT_SLOWER,)),
            Summary(OURS_OVER_JITTED, (Goal("maximum", 1.3),), f", {EAGER_SOFTMAX.name}", of_softmax),
        ),
    )


def _in_jit(name: str) -> Table:
    summaries = [Summary(JAX_OVER_OURS, (NOT_SLOWER,), f", {name}")]
    if name == "other axes":
        cases = [AXIS_0._replace(operation=operation) for operation in ("log_softmax", "logsumexp")]
        note = f", log_softmax and logsumexp of {AXIS_0.name}"
        summaries.append(Summary(JAX_OVER_OURS, (Goal("minimum", 1.5),), note, cases.__contains__))
    return Table(f"In jit: {TITLES[name]}", CASES[name], (Ours, JaxNN), (JAX_OVER_OURS,), tuple(summaries))
