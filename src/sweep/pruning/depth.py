"""Depth pruning: whole blocks are removed, or their sublayers, attention and FFN, each alone.

A unit is a block, or a sublayer of one; its number is that of its block in the unpruned model, with the sublayer's place there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.models import anatomy, sublayers, surgery
from sweep.models.sublayers import Sublayer
from sweep.pruning import checks, criteria, drop, scoring, select, sharing, unit_statistics
from sweep.pruning.criteria import Criterion
from sweep.pruning.families import Layer
from sweep.pruning.pruned import Given, Pruned
from sweep.settings import RequestError

Number = tuple[int, int]  # of a unit: its block's, and its place there, 0 of a block


@dataclass(frozen=True)
class Unit:
    """A block or a sublayer as it lies in the model now."""

    block: int
    place: int
    part: Sublayer | None = None  # None = the whole block
    later: tuple[Sublayer, ...] = ()  # those of the same block that come after it

    @property
    def modules(self) -> tuple[str, ...]:
        """What goes with a sublayer, by names within its block; none for a block, which goes with all that is in it."""
        return () if self.part is None else (*self.part.ends, *self.part.inside)


def units(model: PreTrainedModel, method: Layer) -> list[Unit]:
    """The units of the method's kind that are there, in the order in which a text goes through them."""
    if method.unit == "block":
        return [Unit(block, 0) for block in range(len(anatomy.blocks(model)))]
    return [
        Unit(part.block, place, part, tuple(parts[place + 1 :]))
        for parts in sublayers.find(model)
        for place, part in enumerate(parts)
        if method.unit in ("sublayer", part.kind)
    ]


def tensors(model: PreTrainedModel, unit: Unit) -> list[Tensor]:
    """All parameters that go with a unit, each once."""
    block = anatomy.blocks(model)[unit.block]
    found = list(block.parameters()) if unit.part is None else unit.part.tensors(block)
    return list({id(tensor): tensor for tensor in found}.values())


def prune(model: PreTrainedModel, method: Layer, sparsity: float, given: Given) -> Pruned:
    """Remove the least important units in place, in `method.steps` rounds of measuring and removing.

    Raises RequestError when the request leaves no unit, and for units that cannot be found or removed in this model.
    """
    criterion = criteria.find(method.criterion, method.of)
    generator = torch.Generator().manual_seed(given.seed)
    before = _found(model, method)
    every = [(unit.block, unit.place) for unit in before]
    sizes = {number: _size(model, unit) for number, unit in zip(every, before, strict=True)}
    candidates = [number for number in every if method.blocks is None or number[0] in method.blocks]
    costs = {number: sizes[number] if method.sparsity_of == "parameters" else 1 for number in candidates}
    left, tables, whole = every, [], _whole(model)
    for step in range(1, method.steps + 1):
        if method.unit == "block":
            now = units(model, method)
        else:  # as they were found at first: what others leave behind is none of theirs
            now = [unit for number, unit in zip(every, before, strict=True) if number in set(left)]
        open_ = [place for place, number in enumerate(left) if number in costs]
        numbers = [left[place] for place in open_]
        if criterion.measured:
            scores = _drops(
                model, drop.probe(method.drop, given.tokens, given.tokenizer), method, [now[p] for p in open_]
            )
            tables.append(_table(numbers, scores))
        else:
            memo = given.memo if step == 1 else sharing.unshared
            scores = _scores(model, method, criterion, now, given.tokens, generator, memo)[open_]
        there = {number: cost for number, cost in costs.items() if number in left}
        budget = sum(costs.values()) * sparsity * step / method.steps - (sum(costs.values()) - sum(there.values()))
        keep = _keep(scores, there, budget, method, sparsity, at_least=int(len(open_) == len(left)))
        gone = {place for place, stays in zip(open_, keep.tolist(), strict=True) if not stays}
        _remove(model, method, now, gone)
        left = [number for place, number in enumerate(left) if place not in gone]
    targets = sum(sizes[number] for number in candidates)
    removed = targets - sum(sizes[number] for number in candidates if number in left)
    _check_left(model, whole - removed)
    lost = np.array([number for number in every if number not in set(left)], dtype=np.int64).reshape(-1, 2)
    return Pruned(
        targets=targets,
        removed=removed,
        calibration_tokens=0 if given.tokens is None else given.tokens.numel(),
        units=len(candidates),
        gone=lost[:, 0] if method.unit == "block" else lost,
        measured=drop.latest(tables),
    )


def replay(model: PreTrainedModel, method: Layer, gone: np.ndarray) -> Pruned:
    """Remove the units of these numbers in place.

    gone  (n,) of blocks; of sublayers (n, 2), block and place of each
    """
    before = _found(model, method)
    lost = {(int(block), 0) for block in gone} if method.unit == "block" else {tuple(pair) for pair in gone.tolist()}
    may_go = [unit for unit in before if method.blocks is None or unit.block in method.blocks]
    places = {place for place, unit in enumerate(before) if (unit.block, unit.place) in lost}
    targets, removed = sum(_size(model, unit) for unit in may_go), sum(_size(model, before[place]) for place in places)
    whole = _whole(model)
    _remove(model, method, before, places)
    _check_left(model, whole - removed)
    return Pruned(targets=targets, removed=removed, units=len(may_go), gone=gone)


