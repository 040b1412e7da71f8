"""What chance does to a difference measured on the same documents: tests, intervals, and Holm's correction. No torch.

Where two models are alike, it is a coin's toss which of them does better on a document. So the test of a difference is
that of flipped signs (Fisher 1935; Pitman 1937): how often would coins give one as large? It is exact for documents of
any length and difficulty, and from six on it can say something, where a bootstrap of 17 documents calls twice as many
differences news as it says. The interval holds the differences that the test does not deny, so that the two never
contradict each other. What both take for granted is that a document's difference lies as often so far above the mean as
below it; where few documents make most of a difference, an interval of 95 % covers less.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, binomtest, norm

LEVEL = 0.05
EXACT = 20  # documents up to which all signs are counted
_TOGETHER = 500  # differences that are counted at once


def sign_flips(parts: ArrayLike, shares: ArrayLike) -> tuple[float, float, float]:
    """(low, high, p-value): the 95 % interval of a difference, and how likely chance makes one as far from 0.

    parts   (documents,) what each adds to the difference, which is their sum
    shares  (documents,) what each would add to a difference of 1; they sum to 1
    The p-value is two-sided, twice the smaller tail, and NaN where a part is no finite number; without an interval of
    that level, for want of documents, low and high are NaN.
    """
    x, h = np.asarray(parts, dtype=float), np.asarray(shares, dtype=float)
    heard = (x != 0) | (h != 0)  # a document without a token of a band says nothing
    x, h = x[heard], h[heard]
    if not len(x) or not np.isfinite(x).all() or not np.isfinite(h).all():
        return (np.nan,) * 3
    return *_interval(x, h), float(p_values(x[None])[0])


def p_values(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The two-sided p-values of several differences, (differences, documents): see sign_flips. NaN in, NaN out."""
    towards = np.where(parts.sum(1, keepdims=True) < 0, -1, 1)
    return np.minimum(1, 2 * _at_least(towards * parts))  # the other tail is larger, since signs are tossed fairly


def least(documents: int) -> float:
    """The smallest p-value that so many documents can have: all differ to the same side."""
    return min(1.0, 2.0 ** (1 - documents))


def _interval(x: NDArray[np.float64], h: NDArray[np.float64]) -> tuple[float, float]:
    """The differences that the test does not deny: found by narrowing, since the tails grow steadily with them."""
    if least(len(x)) >= LEVEL:
        return np.nan, np.nan
    middle = x.sum()
    step = np.sqrt(((x - middle * h) ** 2).sum())
    if step <= 1e-12 * abs(middle):  # every document says the same
        return middle, middle

    def end(sign: int) -> float:
        def denied(distances: NDArray[np.float64]) -> NDArray[np.bool_]:
            return 2 * _at_least(sign * ((middle + sign * distances[:, None]) * h - x)) < LEVEL

        inside, outside = 0.0, step
        while not denied(np.array([outside]))[0]:
            inside, outside = outside, 2 * outside
            if outside > 1e9 * step:
                return sign * np.inf
        for _ in range(9):
            grid = np.linspace(inside, outside, 18)
            first = 1 + np.append(denied(grid[1:-1]), True).argmax()
            inside, outside = grid[first - 1], grid[first]
        return float(middle + sign * inside)

    return end(-1), end(1)


