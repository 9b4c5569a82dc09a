"""Raw measurements and what follows from them, in memory, as JSON and as text."""

import json
import pathlib
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.traffic import ELEMENTS_MOVED, gigabytes_per_second

DIGITS = 4
"""Of a sample, in JSON."""


class Row(NamedTuple):
    """What was measured in one case: samples of every contender, and the ratios of their medians."""

    case: Case
    samples: dict[str, list[float]]
    ratios: dict[str, float]

    @property
    def medians(self) -> dict[str, float]:
        """By contender."""
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
      name: what pictures know it by, if there is one of it.
      quantity: one of :data:`QUANTITIES`.
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
        """Writes the JSON, and the tables as Markdown beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_compact(json.dumps(_plain(self), indent=1, ensure_ascii=False)), encoding="utf-8")
        file.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

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

    def markdown(self) -> str:
        """The environment and all tables."""
        facts = "\n".join(f"- {key}: {value}" for key, value in self.environment.items())
        return "\n\n".join(["# Measurements", facts, *map(_markdown, self.tables())]) + "\n"


def duration(seconds: float) -> str:
    """A time as text."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


QUANTITIES = {
    "seconds": duration,
    "bytes": lambda value: f"{value / 2**20:.1f} MiB",
    "ULP": lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
}
"""How what was measured is written."""


def cells(row: Row, quantity: str, contenders: Sequence[str], ratios: Sequence[str]) -> list[str]:
    """What stands in a row of a table."""
    values, text = row.medians, QUANTITIES[quantity]
    return [
        *(text(values[name]) if name in values else "" for name in contenders),
        *(f"{row.ratios[name]:.2f}×" if name in row.ratios else "" for name in ratios),
    ]


def sentences(figures: Sequence[Figure]) -> Iterator[str]:
    """One for all figures of one thing."""
    for of in dict.fromkeys(figure.of for figure in figures):
        same = [figure for figure in figures if figure.of == of]
        yield f"{of}: {', '.join(_said(figure) for figure in same)}"


def _said(figure: Figure) -> str:
    value = f"{figure.statistic} {figure.value:.2f}".lstrip()
    if figure.target is None:
        return value
    bound = "at most " if figure.statistic == "greatest" else ""
    return f"{value} (target {bound}{figure.target}{'' if figure.met else ', missed'})"


def _markdown(result: Result) -> str:
    contenders, ratios = (
        list(dict.fromkeys(name for row in result.rows for name in columns(row)))
        for columns in (lambda row: row.samples, lambda row: row.ratios)
    )
    lines = [["case", *contenders, *ratios], ["---"] * (1 + len(contenders) + len(ratios))]
    lines += [[row.case.name, *cells(row, result.quantity, contenders, ratios)] for row in result.rows]
    table = _table(lines)
    said = "\n".join(f"- {sentence}" for sentence in sentences(result.figures))
    parts = [f"## {result.title}", table, said, *_bandwidths(result)]
    return "\n\n".join(part for part in parts if part)


def _bandwidths(result: Result) -> Iterator[str]:
    """The table again, as bandwidths, if it is about what moves known amounts of memory."""
    names = [name for name in result.rows[0].samples if name in ELEMENTS_MOVED]
    if not names:
        return
    yield "In GB/s of what each must move, and 10⁹ elements per second:"
    lines = [["case", *names], ["---"] * (1 + len(names))]
    for row in result.rows:
        pairs = (
            (gigabytes_per_second(name, row.case, row.medians[name]), row.case.elements / row.medians[name])
            for name in names
        )
        lines.append([row.case.name, *(f"{speed:.1f}, {elements / 1e9:.2f}" for speed, elements in pairs)])
    yield _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
