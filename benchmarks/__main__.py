"""``python -m benchmarks``: measures, prints tables, draws plots, and keeps the measurements as JSON."""

import argparse
import contextlib
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import compare, environment, plots
from benchmarks.markdown import markdown
from benchmarks.progress import Progress
from benchmarks.results import Results
from benchmarks.runner import Effort, Table, run_table
from benchmarks.sections import SECTIONS
from benchmarks.workers import compiling_once
from jax_softmax2p import native

FULL = Effort(sweeps=3, rounds=5, slow_rounds=1, seconds=0.15)
QUICK = Effort(sweeps=1, rounds=3, slow_rounds=1, seconds=0.03, max_elements=2**23)

TRAINING = "training"
"""The section that runs ``benchmarks.train_lm`` instead of tables."""

RESULTS = pathlib.Path("results/benchmarks.json")


def main() -> None:
    """Measures, or loads an earlier run, and prints, keeps, draws and compares it."""
    parser = make_parser()
    options = parser.parse_args()
    is_json = options.compare is not None and options.compare.endswith(".json")
    revision = None if is_json else options.compare
    if options.plot and revision:
        parser.error("--plot measures nothing: --compare needs a JSON beside it, not a revision")
    if not options.plot and importlib.util.find_spec("optax") is None:
        parser.error("losses are compared with optax's: pip install '.[bench]'")
    with contextlib.ExitStack() as stack:
        try:
            before = Results.load(pathlib.Path(options.compare)) if is_json else None
            stored = Results.load(options.plot) if options.plot else None
            sections = {} if options.plot else choose_tables(options)
            if revision:
                folder = stack.enter_context(compare.installed(revision))
                sections = compare.against_revision(sections, folder, revision)
            make_outputs([] if options.plot else [options.json], options.figures)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        trains = TRAINING in (options.section or [TRAINING]) and not (options.only or revision)
        results = stored or measure(sections, trains, options)
    draw(results, options.figures)
    if before is not None:
        print("\n".join(compare.report(before, results)))


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
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
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one sweep instead of 3, 3 rounds instead of 5, shorter, and no large cases",
    )
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
        help="where to draw the plots (%(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="JSON",
        nargs="?",
        const=RESULTS,
        help="draw the plots of an earlier run from its JSON (%(const)s), instead of measuring",
    )
    parser.add_argument(
        "--compare",
        metavar="REV_OR_JSON",
        help="race this package against itself at a git revision; or say which ratios differ from an earlier "
        "run's, from its JSON",
    )
    return parser


def choose_tables(options: argparse.Namespace) -> dict[str, list[Table]]:
    """The tables to measure, by section.

    Raises:
      ValueError: an option is wrong, or leaves nothing.
    """
    if reason := native.unavailable_reason():
        raise ValueError(f"there are no kernels to measure: {reason}")
    if unknown := set(options.section) - {*SECTIONS, TRAINING}:
        known = ", ".join([*SECTIONS, TRAINING])
        raise ValueError(f"unknown section {', '.join(sorted(unknown))}: there are {known}")
    isas = _isas(options.isa)
    every = {name: SECTIONS[name](isas) for name in options.section or SECTIONS if name in SECTIONS}
    sections = {}
    for name, tables in every.items():
        selected = [table.select(_effort(options), options.only) for table in tables]
        sections[name] = [table for table in selected if table.cases]
    if every and not any(sections.values()):
        names = sorted({case.name for tables in every.values() for table in tables for case in table.cases})
        raise ValueError(f"--only {options.only!r} leaves none of: {', '.join(names)}")
    return sections


def make_outputs(files: Sequence[pathlib.Path], figures: pathlib.Path) -> None:
    """Creates what is written later, so that a wrong path is an error now and not after an hour.

    Raises:
      OSError: a file or the folder cannot be written.
    """
    for folder in (figures, *(file.parent for file in files)):
        folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.open("a").close()


def measure(sections: Mapping[str, Sequence[Table]], trains: bool, options: argparse.Namespace) -> Results:
    """Runs the tables, and the training if ``trains``; prints results and saves them after each section."""
    results = Results(environment.describe(), environment.caches(), environment.auto_crossovers(), {})
    for key, value in results.environment.items():
        print(f"{key:>16}  {value}")
    effort, every = _effort(options), [table for tables in sections.values() for table in tables]
    cases = sum(len(table.cases) * table.sweeps(effort) for table in every)
    with Progress(cases) as progress, compiling_once():
        for name, tables in sections.items():
            results.sections[name] = [run_table(table, effort, progress) for table in tables]
            keep(results, options.json)
    if trains:
        results = results._replace(training=train(options.quick))
        keep(results, options.json)
    print(f"\nThe measurements are in {options.json}, the tables in {options.json.with_suffix('.md')}.")
    return results


def keep(results: Results, file: pathlib.Path) -> None:
    """Writes the measurements, and the tables as Markdown beside them."""
    results.save(file)
    file.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def train(quick: bool) -> dict[str, Any] | None:
    """The section ``training``; None where flax or optax is not installed."""
    try:
        from benchmarks import train_lm
    except ImportError as error:
        print(f"\n{TRAINING} left out: {error}")
        return None
    print("\nTraining a language model")
    return train_lm.run(train_lm.QUICK if quick else train_lm.FULL, steps=10 if quick else 80)


def draw(results: Results, folder: pathlib.Path) -> None:
    """Draws all plots for which there are measurements, and prints the names of their files."""
    try:
        files = plots.draw(results, folder)
    except ImportError as error:
        print(f"No plots: {error}")
        return
    for file in files:
        print(f"  {file}")


def _effort(options: argparse.Namespace) -> Effort:
    return QUICK if options.quick else FULL


def _isas(chosen: Sequence[str] | None) -> list[str]:
    known = native.supported_isas()
    if unknown := set(chosen or ()) - set(known):
        raise ValueError(f"--isa {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    return list(chosen) if chosen else [isa for isa in known if isa != "portable"]


if __name__ == "__main__":
    main()
