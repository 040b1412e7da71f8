"""The seam: a method pairs a score with a selection and says how the model changes.

To add a criterion: a function in scores.py, a line in the dictionaries below, its name in config.py, a YAML in
conf/method, and a row in the test of invariants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep import calibrate, models, scores, select, surgery
from sweep.config import Dense, Method, Neuron, Weight


@dataclass(frozen=True)
class Outcome:
    """What pruning did, for the row."""

    targets: int  # weights that could have been removed
    removed: int  # weights that were
    calibration_tokens: int = 0

    @property
    def sparsity(self) -> float:
        return self.removed / self.targets if self.targets else 0.0


def prune(model: PreTrainedModel, method: Method, sparsity: float, tokens: Tensor | None) -> Outcome:
    """Prune the model in place and report what was removed.

    tokens  (sequences, length) calibration text for methods that read one, else None
    Raises RuntimeError when the removed count is not the requested one.
    """
    match method:
        case Dense():
            return Outcome(targets=sum(models.weight(m).numel() for m in models.linears(model).values()), removed=0)
        case Weight():
            return _prune_weights(model, method, sparsity)
        case Neuron():
            assert tokens is not None
            return replace(_prune_neurons(model, method, sparsity, tokens), calibration_tokens=tokens.numel())


WEIGHT_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": scores.magnitude}
NEURON_SCORES: dict[str, Callable[[PreTrainedModel, Tensor], list[Tensor]]] = {
    "taylor_abs": calibrate.neuron_taylor_abs
}


def _prune_weights(model: PreTrainedModel, method: Weight, sparsity: float) -> Outcome:
    score = WEIGHT_SCORES[method.criterion]
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


def _prune_neurons(model: PreTrainedModel, method: Neuron, sparsity: float, tokens: Tensor) -> Outcome:
    ffns = models.ffns(model)
    importance = NEURON_SCORES[method.criterion](model, tokens)
    neurons = [ffn.width for ffn in ffns]
    if method.scope == "global":
        keeps = select.lowest_across(importance, select.count(sum(neurons), sparsity), at_least=1)
    else:
        keeps = [select.lowest(s, select.count(s.numel(), sparsity)) for s in importance]
    sizes = [sum(models.weight(m).numel() for m in (*ffn.inputs, ffn.output)) for ffn in ffns]
    for ffn, keep in zip(ffns, keeps, strict=True):
        surgery.remove_neurons(ffn, keep)
    left = [sum(models.weight(m).numel() for m in (*ffn.inputs, ffn.output)) for ffn in ffns]
    expected = [size * int(keep.sum()) // n for size, keep, n in zip(sizes, keeps, neurons, strict=True)]
    if left != expected:
        raise RuntimeError(f"neuron removal left {sum(left)} weights, {sum(expected)} expected")
    return Outcome(targets=sum(sizes), removed=sum(sizes) - sum(left))
