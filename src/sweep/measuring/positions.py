"""Losses by where in the text a token stands, so that a model that has lost long context shows.

The mean loss of texts hides it: most of a text's tokens are told from the few before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sweep import metrics
from sweep.measuring import words

WIDTH = 128  # tokens


def columns(losses: Sequence[NDArray], told: Sequence[NDArray], longest: int) -> dict[str, float | None]:
    """`loss_at_0to128`, its standard error, `perplexity_at_0to128` and so on, of the ranges in which there is a token.

    losses   of the tokens of each text in order, nats: that of place i is told from the i + 1 tokens before it
    told     bool, which of them count
    longest  tokens that the model reads at once: then it begins anew, as windows of a long text do
    Texts are the sampling unit. One that ends before a range is not in it, so that the ranges of texts of unequal length
    are of unequal texts: compare each with the dense model's.
    """
    sums: dict[int, list[tuple[float, int]]] = {}  # by range, of each text that reaches it
    for loss, counts in zip(losses, told, strict=True):
        ranges = np.arange(len(loss)) % longest // WIDTH
        for place in np.unique(ranges[counts]):
            here = counts & (ranges == place)
            sums.setdefault(int(place), []).append((float(loss[here].sum(dtype=np.float64)), int(here.sum())))
    found: dict[str, float | None] = {}
    for place, texts in sorted(sums.items()):
        name = f"{place * WIDTH}to{min((place + 1) * WIDTH, longest)}"
        value, error = metrics.ratio(*zip(*texts, strict=True))
        found |= {f"loss_at_{name}": value, f"loss_at_{name}_stderr": error, f"perplexity_at_{name}": words.exp(value)}
    return found
