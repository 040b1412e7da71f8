"""Whether two cells differ, told from the same documents. No torch.

Two intervals that overlap say little: both cells answered the same documents, and most of what makes one document
harder than another cancels in the difference. So a comparison joins the cells by document. Accuracy is tested by
McNemar's exact test on the documents that flipped; loss and F1 by a bootstrap over documents; and over a table of
comparisons the p-values are Holm's, or one in twenty would be news by chance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from sweep import classification, columns, frontier, store
from sweep.config import RequestError, did_you_mean

log = logging.getLogger(__name__)

Outcomes: TypeAlias = pd.DataFrame  # one line a document, one column a metric

DRAWS = 2000
LEVEL = 0.05
BETTER, WORSE, NOISE = "better", "worse", frontier.WITHIN_NOISE
TRUTHS = ("acc", "acc_norm", "exact_match", "told", "em")  # metrics that are right or wrong for each document


def mcnemar(before: ArrayLike, after: ArrayLike) -> tuple[float, int, int]:
    """(p-value, wrong to right, right to wrong) of two answers, right (1) or wrong (0), to each document.

    Exact and two-sided: where nothing changed, each flip is as likely to go either way (McNemar 1947,
    doi:10.1007/BF02295996). Without flips the p-value is 1.
    """
    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    flips = gained + lost
    return (float(binomtest(gained, flips, 0.5).pvalue) if flips else 1.0), gained, lost


def bootstrap(
    difference: Callable[[NDArray[np.int64]], NDArray[np.float64]], documents: int, seed: int = 0
) -> tuple[float, float, float]:
    """(low, high, p-value): the 95 % percentile interval of a difference, and how often its sign is the other one.

    difference  from draws of documents, (DRAWS, documents) indices with replacement, to one difference a draw
    The p-value is two-sided. Where no draw has the other sign, draws tell only that it is below 2 / (DRAWS + 1), and over
    a large table Holm would call every such difference noise: then it is that of a normal distribution with the draws'
    spread, but not below 2^(1 - documents), the least that flipping the signs of so many documents can tell.
    NaN in, NaN out.
    """
    draws = np.random.default_rng(seed).integers(0, documents, (DRAWS, documents))
    found = difference(draws)
    if not len(found) or np.isnan(found).any():
        return (np.nan,) * 3
    low, high = np.quantile(found, [0.025, 0.975])
    tail = min((found <= 0).sum(), (found >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    if tail == 0:
        spread = found.std()
        far = 2 * norm.sf(abs(found.mean()) / spread) if spread else 0.0
        p = max(min(p, far), 2.0 ** (1 - documents))
    return float(low), float(high), float(p)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values (1979): the k-th smallest of n times n - k + 1, never falling, at most 1. NaN stays NaN."""
    p = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors)) if len(order) else []
    return adjusted


def outcomes(samples: pd.DataFrame, cell: str, task: str) -> Outcomes:
    """A cell's outcomes in a task, one line a document.

    What older versions wrote twice of a document, under two answer filters that they did not name, is left out.
    """
    mine = samples[(samples.cell == cell) & (samples.task == task)]
    clear = mine.drop_duplicates(["document", "metric"], keep=False)
    wide = clear.pivot_table(index="document", columns="metric", values="value", aggfunc="first", dropna=False)
    return wide if len(clear) == len(mine) else wide.reindex(sorted(set(mine.document)))


def difference(before: Outcomes, after: Outcomes, metric: str) -> dict[str, Any]:
    """`metric` of `after` less that of `before`, on the documents that both have.

    metric   a truth (acc, acc_norm, exact_match, told), f1_macro, a loss (`loss` or `token_perplexity`: nats a token;
             `loss_band_B`: nats a token of the band), or any other value of single documents, whose means are compared
    returns  documents, before, after, difference, low, high (95 %), p, test, and for truths gained and lost
    Raises KeyError when an outcome lacks what the metric is made of.
    """
    both = before.index.intersection(after.index)
    a, b = before.loc[both], after.loc[both]
    found: dict[str, Any] = {"documents": len(both)}
    if metric == "f1_macro":
        values, of_draws = _f1(a, b)
        test = "bootstrap"
    elif metric in ("loss", "token_perplexity") or metric.startswith("loss_band_"):
        values, of_draws = _loss(a, b, metric)
        test = "bootstrap"
    else:
        x, y = a[metric].to_numpy(float), b[metric].to_numpy(float)
        values = (float(x.mean()), float(y.mean()))
        test, of_draws = "bootstrap", lambda draws: (y - x)[draws].mean(1)
    low, high, p = bootstrap(of_draws, len(both))
    if columns.metric(metric) in TRUTHS:
        p, found["gained"], found["lost"] = mcnemar(a[metric], b[metric])
        test = "McNemar"
    return found | {"before": values[0], "after": values[1], "difference": values[1] - values[0], "low": low,
                    "high": high, "p": p, "test": test}  # fmt: skip


