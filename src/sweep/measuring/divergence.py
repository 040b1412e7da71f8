"""How far a model's next-token distributions are from the dense model's: a measure of damage that needs no labels.

Kept of the dense model, once, in the cache: at every position of the pages of `pydoc`, its 64 likeliest tokens with
their log-probabilities (float32). Compared are the distributions over those 64 and, as one outcome, all other tokens.
Merging outcomes never raises a Kullback-Leibler divergence, so that the number is a lower bound of the divergence over
the whole vocabulary; its dense row is 0 up to the rounding of the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sweep import cache, versions
from sweep.config import Cell
from sweep.measuring import task_identity
from sweep.models import origin
from sweep.texts import embedded, text

if TYPE_CHECKING:
    from sweep.measuring.scorer import Alternatives

TASK = "pydoc"
TOP = 64  # tokens that are kept of a distribution


@dataclass(frozen=True)
class Distributions:
    """The dense model's, by page: T positions, the likeliest tokens of each."""

    ids: dict[str, NDArray[np.int64]]  # (T, TOP)
    log_probs: dict[str, NDArray[np.float32]]  # (T, TOP)


def of_dense(cell: Cell) -> Distributions | None:
    """The dense model's distributions on the pages that the cell evaluates; measured once, then read from the cache.

    None for a cell that does not evaluate them.
    """
    if TASK not in cell.benchmarks.tasks:
        return None
    settings = cell.benchmarks
    key = text.fingerprint(
        [
            origin.fingerprint(cell.model),
            task_identity.of_embedded(TASK),
            TOP,
            settings.limit,
            settings.batch_size,
            settings.max_length,
            *versions.arithmetic(cell),
        ]
    )
    folder = cache.entry("distributions", key, lambda half: _measure(cell, half))
    with np.load(folder / "top.npz") as stored:
        pages = [document["page"] for document in embedded.pydoc_documents()][: settings.limit]
        return Distributions(
            {page: stored[f"ids{i}"].astype(np.int64) for i, page in enumerate(pages)},
            {page: stored[f"log_probs{i}"] for i, page in enumerate(pages)},
        )


def _measure(cell: Cell, folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from sweep.measuring import reading, scorer
    from sweep.models import loading

    model, tokenizer = loading.load(cell.model, cell.dtype, cell.device)
    read, _ = reading.of(model)
    lm = scorer.Scorer(model, tokenizer, cell.benchmarks.batch_size, cell.benchmarks.max_length, read)
    lm.top = TOP
    pages = [document["page"] for document in embedded.pydoc_documents()][: cell.benchmarks.limit]
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (page,), i) for i, page in enumerate(pages)])
    arrays: dict[str, Any] = {}
    for i, page in enumerate(pages):
        found = lm.alternatives[page]
        arrays |= {f"ids{i}": found.ids.astype(np.int32), f"log_probs{i}": found.log_probs}
    np.savez(folder / "top.npz", **arrays)


def kl(dense: NDArray[np.floating], other: Alternatives) -> NDArray[np.float64]:
    """KL(dense || other) of each position in nats, over the kept tokens and the rest as one outcome.

    dense  (T, TOP) log-probabilities of the dense model
    other  the other model's log-probabilities of the same tokens
    """
    p, q = dense.astype(np.float64), other.log_probs.astype(np.float64)
    rest_p, rest_q = _rest(p), np.maximum(_rest(q), 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.where(rest_p > 0, rest_p * (np.log(rest_p) - np.log(rest_q)), 0.0)
    return (np.exp(p) * (p - q)).sum(1) + rest


def overlap(dense: NDArray[np.floating], other: Alternatives) -> NDArray[np.float64]:
    """The sum of the smaller of both probabilities, sum_v min(p_v, q_v), of each position: as `kl`, at most 1.

    With it a token that is drawn from the one is kept for the other (Leviathan et al. 2023, arXiv:2211.17192, theorem
    3.5). Merging outcomes never lowers it: an upper bound, by no more than the smaller rest.
    """
    p, q = dense.astype(np.float64), other.log_probs.astype(np.float64)
    return np.exp(np.minimum(p, q)).sum(1) + np.minimum(_rest(p), _rest(q))


def _rest(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability of all other tokens; rounding may leave less than nothing."""
    return np.maximum(1 - np.exp(log_probs).sum(1), 0)
