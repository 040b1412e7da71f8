"""Whether the points of a figure or table differ by more than chance makes. No torch.

Two cells that answered the same documents are compared document by document, as sweep.report.paired does: their own intervals
overlap long before they are alike, for most of what moves the one moves the other. Where a point has several seeds, its
scatter over them must deny that the two are alike as well. Costs, and cells whose outcomes are not at hand, are compared
by their intervals, as values that know nothing of each other; a task's metric that has neither is told from nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from sweep.metrics import is_exp
from sweep.report import chance, frontier, paired

_SCATTER = "seeds"  # the kind of interval that is over seeds


class Pair(NamedTuple):
    """A point less another, on the same documents; of perplexities the difference of their losses, in nats."""

    one: int
    other: int
    difference: float
    low: float  # 95 % over documents
    high: float
    p: float  # over documents, and over seeds where there are several
    gained: float  # share of the documents that only the second answers rightly; NaN of what is no answer
    lost: float


class Evidence:
    """What is known of the points of some rows beside their means.

    Points are lines of frontier.points(): `point`, `y`, `y_low`, `y_high`, `seeds` and `interval` are read.
    """

    def __init__(self, rows: pd.DataFrame | None = None, samples: pd.DataFrame | None = None) -> None:
        """rows: numbered by frontier.numbered; samples: outcomes of their documents, where they are at hand."""
        known = rows is not None and samples is not None
        self._cells = rows.groupby("point").cell.agg(list).to_dict() if known else {}  # type: ignore[union-attr]
        self._samples = samples if known else None
        self._outcomes = functools.cache(lambda task: paired.by_cell(self._samples, task) if known else {})
        self._estimates = functools.cache(self._estimated)

    def pairs(self, metric: str) -> bool:
        """Whether documents tell any two points of a metric apart."""
        return len(self._estimates(metric)) > 1

    def pair(self, metric: str, one: int, other: int) -> tuple[paired.Estimate, paired.Estimate] | None:
        """The estimates of two points by their numbers; None where they are not of the same documents."""
        a, b = (self._estimates(metric).get(point) for point in (one, other))
        return (a[1], b[1]) if a is not None and b is not None and a[0] == b[0] else None

    def p_values(self, points: pd.DataFrame, one: NDArray, other: NDArray, metric: str) -> NDArray[np.float64]:
        """How likely chance alone makes two points as different as they are, for several pairs.

        one, other  (pairs,) places in points
        """
        even = _even(points, metric)
        p, by_seeds = (_unpaired(known, one, other) for known in (even, _over_seeds(even)))
        if "/" in metric:  # measured on documents: of a point without an interval nobody knows how much it would move
            p[(points.interval == "none").to_numpy()[[one, other]].any(0)] = 1.0
        several = (points.interval == _SCATTER).to_numpy()[[one, other]].any(0)
        names = points.get("point", pd.Series(index=points.index)).to_numpy()
        by_documents: dict[int, list[tuple[int, NDArray]]] = {}
        for place, (i, j) in enumerate(zip(one, other, strict=True)):
            if (pair := self.pair(metric, names[i], names[j])) is not None:
                set_, _ = self._estimates(metric)[names[i]]
                by_documents.setdefault(set_, []).append((place, paired.minus(*pair).parts()))
        for mine in by_documents.values():
            places = np.array([place for place, _ in mine])
            tested = chance.p_values(np.stack([parts for _, parts in mine]))
            tested = np.where(several[places], np.maximum(tested, by_seeds[places]), tested)
            p[places] = np.where(np.isnan(tested), p[places], tested)
        return p

    def pairs_of(self, points: pd.DataFrame, metric: str) -> list[Pair]:
        """Every two points that answered the same documents, the second less the first."""
        estimates, names = self._estimates(metric), points.point.tolist()
        known = [i for i, name in enumerate(names) if name in estimates]
        places = [(i, j) for i, j in itertools.combinations(known, 2) if self.pair(metric, names[i], names[j])]
        if not places:
            return []
        one, other = np.array(places).T
        tested = zip(places, self.p_values(points, one, other, metric), strict=True)
        return [_pair(names[i], names[j], estimates[names[i]][1], estimates[names[j]][1], p) for (i, j), p in tested]

    def differ(self, points: pd.DataFrame, metric: str) -> frontier.Differ | None:
        """For frontier.membership: which pairs differ beyond chance; None where documents tell nothing of the metric."""
        if not self.pairs(metric):
            return None
        return lambda one, other: self.p_values(points, one, other, metric) < chance.LEVEL

    def alike(
        self, points: pd.DataFrame, one: NDArray, other: NDArray, metric: str, family: NDArray | None = None
    ) -> NDArray[np.bool_]:
        """Which of several pairs chance alone may make so different, after Holm's correction for their number.

        family  (pairs,) pairs of one value are corrected together; by default all are
        """
        p = self.p_values(points, one, other, metric)
        for mine in [slice(None)] if family is None else [family == value for value in np.unique(family)]:
            p[mine] = chance.holm(p[mine])
        return p >= chance.LEVEL

    def _estimated(self, metric: str) -> dict[int, tuple[int, paired.Estimate]]:
        """(number of its set of documents, mean over its seeds) of each point of which every cell's outcomes are known."""
        task, _, name = metric.partition("/")
        if not name or not self._cells:
            return {}
        found, sets, outcomes = {}, dict[tuple, int](), self._outcomes(task)
        for point, cells in self._cells.items():
            mine = [outcomes[cell] for cell in cells if cell in outcomes]
            documents = {tuple(o.index) for o in mine}
            if len(mine) < len(cells) or len(documents) != 1 or any(name not in paired.comparable(o) for o in mine):
                continue
            estimates = [paired.estimate(o, name) for o in mine]
            mean = paired.Estimate(*(np.mean(part, axis=0) for part in zip(*estimates, strict=True)))
            found[point] = sets.setdefault(documents.pop(), len(sets)), mean
        return found