def _f1(a: Outcomes, b: Outcomes) -> tuple[tuple[float, float], Callable[[NDArray], NDArray]]:
    truth, *choices = (x.to_numpy(int) for x in (a["target"], a["chosen"], b["chosen"]))
    classes = max(int(x.max()) for x in (truth, *choices)) + 2
    pairs = [truth * classes + np.where(chosen < 0, classes - 1, chosen) for chosen in choices]

    def f1(which: int, draws: NDArray) -> NDArray[np.float64]:
        drawn = pairs[which][draws] + np.arange(len(draws))[:, None] * classes**2
        counts = np.bincount(drawn.ravel(), minlength=len(draws) * classes**2)
        return classification.f1_macro(counts.reshape(-1, classes, classes))

    whole = np.arange(len(truth))[None]
    return (float(f1(0, whole)[0]), float(f1(1, whole)[0])), lambda draws: f1(1, draws) - f1(0, draws)


def _loss(a: Outcomes, b: Outcomes, metric: str) -> tuple[tuple[float, float], Callable[[NDArray], NDArray]]:
    """Losses are sums over tokens: documents are drawn, and the sums divided by the drawn documents' tokens."""
    if metric.startswith("loss_band_"):
        count = metric.replace("loss_", "tokens_", 1)
        sums = [o[metric].fillna(0.0).to_numpy(float) for o in (a, b)]
        tokens = [o[count].fillna(0.0).to_numpy(float) for o in (a, b)]
    else:
        sums = [-o["log_likelihood"].to_numpy(float) for o in (a, b)]
        tokens = [o["tokens"].to_numpy(float) if "tokens" in o else np.ones(len(o)) for o in (a, b)]
    values = tuple(float(s.sum() / n.sum()) for s, n in zip(sums, tokens, strict=True))

    def of_draws(draws: NDArray) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            found = sums[1][draws].sum(1) / tokens[1][draws].sum(1) - sums[0][draws].sum(1) / tokens[0][draws].sum(1)
        # A band so rare that a draw has none of it says nothing of the difference; NaN losses stay NaN.
        empty = (tokens[0][draws].sum(1) == 0) | (tokens[1][draws].sum(1) == 0)
        return found[~empty] if not np.isnan(np.concatenate(sums)).any() else found

    return (values[0], values[1]), of_draws


def band_gap(before: Outcomes, after: Outcomes, one: str, other: str) -> dict[str, float]:
    """By how much more the loss of band `one` grows than that of band `other`, nats a token, on the same documents.

    returns  gap, low, high (95 %), p. Positive: `one` suffers more.
    """
    both = before.index.intersection(after.index)
    pairs = [_loss(before.loc[both], after.loc[both], f"loss_band_{band}") for band in (one, other)]
    (a, b), (c, d) = (values for values, _ in pairs)

    def of_draws(draws: NDArray) -> NDArray[np.float64]:
        grown = [difference_of(draws) for _, difference_of in pairs]
        return grown[0] - grown[1] if len(grown[0]) == len(grown[1]) else np.array([])  # a band that a draw may lack

    low, high, p = bootstrap(of_draws, len(both))
    return {"gap": (b - a) - (d - c), "low": low, "high": high, "p": p}


