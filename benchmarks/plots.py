"""Plots of a run: one idea each, in colours that everybody can tell apart."""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.memory_traffic import LOOP_TRAFFIC, gigabytes_per_second
from benchmarks.results import Result, Results, Row

# Okabe and Ito's palette.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

# Colour, line and marker differ, so that a reader needs only one of them.
STYLES = {
    "ours": (BLUE, "-", "o"),
    "jax.nn": (RED, "--", "s"),
    "torch": (ORANGE, "-.", "^"),
    "onnxruntime": (GREEN, ":", "D"),
    "openvino": (PINK, "--", "v"),
    "scipy": (BLACK, ":", "x"),
    "auto": (BLACK, ":", "x"),
    "two_pass": (BLUE, "-", "o"),
    "two_pass_reload": (SKY, "--", "v"),
    "three_pass_recompute": (RED, "-.", "s"),
    "three_pass_reload": (ORANGE, ":", "^"),
}

WIDTH = 8.0
DPI = 110
RC_PARAMS: Any = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
}


def draw(results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws all plots for which the run has measurements; returns their files.

    Raises:
      ImportError: matplotlib is not installed.
    """
    return [file for name, make in PLOTS.items() if make(results, file := folder / f"{name}.png")]


def draw_training(training: Mapping[str, Mapping[str, Any]], file: pathlib.Path) -> None:
    """Draws the losses of ``benchmarks.train_lm`` and the differences between them.

    Raises:
      ImportError: matplotlib is not installed.
    """
    with _figure(file, 5.2, rows=2, sharex=True, height_ratios=(3, 1)) as (figure, (above, below)):
        styles = ({"color": RED, "linewidth": 3, "alpha": 0.5}, {"color": BLUE, "linewidth": 1})
        for (name, figures), style in zip(training.items(), styles, strict=True):
            tokens = f"{figures['tokens_per_second']:,.0f} tokens per second"
            above.plot(figures["losses"], label=f"{name}: {tokens}", **style)
        above.set_ylabel("loss (nats per byte)")
        above.legend()
        first, second = (np.array(figures["losses"]) for figures in training.values())
        gaps = np.abs(first - second)
        below.semilogy(np.where(gaps > 0, gaps, np.nan), ".", color=BLACK)  # A logarithmic axis has no 0.
        below.set_ylabel("difference")
        below.set_xlabel("training step")
        figure.suptitle("A language model trained with jax.nn and with ours: the same losses")


def draw_grokking(records: Mapping[str, Sequence[Mapping[str, Any]]], file: pathlib.Path) -> None:
    """Draws what ``benchmarks.grokking`` recorded, with a line for each seed.

    Raises:
      ImportError: matplotlib is not installed.
    """
    styles = dict(zip(records, ((RED, "--"), (BLUE, "-"), (BLACK, ":"), (ORANGE, "-.")), strict=True))
    with _figure(file, 5.2, rows=2, sharex=True, height_ratios=(2, 1)) as (figure, panels):
        for panel, quantity in zip(panels, ("test accuracy", "gradients of 0"), strict=True):
            for name, of_seeds in records.items():
                color, line = styles[name]
                for seed, record in enumerate(of_seeds):
                    label = name if seed == 0 else None
                    panel.plot(record["step"], record[quantity], line, color=color, label=label)
            panel.set_ylim(-0.03, 1.03)
        panels[0].set_ylabel("accuracy on test data")
        panels[0].legend()
        panels[1].set_ylabel("gradients of 0\nat the label")
        panels[1].set_xlabel("training step")
        figure.suptitle("Addition modulo 113 without weight decay, in float32")


def _bandwidth(results: Results, file: pathlib.Path) -> bool:
    title = "Bandwidth: the bytes that an algorithm must move, by its time"
    return _over_length(results, file, gigabytes_per_second, title, "GB/s")


def _throughput(results: Results, file: pathlib.Path) -> bool:
    of = lambda algorithm, case, seconds: case.elements / seconds / 1e9
    title = "Throughput: float32 softmax of one row, on one thread"
    return _over_length(results, file, of, title, "10⁹ elements per second")


def _over_length(
    results: Results,
    file: pathlib.Path,
    of: Callable[[str, Case, float], float | None],
    title: str,
    unit: str,
) -> bool:
    """Draws algorithms over length, a panel for each instruction set."""
    tables = list(results.tables("algorithms"))
    if not tables:
        return False
    with _panels(file, len(tables)) as (figure, panels):
        for panel, table in zip(panels, tables, strict=True):
            for name in table.rows[0].samples:
                points = [
                    (row.case.elements, value)
                    for row in table.rows
                    if (value := of(name, row.case, row.medians[name])) is not None
                ]
                _line(panel, name, points)
            _logarithmic(panel, "x")
            panel.set_title(table.isa)
            panel.set_xlabel("length of the row (elements)")
            _mark(panel, [(f"x fills {name}", size / 4) for name, size in results.caches.items()])
            if "auto" in panel.get_legend_handles_labels()[1]:
                _mark(panel, [("auto changes", elements) for elements in results.crossovers["n"]])
        _finish_from_zero(figure, panels[0], unit)
        figure.suptitle(title)
    return True


def _passes(results: Results, file: pathlib.Path) -> bool:
    tables = list(results.tables("passes"))
    if not tables:
        return False
    with _panels(file, len(tables), sharex=True) as (figure, panels):
        for panel, table in zip(panels, tables, strict=True):
            row = table.rows[-1]
            speeds = [gigabytes_per_second(name, row.case, seconds) for name, seconds in row.medians.items()]
            colours = [SKY if name in LOOP_TRAFFIC else BLUE for name in row.medians]
            bars = panel.barh(list(row.medians), speeds, color=colours)
            panel.bar_label(bars, fmt="%.1f", padding=3)
            panel.margins(x=0.15)
            panel.grid(axis="y", visible=False)
            panel.set_title(f"{table.isa}, x of {row.case.bytes / 1e6:,.0f} MB")
            panel.set_xlabel("GB/s")
        panels[0].invert_yaxis()
        figure.suptitle("Every pass (dark) beside what memory allows (light), on one thread")
    return True


def _threads(results: Results, file: pathlib.Path) -> bool:
    tables = list(results.tables("threads"))
    if not tables:
        return False
    isas = list(dict.fromkeys(table.isa for table in tables))
    per_thread = min(table.rows[0].case.elements for table in tables)
    with _panels(file, len(isas)) as (figure, panels):
        for panel, isa in zip(panels, isas, strict=True):
            rows = [row for table in tables if table.isa == isa for row in table.rows]
            for name in rows[0].samples:
                points = [
                    (row.case.elements // per_thread, row.case.elements / row.medians[name] / 1e9)
                    for row in rows
                ]
                _line(panel, name, points)
            panel.set_xticks([row.case.elements // per_thread for row in rows])
            panel.set_title(isa)
            panel.set_xlabel("threads")
        _finish_from_zero(figure, panels[0], "10⁹ elements per second")
        figure.suptitle(f"Weak scaling: one row of {per_thread / 2**20:.0f} Mi elements for each thread")
    return True


def _speed_up(results: Results, file: pathlib.Path) -> bool:
    tables = list(results.tables("jit"))
    if not tables:
        return False
    rows = [row for row in tables[0].rows if row.case.dtype == "float32"]
    labels = [" × ".join(f"{size:,}" for size in row.case.shape) for row in rows]
    others = _measured(("jax.nn", "torch"), rows)
    title = f"softmax in float32: how much faster than {' and '.join(others)}, by shape"
    return _others_by_ours(file, 4.4, rows, labels, others, title)


def _peers(results: Results, file: pathlib.Path) -> bool:
    tables = list(results.tables("peers"))
    if not tables:
        return False
    rows = [row for table in tables for row in table.rows if row.case.dtype == "float32"]
    labels = [row.case.name.removesuffix(" float32") for row in rows]
    labels = [f"softmax {label}" if label.startswith("(") else label for label in labels]
    others = _measured(STYLES, rows)
    title = "How much faster than other libraries, by operation and shape"
    return _others_by_ours(file, 5.4, rows, labels, others, title)


def _measured(names: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """Those of the names whose times by ours are in any of the rows."""
    return [name for name in names if any(f"{name} / ours" in row.ratios for row in rows)]


def _others_by_ours(
    file: pathlib.Path,
    height: float,
    rows: Sequence[Row],
    labels: Sequence[str],
    others: Sequence[str],
    title: str,
) -> bool:
    """Draws the times of others divided by ours, a line for each row."""
    ratios = {name: [row.ratios.get(f"{name} / ours", np.nan) for row in rows] for name in others}
    with _figure(file, height) as (figure, panel):
        _dots(panel, labels, ratios)
        panel.set_xlabel("time of the other ÷ ours")
        _legend_below(figure, panel)
        figure.suptitle(title)
    return True


def _ulp(results: Results, file: pathlib.Path) -> bool:
    tables = list(results.tables("accuracy"))
    if not tables:
        return False
    kinds = {"normal": "normal data", "ramp": "a ramp from −90 to 90"}
    with _panels(file, 2) as (figure, panels):
        for panel, (data, title) in zip(panels, kinds.items(), strict=True):
            rows = [row for row in tables[0].rows if row.case.data == data]
            for name in tables[0].rows[0].samples:
                points = [(row.case.shape[-1], max(row.medians[name], 0.1)) for row in rows]
                _line(panel, name, points)
            panel.axhline(2, color=BLACK, linewidth=0.8)
            _logarithmic(panel, "xy")
            panel.set_title(title)
            panel.set_xlabel("length of the row (elements)")
        panels[0].text(0.01, 2.1, "2 ULP", fontsize=8, transform=panels[0].get_yaxis_transform())
        panels[0].set_ylabel("largest error (ULP)")
        _legend_below(figure, panels[0])
        figure.suptitle("The largest error of softmax in float32, against float64")
    return True


def _scaling(results: Results, file: pathlib.Path) -> bool:
    return _scaling_of(results, file, "seconds", lambda value: value * 1e3, 0, "milliseconds a call", "Time")


def _memory(results: Results, file: pathlib.Path) -> bool:
    # Below 1 MiB, memory that the process already has suffices.
    scale = lambda value: value / 2**20
    return _scaling_of(results, file, "bytes", scale, 1, "MiB beyond the operand", "Memory")


def _scaling_of(
    results: Results,
    file: pathlib.Path,
    quantity: str,
    scale: Callable[[float], float],
    minimum: float,
    unit: str,
    title: str,
) -> bool:
    tables = {along: list(results.tables(f"scaling of {quantity} in {along}")) for along in ("n", "batch")}
    if not all(tables.values()):
        return False
    with _panels(file, 2) as (figure, panels):
        for panel, (along, (table,)) in zip(panels, tables.items(), strict=True):
            for name in table.rows[0].samples:
                points = [(row.case.elements, scale(row.medians[name])) for row in table.rows]
                _line(panel, name, [(x, y) for x, y in points if y > minimum], _with_slope(table, name))
            _logarithmic(panel, "xy")
            panel.set_title("one row of n" if along == "n" else "batch × 1,024")
            panel.set_xlabel("elements")
            panel.legend(loc="upper left")
            _mark(panel, [("auto changes", elements) for elements in results.crossovers[along]])
        panels[0].set_ylabel(unit)
        figure.suptitle(f"{title} of softmax in jit against length and batch, with fitted slopes")
    return True


def _with_slope(table: Result, name: str) -> str:
    slopes = [figure.value for figure in table.figures if figure.of.endswith(f" of {name}")]
    return f"{name}, slope {slopes[0]:.2f}" if slopes else name


def _training(results: Results, file: pathlib.Path) -> bool:
    if results.training is None:
        return False
    draw_training(results.training, file)
    return True


PLOTS: dict[str, Callable[[Results, pathlib.Path], bool]] = {
    "bandwidth": _bandwidth,
    "throughput": _throughput,
    "passes": _passes,
    "threads": _threads,
    "speed_up": _speed_up,
    "ulp": _ulp,
    "peers": _peers,
    "scaling": _scaling,
    "memory": _memory,
    "training": _training,
}
"""Functions that draw a plot, by the name of its file. They return False where there are no measurements for
it."""


@contextlib.contextmanager
def _figure(
    file: pathlib.Path, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yields a figure and its axes, and saves it at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(WIDTH, height), layout="constrained", **options
        )
        try:
            yield figure, axes
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=DPI, pil_kwargs={"optimize": True})
        finally:
            pyplot.close(figure)


@contextlib.contextmanager
def _panels(file: pathlib.Path, count: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yields a figure and axes side by side, and saves it at the end."""
    with _figure(file, 4, columns=count, sharey=True, **options) as (figure, axes):
        yield figure, np.atleast_1d(axes)


def _line(panel: Any, name: str, points: Sequence[tuple[float, float]], label: str | None = None) -> None:
    if not points:
        return
    colour, line, marker = STYLES.get(name, (BLACK, "-", "."))
    panel.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=marker, label=label or name)


