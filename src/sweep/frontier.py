"""From rows to what a figure shows: points with intervals over seeds, and the Pareto set. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import t as student

SAME_POINT = ["model", "method", "criterion", "execution", "sparsity"]  # rows that differ in the seed alone


def is_loss(metric: str) -> bool:
    """Whether lower is better, told from the metric's name."""
    return any(word in metric for word in ("perplexity", "bits_per_byte", "loss", "_ms", "bytes", "seconds", "macs"))


def with_paired_latency(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `prefill_ms_paired` and `decode_ms_paired`: a reference latency divided by the paired speed-up.

    Cells run at different times on a machine whose speed drifts, so their own medians cannot be compared; each cell's
    speed-up was measured against the dense model in turn and can. The reference is the dense model's median over all
    cells of the same setting, in each of which it was timed, so that one slow moment does not scale the whole figure.
    """
    setting = ["model", "dtype", "device", "threads"]
    rows = rows.copy()
    for phase, measured in (("prefill", "dense_prefill_ms_p50"), ("decode", "dense_decode_ms_per_token_p50")):
        reference = rows.groupby(setting, dropna=False)[measured].transform("median")
        speedup = rows[f"{phase}_speedup"].where(rows.method != "dense", 1.0)
        rows[f"{phase}_ms_paired"] = reference / speedup
    return rows


def points(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """One line a point of the plane: the mean of x and y over seeds, with a 95 % interval of y.

    returns  SAME_POINT, x, y, y_low, y_high, seeds; with one seed the interval is empty (NaN), never a guess
    Failed cells and rows that lack x or y are left out.
    """
    ok = rows[(rows.status == "ok") & rows[x].notna() & rows[y].notna()]
    lines = []
    for key, group in ok.groupby(SAME_POINT, dropna=False, sort=True):
        n, mean = len(group), group[y].mean()
        half = student.ppf(0.975, n - 1) * group[y].std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
        lines.append((*key, group[x].mean(), mean, mean - half, mean + half, n))
    columns = list(dict.fromkeys([*SAME_POINT, "x", "y", "y_low", "y_high", "seeds"]))
    return pd.DataFrame(lines, columns=columns)


def pareto(x: pd.Series, y: pd.Series, *, x_is_loss: bool, y_is_loss: bool) -> pd.Series:
    """Boolean: True where no other point is at least as good in both and better in one.

    Of points that are equal in both, all are on the frontier.
    """
    a = np.asarray(x if x_is_loss else -x, dtype=float)
    b = np.asarray(y if y_is_loss else -y, dtype=float)
    order = np.lexsort((b, a))
    on = np.zeros(len(a), dtype=bool)
    best = np.inf
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and a[order[stop]] == a[order[start]]:
            stop += 1
        lowest = b[order[start]]  # the group is sorted by b
        if lowest < best:
            on[[i for i in order[start:stop] if b[i] == lowest]] = True
            best = lowest
        start = stop
    return pd.Series(on, index=x.index)
