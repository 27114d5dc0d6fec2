"""Training curves of every reward component, by row, over seeds. Pictures only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Stages = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""Stage → metric → (step, value) of one seed."""

SHOWN = ("reward/", "alarm/motion_ratio")
_LEFT_OUT = ("reward/total_std",)
_COLOURS = (
    "#3267d6",
    "#d9730d",
    "#2f9e6e",
    "#a33fb5",
    "#c0392b",
    "#0f8a9d",
    "#7b8794",
    "#8a6d3b",
    "#e377c2",
    "#17202c",
)


def draw_curves(rows: Mapping[str, Sequence[Stages]], path: Path, *, smooth: int = 5) -> Path | None:
    """Write one panel per stage and component: a line per row, the mean over seeds smoothed over ``smooth`` steps, and a band
    from the lowest to the highest seed. ``rows``: title → the seeds' stages. Returns None where nothing was trained.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = _panels(rows)
    if not panels:
        return None
    columns = min(4, len(panels))
    ranks = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * ranks + 1.2), dpi=110)
    FigureCanvasAgg(figure)
    colours = {title: _COLOURS[i % len(_COLOURS)] for i, title in enumerate(rows)}
    for number, (stage, metric) in enumerate(panels, start=1):
        axes = figure.add_subplot(ranks, columns, number)
        for title, seeds in rows.items():
            series = [s[stage][metric] for s in seeds if metric in s.get(stage, {})]
            if series:
                _draw(axes, series, colours[title], title, smooth)
        axes.set_title(f"{stage}: {metric.removeprefix('reward/').removesuffix('_mean')}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, line)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / (2.9 * ranks + 1.2), 1, 1))
    figure.savefig(path)
    return path


def _panels(rows: Mapping[str, Sequence[Stages]]) -> list[tuple[str, str]]:
    found = {
        (stage, metric)
        for seeds in rows.values()
        for stages in seeds
        for stage, series in stages.items()
        for metric in series
        if metric.startswith(SHOWN) and metric not in _LEFT_OUT and not metric.endswith("_std")
    }
    return sorted(found)


def _draw(axes: Any, series: Sequence[Sequence[Sequence[float]]], colour: str, title: str, smooth: int) -> None:
    steps = sorted(set.intersection(*(({int(p[0]) for p in s}) for s in series)))
    if not steps:
        return
    values = np.array([[{int(k): v for k, v in s}[step] for step in steps] for s in series])
    smoothed = np.array([_smooth(line, smooth) for line in values])
    axes.plot(steps, smoothed.mean(axis=0), color=colour, linewidth=1.3, label=title)
    if len(series) > 1:
        axes.fill_between(steps, smoothed.min(axis=0), smoothed.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the running mean over at most ``width`` values up to each."""
    return np.array([values[max(0, i - width + 1) : i + 1].mean() for i in range(len(values))])
