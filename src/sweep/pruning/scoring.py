"""A criterion's function called with what it reads, and what it returns checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sweep.pruning import own_functions
from sweep.pruning.criteria import Criterion
from sweep.settings import RequestError

_KEPT = (torch.float32, torch.float64, torch.int64)  # dtypes that selection ranks as they are


def scored(criterion: Criterion, given: Mapping[str, Any], shape: Sequence[int], where: str) -> Tensor:
    """The scores of what lies at `where`, of this shape. Higher = keep.

    given  at least what the criterion reads, by name
    Raises RequestError for what are no finite scores of this shape, and for a function of the user's own that fails.
    """
    name = f"method.criterion={criterion.name}"
    function = criterion.load()
    try:
        scores = function(**criterion.arguments(given))
    except Exception as error:
        if criterion.function or "memory" in f"{type(error).__name__} {error}".lower():
            raise  # the package's own; or what makes a row of status out_of_memory
        file = criterion.source.file if criterion.source else function.__code__.co_filename
        raise RequestError(f"{name} failed for {where}: {own_functions.told(error, file)}") from error
    if not isinstance(scores, Tensor) or scores.is_complex():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise RequestError(
            f"{name} must return a tensor of real numbers, one for each it scores; for {where} it gave {kind}"
        )
    if scores.shape != torch.Size(shape):
        raise RequestError(
            f"{name} must return scores of shape {tuple(shape)} for {where}; it gave shape {tuple(scores.shape)}"
        )
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise RequestError(f"{name} gave {bad} of {scores.numel()} scores for {where} that are NaN or infinite")
    return scores.detach() if scores.dtype in _KEPT else scores.detach().float()
