"""What is left of the dense model's quality, and what is gained for it: two numbers a point that compare all recipes. No torch.

Quality kept is a mean over benchmarks of what is left between guessing and the dense model: 1 is the dense model, 0 is
chance, which accuracies of multiple choice have and nothing else does. Of a loss it is the dense model's over this
one's: of a perplexity, the probability of a token, which is its inverse. A benchmark on which the dense model itself is
not told from guessing says nothing, and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student
from tabulate import tabulate

from sweep import metrics as task_metrics
from sweep.metrics import is_exp, stderr
from sweep.report import frontier, names, variants
from sweep.report.evidence import NOTHING, Evidence
from sweep.store.columns import is_loss, label

_Z = 1.96  # standard errors from the mean to an end of its 95 % interval
_LINES = 20  # of the overview in words
_NOISE_OF_MEMORY = 0.05  # resident memory of equal models differs by up to 3 % from one process to the next


@dataclass(frozen=True)
class Gain:
    """What a recipe may buy: by how many times it is better than the dense model, whose gain is 1."""

    name: str  # of its column in the decision table
    label: str  # of an axis
    column: str  # of the rows: a measured speed-up, or what the dense model's is divided by
    at_least: float = 0.0  # what must be gained to be one, beside the interval

    @property
    def measured(self) -> bool:
        """Whether it was timed beside the dense model, and so has an interval of its own."""
        return self.column.endswith("_speedup")


GAINS = (
    Gain("decode", "speed-up of decoding over dense (measured)", "decode_speedup"),
    Gain("prefill", "speed-up of reading a prompt over dense (measured)", "prefill_speedup"),
    Gain("memory", "times less peak memory than dense", "peak_memory_bytes", at_least=_NOISE_OF_MEMORY),
    Gain("stored bytes", "times fewer stored bytes than dense", "stored_bytes", at_least=0.001),
)


@dataclass(frozen=True)
class Overview:
    """The points of some rows, and of what their quality is the mean.

    points  SAME_POINT, point, seeds, name, kept, kept_low, kept_high, interval, and of each gain NAME, NAME_low, NAME_high,
            `NAME_sure`: whether it is one beyond noise. Intervals are of 95 %, NaN where none is known.
    """

    points: pd.DataFrame
    benchmarks: tuple[str, ...]
    notes: tuple[str, ...]  # what was left out, and why
    gains: tuple[Gain, ...]  # that any pruned point has

    @property
    def meaning(self) -> str:
        """What quality kept is here, in a sentence."""
        over = "; ".join(map(label, self.benchmarks))
        mean = f"mean of {len(self.benchmarks)} benchmarks ({over})" if len(self.benchmarks) > 1 else over
        return f"Quality kept: {mean}, of which 100 % is the dense model and 0 % is chance."


def overview(rows: pd.DataFrame, metrics: Sequence[str], evidence: Evidence = NOTHING) -> Overview | None:
    """None where nothing of quality was measured of a pruned model and its dense one.

    rows  that are ok; numbered by frontier.numbered where `evidence` knows their documents
    """
    rows = rows if "point" in rows else frontier.numbered(rows)
    used, notes = _benchmarks(rows, metrics)
    if not used:
        return None
    points = frontier.points(rows.assign(kept=_kept(rows, used)), "sparsity", "kept")
    points = points.drop(columns=["x", "x_low", "x_high"])
    points = points.rename(columns={"y": "kept", "y_low": "kept_low", "y_high": "kept_high"})
    if points.baseline.all():
        return None
    points = _with_documents(points, rows, used, evidence)
    points["name"] = names.series(points)
    found = []
    for gain in GAINS:
        points = points.join(_gain(rows, gain), on="point")
        if points.loc[~points.baseline, gain.name].notna().any():
            found.append(gain)
    return Overview(points, tuple(used), tuple(notes), tuple(found))


def with_kept(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The rows with `quality_kept`, NaN where it cannot be told."""
    used, _ = _benchmarks(rows, metrics)
    return rows.assign(quality_kept=_kept(rows, used) if used else np.nan)


