"""Unit pruning: whole FFN neurons and attention heads are removed, and the matrices become smaller.

A part is one block's FFN or attention. Its units are columns of its output matrix: one column a neuron, head_dim
columns a query head, those of a whole group where key-value groups go together. Units are removed in bundles, the
smallest sets whose removal leaves a legal shape: one unit; `multiple_of` neurons; one query head of every group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep import heads, models, repair, select, surgery, unit_scores, unit_statistics
from sweep.config import GRADIENT_CRITERIA, Head, Neuron
from sweep.outcome import Outcome
from sweep.unit_scores import Statistics


@dataclass(frozen=True)
class Part:
    """One block's FFN or attention, as units over the columns of its output matrix."""

    block: int
    inputs: tuple[models.Linear, ...]
    output: models.Linear
    size: int  # columns a unit
    bundle: int  # units that go together; 0 = one of every key-value group
    groups: int  # key-value groups; 1 for an FFN
    remove: Callable[[Tensor], None]  # cuts the part down to a keep-mask over columns

    @property
    def columns(self) -> int:
        return models.weight(self.output).shape[1]

    @property
    def units(self) -> int:
        return self.columns // self.size

    @property
    def weights(self) -> int:
        return sum(models.weight(linear).numel() for linear in (*self.inputs, self.output))

    @property
    def weights_a_unit(self) -> int:
        """Weights that go with one unit; a query head takes its keys and values along only where they are its own."""
        shared = self.inputs[1:] if self.bundle == 0 else ()
        return (self.weights - sum(models.weight(linear).numel() for linear in shared)) // self.units


