"""Raw measurements and what follows from them, in memory and as JSON."""

import json
import pathlib
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.cases import Case

DIGITS = 4
"""Of a sample, in JSON."""


class Row(NamedTuple):
    """What was measured in one case: samples of every backend, and the ratios of their medians."""

    case: Case
    samples: dict[str, list[float]]
    ratios: dict[str, float]

    @property
    def medians(self) -> dict[str, float]:
        """By backend."""
        return {name: statistics.median(samples) for name, samples in self.samples.items()}


class Figure(NamedTuple):
    """A number that sums a table up, and its target, if it has one."""

    of: str
    statistic: str
    value: float
    target: float | None = None
    met: bool | None = None


class Result(NamedTuple):
    """A table as measured.

    Attributes:
      title: its heading.
      name: what plots know it by, if there is one of it.
      quantity: one of ``formatting.QUANTITIES``.
      isa: whose kernels it is about, if not about several.
      rows: a case each.
      figures: what sums it up.
      cores_used_by_others: meanwhile, on average; None where the system does not tell.
    """

    title: str
    name: str
    quantity: str
    isa: str
    rows: list[Row]
    figures: list[Figure]
    cores_used_by_others: float | None


class Results(NamedTuple):
    """All of a run.

    Attributes:
      environment: what it ran on, as text by name.
      caches: their sizes in bytes, by name.
      crossovers: from how many elements on ``auto`` computes differently: for one row, and for rows of 1024.
      sections: tables, by section.
      training: figures of ``benchmarks.train_lm``, if it ran.
    """

    environment: dict[str, str]
    caches: dict[str, int]
    crossovers: dict[str, list[int]]
    sections: dict[str, list[Result]]
    training: dict[str, Any] | None = None

    def save(self, file: pathlib.Path) -> None:
        """Writes them as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_compact(json.dumps(_plain(self), indent=1, ensure_ascii=False)), encoding="utf-8")

    @classmethod
    def load(cls, file: pathlib.Path) -> "Results":
        """What :meth:`save` has written.

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
        """All of them, or those of a name, if something was measured."""
        for section in self.sections.values():
            yield from (result for result in section if result.rows and name in (None, result.name))


def _plain(value: Any) -> Any:
    """As JSON has it: named tuples as objects, samples with as many digits as they are worth."""
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
    """Lists of numbers on one line each."""
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
