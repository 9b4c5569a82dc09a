"""Writes a run as Markdown: its environment, which of the paper's claims hold, and every table."""

from collections.abc import Iterator, Sequence

from benchmarks.claims import claims
from benchmarks.formatting import cells, sentences
from benchmarks.memory_traffic import ELEMENTS_MOVED, gigabytes_per_second
from benchmarks.results import Result, Results


def markdown(results: Results) -> str:
    """The whole document."""
    facts = "\n".join(f"- {key}: {value}" for key, value in results.environment.items())
    lines = [[claim.text, claim.measured, "yes" if claim.holds else "no"] for claim in claims(results)]
    verdicts = "## What the paper claims\n\n" + _table([["claim", "here", "holds"], *lines]) if lines else ""
    parts = ["# Measurements", facts, verdicts, *map(_section, results.tables())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(result: Result) -> str:
    backends, ratios = (
        list(dict.fromkeys(name for row in result.rows for name in columns(row)))
        for columns in (lambda row: row.samples, lambda row: row.ratios)
    )
    lines = [["case", *backends, *ratios]]
    lines += [[row.case.name, *cells(row, result.quantity, backends, ratios)] for row in result.rows]
    table = _table(lines)
    figures = "\n".join(f"- {sentence}" for sentence in sentences(result.figures))
    parts = [f"## {result.title}", table, figures, *_bandwidths(result)]
    return "\n\n".join(part for part in parts if part)


def _bandwidths(result: Result) -> Iterator[str]:
    """Yields the table as bandwidths, if its backends move known amounts of memory."""
    names = [name for name in result.rows[0].samples if name in ELEMENTS_MOVED]
    if not names:
        return
    yield "In GB/s of what each must move, and 10⁹ elements per second:"
    lines = [["case", *names]]
    for row in result.rows:
        pairs = (
            (gigabytes_per_second(name, row.case, row.medians[name]), row.case.elements / row.medians[name])
            for name in names
        )
        lines.append([row.case.name, *(f"{speed:.1f}, {elements / 1e9:.2f}" for speed, elements in pairs)])
    yield _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, whose first line is the heading."""
    heading, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([heading, f"|{'---|' * len(lines[0])}", *rows])
