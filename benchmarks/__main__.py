"""``python -m benchmarks``: ours against others and against memory, as ratios within one run."""

import argparse
import json
import pathlib
import sys

from benchmarks.race import Effort, run_table
from benchmarks.sections import SECTIONS
from jax_softmax2p import native
from jax_softmax2p.__main__ import describe_environment

FULL = Effort(rounds=9, seconds=0.2)
QUICK = Effort(rounds=3, seconds=0.06)


def main() -> None:
    """Runs the sections and prints their tables."""
    if reason := native.unavailable_reason():
        sys.exit(f"there are no kernels to measure: {reason}")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "section", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument(
        "--isa",
        action="append",
        choices=native.supported_isas(),
        help="instruction set for the section kernels, may be repeated; all but portable by default",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9, and shorter ones")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if unknown := set(options.section) - SECTIONS.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    isas = options.isa or [isa for isa in native.supported_isas() if isa != "portable"]
    tables = {name: SECTIONS[name](isas) for name in options.section or SECTIONS}
    names = {case.name for section in tables.values() for table in section for case in table.cases}
    if not any(options.only in name for name in names):
        parser.error(f"--only {options.only!r} matches none of: {', '.join(sorted(names))}")

    environment = describe_environment()
    for key, value in environment.items():
        print(f"{key:>16}  {value}")
    effort = QUICK if options.quick else FULL
    results = {
        name: [result for table in section if (result := run_table(table, effort, options.only))]
        for name, section in tables.items()
    }
    if options.json:
        figures = {"environment": environment, "sections": results}
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
