"""Measurements and the figures derived from them, in memory and as JSON."""

import json
import pathlib
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.cases import Case

DIGITS = 4
"""Significant digits of a sample in JSON."""


class Row(NamedTuple):
    """The measurements of one case: samples of every backend, and the ratios of their medians."""

    case: Case
    samples: dict[str, list[float]]
    ratios: dict[str, float]

    @property
    def medians(self) -> dict[str, float]:
        """The median of the samples, by backend."""
        return {name: statistics.median(samples) for name, samples in self.samples.items()}


class Figure(NamedTuple):
    """A number that sums up a table, and its target, if it has one."""

    of: str
    statistic: str
    value: float
    target: float | None = None
    met: bool | None = None


class Result(NamedTuple):
    """A measured table.

    Attributes:
      title: the heading.
      name: the name by which plots find the table, if there is a plot of it.
      quantity: one of ``formatting.QUANTITIES``.
      isa: the instruction set whose kernels were measured, if it was a single one.
      rows: one for each case.
      figures: numbers that sum up the rows.
      cores_used_by_others: the average during the measurement; None where the system does not tell.
    """

    title: str
    name: str
    quantity: str
    isa: str
    rows: list[Row]
    figures: list[Figure]
    cores_used_by_others: float | None


class Results(NamedTuple):
    """All measurements of a run.

    Attributes:
      environment: versions and hardware, as text by name.
      caches: the sizes of the caches in bytes, by name.
      crossovers: the numbers of elements from which on ``auto`` computes differently: "n" for one row,
        "batch" for rows of 1024.
      sections: tables, by section.
      training: figures of ``benchmarks.train_lm``, if it ran.
    """

    environment: dict[str, str]
    caches: dict[str, int]
    crossovers: dict[str, list[int]]
    sections: dict[str, list[Result]]
    training: dict[str, Any] | None = None

    def save(self, file: pathlib.Path) -> None:
        """Writes the JSON file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_compact(json.dumps(_plain(self), indent=1, ensure_ascii=False)), encoding="utf-8")

    @classmethod
    def load(cls, file: pathlib.Path) -> "Results":
        """Reads a file that :meth:`save` has written.

        Raises:
          ValueError: the file holds something else.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            sections = {
                name: [_result(each) for each in section] for name, section in data["sections"].items()
            }
            return cls(**{**data, "sections": sections})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} does not hold results of benchmarks: {error!r}") from error

    def tables(self, name: str | None = None) -> Iterator[Result]:
        """Yields all tables, or those of a name, in which something was measured."""
        for section in self.sections.values():
            yield from (result for result in section if result.rows and name in (None, result.name))


def _plain(value: Any) -> Any:
    """Converts named tuples to dicts, and rounds samples to :data:`DIGITS`."""
    if isinstance(value, Row):
        samples = {
            name: [float(f"{sample:.{DIGITS}g}") for sample in samples]
            for name, samples in value.samples.items()
        }
        return _plain(value._replace(samples=samples)._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _compact(text: str) -> str:
    """Puts each list of numbers on one line."""
    numbers = r"\[\s+([-+\d.,e\s]+?)\s+\]"
    return re.sub(numbers, lambda match: f"[{' '.join(match[1].split())}]", text)


def _result(data: dict[str, Any]) -> Result:
    return Result(
        **{
            **data,
            "rows": [Row(**{**row, "case": _case(row["case"])}) for row in data["rows"]],
            "figures": [Figure(**figure) for figure in data["figures"]],
        }
    )


def _case(data: dict[str, Any]) -> Case:
    return Case(**{**data, "shape": tuple(data["shape"])})
