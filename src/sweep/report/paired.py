"""Whether two cells differ, told from the same documents. No torch.

Two intervals that overlap say little: both cells answered the same documents, and most of what makes one document
harder than another cancels in the difference. So a comparison joins the cells by document, and sweep.report.chance tells a
difference from what chance makes: McNemar's exact test where answers are right or wrong, flipped signs for losses, F1
and everything else; and over a table of comparisons the p-values are Holm's, or one in twenty would be news by chance.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sweep import config, confusion, store
from sweep.metrics import METRICS, bare, mean_of, record
from sweep.report import chance, frontier
from sweep.report.chance import LEVEL, holm, mcnemar
from sweep.settings import RequestError, did_you_mean
from sweep.store import columns

log = logging.getLogger(__name__)

Outcomes: TypeAlias = pd.DataFrame  # one line a document, one column a metric

BETTER, WORSE, NOISE = "better", "worse", frontier.WITHIN_NOISE
CHOICES = ("target", "chosen")  # of a document of several classes


class Estimate(NamedTuple):
    """A metric of a set of documents, and what each of them does to it."""

    value: float
    residuals: NDArray[np.float64]  # by how much each document moves it, to first order; they sum to 0
    shares: NDArray[np.float64]  # the weight of each document; they sum to 1

    def parts(self) -> NDArray[np.float64]:
        """What each document adds to the value."""
        with np.errstate(invalid="ignore"):
            return self.value * self.shares + self.residuals


def outcomes(samples: pd.DataFrame, cell: str, task: str) -> Outcomes:
    """A cell's outcomes in a task, one line a document; empty where it has none."""
    return by_cell(samples[samples.cell == cell], task).get(cell, pd.DataFrame())


def by_cell(samples: pd.DataFrame, task: str) -> dict[str, Outcomes]:
    """Every cell's outcomes in a task, one line a document.

    What older versions wrote twice of a document, under two answer filters that they did not name, is left out.
    """
    if samples.empty:
        return {}
    mine = samples[samples.task == task]
    clear = mine.drop_duplicates(["cell", "document", "metric"], keep=False)
    wide = clear.pivot(index=["cell", "document"], columns="metric", values="value")
    if len(clear) < len(mine):
        wide = wide.reindex(pd.MultiIndex.from_frame(mine[["cell", "document"]].drop_duplicates()).sort_values())
    own = clear.groupby("cell").metric.unique()
    return {str(cell): found.droplevel("cell")[sorted(own.get(cell, []))] for cell, found in wide.groupby(level="cell")}


def estimate(found: Outcomes, metric: str) -> Estimate:
    """A metric from its documents.

    metric   f1_macro; a loss: `loss`, `token_perplexity`, `perplexity` (nats a token), `loss_band_B` (nats a token of the
             band), `word_perplexity`, `byte_perplexity` (nats a word or byte), `bits_per_byte`; `kl_from_dense`; or any
             other value of single documents (acc, exact_match, told), of which it is the mean
    Raises KeyError when the outcomes lack what the metric is made of: see `comparable`.
    """
    known = record(metric)
    if known is not None and known.classes is not None:
        return _of_classes(known.classes, *(found[name].to_numpy(int) for name in CHOICES))
    mean = mean_of(metric, found)
    if mean is None:
        raise KeyError(metric)
    n = np.ones(len(found)) if mean.over is None else found[mean.over].to_numpy(float)
    absent = np.isnan(n)  # not every document has words of every band
    return _ratio(np.where(absent, 0, found[mean.of].to_numpy(float) / mean.unit), np.where(absent, 0, n))


def comparable(found: Outcomes) -> list[str]:
    """The metrics that a task's outcomes are enough for."""
    all_have = set(found.dropna(axis="columns"))
    declared = [known.name for known in METRICS if known.classes is None]
    means = {name for name in (*found, *declared) if mean_of(name, found) is not None}
    classes = [known.name for known in METRICS if known.classes is not None and set(CHOICES) <= all_have]
    return sorted(means.union(classes))


