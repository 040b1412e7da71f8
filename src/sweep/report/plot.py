"""Figures from rows, sized for a paper: quality against what is gained or sparsity, speed-up, loss by benchmark. No torch.

A figure shows only what the rows hold: a point without an interval has no bar, and a failed cell has no point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sweep.metrics import BANDS, is_exp
from sweep.report import drawing, frontier, names
from sweep.report.drawing import COLOURS, FORMATS, WIDTHS, save  # noqa: F401  for those who draw figures of their own
from sweep.report.evidence import NOTHING, Evidence
from sweep.report.names import series
from sweep.report.overview import Gain, Overview, on_frontier, shown_gains
from sweep.store.columns import is_loss, label, scale

_EXPLODES = 10.0  # a loss that spans more than this factor is drawn on a log scale
_NEAR = 50.0  # per cent of quality: what keeps less is far from dense
_SLOWEST = 0.7  # times as fast as dense, likewise
_LABELLED = 24  # more points than this, and their sparsities are left to the table
_NUMBERED = 100  # likewise of the numbers of what is beyond an overview
_HEAT_LINES = 40
_DARKEST_LOSS = 3.0  # nats a token
_UNEVEN = 0.005  # standard deviation of the blocks' shares from which they are worth a figure


def overview_figure(found: Overview, width: str = "page") -> Figure:
    """Quality kept against what is gained: measured speed, and bytes; against sparsity where nothing is gained.

    One mark a recipe, in the order of its sparsity along a thin line from the dense model. The axes belong to what is near
    the dense model: a point beyond them stands at the edge, as an arrow with its numbers. Two gains stand side by side on a
    page, else one above the other.
    """
    gains: list[Gain | None] = [*shown_gains(found)] or [None]
    figure, panels = drawing.panels(width, len(gains))
    for axes, gain in zip(panels, gains, strict=True):
        _draw_overview(axes, found, gain)
        axes.set_xlabel(label("sparsity") if gain is None else gain.label)
        if axes is panels[0] or width == "column":
            axes.set_ylabel("quality kept (%)")
            drawing.pin_label(axes)
    bars = found.points[["kept_low", "kept_high"]].notna().any(axis=None)
    drawing.legend(panels[0], {"95 % interval": Line2D([], [], color="0.3", linewidth=0.9)} if bars else {})
    return figure


def _draw_overview(axes: Axes, found: Overview, gain: Gain | None) -> None:
    """One panel: the frontier, each recipe's marks and bars, and at the edges what is beyond them."""
    points = _placed(found, gain)
    low, high, floor, top = _near_dense(points, gain)
    axes.set(xlim=(low, high), ylim=(floor, top))
    axes.axhline(100.0, color="0.55", linewidth=0.8, linestyle="--", zorder=0)
    if gain is not None:
        axes.axvline(1.0, color="0.55", linewidth=0.8, linestyle="--", zorder=0)
        edge = points[on_frontier(points, gain)].sort_values("x")
        x, y = [low, *edge.x], [edge.y.iloc[0], *edge.y]
        axes.plot(x, y, color="0.55", linewidth=1.0, drawstyle="steps-pre", zorder=1, label="frontier")
    styles, dense = drawing.styles_of(points), points[points.baseline].head(1)
    words = []
    for name, line in points[~points.baseline].groupby("name", sort=True):
        colour, mark, _ = style = styles[str(name)]
        has_own = style is not drawing.OTHERS
        line = line.sort_values("sparsity")
        if has_own:
            axes.plot([*dense.x, *line.x], [*dense.y, *line.y], color=colour, linewidth=0.7, alpha=0.5, zorder=2)
        bars: dict[str, Any] = {"color": colour, "linewidth": 0.9, "alpha": 0.6, "zorder": 2.5}
        axes.vlines(line.x, line.y_low, line.y_high, **bars)
        axes.hlines(line.y, line.x_low, line.x_high, **bars)
        inside = line.x.between(low, high) & (line.y >= floor)
        axes.plot(
            line.x[inside], line.y[inside], linestyle="none", marker=mark, color=colour, zorder=2 + has_own, label=name
        )
        words += _sparsities(line[inside]) if len(points) <= _LABELLED else []
        for at, quality in line.loc[~inside, ["x", "y"]].to_numpy(dtype=float):
            x, y = np.clip(at, low, high), np.clip(quality, floor, top)
            arrow = "v" if quality < floor else "<" if at < low else ">"
            axes.plot([x], [y], linestyle="none", marker=arrow, color=colour, clip_on=False, zorder=4)
            numbers = ([f"{quality:.0f} %"] if quality < floor else []) + ([names.times(at)] if x != at else [])
            words += [drawing.Beside(x, y, ", ".join(numbers), colour, needed=True)] if has_own else []
    axes.plot(dense.x, dense.y, marker="*", color="black", markersize=8, linestyle="none", zorder=4, label="dense")
    marks = [points.x.clip(low, high), points.y.clip(floor, top)]
    drawing.write_beside(axes, words if len(points) <= _NUMBERED else [], np.transpose(marks))