def _found(model: PreTrainedModel, method: Layer) -> list[Unit]:
    """The units of a model that can lose some. Raises RequestError."""
    if (times := anatomy.most_runs(model)) > 1:
        raise RequestError(
            f"method=layer: a text goes {times} times through blocks of {type(model).__name__}, so that what is left of them "
            "would be counted anew in each round: use +method=weight"
        )
    if not (found := units(model, method)):
        raise RequestError(f"method.unit={method.unit}: no block of {type(model).__name__} has one, use another unit")
    return found


def _check_left(model: PreTrainedModel, expected: int) -> None:
    if _whole(model) != expected:
        raise RuntimeError(f"the blocks that are left have {_whole(model)} parameters, and {expected} are expected")


def _keep(
    scores: Tensor, costs: dict[Number, int], budget: float, method: Layer, sparsity: float, at_least: int
) -> Tensor:
    """Which units stay. Raises RequestError for a budget that leaves none where one must stay."""
    prices = torch.tensor(list(costs.values()))
    if at_least and not select.nearest([scores], [prices], budget)[0].any():
        most = 1 - max(costs.values()) / sum(costs.values())
        raise RequestError(f"sparsity={sparsity:g} leaves no {method.unit}: {checks.at_most(most)}")
    return select.nearest([scores], [prices], budget, at_least=at_least)[0]


def _size(model: PreTrainedModel, unit: Unit) -> int:
    return sum(tensor.numel() for tensor in tensors(model, unit))


def _whole(model: PreTrainedModel) -> int:
    """Parameters of all blocks, one that several share once for each."""
    return sum(p.numel() for block in anatomy.blocks(model) for p in block.parameters())


def _table(numbers: Sequence[Number], scores: Tensor) -> pd.DataFrame:
    blocks, places = zip(*numbers, strict=True) if numbers else ((), ())
    return pd.DataFrame({"block": blocks, "unit": places, "importance": scores.tolist(), "measured": True})


def _remove(model: PreTrainedModel, method: Layer, now: Sequence[Unit], gone: set[int]) -> None:
    if not gone:
        return
    if method.unit == "block":
        surgery.remove_blocks(model, [place not in gone for place in range(len(now))])
    else:
        parts = [part for place in sorted(gone) if (part := now[place].part) is not None]
        sublayers.remove(model, parts)


def _scores(
    model: PreTrainedModel,
    method: Layer,
    criterion: Criterion,
    now: Sequence[Unit],
    tokens: Tensor | None,
    generator: torch.Generator,
    memo: sharing.Memo,
) -> Tensor:
    """(units,), higher = keep."""
    given: dict[str, Any] = {"units": len(now), "generator": generator}
    if criterion.reads_text:
        assert tokens is not None
        name = "block cosines" if method.unit == "block" else f"cosines of method.unit={method.unit}"
        given["cosine"] = memo(name, functools.partial(_cosines, model, now, tokens))["cosines"].cpu()
    return scoring.scored(criterion, given, (len(now),), f"the {method.unit}s")


def _cosines(model: PreTrainedModel, now: Sequence[Unit], tokens: Tensor) -> sharing.Tensors:
    """Mean over tokens of the cosine between the hidden state before a unit and after it: (units,) float64."""
    blocks = anatomy.blocks(model)
    places = [(blocks[unit.block], None if unit.part is None else functools.partial(_around, unit)) for unit in now]
    return {"cosines": unit_statistics.cosines(places, model, tokens)}


def _around(unit: Unit, block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    assert unit.part is not None
    return sublayers.around(block, unit.part, unit.later, args, kwargs)


@torch.inference_mode()
def _drops(model: PreTrainedModel, probe: drop.Probe, method: Layer, wanted: Sequence[Unit]) -> Tensor:
    """(wanted,) float64: what the metric loses without each of these units."""
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    run = drop.Resumed(exact, probe)
    without = [_without(run, unit) for unit in tqdm(wanted, "measuring drops", leave=False)]
    return torch.from_numpy(drop.importance(drop.Scheme(method.drop.metric, probe), run.whole(), np.stack(without)))


def _without(run: drop.Resumed, unit: Unit) -> np.ndarray:
    """(options,) log-likelihoods of the model that lacks the unit."""
    if unit.part is None:
        return run.without_block(unit.block)
    with ExitStack() as restore:
        sublayers.pass_by(restore, run.blocks[unit.block], unit.part)
        hidden = run.through(unit.block)
    return run.after(unit.block, hidden, 1)[0]
