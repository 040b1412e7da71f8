"""Which cell to use, in words: from the rows, with their uncertainty, and never past what they say."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sweep.report import frontier, plot
from sweep.report.chance import LEVEL
from sweep.report.evidence import NOTHING, Evidence
from sweep.report.summary import number
from sweep.store.columns import is_loss, label, scale

_DRAWS = 500  # resamplings of the knee


def cheapest_within(
    rows: pd.DataFrame, cost: str, metric: str, max_drop: float, relative: bool, evidence: Evidence = NOTHING
) -> str:
    """The cheapest cell that loses at most `max_drop` of the metric against dense, in a sentence.

    max_drop  a fraction of the dense value when `relative`, else in the metric's own unit
    Certain is what the whole interval of the difference from dense allows.
    """
    points = _named(rows, cost, metric)
    dense = points[points.baseline]
    limit_text = f"{100 * max_drop:g} %" if relative else f"{max_drop:g}"
    start = f"At most {limit_text} worse than dense on {label(metric)}: "
    if dense.empty:
        return f"{start}cannot be told, since the rows hold no dense cell."
    sign = 1 if is_loss(metric, rows) else -1
    per_row = frontier.dense_value(points, "y")
    allowance = max_drop * abs(per_row) if relative else pd.Series(max_drop, index=points.index)
    drop = sign * (points.y - per_row)
    kept = points[~points.baseline & (drop <= allowance)]
    cheaper = kept.sort_values("x", ascending=is_loss(cost, rows), kind="stable")
    if cheaper.empty:
        return f"{start}no pruned cell."
    best = cheaper.iloc[0]
    text = f"{start}{_describe(best, cost, metric)}."
    of, dense_of = points.index.get_indexer(cheaper.index), frontier.dense_of(points)
    if np.isnan(evidence.interval(points, of[0], dense_of[of[0]], metric)).any():
        return text + " It has no interval: add seeds before relying on it."
    told = evidence.p_values(points, of, dense_of[of], metric, sign * allowance.to_numpy()[of]) < LEVEL
    sure = cheaper[told & (drop.to_numpy()[of] < allowance.to_numpy()[of])]
    if best.name in sure.index:
        return text + " Its whole interval is within the limit."
    text += " Its interval reaches past the limit, so this is within noise"
    if sure.empty:
        return text + "; no pruned cell is within it for certain."
    return text + f"; the cheapest that is within it for certain: {_describe(sure.iloc[0], cost, metric)}."


def best_within(rows: pd.DataFrame, cost: str, metric: str, limit: float, evidence: Evidence = NOTHING) -> str:
    """The best metric among the cells whose cost is at most `limit` (in the column's unit), in a sentence."""
    points = _named(rows, cost, metric)
    shown = f"{number(limit / scale(cost))}"
    start = f"Best {label(metric)} with {label(cost)} at most {shown}: "
    affordable = points[points.x <= limit].reset_index(drop=True)
    if affordable.empty:
        cheapest = points.x.min() / scale(cost)
        return f"{start}no cell; the cheapest needs {number(cheapest)}."
    best = affordable.sort_values("y", ascending=is_loss(metric, rows), kind="stable").iloc[0]
    others = affordable.index.drop(best.name).to_numpy()
    tied = affordable.loc[others[evidence.alike(affordable, others, np.full(len(others), best.name), metric)]]
    text = f"{start}{_describe(best, cost, metric)}."
    if best.x_high > limit:
        text += " The interval of its cost reaches past the limit."
    if len(tied):
        names = sorted(set(tied.name_ + " at " + tied.sparsity.map("{:g}".format)))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text += f" Within noise of it: {', '.join(names[:3])}{more}."
    return text


def knee(rows: pd.DataFrame, cost: str, metric: str, evidence: Evidence = NOTHING) -> str:
    """The knee of the frontier: the point farthest from the line between its ends, and how sure that is.

    A loss that spans more than a factor of ten is taken by its logarithm. All points are drawn again 500 times, their
    costs within their intervals (taken as normal), their metrics as evidence.redrawn does: other documents would move
    all of them together. The share of the draws with the same knee is said.
    """
    points = _named(rows, cost, metric).reset_index(drop=True)
    start = f"Knee of {label(metric)} against {label(cost)}: "
    losses = {"x_is_loss": is_loss(cost, rows), "y_is_loss": is_loss(metric, rows)}
    at = _knee(points.x.to_numpy(), points.y.to_numpy(), **losses)
    if at is None:
        return f"{start}none; the frontier has fewer than three points."
    if points.y_low.isna().all() and not evidence.pairs(metric):
        return f"{start}{_describe(points.loc[at], cost, metric)}; without intervals, how sure that is cannot be said."
    draw, lowest = np.random.default_rng(0), points.y.min() * 1e-3
    spread = ((points.x_high - points.x_low) / 3.92).fillna(0).to_numpy()
    xs = points.x.to_numpy() + spread * draw.standard_normal((_DRAWS, len(points)))
    ys = np.maximum(evidence.redrawn(points, metric, draw, _DRAWS), lowest)
    same = sum(_knee(x, y, **losses) == at for x, y in zip(xs, ys, strict=True))
    return f"{start}{_describe(points.loc[at], cost, metric)} (in {100 * same / _DRAWS:.0f} % of {_DRAWS} redraws)."


def break_even(rows: pd.DataFrame, phase: str = "decode") -> list[str]:
    """For each method, the lowest sparsity from which every measured point is faster than dense for certain."""
    points = frontier.points(rows, "sparsity", f"{phase}_speedup")
    points["name_"] = plot.series(points)
    sentences = []
    low = rows.groupby([c for c in frontier.SAME_POINT if c in rows], dropna=False)[f"{phase}_speedup_low"].min()
    points = points.merge(low.rename("lowest").reset_index(), how="left")
    for name, line in points[~points.baseline].groupby("name_"):
        line = line.sort_values("sparsity", ascending=False)
        sure = line[(line.lowest > 1.0).cummin()]
        if sure.empty:
            best = line.loc[line.y.idxmax()]
            sentences.append(
                f"{name}: {phase} is nowhere faster than dense for certain "
                f"(best {best.y:.2f}x at sparsity {best.sparsity:g})."
            )
        else:
            first = sure.iloc[-1]
            sentences.append(
                f"{name}: {phase} is faster than dense from sparsity {first.sparsity:g} on "
                f"({first.y:.2f}x there, {line.y.max():.2f}x at best)."
            )
    return sentences


def _named(rows: pd.DataFrame, cost: str, metric: str) -> pd.DataFrame:
    points = frontier.points(rows, cost, metric)
    return points.assign(name_=plot.series(points))[np.isfinite(points.x) & np.isfinite(points.y)]


def _knee(x: np.ndarray, y: np.ndarray, *, x_is_loss: bool, y_is_loss: bool) -> int | None:
    """The index of the frontier point farthest from the chord between the frontier's ends, both axes scaled to 1."""
    on = frontier.undominated(x if x_is_loss else -x, y if y_is_loss else -y)
    index = np.flatnonzero(on)[np.argsort(x[on], kind="stable")]
    if len(index) < 3:
        return None
    a, b = x[index], y[index]
    if y_is_loss and b.min() > 0 and b.max() > 10 * b.min():
        b = np.log(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = (a - a[0]) / (a[-1] - a[0]), (b - b[0]) / (b[-1] - b[0])
    return int(index[1:-1][np.argmax(np.abs(a - b)[1:-1])])


def _describe(point: pd.Series, cost: str, metric: str) -> str:
    at = f" at sparsity {point.sparsity:g}" if point.sparsity else ""
    return (
        f"{point.name_}{at}, {label(cost)} {_with_interval(point, 'x', cost)}, "
        f"{label(metric)} {_with_interval(point, 'y', metric)}"
    )


def _with_interval(point: pd.Series, axis: str, column: str) -> str:
    value, low, high = (point[axis + end] / scale(column) for end in ("", "_low", "_high"))
    text = number(value)
    return f"{text} ({number(low)} to {number(high)})" if pd.notna(low) and high > low else text
