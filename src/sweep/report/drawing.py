"""How figures look: their size, marks, bars, words beside marks, legends and files. No torch.

Every method has its own colour, mark and line, so that a figure survives grey printing and colour-blind eyes.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from sweep.report import frontier
from sweep.report.names import series

WIDTHS = {"column": 3.35, "page": 6.9}  # inches; one and two columns of the usual conference styles
FORMATS = ("png", "svg", "pdf")
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]  # Okabe and Ito, 2008
MOST_NAMED = 12  # methods of a figure that have a colour and a line of its legend
OTHERS = ("0.72", ".", ":")  # colour, mark and line of all beyond these
_MARKS = "os^Dv<>PXp"
_LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
OVER: dict[str, Any] = {
    "seeds": "-",
    "documents": (0, (2.5, 1)),
    "repeats": (0, (1, 0.8)),
}  # bars by what they are over
_BESIDE = 6.0  # points: the size of words beside marks
_BELOW, _ABOVE = 0.42, 0.1  # inches for the horizontal axis' words, and over the axes
_BETWEEN = 0.45  # inches between axes side by side
_LABEL = 0.28  # inches from the left edge to the foot of a two-line label of the vertical axis
_SAVED: dict[str, dict[str, Any]] = {
    "png": {"pil_kwargs": {"compress_level": 1}},  # a fifth of the time, a tenth larger
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
STYLE = {
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
        with matplotlib.rc_context(STYLE):
            figure.savefig(path.with_name(f"{path.name}.{suffix}"), dpi=300, **_SAVED.get(suffix, {}))


def new(width: str, height: float | None = None, left: float = 0.62) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, whose size is the same whatever stands around them; lengths in inches."""
    figure, (axes,) = panels(width, 1, height or 0.6 * min(WIDTHS[width], 5.0), left)
    return figure, axes


