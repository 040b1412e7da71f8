"""Unit pruning: whole FFN neurons are removed, and the matrices become smaller."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from sweep import calibrate, models, select, surgery
from sweep.config import Neuron
from sweep.outcome import Outcome

NEURON_SCORES: dict[str, Callable[[PreTrainedModel, Tensor], list[Tensor]]] = {
    "taylor_abs": calibrate.neuron_taylor_abs
}


def prune_neurons(model: PreTrainedModel, method: Neuron, sparsity: float, tokens: Tensor) -> Outcome:
    """Prune the model in place. Raises RuntimeError when the removed count is not the requested one."""
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
    return Outcome(targets=sum(sizes), removed=sum(sizes) - sum(left), calibration_tokens=tokens.numel())
