"""A figure as data, and how it is drawn."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

# How a series is drawn, by its role.
PEER = {"linewidth": 1.2, "marker": "o", "markersize": 3}
ROLES = {
    "ours": {"linewidth": 2.4, "marker": "o", "markersize": 5, "color": "#c1272d", "zorder": 3},
    "limit": {"linewidth": 1.6, "linestyle": "--", "marker": ".", "color": "black"},
    "line": {"linewidth": 1, "color": "0.5", "zorder": 0},
    "peer": PEER,
    "our points": {"linestyle": "", "marker": "o", "markersize": 6, "color": "#c1272d", "zorder": 3},
    "limit points": {"linestyle": "", "marker": "|", "markersize": 14, "markeredgewidth": 2, "color": "black"},
    "peer points": {"linestyle": "", "marker": "o", "markersize": 4},
}
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f", "#6a51a3", "#7cae00")


@dataclass(frozen=True)
class Series:
    label: str
    role: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_base: int | None = 2  # of its logarithmic scale; None: linear
    log_y: bool = True
    y_names: tuple[str, ...] = ()  # labels at y = 0, 1, …, from the top


@dataclass(frozen=True)
class Figure:
    name: str
    caption: str
    panels: tuple[Panel, ...]

    @property
    def digest(self) -> str:
        """Hash of everything drawn. A figure file is stale if it does not hold this digest."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def draw(figure: Figure, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(figure.panels), 2)
    rows = math.ceil(len(figure.panels) / columns)
    tall = max(3.4, *(0.3 * len(panel.y_names) + 1.2 for panel in figure.panels))
    style = {"svg.hashsalt": figure.name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        canvas, axes = pyplot.subplots(
            rows, columns, figsize=(9 if columns == 2 else 7.5, tall * rows), squeeze=False, layout="constrained"
        )
        colors: dict[str, str] = {}
        for panel, axis in zip(figure.panels, axes.flat, strict=False):
            _draw_panel(panel, axis, colors)
        for axis in axes.flat[len(figure.panels) :]:
            axis.remove()
        handles = {text: handle for axis in canvas.axes for handle, text in zip(*axis.get_legend_handles_labels())}  # noqa: B905
        canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(exist_ok=True)
        canvas.savefig(path, metadata={"Date": None, "Description": figure.digest})
        pyplot.close(canvas)


def _draw_panel(panel: Panel, axis, colors: dict[str, str]) -> None:
    for series in panel.series:
        look = dict(ROLES[series.role])
        if "color" not in look:
            look["color"] = colors.setdefault(series.label, next(_unused(colors)))
        axis.plot(series.xs, series.ys, label=series.label or "_", **look)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.x_base is not None:
        axis.set_xscale("log", base=panel.x_base)
        axis.xaxis.set_major_formatter("{x:g}")
    if panel.log_y:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    elif not panel.y_names:
        axis.set_ylim(bottom=0)
    if panel.y_names:
        axis.set_yticks(range(len(panel.y_names)), panel.y_names)
        axis.invert_yaxis()
        axis.axvline(1, color="0.8", zorder=0)
    axis.grid(axis="x" if panel.y_names else "both", linewidth=0.4, color="0.85")


def _unused(colors: dict[str, str]) -> Iterator[str]:
    return (color for color in cycle(COLORS) if len(colors) >= len(COLORS) or color not in colors.values())
