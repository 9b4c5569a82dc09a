"""Formats measurements as text."""

from collections.abc import Iterator, Sequence

from benchmarks.results import Figure, Row


def duration(seconds: float) -> str:
    """Formats a time in µs or ms."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def size(value: float) -> str:
    """Formats a number of bytes in KiB or MiB."""
    return f"{value / 2**10:.1f} KiB" if value < 2**20 else f"{value / 2**20:,.1f} MiB"


QUANTITIES = {
    "seconds": duration,
    "bytes": lambda value: f"{value / 2**20:.1f} MiB",
    "temporaries": size,
    "ULP": lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
}
"""Functions that format a measurement, by quantity."""


def cells(row: Row, quantity: str, backends: Sequence[str], ratios: Sequence[str]) -> list[str]:
    """The cells of a row: medians, then ratios. Those that were not measured are empty."""
    values, text = row.medians, QUANTITIES[quantity]
    return [
        *(text(values[name]) if name in values else "" for name in backends),
        *(f"{row.ratios[name]:.2f}×" if name in row.ratios else "" for name in ratios),
    ]


def sentences(figures: Sequence[Figure]) -> Iterator[str]:
    """One sentence for all figures with the same subject."""
    for of in dict.fromkeys(figure.of for figure in figures):
        same = [figure for figure in figures if figure.of == of]
        yield f"{of}: {', '.join(_figure_text(figure) for figure in same)}"


def _figure_text(figure: Figure) -> str:
    value = f"{figure.statistic} {figure.value:.2f}".lstrip()
    if figure.target is None:
        return value
    bound = "at most " if figure.statistic == "maximum" else ""
    return f"{value} (target {bound}{figure.target}{'' if figure.met else ', missed'})"
