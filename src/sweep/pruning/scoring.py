"""A criterion's function called with what it reads, and what it returns checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sweep.pruning.criteria import Criterion
from sweep.settings import RequestError


def scored(criterion: Criterion, given: Mapping[str, Any], shape: Sequence[int], where: str) -> Tensor:
    """The scores of what lies at `where`, of this shape. Higher = keep.

    given  at least what the criterion reads, by name
    Raises RequestError for what are no scores of this shape.
    """
    scores = criterion.load()(**{name: given[name] for name in criterion.reads})
    if tuple(scores.shape) != tuple(shape):
        raise RequestError(
            f"method.criterion={criterion.name} gave scores of shape {tuple(scores.shape)} for {where}, whose shape is "
            f"{tuple(shape)}"
        )
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise RequestError(
            f"method.criterion={criterion.name} gave {bad} of {scores.numel()} scores for {where} that are NaN or infinite"
        )
    return scores