def words(found: Overview) -> str:
    """The overview as a table of 100 columns: the recipes on a frontier, and others as far as there is room."""
    gain = next(iter(shown_gains(found)), None)
    points = found.points.sort_values(["baseline", "kept"], ascending=[False, False], kind="stable")
    best = on_frontier(points, gain) if gain else np.zeros(len(points), dtype=bool)
    shown = points.assign(best=best)
    if len(shown) > _LINES:
        shown = pd.concat([shown[shown.best | shown.baseline], shown[~shown.best & ~shown.baseline]]).head(_LINES)
        shown = shown.sort_values(["baseline", "kept"], ascending=[False, False], kind="stable")
    lines = [
        {
            "": "*" if point.best and not point.baseline else "",
            "recipe": names.recipe(point["name"], point.sparsity),
            "quality kept": names.percent(point.kept, point.kept_low, point.kept_high),
            **{g.name: "-" if np.isnan(point[g.name]) else names.times(point[g.name]) for g in found.gains},
        }
        for _, point in shown.iterrows()
    ]
    table = tabulate(lines, headers="keys", disable_numparse=True, maxcolwidths=[None, 36])
    more = f"\n{len(points) - len(shown)} more in the report" if len(points) > len(shown) else ""
    star = f"\n*: no other keeps as much and gains as much in {gain.name}" if gain else ""
    return f"{found.meaning}\n\n{table}{star}{more}"


def on_frontier(points: pd.DataFrame, gain: Gain) -> np.ndarray:
    """Which points nothing outdoes in quality and gain."""
    known = points[gain.name].notna().to_numpy()
    on = np.zeros(len(points), dtype=bool)
    on[known] = frontier.undominated(-points[gain.name][known], -points.kept[known])
    return on


def _varies(points: pd.DataFrame, gain: Gain) -> bool:
    """Whether a gain tells any two recipes apart."""
    values = points.loc[~points.baseline, gain.name].dropna()
    return bool(abs(values - 1).max() > max(0.01, gain.at_least)) if len(values) else False


def shown_gains(found: Overview) -> list[Gain]:
    """The speed and the size of an overview: the first speed, and the last size, that tells any two recipes apart."""
    varying = [gain for gain in found.gains if _varies(found.points, gain)]
    return [gain for gain in varying if gain.measured][:1] + [gain for gain in varying if not gain.measured][-1:]


def chance(rows: pd.DataFrame, metric: str) -> pd.Series:
    """What guessing gives of a metric, row by row: 0 of what cannot be guessed.

    Of a group of tasks the mean over its parts; of rows from before it was kept what is known of the task.
    """
    task = metric.partition("/")[0]
    if not task_metrics.guesses(metric):
        return pd.Series(0.0, index=rows.index)
    told = rows.get(f"{task}/chance")
    if told is None:
        parts = [name for name in rows if name.startswith(f"{task}_") and name.endswith("/chance")]
        told = rows[parts].mean(axis=1) if parts else pd.Series(np.nan, index=rows.index)
    return told.fillna(task_metrics.CHANCE.get(task, 0.0))


def _benchmarks(rows: pd.DataFrame, metrics: Iterable[str]) -> tuple[list[str], list[str]]:
    """(those that tell something, what is said of the others). A group of tasks that was asked for counts once."""
    used: list[str] = []
    blind: list[str] = []
    there = {metric.partition("/")[0] for metric in metrics}
    asked = (
        {task for text in rows.config.dropna().unique() for task in variants.tasks(text)} if "config" in rows else set()
    )
    for metric in metrics:
        task = metric.partition("/")[0]
        part = task not in asked and any(task.startswith(f"{group}_") for group in asked & there)
        dense = rows[rows.baseline & rows[metric].notna()]
        if part or dense.empty:
            continue
        above = dense[metric] - chance(dense, metric)
        noise = _Z * dense.get(stderr(metric), pd.Series(0.0, index=dense.index)).fillna(0.0)
        silent = not is_loss(metric, rows) and (above <= noise).any()
        (blind if silent else used).append(metric)
    notes = [f"Not in it: {'; '.join(map(label, blind))}, where the dense model is not told from guessing."]
    return used, notes if blind else []


