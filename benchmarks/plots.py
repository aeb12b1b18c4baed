"""The two pictures a benchmark needs: bars side by side, and lines over a quantity. PNG files; no display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagecoach.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN, DOTS_PER_IN = 8.0, 4.5, 120


def check_matplotlib() -> None:
    """Raises ConfigError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        text = f"plot: {error.name} is missing: install Stagecoach with its [bench] extra"
        raise ConfigError(text, field="plot") from error


def grouped_bars(
    path: Path,
    *,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    y_label: str,
    log_y: bool = False,
) -> None:
    """A group of bars for each of `groups`, in it one bar of each series: `series[name][i]` belongs to `groups[i]`."""
    figure, axes = _figure(title)
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        bars = axes.bar([place + offset for place in range(len(groups))], values, width, label=name)
        axes.bar_label(bars, labels=[f"{value:.3g}" for value in values], fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    if log_y:
        axes.set_yscale("log")
    axes.set_ylabel(y_label)
    _save(figure, axes, path)


def lines(
    path: Path,
    *,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """One line for each series, through its points (x, y)."""
    figure, axes = _figure(title)
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)  # a difference should not look larger than it is
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _save(figure, axes, path)


def _figure(title: str) -> tuple[Figure, Axes]:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DOTS_PER_IN, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
