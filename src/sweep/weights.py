"""Weight pruning: single weights of the blocks' linear layers are set to zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep import models, scores, select, surgery
from sweep.config import Weight
from sweep.outcome import Outcome

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": scores.magnitude}


def prune(model: PreTrainedModel, method: Weight, sparsity: float) -> Outcome:
    """Prune the model in place. Raises RuntimeError when the removed count is not the requested one."""
    score = SCORES[method.criterion]
    targets = removed = 0
    for name, linear in _targets(model, method.targets).items():
        weight = models.weight(linear)
        try:
            keep = select.lowest(score(weight), select.count(weight.numel(), sparsity))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        surgery.zero_weights(linear, keep)
        if weight[~keep].any():
            raise RuntimeError(f"{name}: pruned weights are not zero")
        targets += weight.numel()
        removed += weight.numel() - int(keep.sum())
        if removed and torch.count_nonzero(weight) > keep.sum():
            raise RuntimeError(f"{name}: more weights are left than the mask keeps")
    return Outcome(targets, removed)


def _targets(model: PreTrainedModel, targets: str) -> dict[str, models.Linear]:
    """The linear layers that a weight method prunes."""
    linears = models.linears(model)
    if targets == "all":
        return linears
    attention = models.architecture(model).attention
    inside = {name: f".{attention}." in f".{name}." for name in linears}
    return {name: linear for name, linear in linears.items() if inside[name] == (targets == "attention")}
