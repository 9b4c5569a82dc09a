"""Compares two runs, or races two revisions of this package against each other."""

import contextlib
import functools
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.backends import Ours
from benchmarks.results import Results
from benchmarks.runner import Goal, Ratio, Summary, Table
from benchmarks.workers import InstalledBackend

TOLERANCE = 0.15
"""Two runs agree on a ratio if it differs by no more than this fraction."""

_ROOT = pathlib.Path(__file__).parent.parent


class Difference(NamedTuple):
    """A ratio in an earlier run and in this one."""

    table: str
    case: str
    ratio: str
    before: float
    now: float

    @property
    def change(self) -> float:
        """The relative difference, in either direction."""
        return max(self.before / self.now, self.now / self.before) - 1


def differences(before: Results, now: Results) -> list[Difference]:
    """The differences of all ratios that both runs have."""
    known = {
        (result.title, row.case, name): ratio
        for result in before.tables()
        for row in result.rows
        for name, ratio in row.ratios.items()
    }
    return [
        Difference(result.title, row.case.name, name, known[key], ratio)
        for result in now.tables()
        for row in result.rows
        for name, ratio in row.ratios.items()
        if (key := (result.title, row.case, name)) in known and known[key] > 0 and ratio > 0
    ]


def report(before: Results, now: Results) -> Iterator[str]:
    """Yields lines that say how the environments differ, and which ratios by more than :data:`TOLERANCE`."""
    for key in sorted(before.environment.keys() | now.environment.keys()):
        values = [results.environment.get(key, "nothing") for results in (before, now)]
        if values[0] != values[1]:
            yield f"{key}: {values[0]} before, {values[1]} now"
    both = differences(before, now)
    beyond = sorted((one for one in both if one.change > TOLERANCE), key=lambda one: -one.change)
    yield f"{len(beyond)} of {len(both)} ratios differ by more than {TOLERANCE:.0%}"
    for one in beyond:
        yield f"  {one.before:.2f} → {one.now:.2f}  {one.ratio}, {one.case}  [{one.table}]"


@contextlib.contextmanager
def installed(revision: str) -> Iterator[pathlib.Path]:
    """Installs the package of a git revision into a temporary folder, which it yields.

    Raises:
      ValueError: there is no such revision, or it cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive, sources, site = (str(pathlib.Path(folder, name)) for name in ("tar", "sources", "site"))
        _run("git", "-C", str(_ROOT), "archive", "--format=tar", "--output", archive, revision)
        shutil.unpack_archive(archive, sources, "tar")
        _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, sources)
        yield pathlib.Path(site)


def against_revision(
    sections: Mapping[str, Sequence[Table]], folder: pathlib.Path, revision: str
) -> dict[str, list[Table]]:
    """The tables that time this package, with two backends: the package as it is, and that of the folder."""
    installed_backend = InstalledBackend(folder, functools.partial(Ours, revision))
    ratio = Ratio(f"{revision} / ours", (revision,), "ours")
    goals = (Goal("geometric mean", 1.0), Goal("minimum", 1.0))
    return {
        name: [
            Table(
                f"{table.title}: ours and {revision}",
                table.cases,
                (Ours, installed_backend),
                (ratio,),
                (Summary(ratio, goals),),
            )
            for table in tables
            if Ours in table.backends and table.quantity == "seconds"
        ]
        for name, tables in sections.items()
    }


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