def _at_least(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability that parts whose signs are tossed sum to as much as they do, (differences, documents) -> (differences,)."""
    finite, counts = np.isfinite(parts).all(1), (parts != 0).sum(1)
    found = np.full(len(parts), np.nan)
    for few in np.array_split(np.flatnonzero(finite & (counts <= EXACT)), -(-len(parts) // _TOGETHER)):
        if len(few):
            found[few] = _counted(parts[few])
    many = finite & (counts > EXACT)
    sizes = np.abs(parts)
    alike = many & (sizes.max(1) - np.where(parts == 0, np.inf, sizes).min(1) < 1e-9 * sizes.max(1))
    found[alike] = binom.sf((parts[alike] > 0).sum(1) - 1, counts[alike], 0.5)  # flips of answers: McNemar's test
    if (many & ~alike).any():
        found[many & ~alike] = _saddlepoint(parts[many & ~alike])
    return found


def _counted(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exactly. Flipping a set of documents keeps the sum where their own sum is at most 0; such sets are counted.

    In two halves, whose sums are sorted once: 2^(n/2) of them meet as many others.
    """
    first = np.argsort(parts == 0, axis=1, kind="stable")[:, :EXACT]  # all that are not 0
    x = np.take_along_axis(parts, first, axis=1)
    x = x / np.maximum(np.abs(x).sum(1, keepdims=True), np.finfo(float).tiny)
    half = x.shape[1] // 2
    one, other = x[:, :half] @ _subsets(half).T, np.sort(x[:, half:] @ _subsets(x.shape[1] - half).T, axis=1)
    row = np.arange(len(x))[:, None]  # sums lie within -1 and 1: rows that stand 3 apart are sorted as one
    small = 1e-12  # what rounding makes of 0
    below = np.searchsorted((other + 3 * row).ravel(), small - one + 3 * row, side="right") - row * other.shape[1]
    return below.sum(1) / 2.0 ** x.shape[1]


@functools.lru_cache
def _subsets(documents: int) -> NDArray[np.float64]:
    """(2^documents, documents): which are in each subset, the empty one included."""
    return (np.arange(2**documents)[:, None] >> np.arange(documents) & 1).astype(float)


def _saddlepoint(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """As _counted, for more documents: the saddlepoint approximation (Robinson 1982, J. R. Statist. Soc. B 44, 91).

    K(t), the sum of log cosh(t x), is the cumulant function of the sum whose signs are tossed; from the t at which its
    slope is the sum of x, Lugannani's and Rice's formula gives the tail. Its error is relative, so that a small p-value
    can be corrected for a large table.
    """
    x = np.abs(parts) / np.sqrt((parts**2).sum(1, keepdims=True))  # the sum's standard deviation is 1
    total = parts.sum(1) / np.sqrt((parts**2).sum(1))
    above = np.abs(total)
    t = np.zeros(len(x))
    for _ in range(60):  # K' is concave: Newton's steps from 0 approach from below
        tanh = np.tanh(t[:, None] * x)
        slope = (x**2 * (1 - tanh**2)).sum(1)
        step = np.where(slope > 1e-12, (above - (x * tanh).sum(1)) / np.maximum(slope, 1e-12), 0)
        t += step
        if (np.abs(step) < 1e-9 * (1 + t)).all():
            break
    log_cosh = (t[:, None] * x + np.log1p(np.exp(-2 * t[:, None] * x)) - np.log(2)).sum(1)
    w, u = np.sqrt(np.maximum(2 * (t * above - log_cosh), 0)), t * np.sqrt(slope)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = norm.sf(w) + norm.pdf(w) * (1 / u - 1 / w)
    tail = np.where(w > 1e-4, tail, 0.5)
    tail = np.where(above < x.sum(1) * (1 - 1e-9), tail, 0)  # else all have one sign: no toss makes more of them
    tail = np.clip(tail, 2.0 ** -(parts != 0).sum(1), 0.5)
    return np.where(total >= 0, tail, 1 - tail)


def mcnemar(before: ArrayLike, after: ArrayLike) -> tuple[float, int, int]:
    """(p-value, wrong to right, right to wrong) of two answers, right (1) or wrong (0), to each document.

    Exact and two-sided: where nothing changed, each flip is as likely to go either way (McNemar 1947,
    doi:10.1007/BF02295996). It is the test of flipped signs, counted at once. Without flips the p-value is 1.
    """
    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    flips = gained + lost
    return (float(binomtest(gained, flips, 0.5).pvalue) if flips else 1.0), gained, lost


def flip_interval(gained: int, lost: int, documents: int, p: float) -> tuple[float, float]:
    """The 95 % interval of a difference of two shares of right answers to the same documents.

    Bonett's and Price's adjusted Wald (2012, doi:10.3102/1076998611411915), which adds a flip each way: where few
    documents flip, none of them being seen is no proof. It reaches 0 wherever McNemar's test denies nothing.
    """
    up, down = (gained + 1) / (documents + 2), (lost + 1) / (documents + 2)
    half = norm.isf(LEVEL / 2) * np.sqrt((up + down - (up - down) ** 2) / (documents + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return (low, high) if p < LEVEL else (min(low, 0.0), max(high, 0.0))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values (1979): the k-th smallest of n times n - k + 1, never falling, at most 1. NaN stays NaN."""
    p = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors)) if len(order) else []
    return adjusted
