"""``python -m benchmarks``: all tables and pictures of this package, from measurements kept as JSON."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import compare, environment, pictures
from benchmarks.progress import Progress
from benchmarks.race import Effort, Table, run_table
from benchmarks.results import Results
from benchmarks.sections import SECTIONS
from jax_softmax2p import native

FULL = Effort(rounds=9, seconds=0.2)
QUICK = Effort(rounds=3, seconds=0.03, elements=2**23)

TRAINING = "training"
"""A section that is no table: ``benchmarks.train_lm``."""

RESULTS = pathlib.Path("results/benchmarks.json")


def main() -> None:
    """Measures, or takes what was measured, and prints, keeps, draws and compares it."""
    parser = make_parser()
    options = parser.parse_args()
    if unknown := set(options.section) - {*SECTIONS, TRAINING}:
        known = ", ".join([*SECTIONS, TRAINING])
        parser.error(f"unknown section {', '.join(sorted(unknown))}: there are {known}")
    # A file of that name, or a revision.
    before, revision = None, options.compare
    try:
        if options.compare and options.compare.endswith(".json"):
            before, revision = Results.load(pathlib.Path(options.compare)), None
        if options.plot:
            if revision:
                parser.error("--plot measures nothing: --compare needs a JSON with it, not a revision")
            results = Results.load(options.plot)
        elif revision:
            with compare.installed(revision) as folder:
                results = measure(options, lambda table: compare.against(table, folder, revision))
        else:
            results = measure(options, lambda table: table)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not options.plot:
        results.save(options.json)
        print(f"\nThe measurements are in {options.json}, the tables in {options.json.with_suffix('.md')}.")
    draw(results, options.figures)
    if before is not None:
        print("\n".join(compare.report(before, results)))


def make_parser() -> argparse.ArgumentParser:
    """What may stand on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "section",
        nargs="*",
        metavar="SECTION",
        help=f"any of {', '.join(SECTIONS)}, {TRAINING}; all by default",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument(
        "--isa",
        action="append",
        help="instruction set for sections kernels and paper, may be repeated; all but portable by default",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9, shorter, no large cases")
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        default=RESULTS,
        help="where to keep the measurements, and the tables beside them as Markdown (%(default)s)",
    )
    parser.add_argument(
        "--figures",
        type=pathlib.Path,
        metavar="FOLDER",
        default=RESULTS.parent / "figures",
        help="where to draw the pictures (%(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="JSON",
        nargs="?",
        const=RESULTS,
        help="draw the pictures of an earlier run from its JSON (%(const)s), instead of measuring",
    )
    parser.add_argument(
        "--compare",
        metavar="REV_OR_JSON",
        help="race this package against itself at a git revision; or say which ratios differ from an earlier "
        "run's, from its JSON",
    )
    return parser


def measure(options: argparse.Namespace, adapt: Callable[[Table], Table | None]) -> Results:
    """Runs the chosen sections, each table as ``adapt`` makes it, and prints them.

    Raises:
      ValueError: there is nothing to measure, or an option is wrong.
    """
    if reason := native.unavailable_reason():
        sys.exit(f"there are no kernels to measure: {reason}")
    effort = QUICK if options.quick else FULL
    chosen = options.section or [*SECTIONS, TRAINING]
    every = {name: SECTIONS[name](_isas(options.isa)) for name in chosen if name in SECTIONS}
    sections = {
        name: [adapted.within(effort, options.only) for table in tables if (adapted := adapt(table))]
        for name, tables in every.items()
    }
    sections = {name: tables for name in sections if (tables := [t for t in sections[name] if t.cases])}
    if options.section != [TRAINING] and not sections:
        names = sorted({case.name for tables in every.values() for table in tables for case in table.cases})
        raise ValueError(f"--only {options.only!r} leaves none of: {', '.join(names)}")
    facts = environment.describe()
    for key, value in facts.items():
        print(f"{key:>16}  {value}")
    with Progress(sum(len(table.cases) for tables in sections.values() for table in tables)) as progress:
        measured = {
            name: [run_table(table, effort, progress) for table in tables]
            for name, tables in sections.items()
        }
    training = (
        train(options.quick) if TRAINING in chosen and not options.only and not options.compare else None
    )
    return Results(facts, environment.caches(), environment.auto_crossovers(), measured, training)


def train(quick: bool) -> dict[str, Any] | None:
    """The section ``training``; None where flax or optax is not installed."""
    try:
        from benchmarks import train_lm
    except ImportError as error:
        print(f"\n{TRAINING} left out: {error}")
        return None
    print("\nTraining a language model")
    return train_lm.run(train_lm.QUICK if quick else train_lm.Size(), steps=10 if quick else 100)


def draw(results: Results, folder: pathlib.Path) -> None:
    """All pictures for which there are measurements."""
    try:
        files = pictures.draw(results, folder)
    except ImportError as error:
        print(f"No pictures: {error}")
        return
    for file in files:
        print(f"  {file}")


def _isas(chosen: Sequence[str] | None) -> list[str]:
    known = native.supported_isas()
    if unknown := set(chosen or ()) - set(known):
        raise ValueError(f"--isa {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    return list(chosen) if chosen else [isa for isa in known if isa != "portable"]


if __name__ == "__main__":
    main()
