"""Measurements as text."""

from collections.abc import Iterator, Sequence

from benchmarks.results import Figure, Row


def duration(seconds: float) -> str:
    """A time as text."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


QUANTITIES = {
    "seconds": duration,
    "bytes": lambda value: f"{value / 2**20:.1f} MiB",
    "ULP": lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
}
"""How what was measured is written."""


def cells(row: Row, quantity: str, backends: Sequence[str], ratios: Sequence[str]) -> list[str]:
    """What stands in a row of a table."""
    values, text = row.medians, QUANTITIES[quantity]
    return [
        *(text(values[name]) if name in values else "" for name in backends),
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
    bound = "at most " if figure.statistic == "maximum" else ""
    return f"{value} (target {bound}{figure.target}{'' if figure.met else ', missed'})"
