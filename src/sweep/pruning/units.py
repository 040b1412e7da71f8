"""Unit pruning: whole FFN neurons and attention heads are removed, and the matrices become smaller.

A part is one block's FFN or attention. Its units are columns of its output matrix: one column a neuron, head_dim
columns a query head, those of a whole group where key-value groups go together. Units are removed in bundles, the
smallest sets whose removal leaves a legal shape: one unit; `multiple_of` neurons; one query head of every group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.models import anatomy, candidates, surgery
from sweep.models.anatomy import Linear
from sweep.models.candidates import KEPT, Attention, Experts, Ffn, Slice
from sweep.models.parts import attentions, ffns
from sweep.pruning import checks, criteria, drop, repair, scoring, select, sharing, unit_statistics
from sweep.pruning.criteria import Criterion
from sweep.pruning.families import Head, Neuron
from sweep.pruning.pruned import Pruned
from sweep.pruning.unit_scores import Activations, Gradients
from sweep.settings import RequestError

ALIGNED = 8  # neurons: torch multiplies experts together where rows are 16 bytes long or a multiple, 8 of 2 bytes


@dataclass(frozen=True)
class Part:
    """One block's FFN, the FFNs of its experts, or its attention, as units over the columns of the matrix that reads them."""

    of: Ffn | Experts | Attention
    size: int  # columns a unit
    units: int
    bundle: int = 1  # units that go together, of each of the groups
    groups: int = 1  # sets of units that all have to keep the same number: key-value groups, experts

    @property
    def block(self) -> int:
        return self.of.block

    @property
    def columns(self) -> int:
        return self.size * self.units

    @property
    def matrices(self) -> list[Tensor]:
        """(out, in) each, as views of the model's own."""
        if isinstance(self.of, Experts):
            held = anatomy.held(self.of.module, self.of.name)
            return [matrix for _, matrices in held.values() for matrix in matrices.values()]
        return [anatomy.weight(linear).detach() for linear in (*self.of.inputs, self.of.output)]

    @property
    def weights(self) -> int:
        return sum(matrix.numel() for matrix in self.matrices)

    @property
    def weights_a_unit(self) -> int:
        """Weights that go with one unit; a query head takes its keys and values along only where they are its own."""
        if isinstance(self.of, Experts):
            return self.weights // self.units
        own = sum(matrix.numel() for matrix in self.rows())
        return own // self.units + self.size * anatomy.weight(self.of.output).shape[0]

    @property
    def output(self) -> Linear:
        """The matrix that reads the units, where they are not of many experts: checked before anything is measured."""
        assert not isinstance(self.of, Experts)
        return self.of.output

    def weight(self) -> Tensor:
        """(out, columns) the matrix that reads the units; of experts side by side."""
        if not isinstance(self.of, Experts):
            return anatomy.weight(self.of.output)
        down = self.of.slices[-1]
        return torch.cat(list(down.parameter.detach() if down.axis == 2 else down.parameter.detach().mT), 1)

    def rows(self) -> list[Tensor]:
        """What makes the units and is each one's own: of each matrix (rows, in), as many rows for every unit, in order."""
        if isinstance(self.of, Experts):
            return [expert_rows for each in self.of.slices[:-1] if (expert_rows := _rows_of_experts(each)) is not None]
        unit = torch.arange(self.units)
        if isinstance(self.of, Attention):
            unit = unit.repeat_interleave(self.of.heads // self.units)
        found = []
        slices = {id(each.module): each for each in self.of.slices}
        for linear in self.of.inputs:
            owners = slices[id(linear)].of(unit)
            order = owners.argsort(stable=True)[int((owners == KEPT).sum()) :]
            matrix = anatomy.weight(linear)
            if len(order):
                whole = torch.equal(order, torch.arange(len(matrix)))
                found.append(matrix if whole else matrix[order.to(matrix.device)])
        return found

    def remove(self, keep: Tensor) -> None:
        """Cut the part down to the columns where `keep` is True."""
        surgery.remove_units(self.of, self._of_heads(keep[:: self.size]))

    def cut(self, keep: Tensor) -> Part:
        """What the part is after it was cut down to the units where `keep` is True."""
        return replace(self, of=candidates.cut(self.of, self._of_heads(keep)), units=int(keep.sum()))

    def _of_heads(self, keep: Tensor) -> Tensor:
        """Of units that are several heads, each head's."""
        return keep.repeat_interleave(self.of.heads // self.units) if isinstance(self.of, Attention) else keep


def _rows_of_experts(of: Slice) -> Tensor | None:
    """The rows, (rows, in), that make the neurons of all experts, neuron by neuron; None for a bias."""
    if of.parameter.ndim != 3:
        return None
    matrices = of.parameter.detach() if of.axis == 1 else of.parameter.detach().mT
    pairs = zip(matrices, of.owners, strict=True)
    return torch.cat([matrix[owners.argsort(stable=True).to(matrix.device)] for matrix, owners in pairs])


def parts(model: PreTrainedModel, method: Neuron | Head) -> list[Part]:
    """The parts that the method may prune, in order of their blocks."""
    found = (
        [_neurons(ffn, method) for ffn in ffns(model)]
        if isinstance(method, Neuron)
        else [_heads(attention, method) for attention in attentions(model)]
    )
    return [part for part in found if method.blocks is None or part.block in method.blocks]


def counts(model: PreTrainedModel, method: Neuron | Head) -> list[int]:
    """How many units each block has, chosen or not."""
    found = [0] * len(anatomy.blocks(model))
    for part in parts(model, replace(method, blocks=None)):
        found[part.block] += part.units
    return found


def _neurons(ffn: Ffn | Experts, method: Neuron) -> Part:
    if isinstance(ffn, Experts):
        return Part(ffn, 1, ffn.width, math.lcm(method.multiple_of, ALIGNED), ffn.experts)
    return Part(ffn, 1, ffn.width, method.multiple_of)


def _heads(attention: Attention, method: Head) -> Part:
    if method.unit == "group" or attention.groups == attention.heads:
        return Part(attention, attention.head_dim * attention.heads_per_group, attention.groups)
    return Part(attention, attention.head_dim, attention.heads, groups=attention.groups)


def prune(
    model: PreTrainedModel,
    method: Neuron | Head,
    sparsity: float,
    tokens: Tensor | None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    memo: sharing.Memo = sharing.unshared,
) -> Pruned:
    """Prune the model in place, in `method.steps` rounds of measuring and removing.

    tokens     (sequences, length) calibration text, for criteria and repairs that read one
    tokenizer  for a drop that is measured on a task
    memo       where statistics of the unpruned model come from
    Raises RequestError, before anything is measured, when the request leaves a part without a unit; RuntimeError when the
    matrices are not left with the weights that the choice leaves them.
    """
    criterion = criteria.find(method.criterion, method.of)
    generator = torch.Generator().manual_seed(seed)
    before = parts(model, method)
    weights, units = sum(p.weights for p in before), sum(p.units for p in before)
    check(before, method, sparsity)
    _check_experts(before, method, criterion)
    now, expected, tables = before, weights, []
    numbers = every = _numbered(before)  # of the units that are left, in the unpruned model
    for step in range(1, method.steps + 1):
        goal = sparsity * step / method.steps
        seen, bundles = [dict[str, Activations]() for _ in now], None
        if criterion.measured:
            gone = 1 - (sum(p.weights for p in now) / weights)
            measured = measured_drops(model, method, tokens, tokenizer, (goal - gone) / (1 - gone))
            scores, bundles = measured.scores, measured.groups
            tables.append(drop.numbered(measured.table, _by_block(now, numbers)))
        else:
            seen = _statistics(model, method, now, tokens, seed, memo if step == 1 else sharing.unshared)
            scores = [score(criterion, part, s, generator) for part, s in zip(now, seen, strict=True)]
        keeps = choose(now, scores, method, goal, weights, units, bundles)
        expected -= sum(int((~keep).sum()) * p.weights_a_unit for p, keep in zip(now, keeps, strict=True))
        numbers = [n[keep] for n, keep in zip(numbers, keeps, strict=True)]
        compensation = [s["activations"] if criterion.compensates else None for s in seen]
        cut(model, now, keeps, compensation, tokens if method.repair else None)
        now = [part.cut(keep) for part, keep in zip(now, keeps, strict=True)]
    removed = _finished(model, before, now, weights, expected)
    return Pruned(
        targets=weights,
        removed=removed,
        calibration_tokens=0 if tokens is None else tokens.numel(),
        units=units,
        gone=_gone([part.block for part in before], every, numbers),
        measured=drop.latest(tables),
    )


def replay(model: PreTrainedModel, method: Neuron | Head, gone: np.ndarray) -> Pruned:
    """Remove the units of these numbers in place.

    gone  (n, 2) block and number of each
    """
    before = parts(model, method)
    weights, units = sum(p.weights for p in before), sum(p.units for p in before)
    of_block = {block: gone[gone[:, 0] == block, 1] for block in {part.block for part in before}}
    pairs = zip(before, _numbered(before), strict=True)
    keeps = [~torch.from_numpy(np.isin(numbers.numpy(), of_block[part.block])) for part, numbers in pairs]
    expected = weights - sum(int((~keep).sum()) * p.weights_a_unit for p, keep in zip(before, keeps, strict=True))
    cut(model, before, keeps, [None] * len(before), None)
    now = [part.cut(keep) for part, keep in zip(before, keeps, strict=True)]
    removed = _finished(model, before, now, weights, expected)
    return Pruned(targets=weights, removed=removed, units=units, gone=gone)


def _finished(model: PreTrainedModel, before: Sequence[Part], now: Sequence[Part], weights: int, expected: int) -> int:
    """Have the configuration say what the parts are now; how many of the weights they lost. Raises RuntimeError."""
    surgery.describe_shape(model, [part.of for part in before], [part.of for part in now])
    remaining = sum(p.weights for p in now)
    if remaining != expected:
        raise RuntimeError(f"removal of units left {remaining} weights, {expected} expected")
    return weights - remaining


def _numbered(parts: Sequence[Part]) -> list[Tensor]:
    """The numbers of the units of each part within its block, which may have several parts."""
    next_: dict[int, int] = {}
    found = []
    for part in parts:
        first = next_.get(part.block, 0)
        found.append(torch.arange(first, first + part.units))
        next_[part.block] = first + part.units
    return found


def _by_block(parts: Sequence[Part], numbers: Sequence[Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for part, its in zip(parts, numbers, strict=True):
        found[part.block] = torch.cat([found[part.block], its]) if part.block in found else its
    return found


def _check_experts(parts: Sequence[Part], method: Neuron | Head, criterion: Criterion) -> None:
    """Refuse what is done to one output matrix where a block's experts share a tensor. Raises RequestError."""
    if not any(isinstance(part.of, Experts) for part in parts):
        return
    asked = {
        f"criterion={criterion.name}, which is measured by leaving out columns of one matrix,": criterion.measured,
        f"criterion={criterion.name}, which leaves the mean of what goes in a bias,": criterion.compensates,
        "repair=true": method.repair,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise RequestError(
                f"method.{what} is not for the neurons of experts, which lie in one tensor: leave it out, or name a "
                "criterion such as taylor_balanced or wanda_sp"
            )


def _gone(blocks: Sequence[int], every: Sequence[Tensor], left: Sequence[Tensor]) -> np.ndarray:
    """(units, 2) int64: block and number of each unit that was there and is not left, part by part."""
    lost = [np.setdiff1d(all_.numpy(), numbers.numpy()) for all_, numbers in zip(every, left, strict=True)]
    pairs = [(block, unit) for block, units in zip(blocks, lost, strict=True) for unit in units]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def cut(
    model: PreTrainedModel,
    parts: Sequence[Part],
    keeps: Sequence[Tensor],
    compensation: Sequence[Activations | None],
    mending: Tensor | None,
) -> None:
    """Cut every part down to the units it keeps. In place.

    compensation  statistics of a part whose removed columns leave their mean in a bias, or None
    mending       calibration text on which the output matrices are refitted, or None for no repair
    """
    columns = [keep.repeat_interleave(part.size) for part, keep in zip(parts, keeps, strict=True)]
    if mending is not None:
        cuts = [(p.block, p.output, p.remove, keep) for p, keep in zip(parts, columns, strict=True)]
        repair.cut_and_refit(model, cuts, mending)
        return
    for part, keep, seen in zip(parts, columns, compensation, strict=True):
        if seen is not None:
            _compensate(part, keep, seen)
        part.remove(keep)


@torch.no_grad()
def score(criterion: Criterion, part: Part, seen: Mapping[str, Activations], generator: torch.Generator) -> Tensor:
    """The importance of every unit of a part: (units,), higher = keep.

    seen  at least what the criterion reads of calibration text, by name
    """
    given = {
        "weight": part.weight() if "weight" in criterion.reads else None,  # copies, of experts
        "rows": part.rows() if "rows" in criterion.reads else None,
        "size": part.size,
        "units": part.units,
        "generator": generator,
        **seen,
    }
    return scoring.scored(criterion, given, (part.units,), f"the units of block {part.block}")


def choose(
    parts: list[Part],
    scores: list[Tensor],
    method: Neuron | Head,
    goal: float,
    weights: int,
    units: int,
    groups: list[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Keep-masks over the units of each part, such that `goal` of the original weights or units is gone in all.

    weights, units  of the parts before anything was removed
    groups          units that were measured together and go together, where criterion=drop says so
    The lowest bundles go, as many as come nearest to the goal; every part keeps its best bundle.
    """
    by_weight = method.sparsity_of == "parameters"
    bundles = groups or [_bundles(part, s.cpu()) for part, s in zip(parts, scores, strict=True)]
    values = [
        torch.stack([s.cpu()[members].mean() for members in inside]) for s, inside in zip(scores, bundles, strict=True)
    ]
    costs = [
        torch.tensor([len(members) * (part.weights_a_unit if by_weight else 1) for members in inside])
        for part, inside in zip(parts, bundles, strict=True)
    ]
    left = [part.weights if by_weight else part.units for part in parts]
    whole = weights if by_weight else units
    budget = goal * whole - (whole - sum(left))
    if method.scope == "global":
        kept = select.nearest(values, costs, budget, at_least=1)
    else:
        budgets = [budget * size / sum(left) for size in left]
        kept = [select.nearest([v], [c], b, at_least=1)[0] for v, c, b in zip(values, costs, budgets, strict=True)]
    masks = []
    for part, inside, stays in zip(parts, bundles, kept, strict=True):
        mask = torch.ones(part.units, dtype=torch.bool)
        for members, stay in zip(inside, stays.tolist(), strict=True):
            mask[members] = stay
        masks.append(mask)
    return masks


def check(parts: list[Part], method: Neuron | Head, sparsity: float) -> None:
    """Refuse a sparsity that leaves a part without a unit. Raises RequestError."""
    weights, units = sum(part.weights for part in parts), sum(part.units for part in parts)
    in_order = [torch.arange(part.units, dtype=torch.float64) for part in parts]  # which bundles go does not matter
    try:
        choose(parts, in_order, method, sparsity, weights, units)
    except ValueError:
        stays = [len(_bundles(part, scores)[-1]) for part, scores in zip(parts, in_order, strict=True)]
        if method.sparsity_of == "units":
            sizes = [(part.units, part.units - stay) for part, stay in zip(parts, stays, strict=True)]
        else:
            sizes = [
                (part.weights, (part.units - stay) * part.weights_a_unit)
                for part, stay in zip(parts, stays, strict=True)
            ]
        together = [tuple(map(sum, zip(*sizes, strict=True)))] if method.scope == "global" else sizes
        most = min(gone / size for size, gone in together)
        noun = "neuron" if isinstance(method, Neuron) else "head"
        ways = [checks.at_most(most) if most > 0 else "choose another method"]
        ways += [checks.QUERY] if isinstance(method, Head) and method.unit == "group" and _shares_keys(parts) else []
        raise RequestError(f"sparsity={sparsity:g} leaves a block without a {noun}: {', or '.join(ways)}") from None


def _shares_keys(parts: list[Part]) -> bool:
    """Whether several query heads read the same keys."""
    return any(isinstance(part.of, Attention) and part.of.heads > part.of.groups for part in parts)


def _bundles(part: Part, scores: Tensor) -> list[Tensor]:
    """Sets of units that are removed together, the least important first."""
    order = scores.view(part.groups, -1).argsort(dim=1, stable=True)
    first = torch.arange(part.groups)[:, None] * order.shape[1]
    odd = order.shape[1] % part.bundle
    pieces = (order + first)[:, odd:].split(part.bundle, dim=1)
    return [*([(order + first)[:, :odd].flatten()] if odd else []), *(piece.flatten() for piece in pieces)]


@dataclass(frozen=True)
class Measured:
    """Importance by the measured drop, of every part."""

    scores: list[Tensor]  # (units,) float64; with groups, every unit has its group's
    groups: list[list[Tensor]] | None
    table: pd.DataFrame  # block, unit, importance, measured: False for a unit that screening spared


def measured_drops(
    model: PreTrainedModel,
    method: Neuron | Head,
    tokens: Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    fraction: float,
) -> Measured:
    """What `method.metric` loses without each unit, or without each group of units.

    fraction  of the units that are to go; screening measures those whose estimate is near that cut
    """
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    found = parts(exact, method)
    probe = drop.probe(method.drop, tokens, tokenizer)
    size = getattr(method, "group", 1)
    estimates = [torch.zeros(part.units) for part in found]
    if method.drop.screen == "taylor" or size > 1:
        columns = drop.first_order(exact, probe, [part.output for part in found])
        estimates = [c.cpu().view(-1, part.size).sum(1) for c, part in zip(columns, found, strict=True)]
    # Units of like estimate form a group, so that a group is about as dispensable as each of its units.
    groups = [list(estimate.argsort(stable=True).split(size)) for estimate in estimates]
    if size == 1:
        groups = [list(torch.arange(part.units).split(1)) for part in found]
    guess = [torch.stack([e[g].sum() for g in inside]).double() for e, inside in zip(estimates, groups, strict=True)]
    near = [torch.ones(len(g), dtype=torch.bool) for g in guess]
    if method.drop.screen == "taylor":
        near = screened(guess, fraction, method.drop.screen_margin, together=method.scope == "global")
    ablations = [
        drop.Ablation(
            part.block, part.output, [_columns(inside[i], part.size) for i in keep.nonzero().squeeze(1).tolist()]
        )
        for part, inside, keep in zip(found, groups, near, strict=True)
    ]
    scheme = drop.Scheme(method.drop.metric, probe)
    base, likelihoods = drop.likelihoods(exact, probe, ablations)
    drops = torch.from_numpy(drop.importance(scheme, base, np.concatenate(likelihoods)))
    values = _around(guess, near, list(drops.split([int(n.sum()) for n in near])), together=method.scope == "global")
    scores, rows = [], []
    for part, numbers, inside, value, keep in zip(found, _numbered(found), groups, values, near, strict=True):
        of_unit = torch.zeros(part.units, dtype=torch.double)
        for members, one, exactly in zip(inside, value.tolist(), keep.tolist(), strict=True):
            of_unit[members] = one
            rows += [(part.block, unit, one if exactly else None, exactly) for unit in numbers[members].tolist()]
        scores.append(of_unit)
    table = pd.DataFrame(rows, columns=["block", "unit", "importance", "measured"])
    return Measured(scores, groups if size > 1 else None, table)


def screened(estimates: list[Tensor], fraction: float, margin: float, *, together: bool) -> list[Tensor]:
    """Masks of the entries whose rank is within `margin` (of all entries) of the cut at `fraction`.

    together  the ranks are among all tensors; else within each
    """
    if not together:
        return [screened([e], fraction, margin, together=True)[0] for e in estimates]
    joined = torch.cat(estimates)
    rank = joined.argsort(stable=True).argsort()
    cut, width = fraction * len(joined), margin * len(joined)
    return list(((rank >= cut - width) & (rank < cut + width)).split([len(e) for e in estimates]))


def _around(estimates: list[Tensor], near: list[Tensor], drops: list[Tensor], *, together: bool) -> list[Tensor]:
    """Measured drops where there are some; entries below the measured window sort under them, those above over them."""
    if not together:
        return [_around([e], [n], [d], together=True)[0] for e, n, d in zip(estimates, near, drops, strict=True)]
    guess, measured, exact = torch.cat(estimates), torch.cat(near), torch.cat(drops)
    if measured.all():
        return drops
    if not len(exact):
        return estimates
    values = torch.empty_like(guess)
    values[measured] = exact
    low = ~measured & (guess <= guess[measured].min())
    high = ~measured & ~low
    values[low] = guess[low] - guess[low].max() + exact.min() - 1e-9 if low.any() else guess[low]
    values[high] = guess[high] - guess[high].min() + exact.max() + 1e-9 if high.any() else guess[high]
    return list(values.split([len(e) for e in estimates]))


def _columns(members: Tensor, size: int) -> Tensor:
    """The columns of some units of `size` columns each."""
    return (members[:, None] * size + torch.arange(size)).flatten()


def _statistics(
    model: PreTrainedModel,
    method: Neuron | Head,
    parts: list[Part],
    tokens: Tensor | None,
    seed: int = 0,
    memo: sharing.Memo = sharing.unshared,
) -> list[dict[str, Activations]]:
    """What the method's criterion reads of calibration text, by name, of each part."""
    reads = criteria.find(method.criterion, method.of).reads
    names = [name for name in reads if criteria.READABLE[method.of][name].text]
    if not names:
        return [{} for _ in parts]
    assert tokens is not None
    text = tokens

    def measure() -> sharing.Tensors:
        found = unit_statistics.read(
            names,
            model,
            [p.of if isinstance(p.of, Experts) else p.of.output for p in parts],
            [p.size for p in parts],
            text,
            seed,
        )
        return {
            f"{name}.{i}.{field}": value
            for name, of_parts in found.items()
            for i, seen in enumerate(of_parts)
            for field, value in vars(seen).items()
            if isinstance(value, Tensor)
        }

    where = [(part.block, part.size) for part in parts]
    found = memo(f"{method.family} {names} of {where}, {seed=}", measure)
    return [{name: _held(found, f"{name}.{i}.", text.numel()) for name in names} for i in range(len(parts))]


def _held(found: sharing.Tensors, prefix: str, tokens: int) -> Activations:
    """The statistics whose tensors are held under this prefix."""
    own = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    read = own.pop("tokens", tokens)
    return (Gradients if "product" in own else Activations)(read, **own)


def _compensate(part: Part, keep: Tensor, seen: Activations) -> None:
    """Add to the bias what the removed columns give on average (FLAP): sum over removed j of W_j * mean x_j."""
    weight = anatomy.weight(part.output)
    gone = ~keep.to(weight.device)
    mean = (seen.input_sum / seen.tokens).float().to(weight.device)
    surgery.add_bias(part.output, weight[:, gone].float() @ mean[gone])
