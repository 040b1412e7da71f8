"""Figures from rows: quality against cost with the Pareto frontier, and quality against sparsity."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweep import frontier

LABELS = {
    "decode_ms_paired": "decode latency (ms per token, paired with dense)",
    "prefill_ms_paired": "prefill latency (ms, paired with dense)",
    "peak_memory_bytes": "peak resident memory (MB)",
    "weights_bytes": "weights in memory (MB)",
    "sparsity": "sparsity requested (fraction removed)",
}
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito, 2008
_MARKS = "os^Dv<>P*X"
_EXPLODES = 10.0  # a loss that spans more than this factor is drawn on a log scale


def label(column: str) -> str:
    """What an axis is called, with its unit."""
    if column in LABELS:
        return LABELS[column]
    task, _, metric = column.partition("/")
    return f"{metric.replace('_', ' ')} on {task}" if metric else column


def cost_figure(rows: pd.DataFrame, cost: str, metric: str) -> Figure:
    """A metric against a cost: one mark a cell, the Pareto frontier as a line, the dense model as cross-hairs."""
    figure, axes = _new()
    points = _scaled(frontier.points(rows, cost, metric), cost)
    _draw_series(axes, points, joined=False)
    _draw_sparsities(axes, points)
    on = points[frontier.pareto(points.x, points.y, x_is_loss=frontier.is_loss(cost),
                                y_is_loss=frontier.is_loss(metric))].sort_values("x")  # fmt: skip
    axes.plot(on.x, on.y, color="0.4", linewidth=1.2, zorder=1, label="Pareto frontier")
    _finish(axes, points, cost, metric)
    return figure


def sparsity_figure(rows: pd.DataFrame, metric: str) -> Figure:
    """A metric against the requested sparsity, one line a method, the dense model as a horizontal line."""
    figure, axes = _new()
    points = frontier.points(rows, "sparsity", metric)
    points = points.loc[:, ~points.columns.duplicated()]
    _draw_series(axes, points, joined=True)
    _finish(axes, points, "sparsity", metric)
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG and close it; returns the files."""
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=160, bbox_inches="tight")
    plt.close(figure)
    return files


def _new() -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _scaled(points: pd.DataFrame, column: str) -> pd.DataFrame:
    """Bytes as megabytes: the axis names the unit."""
    return points.assign(x=points.x / 1e6) if column.endswith("_bytes") else points


def _draw_series(axes: Axes, points: pd.DataFrame, *, joined: bool) -> None:
    pruned = points[points.method != "dense"].copy()
    pruned["series"] = pruned.method + " (" + pruned.criterion.fillna("") + ")"
    several = pruned.execution.nunique() > pruned.groupby("method").execution.first().nunique()
    if several:
        pruned["series"] += ", " + pruned.execution
    for i, (name, line) in enumerate(pruned.groupby("series", sort=True)):
        line = line.sort_values("sparsity")
        interval = [(line.y - line.y_low).fillna(0), (line.y_high - line.y).fillna(0)]
        axes.errorbar(line.x, line.y, yerr=interval, label=name, color=_COLOURS[i % len(_COLOURS)],
                      marker=_MARKS[i % len(_MARKS)], linestyle="-" if joined else "none", capsize=2, zorder=3)  # fmt: skip


def _draw_sparsities(axes: Axes, points: pd.DataFrame) -> None:
    for point in points[points.method != "dense"].itertuples():
        axes.annotate(f"{point.sparsity:g}", (point.x, point.y), textcoords="offset points", xytext=(5, 4), fontsize=7,
                      color="0.35")  # fmt: skip


def _finish(axes: Axes, points: pd.DataFrame, x: str, y: str) -> None:
    for dense in points[points.method == "dense"].itertuples():
        axes.axhline(dense.y, color="0.6", linewidth=0.9, linestyle="--", zorder=0)
        axes.plot(dense.x, dense.y, "*", color="black", markersize=11, zorder=4, label="dense")
    if frontier.is_loss(y) and points.y.max() > _EXPLODES * points.y.min() > 0:
        axes.set_yscale("log")
    better = "lower" if frontier.is_loss(y) else "higher"
    axes.set_xlabel(label(x))
    axes.set_ylabel(f"{label(y)} ({better} is better)")
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, frameon=False)