def difference(before: Outcomes, after: Outcomes, metric: str) -> dict[str, Any]:
    """`metric` (see `estimate`) of `after` less that of `before`, on the documents that both have.

    returns  documents, before, after, difference, low, high (95 %), p, test, and for answers that are right or wrong
             gained and lost
    """
    both = before.index.intersection(after.index)
    a, b = (estimate(o.loc[both], metric) for o in (before, after))
    found: dict[str, Any] = {
        "documents": len(both),
        "before": a.value,
        "after": b.value,
        "difference": b.value - a.value,
    }
    if metric in before and metric in after and _are_answers(answers := [o.loc[both, metric] for o in (before, after)]):
        p, gained, lost = mcnemar(*answers)
        low, high = chance.flip_interval(gained, lost, len(both), p)
        return found | {"low": low, "high": high, "p": p, "test": "McNemar", "gained": gained, "lost": lost}
    less = minus(b, a)
    low, high, p = chance.sign_flips(less.parts(), less.shares)
    return found | {"low": low, "high": high, "p": p, "test": "sign flips"}


def minus(after: Estimate, before: Estimate) -> Estimate:
    """The difference of two estimates of the same documents, in the same order."""
    return Estimate(after.value - before.value, after.residuals - before.residuals, (after.shares + before.shares) / 2)


def mean_difference(
    outcomes: Mapping[str, Outcomes], pairs: Iterable[tuple[str, str]], metric: str
) -> dict[str, float]:
    """`metric` (see `estimate`) of the second cell of a pair less that of the first, the mean over pairs such as one a seed.

    outcomes  by cell: see by_cell. All cells have the same documents
    returns   difference, low, high (95 %, over the documents), p
    """
    found = [minus(*(estimate(outcomes[cell], metric) for cell in (after, before))) for before, after in pairs]
    parts = np.mean([change.parts() for change in found], axis=0)
    low, high, p = chance.sign_flips(parts, found[0].shares)
    return {"difference": float(parts.sum()), "low": low, "high": high, "p": p}


def _are_answers(values: Sequence[pd.Series]) -> bool:
    """Whether every value is right (1) or wrong (0), and there are any."""
    return all(len(v) and v.isin((0.0, 1.0)).all() for v in values)


def _ratio(x: NDArray[np.float64], n: NDArray[np.float64]) -> Estimate:
    """The sum over documents divided by the sum of their counts, such as nats by tokens."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value, shares = x.sum() / n.sum(), n / n.sum()
        return Estimate(float(value), x / n.sum() - value * shares, shares)


def _of_classes(name: str, truth: NDArray[np.int64], chosen: NDArray[np.int64]) -> Estimate:
    """A metric of confusion.macro; what a document does to it is told by leaving it out (the jackknife)."""
    documents = len(truth)
    if documents < 2:
        return Estimate(math.nan, np.full(documents, math.nan), np.full(documents, math.nan))
    counts = confusion.counts(truth, chosen)
    pairs = np.argwhere(counts)
    without = np.repeat(counts[None], len(pairs), axis=0)
    without[np.arange(len(pairs)), *pairs.T] -= 1
    left = np.empty(counts.shape)  # without a document of each pair; a choice of -1 is the last class
    left[*pairs.T] = confusion.macro(without)[name]
    left = left[truth, chosen]
    residuals = (documents - 1) / documents * (left.mean() - left)
    return Estimate(float(confusion.macro(counts)[name]), residuals, np.full(documents, 1 / documents))


def band_gap(before: Outcomes, after: Outcomes, one: str, other: str) -> dict[str, float]:
    """By how much more the loss of band `one` grows than that of band `other`, nats a token, on the same documents.

    returns  gap, low, high (95 %), p. Positive: `one` suffers more.
    """
    both = before.index.intersection(after.index)
    grown = [minus(*(estimate(o.loc[both], f"loss_band_{band}") for o in (after, before))) for band in (one, other)]
    gap = minus(*grown)
    low, high, p = chance.sign_flips(gap.parts(), gap.shares)
    return {"gap": gap.value, "low": low, "high": high, "p": p}


def compare(
    results: store.Where, metrics: Sequence[str], pairs: Sequence[tuple[str, str]] | None = None
) -> pd.DataFrame:
    """Comparisons of a results folder, one line a pair and metric, with Holm's p-value and a verdict.

    metrics  as `task/metric`, such as `arc_easy/acc`, `continents/f1_macro`, `pydoc/loss`, `pydoc/loss_band_zipf0to3`,
             `gsm8k/exact_match,strict-match`
    pairs    (before, after) names of cells; without them, every pruned cell of the newest measuring version after its
             dense one
    Raises RequestError for a metric that a task's examples do not have. A task that no cell ran gives no line.
    verdict  `better`, `worse`, or `within noise` where Holm's p-value over the whole table is 0.05 or more; null where
             a loss is no number. A table that is too large for so few documents to say anything is told in a warning.
    """
    rows, samples = store.load(results), store.read_table(results, "samples")
    rows = rows[rows.status == "ok"].set_index("cell")
    current, left_out = frontier.newest(rows, "name their cells in pairs to compare them")
    if pairs is None and left_out:
        log.warning(*left_out)
    chosen = list(pairs) if pairs is not None else against_dense(current)
    of_task = functools.cache(lambda task: by_cell(samples, task))
    lines = []
    for before, after in chosen:
        for name in metrics:
            task, _, metric = name.partition("/")
            if before not in of_task(task) or after not in of_task(task):
                continue
            a, b = (of_task(task)[cell] for cell in (before, after))
            row = rows.loc[after]
            for found in (a, b):
                _check(name, found)
            metric = _written(metric, a)
            lines.append(
                {
                    "before": before,
                    "after": after,
                    **{stage.column: row.get(stage.column, stage.nothing) for stage in config.STAGES},
                    "criterion": row.criterion,
                    "sparsity": row.sparsity,
                    "seed": row.seed,
                    "metric": name,
                }
                | {f"{k}_value" if k in ("before", "after") else k: v for k, v in difference(a, b, metric).items()}
            )
    found = pd.DataFrame(lines)
    if found.empty:
        return found
    found["p_holm"] = holm(found.p)
    _say_what_cannot_be_told(found)
    worse = (found.difference > 0) == [columns.is_loss(name, rows) for name in found.metric]
    verdict = np.where(found.p_holm >= LEVEL, NOISE, np.where(worse, WORSE, BETTER))
    return found.assign(verdict=pd.Series(verdict, index=found.index).where(found.p_holm.notna(), None))


def flips(rows: pd.DataFrame, samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The pruned rows with `lost` (right to wrong) and `gained` (wrong to right): shares of the documents of a task.

    metric  `task/acc` or another of which every document's value is right (1) or wrong (0): else no row is left
    Rows without a dense row of their settings, or without samples, are left out.
    """
    task, _, truth = metric.partition("/")
    samples = samples[(samples.task == task) & samples.metric.isin([truth, bare(truth)])]
    samples = samples.drop_duplicates(["cell", "document"], keep=False)  # as in outcomes
    answers = {cell: mine.set_index("document").value for cell, mine in samples.groupby("cell")}
    answers = {cell: values for cell, values in answers.items() if _are_answers([values])}
    found = rows.set_index("cell")
    turned: dict[str, dict[str, float]] = {}
    for before, after in against_dense(found):
        if before in answers and after in answers:
            a, b = answers[before].align(answers[after], join="inner")
            _, gained, lost = mcnemar(a, b)
            turned[after] = {"lost": lost / len(a), "gained": gained / len(a)}
    return found.join(pd.DataFrame.from_dict(turned, orient="index", columns=["lost", "gained"]), how="inner")