def _placed(found: Overview, gain: Gain | None) -> pd.DataFrame:
    """The points that a panel shows, with x, y and their ends, and whether they are on its frontier."""
    of_x = ["sparsity"] * 3 if gain is None else [gain.name + end for end in ("", "_low", "_high")]
    points = found.points.assign(
        **{f"x{end}": found.points[name] for end, name in zip(("", "_low", "_high"), of_x, strict=True)},
        **{f"y{end}": 100 * found.points[f"kept{end}"] for end in ("", "_low", "_high")},
    )
    points = points[np.isfinite(points.x) & np.isfinite(points.y)]
    on = on_frontier(points, gain) if gain is not None else np.zeros(len(points), dtype=bool)
    return points.assign(standing=np.where(on, frontier.ON, frontier.OFF))


def _near_dense(points: pd.DataFrame, gain: Gain | None) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of an overview: what keeps half of the quality, and is not far slower than dense."""
    near = points.y[points.y >= _NEAR]
    floor = min(90.0, 5 * math.floor((near.min() - 2) / 5))
    x = points.x[points.y >= floor]
    ends = (0.0, max(x.max(), 0.1)) if gain is None else (max(min(x.min(), 0.97), _SLOWEST), max(x.max(), 1.1))
    margin = 0.05 * (ends[1] - ends[0])
    return ends[0] - margin, ends[1] + margin, floor, max(102.0, near.max() + 3)


def _sparsities(points: pd.DataFrame) -> list[drawing.Beside]:
    """The sparsity beside each mark; where marks are many, the table has it."""
    pruned = points[points.sparsity > 0] if len(points) <= _LABELLED else points.iloc[:0]
    return [drawing.Beside(point.x, point.y, f"{point.sparsity:g}") for point in pruned.itertuples()]


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
    figure, axes = drawing.new(width)
    drawing.draw_frontier(axes, points, **losses)
    drawing.draw_series(axes, points, joined=False, y_is_loss=losses["y_is_loss"])
    _finish(axes, points, cost, metric, y_is_loss=losses["y_is_loss"])
    axes.autoscale_view()  # settles what the axes show
    drawing.write_beside(axes, _sparsities(points), points[["x", "y"]])
    drawing.legend(axes, drawing.hollow(points, "within noise of the frontier") | drawing.kinds(points))
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
    figure, axes = drawing.new(width)
    drawing.draw_series(axes, points, joined=True, y_is_loss=is_loss(metric, rows))
    _finish(axes, points, "sparsity", metric, y_is_loss=is_loss(metric, rows))
    drawing.legend(axes, drawing.hollow(points, "within noise of dense") | drawing.kinds(points))
    return figure


def speedup_figure(rows: pd.DataFrame, phase: str = "decode", width: str = "column") -> Figure:
    """Measured speed-up against sparsity, and beside it, dashed, the one that the MACs alone would promise."""
    column = f"{phase}_speedup"
    points = _prepared(rows, "sparsity", column)
    points["standing"] = frontier.ON
    figure, axes = drawing.new(width)
    drawing.draw_series(axes, points, joined=True)
    counted = _prepared(with_counted_speedup(rows), "sparsity", "counted_speedup")
    counted = counted[~counted.baseline]
    styles = drawing.styles_of(points)
    for name, line in counted.groupby(series(counted), sort=True):
        colour = styles[name][0] if name in styles else "0.5"
        line = line.sort_values("x")
        axes.plot(line.x, line.y, color=colour, linestyle=(0, (1, 2)), linewidth=1.0, zorder=2)
    axes.axhline(1.0, color="0.3", linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlabel(label("sparsity"))
    axes.set_ylabel(f"{phase} speed-up over dense (measured)")
    counts = {"counted: dense MACs / non-zero MACs": Line2D([], [], color="0.3", linestyle=(0, (1, 2)))}
    drawing.legend(axes, counts | drawing.kinds(points))
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
    figure, axes = drawing.new(
        width, height=0.19 * len(drops), left=min(0.15 + 0.058 * longest, 0.7 * drawing.WIDTHS[width])
    )
    axes.grid(visible=False)
    values = drops.to_numpy(dtype=float)
    axes.imshow(
        np.clip(values, -darkest / 5, darkest),
        aspect="auto",
        cmap="PuOr_r",
        norm=TwoSlopeNorm(0.0, vmin=-darkest, vmax=darkest),
    )
    axes.set_xticks(range(drops.shape[1]), list(columns) or [label(c).replace(", ", "\n", 1) for c in drops.columns])
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
    for kind, columns in by_kind.items():
        lost = drop_table(rows, columns)
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
    figure, axes = drawing.new(width)
    drawing.draw_series(axes, points, joined=False)
    axes.axline((1, 1), slope=1, color="0.3", linewidth=0.9, linestyle="--", zorder=0)
    axes.axhline(1.0, color="0.8", linewidth=0.7, zorder=0)
    axes.axvline(1.0, color="0.8", linewidth=0.7, zorder=0)
    axes.set_xlabel("speed-up of a token over dense (measured)")
    axes.set_ylabel(f"speed-up of an answer\non {task} (measured)")
    drawing.pin_label(axes)
    drawing.legend(
        axes, {"answers as long as dense ones": Line2D([], [], color="0.3", linestyle="--")} | drawing.kinds(points)
    )
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
    figure, axes = drawing.new(width)
    styles = drawing.styles_of(rows)
    for (name, sparsity), line in drops[distance == distance.groupby(level=0).transform("min")].iterrows():
        colour, mark, dashes = styles[name]
        axes.plot(
            [places[c] for c in drops], line, color=colour, marker=mark, linestyle=dashes, label=f"{name} {sparsity:g}"
        )
    axes.axhline(0.0, color="0.3", linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlabel("tokens before, at least")
    axes.set_ylabel(f"nats a token added on {task}")
    drawing.pin_label(axes)
    drawing.legend(axes)
    return figure


def flips_figure(flips: pd.DataFrame, task: str, width: str = "column") -> Figure:
    """Answers of a task that turned, against sparsity, as shares of its documents; means over seeds.

    flips  rows with `lost` (right to wrong, solid and filled) and `gained` (wrong to right, dashed and hollow)
    """
    figure, axes = drawing.new(width)
    styles = drawing.styles_of(flips)
    for name, line in flips.groupby(series(flips), sort=True):
        colour, mark, _ = styles[name]
        line = line.groupby("sparsity")[["lost", "gained"]].mean()
        axes.plot(line.index, line.lost, color=colour, marker=mark, label=name)
        axes.plot(line.index, line.gained, color=colour, marker=mark, linestyle="--", markerfacecolor="white")
    axes.set_xlabel(label("sparsity"))
    axes.set_ylabel(f"answers that turned on {task}\n(share of documents)")
    axes.set_ylim(bottom=0)
    drawing.pin_label(axes)
    style: dict[str, Any] = {"color": "0.3", "marker": "o"}
    drawing.legend(
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
    figure, axes = drawing.new(width)
    styles = drawing.styles_of(rows)
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
    drawing.pin_label(axes)
    drawing.legend(axes)
    return figure


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
            bar.set_linestyle(drawing.OVER[dense.interval])
    if points.baseline.any():
        axes.plot([], [], marker="*", color="black", markersize=7, linestyle="none", label="dense")
    if y_is_loss and len(points) and points.y.max() > _EXPLODES * points.y.min() > 0:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(drawing.plain)  # 200, and not 2 times a power of ten, which takes more room
        axes.yaxis.set_minor_formatter(drawing.plain if points.y.max() < 1000 * points.y.min() else "")
    better = "lower" if y_is_loss else "higher"
    axes.set_xlabel(label(x))
    axes.set_ylabel(f"{label(y)}\n({better} is better)")
    drawing.pin_label(axes)