def _dots(panel: Any, labels: Sequence[str], ratios: Mapping[str, Sequence[float]]) -> None:
    """Draws a row for each label, a dot for each ratio, and a line at 1."""
    places = np.arange(len(labels))
    for name, values in ratios.items():
        colour, _, marker = STYLES[name]
        panel.plot(values, places, linestyle="", marker=marker, markersize=7, color=colour, label=name)
    panel.axvline(1, color=BLACK, linewidth=1)
    _logarithmic(panel, "x")
    low, high = panel.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    panel.set_yticks(places, labels)
    panel.invert_yaxis()


def _logarithmic(panel: Any, axes: str) -> None:
    """Makes the named axes, of x and y, logarithmic, with numbers at powers of ten only."""
    for axis in axes:
        panel.set(**{f"{axis}scale": "log"})
        getattr(panel, f"{axis}axis").set_minor_formatter("")


def _mark(panel: Any, places: Sequence[tuple[str, float]]) -> None:
    """Draws vertical lines across a panel, with text beside them."""
    for text, place in places:
        panel.axvline(place, color=BLACK, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.6)
        where = panel.get_xaxis_transform()
        panel.text(
            place,
            0.02,
            f" {text}",
            transform=where,
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=7,
        )


def _finish_from_zero(figure: Any, panel: Any, unit: str) -> None:
    """Makes a shared y axis start at 0. To be called last, since a limit stops the automatic fitting."""
    panel.set_ylim(bottom=0)
    panel.set_ylabel(unit)
    _legend_below(figure, panel)


def _legend_below(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    layout = {"ncols": 6, "fontsize": 9, "columnspacing": 1.2, "handlelength": 2.4}
    figure.legend(handles, labels, loc="outside lower center", **layout)
