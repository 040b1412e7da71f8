"""Figures from rows, sized for one column of a paper: quality against cost or sparsity, speed-up, loss by benchmark.

Every method has its own colour, mark and line, so that a figure survives grey printing and colour-blind eyes. A figure
shows only what the rows hold: a point without an interval has no bar, and a failed cell has no point.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sweep import config
from sweep.formats import declared
from sweep.metrics import BANDS, is_exp
from sweep.report import frontier
from sweep.report.evidence import NOTHING, Evidence
from sweep.store.columns import COLUMNS, MADE, is_loss, label, scale

AXES = {  # what is typed after --x, and the column it stands for
    column.short: column.name for column in [*MADE.values(), *COLUMNS.values()] if column.short
}
WIDTHS = {"column": 3.35, "page": 6.9}  # inches; one and two columns of the usual conference styles
FORMATS = ("png", "svg", "pdf")
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]  # Okabe and Ito, 2008
_PACKED = [name for name, form in declared.FORMATS.items() if form.module]  # named even where no other is shown
_MARKS = "os^Dv<>PXp"
_LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
_OVER: dict[str, Any] = {
    "seeds": "-",
    "documents": (0, (2.5, 1)),
    "repeats": (0, (1, 0.8)),
}  # bars by what they are over
_EXPLODES = 10.0  # a loss that spans more than this factor is drawn on a log scale
_BELOW, _ABOVE = 0.42, 0.1  # inches for the horizontal axis' words, and over the axes
_LABEL = 0.28  # inches from the left edge to the foot of a two-line label of the vertical axis
_LABELLED = 24  # more points than this, and their sparsities are left to the table
_HEAT_LINES = 40
_DARKEST_LOSS = 3.0  # nats a token
_UNEVEN = 0.005  # standard deviation of the blocks' shares from which they are worth a figure
_SAVED: dict[str, dict[str, Any]] = {
    "png": {"pil_kwargs": {"compress_level": 1}},  # a fifth of the time, a tenth larger
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
_STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.titlesize": 8,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "sweep",
}


def series(points: pd.DataFrame) -> pd.Series:
    """The name of each point's recipe, stage after stage: as short as tells it from the others of the figure."""
    name = pd.Series("", index=points.index)
    for stage in config.STAGES:
        word = points[stage.column].astype(str)
        if stage.group == "method":
            word += (" " + points.criterion.astype(str)).where(points.criterion.notna(), "")
        used = points[stage.column] != stage.nothing
        name += ((" + " + word).where(name != "", word)).where(used, "")
    name = name.where(~points.baseline, "dense")
    name += (" (" + points.variant + ")").where(points.variant != "", "")
    several = points.groupby(name).execution.transform("nunique") > 1
    name += (", " + points.execution.astype(str)).where(several | points.execution.isin(_PACKED), "")
    for words in ("setting", "machine"):
        name += (" [" + points[words] + "]").where(points[words] != "", "")
    if points.version.nunique() > 1:
        name += " (version " + points.version + ")"
    if points.model.nunique() > 1:
        name += ", " + points.model.astype(str)
    return name


def cost_figure(
    rows: pd.DataFrame, cost: str, metric: str, width: str = "column", evidence: Evidence = NOTHING
) -> Figure:
    """A metric against a cost: one mark a method, the Pareto frontier with its uncertainty, dense as cross-hairs.

    Filled: on the frontier for certain. Hollow: within noise of it. Pale: certainly off it. By the documents that all
    have answered, where `evidence` has them.
    """
    points = _prepared(rows, cost, metric)
    losses = {"x_is_loss": is_loss(cost, rows), "y_is_loss": is_loss(metric, rows)}
    points["standing"] = frontier.membership(points, **losses, differ=evidence.differ(points, metric))
    figure, axes = _new(width)
    _draw_frontier(axes, points, **losses)
    _draw_series(axes, points, joined=False)
    _finish(axes, points, cost, metric, y_is_loss=losses["y_is_loss"])
    if len(points) <= _LABELLED:
        _draw_sparsities(axes, points)
    _legend(axes, _hollow(points, "within noise of the frontier") | _kinds(points))
    return figure