def table(results: store.Where, metrics: Sequence[str], pairs: Sequence[tuple[str, str]] | None = None) -> pd.DataFrame:
    """Comparisons of a results folder, one line a pair and metric, with Holm's p-value and a verdict.

    metrics  as `task/metric`, such as `arc_easy/acc`, `continents/f1_macro`, `pydoc/loss`, `pydoc/loss_band_zipf0to3`,
             `gsm8k/exact_match,strict-match`
    pairs    (before, after) names of cells; without them, every pruned cell after its dense one, but for those that a
             newer measuring version has measured again
    Raises RequestError for a metric that a task's examples do not have. A task that no cell ran gives no line.
    verdict  `better`, `worse`, or `within noise` where Holm's p-value over the whole table is 0.05 or more; null where
             a loss is no number
    """
    rows, samples = store.load(results), store.table(results, "samples")
    rows = rows[rows.status == "ok"].set_index("cell")
    current, left_out = frontier.newest(rows)
    if pairs is None and left_out:
        log.warning(*left_out)
    chosen = list(pairs) if pairs is not None else against_dense(current)
    lines = []
    for before, after in chosen:
        for name in metrics:
            task, _, metric = name.partition("/")
            a, b = (outcomes(samples, cell, task) for cell in (before, after))
            if not len(a) or not len(b):
                continue
            row = rows.loc[after]
            _check(name, a)
            metric = _written(metric, a)
            lines.append({"before": before, "after": after, "method": row.method, "criterion": row.criterion,
                          "sparsity": row.sparsity, "seed": row.seed, "metric": name}
                         | {f"{k}_value" if k in ("before", "after") else k: v
                            for k, v in difference(a, b, metric).items()})  # fmt: skip
    found = pd.DataFrame(lines)
    if found.empty:
        return found
    found["p_holm"] = holm(found.p)
    worse = (found.difference > 0) == [columns.is_loss(name, rows) for name in found.metric]
    verdict = np.where(found.p_holm >= LEVEL, NOISE, np.where(worse, WORSE, BETTER))
    return found.assign(verdict=pd.Series(verdict, index=found.index).where(found.p_holm.notna(), None))


def flips(rows: pd.DataFrame, samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The pruned rows with `lost` (right to wrong) and `gained` (wrong to right): shares of the documents of a task.

    metric  `task/acc` or another truth. Rows without a dense row of their settings, or without samples, are left out.
    """
    task, _, truth = metric.partition("/")
    samples = samples[(samples.task == task) & samples.metric.isin([truth, columns.metric(truth)])]
    samples = samples.drop_duplicates(["cell", "document"], keep=False)  # as in outcomes
    answers = {cell: mine.set_index("document").value for cell, mine in samples.groupby("cell")}
    found = rows.set_index("cell")
    turned: dict[str, dict[str, float]] = {}
    for before, after in against_dense(found):
        if before in answers and after in answers:
            a, b = answers[before].align(answers[after], join="inner")
            _, gained, lost = mcnemar(a, b)
            turned[after] = {"lost": lost / len(a), "gained": gained / len(a)}
    return found.join(pd.DataFrame.from_dict(turned, orient="index", columns=["lost", "gained"]), how="inner")


def _written(metric: str, found: Outcomes) -> str:
    """What a task's outcomes call a metric: older versions left the answer filter out."""
    plain = columns.metric(metric)
    return plain if metric not in found and plain in found else metric


def _check(name: str, found: Outcomes) -> None:
    """Raises RequestError when a task's outcomes lack what a metric is made of."""
    task, _, metric = name.partition("/")
    metric = _written(metric, found)
    made_of = {"f1_macro": "chosen", "loss": "tokens", "token_perplexity": "tokens"}.get(metric, metric)
    if made_of not in found and not metric.startswith("loss_band_"):
        known = sorted(c for c in found.columns if "_band_" not in c)
        known += [m for m, needs in (("f1_macro", "chosen"), ("loss", "tokens")) if needs in found]
        near = did_you_mean(metric, known) if known else " Older versions wrote answers under several filters as one."
        raise RequestError(f"{name}: the examples of {task} have no {metric}.{near} They have: {', '.join(known)}")


def against_dense(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(dense cell, pruned cell) for every pruned row whose dense model was measured with the same settings.

    rows  by cell
    """
    rows = frontier.with_words(rows)
    pairs = zip(frontier.dense_of(rows), rows.index, rows.method, strict=True)
    return [(rows.index[dense], cell) for dense, cell, method in pairs if method != "dense" and dense >= 0]