def _say_what_cannot_be_told(found: pd.DataFrame) -> None:
    """Warn of metrics whose smallest possible p-value is not news in a table of this size."""
    compared = int(found.p.notna().sum())
    for name, documents in found.groupby("metric", sort=False).documents.max().items():
        least = chance.least(documents)
        if compared and least * compared >= LEVEL:
            log.warning(
                "%s: %d documents give no p-value below %.2g, and Holm's correction of %d comparisons asks for one "
                "below %.2g: whatever the difference, the verdict is `%s`. Compare fewer at a time, or on more "
                "documents",
                name,
                documents,
                least,
                compared,
                LEVEL / compared,
                NOISE,
            )


def _written(metric: str, found: Outcomes) -> str:
    """What a task's outcomes call a metric: older versions left the answer filter out."""
    plain = bare(metric)
    return plain if metric not in found and plain in found else metric


def _check(name: str, found: Outcomes) -> None:
    """Raises RequestError when a task's outcomes lack what a metric is made of."""
    task, _, metric = name.partition("/")
    known = comparable(found)
    if _written(metric, found) not in known:
        near = did_you_mean(metric, known) if known else " Older versions wrote answers under several filters as one."
        shown = ", ".join(m for m in known if "_band_" not in m)
        raise RequestError(f"{name}: the examples of {task} have no {metric}.{near} They have: {shown}")


def against_dense(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(dense cell, pruned cell) for every pruned row whose dense model was measured with the same settings.

    rows  by cell
    """
    rows = frontier.with_words(rows)
    pairs = zip(frontier.dense_of(rows), rows.index, rows.baseline, strict=True)
    return [(rows.index[dense], cell) for dense, cell, is_dense in pairs if not is_dense and dense >= 0]
