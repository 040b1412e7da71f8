"""From rows to what a figure shows: points with intervals over seeds, and the Pareto set. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from sweep import config
from sweep.metrics import is_exp, stderr
from sweep.report import variants

_WORDS = ["baseline", "variant", "setting", "version", "machine"]  # which sweep.report.variants adds
# Rows that agree in these differ in the seed alone.
SAME_POINT = [
    *("model", *(stage.column for stage in config.STAGES), "criterion", "variant", "execution"),
    *("setting", "version", "machine", "sparsity", "baseline"),
]
ON, OFF, WITHIN_NOISE = "on", "off", "within noise"
Differ: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]


def with_paired_latency(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `prefill_ms_paired` and `decode_ms_paired`: a reference latency divided by the paired speed-up.

    Cells run at different times on a machine whose speed drifts, so their own medians cannot be compared; each cell's
    speed-up was measured against the dense model in turn and can. The reference is the dense model's median over all
    cells of the same setting on the same processor and GPU, in each of which it was timed, so that one slow moment does
    not scale the whole figure.
    `_low` and `_high` follow the interval of the speed-up.
    """
    rows = with_words(rows)
    alike = ["model", "dtype", "device", "threads", "setting", "version", *({"cpu", "gpu"} & set(rows))]
    for phase, measured in (("prefill", "dense_prefill_ms_p50"), ("decode", "dense_decode_ms_per_token_p50")):
        reference = rows.groupby(alike, dropna=False)[measured].transform("median")
        for end, opposite in (("", ""), ("_low", "_high"), ("_high", "_low")):  # the highest speed-up: the lowest time
            speedup = rows.get(f"{phase}_speedup{opposite}", pd.Series(np.nan, index=rows.index))
            rows[f"{phase}_ms_paired{end}"] = reference / speedup.where(~rows.baseline, 1.0)
    return rows