def sparsity_figure(rows: pd.DataFrame, metric: str, width: str = "column", evidence: Evidence = NOTHING) -> Figure:
    """A metric against the requested sparsity, one line a method, dense as a horizontal line with its interval.

    Hollow: chance alone may make the point as different from its dense model, after Holm's correction over the figure.
    """
    points = _prepared(rows, "sparsity", metric)
    points["standing"] = frontier.ON
    dense = frontier.dense_of(points)
    compared = np.flatnonzero(~points.baseline.to_numpy() & (dense >= 0))
    alike = evidence.alike(points, compared, dense[compared], metric)
    points.loc[points.index[compared[alike]], "standing"] = frontier.WITHIN_NOISE
    figure, axes = _new(width)
    _draw_series(axes, points, joined=True)
    _finish(axes, points, "sparsity", metric, y_is_loss=is_loss(metric, rows))
    _legend(axes, _hollow(points, "within noise of dense") | _kinds(points))
    return figure


def speedup_figure(rows: pd.DataFrame, phase: str = "decode", width: str = "column") -> Figure:
    """Measured speed-up against sparsity, and beside it, dashed, the one that the MACs alone would promise."""
    column = f"{phase}_speedup"
    points = _prepared(rows, "sparsity", column)
    points["standing"] = frontier.ON
    figure, axes = _new(width)
    _draw_series(axes, points, joined=True)
    counted = _prepared(with_counted_speedup(rows), "sparsity", "counted_speedup")
    counted = counted[~counted.baseline]
    styles = _styles(points)
    for name, line in counted.groupby(series(counted), sort=True):
        colour = styles[name][0] if name in styles else "0.5"
        line = line.sort_values("x")
        axes.plot(line.x, line.y, color=colour, linestyle=(0, (1, 2)), linewidth=1.0, zorder=2)
    axes.axhline(1.0, color="0.3", linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlabel(label("sparsity"))
    axes.set_ylabel(f"{phase} speed-up over dense (measured)")
    counts = {"counted: dense MACs / non-zero MACs": Line2D([], [], color="0.3", linestyle=(0, (1, 2)))}
    _legend(axes, counts | _kinds(points))
    return figure


def with_counted_speedup(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `counted_speedup`: the dense model's MACs over this one's non-zero MACs."""
    rows = frontier.with_words(rows)
    return rows.assign(counted_speedup=frontier.dense_value(rows, "macs_per_token") / rows.nonzero_macs_per_token)


def drop_table(rows: pd.DataFrame, metrics: Iterable[str], *, relative: bool = True) -> pd.DataFrame:
    """Change against the dense row of the same setting; positive = worse. One line a point.

    relative  in per cent of the dense value, NaN where that is zero; else in the unit of the metric
    Where a loss explodes the number is large and true.
    """
    changes = []
    for metric in metrics:
        points = _points(rows, "sparsity", metric)
        points["dense"] = frontier.dense_value(points, "y")
        pruned = points[~points.baseline]
        sign = 1 if is_loss(metric, rows) else -1
        drop = sign * (pruned.y - pruned.dense)
        if relative:
            drop = 100 * drop / pruned.dense.where(pruned.dense != 0)
        index = pd.MultiIndex.from_arrays([series(pruned), pruned.sparsity], names=["method", "sparsity"])
        changes.append(pd.Series(drop.to_numpy(), index=index, name=metric))
    return pd.concat(changes, axis=1).sort_index() if changes else pd.DataFrame()


def heat_figure(
    drops: pd.DataFrame,
    width: str = "column",
    *,
    columns: Iterable[str] = (),
    words: str = "change against dense in %, positive = worse",
    darkest: float = 100.0,
) -> Figure:
    """The table of drop_table as a heat map. Every cell has its number: the colour is for the eye, not for reading.

    columns  what stands under them; by default the labels of their metrics
    darkest  the value from which the map gets no darker: a metric that doubles, an accuracy that is gone
    More than 40 lines do not fit: then each method is shown at its sparsity nearest to 0.5.
    """
    if len(drops) > _HEAT_LINES:
        distance = pd.Series(abs(drops.index.get_level_values(1) - 0.5), index=drops.index)
        drops = drops.loc[distance.groupby(level=0).idxmin()].head(_HEAT_LINES)
    longest = max(len(f"{name} {sparsity:g}") for name, sparsity in drops.index)
    figure, axes = _new(width, height=0.19 * len(drops), left=min(0.15 + 0.058 * longest, 0.7 * WIDTHS[width]))
    axes.grid(visible=False)
    values = drops.to_numpy(dtype=float)
    axes.imshow(
        np.clip(values, -darkest / 5, darkest),
        aspect="auto",
        cmap="PuOr_r",
        norm=TwoSlopeNorm(0.0, vmin=-darkest, vmax=darkest),
    )
    axes.set_xticks(range(drops.shape[1]), list(columns) or [label(c).replace(" on ", "\n") for c in drops.columns])
    axes.set_yticks(range(len(drops)), [f"{name} {sparsity:g}" for name, sparsity in drops.index])
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]):
            colour = "white" if values[i, j] > 0.7 * darkest else "black"
            digits = 1 if darkest >= 10 else 2
            text = f"{values[i, j]:+.{digits}f}" if abs(values[i, j]) < 1000 else f"{values[i, j]:+.0e}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
    axes.set_xlabel(words, loc="right")  # so that it grows to where there is room
    axes.spines[:].set_visible(False)
    return figure


def band_figure(rows: pd.DataFrame, task: str, width: str = "column") -> Figure | None:
    """By how much the loss of a task rises for common and for rare words, or None where no row has it."""
    metrics = {f"{task}/loss_band_{band}": words for band, words in BANDS.items()}
    known = [metric for metric in metrics if metric in rows and rows[metric].notna().any()]
    drops = drop_table(rows, known, relative=False)
    if not drops.notna().any(axis=None):
        return None
    words = f"nats a token added on {task}, by Zipf value of the word"
    return heat_figure(drops, width, columns=[metrics[c] for c in drops], words=words, darkest=_DARKEST_LOSS)


def loss_by_kind(rows: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Per cent of the dense model's quality that is lost, by what is asked of a model. One line a point.

    `choice` and `generation` are means over tasks of what is lost of their metric, `perplexity` of one less the dense
    model's over this one's. Only kinds that the rows have.
    """
    by_kind: dict[str, list[str]] = {kind: [] for kind in ("choice", "perplexity", "generation")}
    for metric in metrics:
        written = f"{metric.partition('/')[0]}/generated_tokens_mean"
        if written in rows and rows[written].notna().any():
            by_kind["generation"] += [] if is_loss(metric, rows) else [metric]
        elif is_exp(metric):
            by_kind["perplexity"].append(metric)
        elif not is_loss(metric, rows):
            by_kind["choice"].append(metric)
    found = {}
    for kind, names in by_kind.items():
        lost = drop_table(rows, names)
        if kind == "perplexity":
            lost = 100 * (1 - 1 / (1 + lost / 100))
        if lost.notna().any(axis=None):
            found[kind] = lost.mean(axis=1)
    return pd.DataFrame(found)


def kinds_figure(rows: pd.DataFrame, metrics: Iterable[str], width: str = "column") -> Figure | None:
    """What is lost of choices, perplexity and answers side by side, method by method.

    None where the rows have no answers, or nothing beside them.
    """
    lost = loss_by_kind(rows, metrics)
    if "generation" not in lost or lost.shape[1] < 2:
        return None
    return heat_figure(lost, width, columns=lost.columns, words="quality lost in % of dense")


def answer_figure(rows: pd.DataFrame, task: str, width: str = "column") -> Figure | None:
    """By how much an answer is faster against by how much a token is: below the diagonal, answers have grown longer.

    None where no pruned row has both.
    """
    token, answer = "decode_speedup", f"{task}/answer_speedup"
    points = _prepared(rows, token, answer) if answer in rows else pd.DataFrame()
    if points.empty or points.baseline.all():
        return None
    points["standing"] = frontier.ON
    figure, axes = _new(width)
    _draw_series(axes, points, joined=False)
    axes.axline((1, 1), slope=1, color="0.3", linewidth=0.9, linestyle="--", zorder=0)
    axes.axhline(1.0, color="0.8", linewidth=0.7, zorder=0)
    axes.axvline(1.0, color="0.8", linewidth=0.7, zorder=0)
    axes.set_xlabel("speed-up of a token over dense (measured)")
    axes.set_ylabel(f"speed-up of an answer\non {task} (measured)")
    _pin_label(axes)
    _legend(axes, {"answers as long as dense ones": Line2D([], [], color="0.3", linestyle="--")} | _kinds(points))
    return figure


def position_figure(rows: pd.DataFrame, task: str, width: str = "column") -> Figure | None:
    """By how much the loss of a task rises with the place in the text, of each method at its sparsity nearest to 0.5.

    A line that climbs is a model that makes less of long context than the dense one. Means over seeds. None where no row
    has two ranges of places beside its dense model's.
    """
    places = {c: int(found[1]) for c in rows if (found := re.fullmatch(rf"{re.escape(task)}/loss_at_(\d+)to\d+", c))}
    drops = drop_table(rows, sorted(places, key=lambda c: places[c]), relative=False) if places else pd.DataFrame()
    drops = drops.dropna(how="all").dropna(axis=1, how="all")
    if drops.shape[0] == 0 or drops.shape[1] < 2:
        return None
    distance = pd.Series(abs(drops.index.get_level_values(1) - 0.5), index=drops.index)
    figure, axes = _new(width)
    styles = _styles(rows)
    for (name, sparsity), line in drops[distance == distance.groupby(level=0).transform("min")].iterrows():
        colour, mark, dashes = styles[name]
        axes.plot(
            [places[c] for c in drops], line, color=colour, marker=mark, linestyle=dashes, label=f"{name} {sparsity:g}"
        )
    axes.axhline(0.0, color="0.3", linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlabel("tokens before, at least")
    axes.set_ylabel(f"nats a token added on {task}")
    _pin_label(axes)
    _legend(axes)
    return figure


def flips_figure(flips: pd.DataFrame, task: str, width: str = "column") -> Figure:
    """Answers of a task that turned, against sparsity, as shares of its documents; means over seeds.

    flips  rows with `lost` (right to wrong, solid and filled) and `gained` (wrong to right, dashed and hollow)
    """
    figure, axes = _new(width)
    styles = _styles(flips)
    for name, line in flips.groupby(series(flips), sort=True):
        colour, mark, _ = styles[name]
        line = line.groupby("sparsity")[["lost", "gained"]].mean()
        axes.plot(line.index, line.lost, color=colour, marker=mark, label=name)
        axes.plot(line.index, line.gained, color=colour, marker=mark, linestyle="--", markerfacecolor="white")
    axes.set_xlabel(label("sparsity"))
    axes.set_ylabel(f"answers that turned on {task}\n(share of documents)")
    axes.set_ylim(bottom=0)
    _pin_label(axes)
    style: dict[str, Any] = {"color": "0.3", "marker": "o"}
    _legend(
        axes,
        {
            "right to wrong": Line2D([], [], **style),
            "wrong to right": Line2D([], [], linestyle="--", markerfacecolor="white", **style),
        },
    )
    return figure


def layer_figure(rows: pd.DataFrame, layers: pd.DataFrame, width: str = "column") -> Figure | None:
    """The share of each block's weights that is zero or gone, of each method at its sparsity nearest to 0.5.

    layers  the cells' table of that name
    Means over seeds. None where every block of every method loses the same.
    """
    pruned = rows[~rows.baseline & rows.cell.isin(layers.cell)]
    pruned = pruned.assign(series=series(pruned))
    distance = (pruned.sparsity - 0.5).abs()
    pruned = pruned[distance == distance.groupby(pruned.series).transform("min")]
    if "left" in layers:  # as tables of late have: why a parameter is no matrix to prune
        layers = layers[layers["left"].isna()]
    blocks = layers.groupby(["cell", "block"])[["weights", "zeros"]].sum()
    share = (blocks.zeros / blocks.weights).unstack("block")
    if share.empty or share.loc[pruned.cell].std(axis=1).max() < _UNEVEN:
        return None
    figure, axes = _new(width)
    styles = _styles(rows)
    for (name, sparsity), cells in pruned.groupby(["series", "sparsity"], sort=True):
        colour, mark, dashes = styles[name]
        line = share.loc[cells.cell].mean()
        axes.plot(
            line.index, line, color=colour, marker=mark, linestyle=dashes, markersize=3, label=f"{name} {sparsity:g}"
        )
    axes.set_xlabel("block")
    axes.set_ylabel("share of the block's weights\nthat is zero or gone")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _pin_label(axes)
    _legend(axes)
    return figure


class Saver:
    """Writes figures while the next ones are drawn: two thirds of a report's time goes into PNG, SVG and PDF files.

    In child processes where the system can fork (Linux); elsewhere a child would take longer to start than it saves.
    """

    def __init__(self, formats: Iterable[str] = FORMATS) -> None:
        self.formats = tuple(formats)
        self.files: list[Path] = []
        self._pool: Executor | None = None
        self._pending: list[Future] = []

    def __enter__(self) -> Saver:
        if sys.platform == "linux":
            self._pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork"))
        return self

    def __call__(self, figure: Figure, path: Path) -> None:
        self.files += [path.with_name(f"{path.name}.{suffix}") for suffix in self.formats]
        if self._pool is None:
            save(figure, path, self.formats)
        else:
            self._pending.append(self._pool.submit(save, figure, path, self.formats))

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()  # raises what went wrong in the child


def save(figure: Figure, path: Path, formats: Iterable[str] = FORMATS) -> None:
    """Write a figure as `path` with the suffix of each format. Undated: equal rows give equal files."""
    for suffix in formats:
        with matplotlib.rc_context(_STYLE):
            figure.savefig(path.with_name(f"{path.name}.{suffix}"), dpi=300, **_SAVED.get(suffix, {}))


def _new(width: str, height: float | None = None, left: float = 0.62) -> tuple[Figure, Axes]:
    """A figure whose axes have the same size whatever stands around them; lengths in inches.

    Placed by hand: a layout engine would shrink the axes to nothing under a long legend, and takes longer than drawing.
    """
    inches = WIDTHS[width]
    height = height or 0.6 * min(inches, 5.0)
    total = height + _BELOW + _ABOVE
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(inches, total))
        axes = figure.add_axes((left / inches, _BELOW / total, (inches - left - 0.1) / inches, height / total))
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _points(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Points in the units of the columns, without those that no axis can show."""
    points = frontier.points(rows, x, y)
    return points[np.isfinite(points.x) & np.isfinite(points.y)].reset_index(drop=True)


def _prepared(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Points in the units of the labels."""
    points = _points(rows, x, y)
    for name, column in (("x", x), ("y", y)):
        for end in ("", "_low", "_high"):
            points[name + end] /= scale(column)
    return points


def _styles(points: pd.DataFrame) -> Mapping[str, tuple[str, str, object]]:
    """Colour, mark and line of each method, by its place in the sorted names."""
    names = sorted(set(series(points[~points.baseline])))
    return {
        name: (COLOURS[i % len(COLOURS)], _MARKS[i % len(_MARKS)], _LINES[i % len(_LINES)])
        for i, name in enumerate(names)
    }


def _draw_series(axes: Axes, points: pd.DataFrame, *, joined: bool) -> None:
    """Every method's marks, intervals and, where joined, line."""
    pruned = points[~points.baseline].sort_values(["sparsity", "x"])
    styles, names = _styles(points), series(pruned).to_numpy(dtype=object)
    x, y, standing = (pruned[column].to_numpy() for column in ("x", "y", "standing"))
    bars = [
        (bar, strokes)
        for along in ("x", "y")
        for kind, strokes in _OVER.items()
        if (bar := _bars(pruned, along, kind)) is not None
    ]
    for name in sorted(set(names)):
        colour, mark, dashes = styles[name]
        own = names == name
        for bar, strokes in bars:
            axes.plot(
                *bar[:, own].reshape(2, -1), color=colour, linestyle=strokes, linewidth=0.9, alpha=0.8, zorder=2.5
            )
        if joined:
            axes.plot(x[own], y[own], color=colour, linestyle=dashes, zorder=2)
        for kind, face, alpha in (
            (frontier.ON, colour, 1.0),
            (frontier.WITHIN_NOISE, "white", 1.0),
            (frontier.OFF, colour, 0.45),
        ):
            part = own & (standing == kind)
            if part.any():
                axes.plot(
                    x[part],
                    y[part],
                    linestyle="none",
                    marker=mark,
                    color=colour,
                    markerfacecolor=face,
                    alpha=alpha,
                    zorder=3,
                )
        axes.add_line(Line2D([], [], color=colour, marker=mark, linestyle=dashes if joined else "none", label=name))


def _hollow(points: pd.DataFrame, words: str) -> dict[str, Line2D]:
    """What stands for hollow marks in a legend, if there are any."""
    mark = Line2D([], [], marker="o", color="0.3", markerfacecolor="white", linestyle="none")
    return {words: mark} if (points.standing == frontier.WITHIN_NOISE).any() else {}


def _over(points: pd.DataFrame, along: str) -> pd.Series:
    """What each point's interval along an axis is over: a cost's is that of its paired repeats."""
    kind = points.interval if along == "y" else pd.Series("repeats", index=points.index)
    return kind.where(points[f"{along}_high"] > points[f"{along}_low"], "none")


def _kinds(points: pd.DataFrame) -> dict[str, Line2D]:
    """What the bars of a figure are, for its legend."""
    there = {kind for along in ("x", "y") for kind in _over(points, along)}
    return {
        f"95 % over {kind}": Line2D([], [], color="0.3", linestyle=strokes, linewidth=0.9)
        for kind, strokes in _OVER.items()
        if kind in there
    }


def _bars(points: pd.DataFrame, along: str, kind: str) -> np.ndarray | None:
    """Every point's interval of a kind along an axis as a stroke of one line, (x and y, points, 3): its ends and a gap.

    A stroke without length where none of the kind is known; None where none is. One line is written many times faster
    than as many strokes.
    """
    mine = _over(points, along) == kind
    ends = [points[f"{along}_{end}"].where(mine) for end in ("low", "high")]
    if not mine.any():
        return None
    strokes = np.full((2, len(points), 3), np.nan)
    for place, axis in enumerate(("x", "y")):
        for end in (0, 1):
            at = points[axis]
            strokes[place, :, end] = ends[end].where(np.isfinite(ends[end]), at) if axis == along else at
    return strokes


def _draw_frontier(axes: Axes, points: pd.DataFrame, *, x_is_loss: bool, y_is_loss: bool) -> None:
    """The staircase of what nothing dominates, and the band between the staircases of the intervals' ends."""
    if points.empty:
        return
    grid = np.unique(points.x)
    central, low, high = (
        _staircase(points, y, grid, x_is_loss=x_is_loss, y_is_loss=y_is_loss) for y in ("y", "y_low", "y_high")
    )
    where: Literal["post", "pre"] = "post" if x_is_loss else "pre"
    axes.fill_between(grid, low, high, step=where, color="0.88", linewidth=0, zorder=0.5)
    axes.plot(grid, central, color="0.45", linewidth=1.0, drawstyle=f"steps-{where}", zorder=1, label="Pareto frontier")


def _staircase(points: pd.DataFrame, y: str, grid: np.ndarray, *, x_is_loss: bool, y_is_loss: bool) -> np.ndarray:
    """The best y that is to be had at each cost of the grid."""
    best = points.assign(value=points[y].fillna(points.y)).groupby("x").value
    best = (best.min() if y_is_loss else best.max()).reindex(grid)
    ordered = best if x_is_loss else best[::-1]
    running = ordered.cummin() if y_is_loss else ordered.cummax()
    return (running if x_is_loss else running[::-1]).to_numpy()


def _draw_sparsities(axes: Axes, points: pd.DataFrame) -> None:
    """The sparsity beside each mark, where that lies upon no other mark and no other number; else the table has it."""
    axes.autoscale_view()  # settles what the axes show
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    places = axes.transData.transform(points[["x", "y"]]) * 72 / figure.dpi  # in the unit of a font's size
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    for point, (x, y) in zip(points.itertuples(), places, strict=True):
        text, size = f"{point.sparsity:g}", 6
        width = 0.6 * size * len(text)
        for right, up in ((4, 3), (4, -9), (-4 - width, 3), (-4 - width, -9)):
            box = (x + right, y + up, x + right + width, y + up + size)
            free = all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken)
            if free and point.sparsity:
                axes.annotate(
                    text, (point.x, point.y), textcoords="offset points", xytext=(right, up), fontsize=size, color="0.3"
                )
                taken.append(box)
                break


def _finish(axes: Axes, points: pd.DataFrame, x: str, y: str, *, y_is_loss: bool) -> None:
    for dense in points[points.baseline].itertuples():
        axes.axhline(dense.y, color="0.55", linewidth=0.8, linestyle="--", zorder=0)
        if x != "sparsity":
            axes.axvline(dense.x, color="0.55", linewidth=0.8, linestyle="--", zorder=0)
        drawn = axes.errorbar(
            [dense.x],
            [dense.y],
            yerr=None if np.isnan(dense.y_low) else [[dense.y - dense.y_low], [dense.y_high - dense.y]],
            marker="*",
            color="black",
            markersize=8,
            elinewidth=0.8,
            capsize=1.5,
            linestyle="none",
            zorder=4,
        )
        for bar in drawn.lines[2]:
            bar.set_linestyle(_OVER[dense.interval])
    if points.baseline.any():
        axes.plot([], [], marker="*", color="black", markersize=7, linestyle="none", label="dense")
    if y_is_loss and len(points) and points.y.max() > _EXPLODES * points.y.min() > 0:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(_plain)  # 200, and not 2 times a power of ten, which takes more room
        axes.yaxis.set_minor_formatter(_plain if points.y.max() < 1000 * points.y.min() else "")
    better = "lower" if y_is_loss else "higher"
    axes.set_xlabel(label(x))
    axes.set_ylabel(f"{label(y)}\n({better} is better)")
    _pin_label(axes)


def _pin_label(axes: Axes) -> None:
    """Place the label of the y axis from the figure's edge: placed from the ticks, long numbers push it out."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    box, inches = axes.get_position(), figure.get_figwidth()
    axes.yaxis.set_label_coords((_LABEL / inches - box.x0) / box.width, 0.5)


def _plain(value: float, _: object = None) -> str:
    """A tick as a short number; every other one of a decade stays bare, or they would run into each other."""
    leading = value / 10 ** math.floor(math.log10(value) + 1e-9)
    if round(leading) not in (1, 2, 5):
        return ""
    for power, letter in ((1e6, "M"), (1e3, "k")):
        if power <= value < 1e9:
            return f"{value / power:g}{letter}"
    return f"{value:g}"


def _legend(axes: Axes, extra: Mapping[str, Line2D] | None = None) -> None:
    """Above the axes, where no point can be, in as many lines as it takes: the figure grows, the axes stay."""
    handles, names = axes.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True)) | dict(extra or {})
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    inches, height = figure.get_size_inches()
    entries = {"\n".join(textwrap.wrap(name, int((inches - 0.45) / 0.058))): handle for name, handle in entries.items()}
    longest = max((len(line) for name in entries for line in name.split("\n")), default=1)
    columns = max(1, min(len(entries), int((inches - 0.2) / (0.33 + 0.062 * longest))))
    box = axes.get_position()
    lines = sum(name.count("\n") + 1 for name in entries)
    legend_height = 0.13 * -(-lines // columns) + 0.08
    total = height + legend_height
    figure.set_size_inches(inches, total)
    axes.set_position((box.x0, box.y0 * height / total, box.width, box.height * height / total))
    with matplotlib.rc_context(_STYLE):
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="upper left",
            bbox_to_anchor=(0.02, 1 - 0.02 / total),
            ncols=columns,
            frameon=False,
            borderaxespad=0,
            borderpad=0.2,
            handletextpad=0.5,
            columnspacing=1.0,
            labelspacing=0.35,
        )