def _kept(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.Series:
    """The mean over benchmarks, row by row; NaN where one is missing that the dense row has."""
    shares, there = [], []
    for metric in metrics:
        dense = frontier.dense_value(rows, metric)
        if is_loss(metric, rows):
            shares.append(dense / rows[metric])
        else:
            floor = chance(rows, metric)
            shares.append((rows[metric] - floor) / (dense - floor))
        there.append(dense.notna())
    kept, asked = pd.concat(shares, axis=1), pd.concat(there, axis=1)
    complete = (kept.notna().to_numpy() | ~asked.to_numpy()).all(axis=1)
    mean = kept.mean(axis=1).where(complete)
    return mean.where(~rows.baseline | mean.isna(), 1.0)


def _with_documents(
    points: pd.DataFrame, rows: pd.DataFrame, metrics: Sequence[str], evidence: Evidence
) -> pd.DataFrame:
    """The points with the interval over documents, and the wider ends of both where there are several seeds."""
    variance, parts, degrees = (np.zeros(len(points)) for _ in range(3))
    dense = frontier.dense_of(points)
    known = ~points.baseline.to_numpy() & (dense >= 0)
    for metric in metrics:
        mine = frontier.points(rows, "sparsity", metric).set_index("point").reindex(points.point)
        floor = chance(rows, metric).groupby(rows.point).first().reindex(points.point).to_numpy()
        value = mine.y.to_numpy()
        # One seed's error over documents: that of several is not a sum of independent ones.
        error = rows.get(stderr(metric), pd.Series(np.nan, index=rows.index)).groupby(rows.point).mean()
        spread = error.reindex(points.point).to_numpy(dtype=float)
        lower_is_better = is_loss(metric, rows)
        for i in np.flatnonzero(known & np.isfinite(value)):
            j = dense[i]
            added, free = _variance(
                evidence.pair(metric, points.point[i], points.point[j]),
                metric,
                (value[i], value[j]),
                (spread[i], spread[j]),
                floor[i],
                lower_is_better=lower_is_better,
            )
            variance[i] += added
            degrees[i] += added**2 / free
            parts[i] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.where(degrees > 0, variance**2 / degrees, np.inf)  # Welch and Satterthwaite
        half = student.ppf(0.975, freedom) * np.sqrt(variance) / parts
    half[~known | (parts == 0)] = np.nan
    low, high = points.kept - half, points.kept + half
    interval = np.where(
        np.isfinite(half), np.where(points.seeds > 1, "documents and seeds", "documents"), points.interval
    )
    return points.assign(
        kept_low=np.fmin(points.kept_low, low), kept_high=np.fmax(points.kept_high, high), interval=interval
    )


def _variance(
    pair: tuple | None,
    metric: str,
    values: tuple[float, float],
    errors: tuple[float, float],
    floor: float,
    *,
    lower_is_better: bool,
) -> tuple[float, float]:
    """(variance, degrees of freedom) of what is kept of one benchmark, to first order.

    pair    the estimates of the point and of the dense one where both answered the same documents
    values  of both; errors: their standard errors, for where there is no pair
    """
    (y, d), (error, dense_error) = values, errors
    if pair is not None:
        mine, other = (estimate.residuals for estimate in pair)
        if is_exp(metric):  # residuals are those of the loss
            moved = d / y * (other - mine)
        elif lower_is_better:
            moved = other / y - d / y**2 * mine
        else:
            moved = (mine - (y - floor) / (d - floor) * other) / (d - floor)
        n = len(moved)
        return float((moved**2).sum() * n / (n - 1)) if n > 1 else np.nan, max(n - 1, 1)
    if lower_is_better:
        return (d / y) ** 2 * ((error / y) ** 2 + (dense_error / d) ** 2), np.inf
    return (error**2 + ((y - floor) / (d - floor) * dense_error) ** 2) / (d - floor) ** 2, np.inf


def _gain(rows: pd.DataFrame, gain: Gain) -> pd.DataFrame:
    """By point, the gain as NAME, with its ends, and whether it is one beyond noise: medians over seeds.

    A speed-up counts where its interval is above 1 and it exceeds what the dense model gains on itself in the same repeats by
    more than both vary: as logarithms, by the root of the sum of the squares of the half-widths of their intervals.
    """
    if gain.measured:
        ends = [f"{gain.column}{end}" for end in ("", "_low", "_high")]
        control = [gain.column.replace("_speedup", f"_control{end}") for end in ("", "_high")]
        asked = pd.DataFrame({name: rows.get(name, np.nan) for name in [*ends, *control]}, index=rows.index).astype(
            float
        )
        asked[ends[0]] = asked[ends[0]].where(~rows.baseline, 1.0)
        asked.loc[rows.baseline, ends[1:]] = np.nan
        by_point = asked.groupby(rows.point).median()
        value, low, high = (by_point[name] for name in ends)
        noise, noise_high = (by_point[name].fillna(1.0).clip(lower=1.0) for name in control)
        apart = np.hypot(np.log(value / low), np.log(noise_high / noise))
        sure = (low > 1) & (np.log(value / noise) > apart)
    else:
        column = gain.column
        if column == "peak_memory_bytes" and rows.get("peak_device_memory_bytes", pd.Series(dtype=float)).notna().any():
            column = "peak_device_memory_bytes"
        if column not in rows:
            rows = rows.assign(**{column: np.nan})
        value = (frontier.dense_value(rows, column) / rows[column].astype(float)).groupby(rows.point).median()
        low = high = pd.Series(np.nan, index=value.index)
        sure = value > 1 + gain.at_least
    named = {gain.name: value, f"{gain.name}_low": low, f"{gain.name}_high": high, f"{gain.name}_sure": sure}
    return pd.DataFrame(named)
