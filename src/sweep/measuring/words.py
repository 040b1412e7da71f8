"""How rare a word is, and what a model loses on rare ones. No torch.

The frequency of a word is its Zipf value from the package wordfreq: log10 of its occurrences in 10^9 words of general
English (van Heuven et al. 2014, doi:10.1080/17470218.2013.850521), 7 for `the`, 0 for a word that is not listed. A
token belongs to the first word it has a letter of; tokens without letters (digits, punctuation, blanks) have a band of
their own, for they are most of the tokens of some texts and no words.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sweep import metrics

BANDS = tuple(metrics.BANDS)
_EDGES = (5.0, 4.0, 3.0)  # lowest Zipf value of the first bands
NO_WORD = len(BANDS) - 1
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


@functools.lru_cache(maxsize=1 << 20)
def zipf(word: str) -> float:
    """The Zipf frequency of a word in English, 0 to 8; case does not count."""
    from wordfreq import zipf_frequency  # reads its word list on first use

    return float(zipf_frequency(word, "en"))


def band(word: str) -> int:
    """The place in BANDS of a word, or of anything without letters."""
    found = _WORD.search(word)
    if not found:
        return NO_WORD
    value = zipf(found.group())
    return next((i for i, edge in enumerate(_EDGES) if value >= edge), len(_EDGES))


def of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(band, word) of each token of a text: `word` is the place of its word in the text, -1 where it is of none.

    offsets  (start, end) of each token in the text
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    bands = [band(text[start:end]) for start, end in spans]
    at_character = np.full(len(text) + 1, -1)
    for i, (start, end) in enumerate(spans):
        at_character[start:end] = i
    words = np.full(len(offsets), -1)
    for i, (start, end) in enumerate(offsets):
        inside = at_character[start:end]
        hits = inside[inside >= 0]
        words[i] = hits[0] if len(hits) else -1
    return np.array([NO_WORD if word < 0 else bands[word] for word in words], dtype=np.int64), words


def of_vocabulary(tokenizer: Any, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The band of each of these tokens, by the word that it alone spells; a piece of a word is as rare as it is a word.

    Special tokens have no word.
    """
    special = set(tokenizer.all_special_ids)
    return np.array([NO_WORD if i in special else band(tokenizer.decode([i])) for i in ids], dtype=np.int64)


def by_band(
    bands: NDArray[np.int64],
    words: NDArray[np.int64],
    losses: NDArray[np.floating],
    removed: NDArray[np.bool_] | None = None,
) -> dict[str, float]:
    """One text's sums by band, of the bands that occur: `loss_band_B` in nats, `tokens_band_B`, `words_band_B`.

    removed  tokens that the model's vocabulary has lost, counted as `removed_band_B`
    """
    found = {}
    for i, name in enumerate(BANDS):
        here = bands == i
        if here.any():
            found[f"loss_band_{name}"] = float(losses[here].sum(dtype=np.float64))
            found[f"tokens_band_{name}"] = float(here.sum())
            if i != NO_WORD:
                found[f"words_band_{name}"] = float(len(np.unique(words[here])))
            if removed is not None:
                found[f"removed_band_{name}"] = float((here & removed).sum())
    return found


def pooled(texts: Sequence[dict[str, float]]) -> dict[str, float]:
    """All texts' sums as one task's metrics, by band.

    `loss_band_B`            mean loss of a token, nats, with `_stderr`: texts are the sampling unit, since the tokens of
                             one text depend on each other (the linearised variance of a ratio)
    `perplexity_band_B`      its exp
    `word_loss_band_B`       mean loss of a word, nats: a rare word is made of more tokens
    `tokens_band_B`          tokens in the band
    `removed_share_band_B`   of its tokens, those that the model's vocabulary has lost; where any text says so
    """
    found: dict[str, float] = {}
    for name in BANDS:
        losses, tokens = (np.array([t.get(f"{key}_band_{name}", 0.0) for t in texts]) for key in ("loss", "tokens"))
        total = tokens.sum()
        if not total:
            continue
        if any(f"removed_band_{name}" in t for t in texts):
            found[f"removed_share_band_{name}"] = float(sum(t.get(f"removed_band_{name}", 0.0) for t in texts) / total)
        mean, error = metrics.ratio(losses, tokens)
        found[f"loss_band_{name}"] = mean
        if error is not None:
            found[f"loss_band_{name}_stderr"] = error
        found[f"perplexity_band_{name}"] = exp(mean)
        words = sum(t.get(f"words_band_{name}", 0.0) for t in texts)
        if words:
            found[f"word_loss_band_{name}"] = float(losses.sum() / words)
        found[f"tokens_band_{name}"] = float(total)
    return found


def exp(loss: float) -> float:
    """The perplexity of a loss in nats, infinite where a float cannot hold it; NaN stays NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def accuracy_by_band(bands: Sequence[int], right: Sequence[float]) -> dict[str, float]:
    """`acc_band_B` with `_stderr` and `examples_band_B`, from the band of each example's word and whether it was told."""
    found: dict[str, float] = {}
    for i, name in enumerate(BANDS):
        values = np.array([r for b, r in zip(bands, right, strict=True) if b == i], dtype=float)
        if not len(values):
            continue
        found[f"acc_band_{name}"] = float(values.mean())
        if len(values) > 1:
            found[f"acc_band_{name}_stderr"] = float(values.std(ddof=1) / math.sqrt(len(values)))
        found[f"examples_band_{name}"] = float(len(values))
    return found


def rows_by_band(
    bands: NDArray[np.int64], norms: NDArray[np.floating], kept: Sequence[int] | NDArray[np.int64]
) -> dict[str, float]:
    """Of a matrix with one row a token: the mean L2 norm of the dense model's rows by band, and the share removed.

    bands, norms  (V,) of the dense model
    kept          ids of the rows that are left
    """
    left = np.zeros(len(norms), dtype=bool)
    left[np.asarray(kept)] = True
    found = {}
    for i, name in enumerate(BANDS):
        here = np.flatnonzero(bands == i)
        if len(here):
            found[f"row_norm_band_{name}"] = float(norms[here].mean(dtype=np.float64))
            found[f"share_pruned_band_{name}"] = float(1 - left[here].mean())
            found[f"rows_band_{name}"] = float(len(here))
    return found