def parts(model: PreTrainedModel, method: Neuron | Head) -> list[Part]:
    """The parts that the method may prune, in order of their blocks."""
    if isinstance(method, Neuron):
        found = [Part(ffn.block, ffn.inputs, ffn.output, 1, method.multiple_of, 1,
                      lambda keep, ffn=ffn: surgery.remove_neurons(ffn, keep))  # type: ignore[misc]
                 for ffn in models.ffns(model)]  # fmt: skip
    else:
        found = []
        for a in heads.attentions(model):
            together = method.unit == "group" or a.groups == a.heads
            size = a.head_dim * (a.heads // a.groups if together else 1)
            found.append(Part(a.block, a.inputs, a.output, size, 1 if together else 0, a.groups,
                              lambda keep, a=a: surgery.remove_heads(a, keep[:: a.head_dim])))  # type: ignore[misc]  # fmt: skip
    return [part for part in found if method.blocks is None or part.block in method.blocks]


def prune(
    model: PreTrainedModel, method: Neuron | Head, sparsity: float, tokens: Tensor | None, seed: int = 0
) -> Outcome:
    """Prune the model in place, in `method.steps` rounds of measuring and removing.

    tokens  (sequences, length) calibration text, for criteria and repairs that read one
    Raises ValueError when the request leaves a part without a unit, RuntimeError when the matrices are not left with
    the weights that the choice leaves them.
    """
    generator = torch.Generator().manual_seed(seed)
    before = parts(model, method)
    weights, units = sum(p.weights for p in before), sum(p.units for p in before)
    parameters = sum(p.numel() for p in model.parameters())
    expected = weights
    for step in range(1, method.steps + 1):
        now = parts(model, method)
        seen = _statistics(model, method, now, tokens)
        scores = [score(method.criterion, part, s, generator) for part, s in zip(now, seen, strict=True)]
        keeps = choose(now, scores, method, sparsity * step / method.steps, weights, units)
        expected -= sum(int((~keep).sum()) * p.weights_a_unit for p, keep in zip(now, keeps, strict=True))
        cut = [keep.repeat_interleave(part.size) for part, keep in zip(now, keeps, strict=True)]
        if method.repair:
            assert tokens is not None
            repair.cut_and_refit(
                model, [(p.block, p.output, p.remove, k) for p, k in zip(now, cut, strict=True)], tokens
            )
        else:
            for part, keep, statistics in zip(now, cut, seen, strict=True):
                if method.criterion == "flap" and statistics is not None:
                    _compensate(part, keep, statistics)
                part.remove(keep)
    surgery.describe_shape(model)
    after = parts(model, method)
    left = sum(p.weights for p in after)
    if left != expected:
        raise RuntimeError(f"removal of units left {left} weights, {expected} expected")
    return Outcome(
        targets=weights,
        removed=weights - left,
        calibration_tokens=0 if tokens is None else tokens.numel(),
        units=units,
        units_removed=units - sum(p.units for p in after),
        removed_parameters=parameters - sum(p.numel() for p in model.parameters()),
    )


def score(criterion: str, part: Part, seen: Statistics | None, generator: torch.Generator) -> Tensor:
    """The importance of every unit of a part: (units,) float32, higher = keep."""
    weight = models.weight(part.output)
    match criterion:
        case "random":
            return unit_scores.random(part.units, generator)
        case "l2":
            own = part.inputs[:1] if part.bundle == 0 else part.inputs
            return unit_scores.l2([models.weight(linear) for linear in own], weight, part.size)
    assert seen is not None
    match criterion:
        case "activation":
            return unit_scores.activation(seen, part.size)
        case "wanda_sp":
            return unit_scores.wanda_sp(weight, seen, part.size)
        case "flap":
            return unit_scores.flap(weight, seen, part.size)
        case "taylor":
            return unit_scores.taylor(seen)
        case "taylor_abs":
            return unit_scores.taylor_abs(seen)
        case "fisher":
            return unit_scores.fisher(seen)
    raise AssertionError(criterion)


def choose(
    parts: list[Part], scores: list[Tensor], method: Neuron | Head, goal: float, weights: int, units: int
) -> list[Tensor]:
    """Keep-masks over the units of each part, such that `goal` of the original weights or units is gone in all.

    weights, units  of the parts before anything was removed
    The lowest bundles go, as many as come nearest to the goal; every part keeps its best bundle.
    """
    by_weight = method.sparsity_of == "parameters"
    bundles = [_bundles(part, s.cpu()) for part, s in zip(parts, scores, strict=True)]
    values = [torch.stack([s.cpu()[members].mean() for members in inside])
              for s, inside in zip(scores, bundles, strict=True)]  # fmt: skip
    costs = [torch.tensor([len(members) * (part.weights_a_unit if by_weight else 1) for members in inside])
             for part, inside in zip(parts, bundles, strict=True)]  # fmt: skip
    left = [part.weights if by_weight else part.units for part in parts]
    whole = weights if by_weight else units
    budget = goal * whole - (whole - sum(left))
    if method.scope == "global":
        kept = select.nearest(values, costs, budget, at_least=1)
    else:
        share = [budget * size / sum(left) for size in left]
        kept = [select.nearest([v], [c], b, at_least=1)[0] for v, c, b in zip(values, costs, share, strict=True)]
    masks = []
    for part, inside, stays in zip(parts, bundles, kept, strict=True):
        mask = torch.ones(part.units, dtype=torch.bool)
        for members, stay in zip(inside, stays.tolist(), strict=True):
            mask[members] = stay
        masks.append(mask)
    return masks


def _bundles(part: Part, scores: Tensor) -> list[Tensor]:
    """Sets of units that are removed together, the least important first."""
    if part.bundle == 0:
        order = scores.view(part.groups, -1).argsort(dim=1, stable=True)
        first = torch.arange(part.groups)[:, None] * order.shape[1]
        return list((order + first).t())
    order = scores.argsort(stable=True)
    odd = part.units % part.bundle
    return [*([order[:odd]] if odd else []), *order[odd:].split(part.bundle)]


def _statistics(
    model: PreTrainedModel, method: Neuron | Head, parts: list[Part], tokens: Tensor | None
) -> list[Statistics] | list[None]:
    if method.criterion in ("random", "l2"):
        return [None] * len(parts)
    assert tokens is not None
    return unit_statistics.gather(model, [p.output for p in parts], [p.size for p in parts], tokens,
                                  gradients=method.criterion in GRADIENT_CRITERIA)  # fmt: skip


def _compensate(part: Part, keep: Tensor, seen: Statistics) -> None:
    """Add to the bias what the removed columns give on average (FLAP): sum over removed j of W_j * mean x_j."""
    gone = ~keep.to(seen.input_sum.device)
    mean = seen.input_sum / seen.tokens
    surgery.add_bias(part.output, models.weight(part.output)[:, gone].float() @ mean[gone])