NOTHING = Evidence()


def _pair(one: int, other: int, before: paired.Estimate, after: paired.Estimate, p: float) -> Pair:
    less = paired.minus(after, before)
    n = len(less.residuals)
    half = norm.isf(chance.LEVEL / 2) * math.sqrt((less.residuals**2).sum() * n / max(n - 1, 1))
    low, high = less.value - half, less.value + half
    if p >= chance.LEVEL:  # as in chance.flip_interval: what the test does not deny is in the interval
        low, high = min(low, 0.0), max(high, 0.0)
    with np.errstate(invalid="ignore"):
        a, b = (estimate.parts() / estimate.shares for estimate in (before, after))
    answers = all(((values > -1e-9) & (values < 1 + 1e-9)).all() for values in (a, b))
    gained, lost = (float((b * (1 - a)).mean()), float((a * (1 - b)).mean())) if answers else (math.nan, math.nan)
    return Pair(int(one), int(other), less.value, low, high, float(p), gained, lost)


def _even(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The points with y and its interval on the scale on which they scatter evenly: of perplexities the logarithm."""
    if not is_exp(metric):
        return points
    with np.errstate(divide="ignore", invalid="ignore"):
        return points.assign(**{name: np.log(points[name]) for name in ("y", "y_low", "y_high")})


def _spread(points: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(standard error, degrees of freedom) of each point's y, from its interval; 0 where it has none."""
    half = ((points.y_high - points.y_low) / 2).fillna(0).to_numpy()
    degrees = np.where(points.interval == _SCATTER, np.maximum(points.seeds, 2) - 1, np.inf)
    kinds, kind = np.unique(degrees, return_inverse=True)
    return half / student.ppf(0.975, kinds)[kind], degrees


def _over_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """The points with their intervals over seeds alone: what documents do is told by the documents."""
    seeds = points.interval == _SCATTER
    return points.assign(y_low=points.y_low.where(seeds), y_high=points.y_high.where(seeds))


def _joint(points: pd.DataFrame, one: NDArray, other: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(difference, its standard error, its degrees of freedom by Welch) of pairs of points."""
    error, degrees = _spread(points)
    y, square = points.y.to_numpy(), error**2
    total = square[one] + square[other]
    with np.errstate(invalid="ignore", divide="ignore"):
        joint = total**2 / (square[one] ** 2 / degrees[one] + square[other] ** 2 / degrees[other])
    return y[one] - y[other], np.sqrt(total), np.where(np.isnan(joint), np.inf, joint)


def _unpaired(points: pd.DataFrame, one: NDArray, other: NDArray) -> NDArray[np.float64]:
    apart, error, degrees = _joint(points, one, other)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * student.sf(np.abs(apart) / error, degrees)
    return np.where(apart == 0, 1.0, p)