def panels(width: str, count: int, height: float = 2.1, left: float = 0.62) -> tuple[Figure, list[Axes]]:
    """A figure of several pairs of axes: side by side on a page, else one above the other; lengths in inches.

    Placed by hand: a layout engine would shrink the axes to nothing under a long legend, and takes longer than drawing.
    """
    inches, beside = WIDTHS[width], count if width == "page" else 1
    down = -(-count // beside)
    total = down * (height + _BELOW) + _ABOVE
    wide = (inches - left - 0.1 - (beside - 1) * _BETWEEN) / beside
    places = [
        (left + i % beside * (wide + _BETWEEN), _BELOW + (down - 1 - i // beside) * (height + _BELOW))
        for i in range(count)
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(inches, total))
        made = [figure.add_axes((x / inches, y / total, wide / inches, height / total)) for x, y in places]
    for axes in made:
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, made


def styles_of(points: pd.DataFrame, *, y_is_loss: bool = False) -> Mapping[str, tuple[str, str, object]]:
    """Colour, mark and line of each method, by its place in the sorted names.

    Of more than `MOST_NAMED` those have their own that are not off the frontier, where points say so, and then those of the
    best `y`; all others are `OTHERS`.
    """
    pruned = points[~points.baseline]
    by_name = pruned.assign(_name=series(pruned)).groupby("_name")
    names = sorted(by_name.groups)
    if len(names) > MOST_NAMED and "y" in points:
        rank = pd.DataFrame({"off": True, "y": by_name.y.min() if y_is_loss else -by_name.y.max()})
        if "standing" in points:
            rank["off"] = by_name.standing.agg(lambda standing: (standing == frontier.OFF).all())
        names = sorted(rank.sort_values(["off", "y"], kind="stable").index[:MOST_NAMED])
    own = {
        name: (COLOURS[i % len(COLOURS)], _MARKS[i % len(_MARKS)], _LINES[i % len(_LINES)])
        for i, name in enumerate(names[:MOST_NAMED])
    }
    return dict.fromkeys(by_name.groups, OTHERS) | own


def draw_series(axes: Axes, points: pd.DataFrame, *, joined: bool, y_is_loss: bool = False) -> None:
    """Every method's marks, intervals and, where joined, line; below those that have a style of their own, the others."""
    pruned = points[~points.baseline].sort_values(["sparsity", "x"])
    styles, names = styles_of(points, y_is_loss=y_is_loss), series(pruned).to_numpy(dtype=object)
    x, y, standing = (pruned[column].to_numpy() for column in ("x", "y", "standing"))
    bars = [
        (bar, strokes)
        for along in ("x", "y")
        for kind, strokes in OVER.items()
        if (bar := _bars(pruned, along, kind)) is not None
    ]
    for name in sorted(set(names), key=lambda name: (styles[name] is not OTHERS, name)):
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


def hollow(points: pd.DataFrame, words: str) -> dict[str, Line2D]:
    """What stands for hollow marks in a legend, if there are any."""
    mark = Line2D([], [], marker="o", color="0.3", markerfacecolor="white", linestyle="none")
    return {words: mark} if (points.standing == frontier.WITHIN_NOISE).any() else {}


def _over(points: pd.DataFrame, along: str) -> pd.Series:
    """What each point's interval along an axis is over: a cost's is that of its paired repeats."""
    kind = points.interval if along == "y" else pd.Series("repeats", index=points.index)
    return kind.where(points[f"{along}_high"] > points[f"{along}_low"], "none")


def kinds(points: pd.DataFrame) -> dict[str, Line2D]:
    """What the bars of a figure are, for its legend."""
    there = {kind for along in ("x", "y") for kind in _over(points, along)}
    return {
        f"95 % over {kind}": Line2D([], [], color="0.3", linestyle=strokes, linewidth=0.9)
        for kind, strokes in OVER.items()
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


def draw_frontier(axes: Axes, points: pd.DataFrame, *, x_is_loss: bool, y_is_loss: bool) -> None:
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


class Beside(NamedTuple):
    """Words beside a mark, in the coordinates of its axes."""

    x: float
    y: float
    text: str
    colour: str = "0.3"
    needed: bool = False  # else they may be left out where there is no room


def write_beside(axes: Axes, words: Iterable[Beside], marks: ArrayLike) -> None:
    """Each where it lies upon no mark and upon no other words; needed ones farther off where there is no room near."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    points = 72 / figure.dpi  # in a pixel
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in axes.transData.transform(np.reshape(marks, (-1, 2))) * points]
    box = axes.get_window_extent()
    left, bottom, right, top = box.x0 * points - 2, box.y0 * points, box.x1 * points + 8, box.y1 * points + 4
    for word in sorted(words, key=lambda word: not word.needed):
        x, y = axes.transData.transform((word.x, word.y)) * points
        wide = 0.55 * _BESIDE * len(word.text)
        above = (3, -9, 12, 21, 30) if word.needed else (3, -9)
        for dy, dx in itertools.product(above, (5, -5 - wide)):
            a, b, c, d = x + dx, y + dy, x + dx + wide, y + dy + _BESIDE
            free = all(c < one[0] or one[2] < a or d < one[1] or one[3] < b for one in taken)
            if free and left <= a and c <= right and bottom <= b and d <= top:
                axes.annotate(
                    word.text,
                    (word.x, word.y),
                    textcoords="offset points",
                    xytext=(dx, dy),
                    fontsize=_BESIDE,
                    color=word.colour,
                    annotation_clip=False,
                    bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3},
                )
                taken.append((a, b, c, d))
                break


def pin_label(axes: Axes) -> None:
    """Place the label of the y axis from the figure's edge: placed from the ticks, long numbers push it out."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    box, inches = axes.get_position(), figure.get_figwidth()
    axes.yaxis.set_label_coords((_LABEL / inches - box.x0) / box.width, 0.5)


def plain(value: float, _: object = None) -> str:
    """A tick as a short number; every other one of a decade stays bare, or they would run into each other."""
    leading = value / 10 ** math.floor(math.log10(value) + 1e-9)
    if round(leading) not in (1, 2, 5):
        return ""
    for power, letter in ((1e6, "M"), (1e3, "k")):
        if power <= value < 1e9:
            return f"{value / power:g}{letter}"
    return f"{value:g}"


def legend(axes: Axes, extra: Mapping[str, Line2D] | None = None) -> None:
    """Above the axes, where no point can be, in as many lines as it takes: the figure grows, the axes stay.

    What is drawn as `OTHERS` is one entry.
    """
    handles, names = axes.get_legend_handles_labels()
    entries: dict[str, Any] = dict(zip(names, handles, strict=True))
    grey = [name for name, handle in entries.items() if getattr(handle, "get_color", str)() == OTHERS[0]]
    if grey:
        one = {f"{len(grey)} others, which the table has": entries[grey[0]]}
        entries = {name: handle for name, handle in entries.items() if name not in grey} | one
    entries |= dict(extra or {})
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    inches, height = figure.get_size_inches()
    entries = {"\n".join(textwrap.wrap(name, int((inches - 0.45) / 0.058))): handle for name, handle in entries.items()}
    longest = max((len(line) for name in entries for line in name.split("\n")), default=1)
    columns = max(1, min(len(entries), int((inches - 0.2) / (0.33 + 0.062 * longest))))
    lines = sum(name.count("\n") + 1 for name in entries)
    legend_height = 0.13 * -(-lines // columns) + 0.08
    total = height + legend_height
    figure.set_size_inches(inches, total)
    for each in figure.axes:
        box = each.get_position()
        each.set_position((box.x0, box.y0 * height / total, box.width, box.height * height / total))
    with matplotlib.rc_context(STYLE):
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