def with_words(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy of the rows with the words of `variants.with_variant`, which are made where they are missing."""
    return rows.copy() if set(_WORDS) <= set(rows) else variants.with_variant(rows)


def numbered(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `point`, the same number for those that agree in SAME_POINT, and of each seed of a point one row.

    Of two rows of one seed the newer is kept, and one that is ok before one that is not: seeds are draws, and measuring
    one of them twice makes no second one. points() would else number the rows each time.
    """
    rows = with_words(rows)
    rows["point"] = rows.groupby(SAME_POINT, dropna=False, sort=True).ngroup()
    return _oldest_first(rows).drop_duplicates(["point", "seed"], keep="last").sort_index()


def _oldest_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that are not ok before those that are, and among these by their start."""
    ok = rows["status"] == "ok" if "status" in rows else True
    at = rows["started_at"].fillna("") if "started_at" in rows else ""
    return rows.iloc[rows.assign(_ok=ok, _at=at).reset_index().sort_values(["_ok", "_at"], kind="stable").index]


def newest(rows: pd.DataFrame, asked: str) -> tuple[pd.DataFrame, list[str]]:
    """(the rows of one measuring version, sentences that say what was left out).

    asked  how the others are asked for

    What two versions have measured is not compared, so nothing that is to be compared holds both. The version is the
    newest that has changed a model: a study that has only begun anew, with its dense cells, is still the earlier one.
    """
    version, changed = variants.versions(rows), ~variants.is_baseline(rows)
    others = version != version[changed if changed.any() else slice(None)].max()
    left = version[others].value_counts().sort_index()
    counts = [
        f"{count} of {'an unknown one' if v == variants.UNKNOWN else f'version {v}'}" for v, count in left.items()
    ]
    said = [f"Left out, since measuring versions are not compared: {', '.join(counts)}; {asked}."]
    return rows[~others], said if counts else []


def dense_of(rows: pd.DataFrame) -> NDArray[np.int64]:
    """For each row or point, the place of the dense one that it is compared with, or -1 where there is none.

    It is of the same model, setting and version, and on the same machine where there is one; of several, the newest.
    """
    keys = ["model", "setting", "version", "machine"]
    rows = rows.assign(place=np.arange(len(rows)), model=rows.model.fillna(""))
    dense = rows[rows.baseline]
    known: dict[tuple, int] = {}
    for *key, place in _oldest_first(dense)[[*keys, "place"]].itertuples(index=False):
        known[tuple(key)] = known[tuple(key[:-1])] = place
    return np.array(
        [known.get(key, known.get(key[:-1], -1)) for key in rows[keys].itertuples(index=False, name=None)],
        dtype=np.int64,
    )


def dense_value(rows: pd.DataFrame, column: str) -> pd.Series:
    """For each row or point, what `column` is in its dense one; NaN where there is none."""
    place = dense_of(rows)
    values = np.append(rows[column].to_numpy(dtype=float, na_value=np.nan), np.nan)
    return pd.Series(values[place], index=rows.index)


def points(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """One line a point of the plane: the mean of x and y over seeds, each with a 95 % interval where one is known.

    returns  SAME_POINT, point, x, x_low, x_high, y, y_low, y_high, seeds, interval
    interval  says where y's interval comes from: `seeds` (Student's t over the replicates), `documents` (one seed: the
              task's own standard error), `repeats` (one seed: the paired timings), or `none`, with NaN: never a guess
    Intervals of perplexities are those of the loss: three seeds of 6,000, 8,000 and 13,000 are far from 13 for certain,
    which as much scatter on both sides of their mean would hide. Failed cells and rows that lack x or y are left out.
    """
    rows = rows if "point" in rows else numbered(rows)
    ok = rows[(rows.status == "ok") & rows[x].notna() & rows[y].notna()]
    error = stderr(y)
    bounds = [f"{x}_low", f"{x}_high", error, f"{y}_low", f"{y}_high"]
    wanted = pd.DataFrame({"x": ok[x], "y": ok[y]} | {name: ok.get(name, np.nan) for name in bounds}, index=ok.index)
    wanted = wanted.astype(float)
    grouped = wanted.groupby(ok.point)
    mean, seeds = grouped.mean(), grouped.size()
    logarithm = is_exp(y)
    scatter = (np.log(wanted.y) if logarithm else wanted.y).groupby(ok.point)
    half = pd.Series(student.ppf(0.975, seeds.clip(lower=2) - 1), seeds.index) * scatter.std(ddof=1) / np.sqrt(seeds)
    several, documents = seeds > 1, mean[error].notna()
    half = half.where(several, 1.96 * mean[error] / (mean.y if logarithm else 1.0))
    centred = several | documents
    low, high = (np.exp(end) if logarithm else end for end in (scatter.mean() - half, scatter.mean() + half))
    interval = np.select([several, documents, mean[f"{y}_low"].notna()], ["seeds", "documents", "repeats"], "none")
    found = pd.DataFrame(
        {
            "x": mean.x,
            "x_low": mean[f"{x}_low"],
            "x_high": mean[f"{x}_high"],
            "y": mean.y,
            "y_low": low.where(centred, mean[f"{y}_low"]),
            "y_high": high.where(centred, mean[f"{y}_high"]),
            "seeds": seeds,
            "interval": interval,
        }
    )
    named = ok.drop_duplicates("point").set_index("point")[SAME_POINT]
    return named.join(found, how="right").reset_index()


def membership(points: pd.DataFrame, *, x_is_loss: bool, y_is_loss: bool, differ: Differ | None = None) -> pd.Series:
    """`on`, `off` or `within noise` of the Pareto frontier, for every line of points().

    differ  whether the y of pairs of points differ beyond chance, from their places: told from the documents of both

    Where it is given, a point is off the frontier for certain when one of the frontier is no costlier even at the best
    end of the point's cost, and better beyond chance; and on it for certain when every point that may be no costlier is
    worse beyond chance. Without it, a point is on the frontier for certain when nothing dominates it even at the worst
    ends of its own intervals, and off when something dominates it even at their best ends. All else is within noise.
    """
    x, y = (points[c] if loss else -points[c] for c, loss in (("x", x_is_loss), ("y", y_is_loss)))
    ends = {}
    for name, values, loss in (("x", x, x_is_loss), ("y", y, y_is_loss)):
        low, high = ((points[f"{name}_{end}"] * (1 if loss else -1)).fillna(values) for end in ("low", "high"))
        ends[name] = (np.minimum(low, high), np.maximum(low, high))
    if differ is None:
        best = _dominated(ends["x"][0], ends["y"][0], x, y)
        worst = _dominated(ends["x"][1], ends["y"][1], x, y)
    else:
        best, worst = _compared(x.to_numpy(), y.to_numpy(), ends["x"][0].to_numpy(), ends["x"][1].to_numpy(), differ)
    words = np.where(best, OFF, np.where(worst, WITHIN_NOISE, ON))
    return pd.Series(words, index=points.index)


def _compared(x: NDArray, y: NDArray, x_best: NDArray, x_worst: NDArray, differ: Differ) -> tuple[NDArray, NDArray]:
    """(which points are dominated for certain, which may be): each is compared with the points of the frontier.

    Lower is better in x and y.
    """
    edge = np.flatnonzero(undominated(x, y))
    surely, maybe = np.zeros(len(x), dtype=bool), np.ones(len(x), dtype=bool)
    maybe[edge] = False
    inside = np.setdiff1d(np.arange(len(x)), edge)
    i, j = (pairs.ravel() for pairs in np.meshgrid(inside, edge, indexing="ij"))
    near = (x[j] <= x_best[i]) & (y[j] <= y[i])
    i, j = i[near], j[near]
    np.logical_or.at(surely, i, (y[j] == y[i]) & (x[j] < x_best[i]) | differ(i, j))
    i, j = (pairs.ravel() for pairs in np.meshgrid(edge, np.arange(len(x)), indexing="ij"))
    near = (x[j] <= x_worst[i]) & (i != j) & ((x[j] != x[i]) | (y[j] != y[i]))
    i, j = i[near], j[near]
    np.logical_or.at(maybe, i, (y[j] <= y[i]) | ~differ(i, j))  # better, or not told from it
    return surely, maybe


def _dominated(x: pd.Series, y: pd.Series, others_x: pd.Series, others_y: pd.Series) -> np.ndarray:
    """Whether each (x, y) is dominated by one of the others (not by the one in its own place); lower is better."""
    a, b, other_a, other_b = (np.asarray(v, dtype=float) for v in (x, y, others_x, others_y))
    found = np.zeros(len(a), dtype=bool)
    for i in range(len(a)):
        as_good = (other_a <= a[i]) & (other_b <= b[i]) & ((other_a < a[i]) | (other_b < b[i]))
        as_good[i] = False
        found[i] = as_good.any()
    return found


def undominated(a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
    """Where no other point is at least as low in both and lower in one.

    Of points that are equal in both, all are on the frontier.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    order = np.lexsort((b, a))
    costs, first, group = np.unique(a[order], return_index=True, return_inverse=True)
    lowest = b[order][first]  # of each cost: a group is sorted by b
    before = np.minimum.accumulate(np.concatenate([[np.inf], lowest]))[: len(costs)]
    on = np.zeros(len(a), dtype=bool)
    on[order] = (b[order] == lowest[group]) & (lowest < before)[group]
    return on
