"""Expert pruning: whole experts of mixtures are removed, with their logits in what chooses among them.

Before anything is removed, each kind of mixture is tried: an expert is cut out, and what is left must give what the whole
mixture gives when no token may choose that expert. Where routers rank groups of experts, as many go of each.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.models import anatomy, experts, surgery
from sweep.models.experts import Mixture
from sweep.pruning import checks, criteria, drop, expert_statistics, scoring, select, sharing
from sweep.pruning.criteria import Criterion
from sweep.pruning.expert_statistics import Sums
from sweep.pruning.families import Expert
from sweep.pruning.pruned import Given, Pruned
from sweep.settings import RequestError

log = logging.getLogger(__name__)


def prune(model: PreTrainedModel, method: Expert, sparsity: float, given: Given) -> Pruned:
    """Remove the least important experts in place.

    Raises RequestError, before anything is measured, for a model without experts, for one whose mixtures fail the trial, and
    for a sparsity that leaves fewer experts than a token takes; RuntimeError when another number of weights is left than the
    choice leaves.
    """
    criterion = criteria.find(method.criterion, method.of)
    every = experts.find(model)
    mixtures = chosen(every, method)
    check(mixtures, method, sparsity)
    try_all(mixtures, leaves_mean=criterion.compensates)
    weights, sizes = sum(m.weights for m in mixtures), [mixture.number for mixture in mixtures]
    seen: list[Sums] = [{} for _ in mixtures]
    measured = None
    if criterion.measured:
        measured = _drops(model, method, mixtures, given)
        scores = list(torch.tensor(measured["importance"].to_numpy()).split(sizes))
    else:
        generator = torch.Generator().manual_seed(given.seed)
        seen = _statistics(model, criterion, mixtures, given)
        scores = [_score(criterion, m, s, generator) for m, s in zip(mixtures, seen, strict=True)]
    keeps = choose(mixtures, scores, method, sparsity)
    unreached = _unreached(mixtures, seen)
    means = [s["output_sum"] / s["counts"].clamp_min(1)[:, None] for s in seen] if criterion.compensates else None
    remaining = _remove(model, every, mixtures, keeps, means)
    return Pruned(
        targets=weights,
        removed=weights - remaining,
        calibration_tokens=0 if given.tokens is None else given.tokens.numel(),
        units=sum(sizes),
        gone=np.array(
            [
                (m.block, e)
                for m, keep in zip(mixtures, keeps, strict=True)
                for e in (~keep).nonzero().flatten().tolist()
            ],
            dtype=np.int64,
        ).reshape(-1, 2),
        measured=measured,
        unreached=unreached,
    )


def replay(model: PreTrainedModel, method: Expert, gone: np.ndarray) -> Pruned:
    """Remove the experts of these numbers in place, with their logits.

    gone  (n, 2) block and number of each
    Raises RequestError where that leaves a block fewer experts than a token of this model takes.
    """
    every = experts.find(model)
    mixtures = chosen(every, method)
    weights, units = sum(m.weights for m in mixtures), sum(mixture.number for mixture in mixtures)
    keeps = [torch.ones(mixture.number, dtype=torch.bool) for mixture in mixtures]
    for mixture, keep in zip(mixtures, keeps, strict=True):
        keep[gone[gone[:, 0] == mixture.block, 1]] = False
        if keep.sum() < mixture.least:
            raise RequestError(
                f"method.replay leaves block {mixture.block} {int(keep.sum())} of {mixture.number} experts, and a token takes "
                f"{mixture.taken}, so that {mixture.least} are needed: use a recipe of a lower sparsity"
            )
    try_all(mixtures, leaves_mean=False)
    remaining = _remove(model, every, mixtures, keeps)
    return Pruned(targets=weights, removed=weights - remaining, units=units, gone=gone)


def _remove(
    model: PreTrainedModel,
    every: list[Mixture],
    mixtures: list[Mixture],
    keeps: list[Tensor],
    means: list[Tensor] | None = None,
) -> int:
    """Remove what is not kept, and return how many weights are left of the experts.

    every  mixtures of the model, of which some lose experts
    means  of each mixture, (E, hidden), what stands in the place of an expert that goes; None = nothing, its logit goes too
    Raises RuntimeError when another number of weights is left than the choice leaves.
    """
    before = {mixture.number for mixture in every}
    expected = sum(m.weights * int(keep.sum()) // m.number for m, keep in zip(mixtures, keeps, strict=True))
    for number, (mixture, keep) in enumerate(zip(mixtures, keeps, strict=True)):
        if means is not None:
            surgery.replace_experts(mixture, keep, means[number])
        else:
            surgery.remove_experts(mixture, keep)
    remaining = sum(mixture.weights for mixture in mixtures)
    if remaining != expected:
        raise RuntimeError(f"removal of experts left {remaining} weights, {expected} expected")
    now = {mixture.number for mixture in every}
    if len(before) == len(now) == 1 and means is None:
        experts.describe(model, *before, *now)
    return remaining


def chosen(mixtures: list[Mixture], method: Expert) -> list[Mixture]:
    """Those of the blocks that are pruned. Raises RequestError where one of these has no experts."""
    if method.blocks is None:
        return mixtures
    known = {mixture.block: mixture for mixture in mixtures}
    if without := [block for block in method.blocks if block not in known]:
        raise RequestError(
            f"method.blocks names {', '.join(map(str, without))}, which have no experts: blocks {list(known)} have some"
        )
    return [known[block] for block in sorted(set(method.blocks))]


def check(mixtures: list[Mixture], method: Expert, sparsity: float) -> None:
    """Refuse a sparsity that leaves a block fewer experts than a token takes. Raises RequestError."""
    may_go = [(m.number - _at_least(m) * m.groups, m.number, m.groups) for m in mixtures]
    if method.scope == "global":
        groups = max(m.groups for m in mixtures)
        may_go = [(sum(go for go, _, _ in may_go), sum(number for _, number, _ in may_go), groups)]
    if all(sparsity * number - go <= groups / 2 for go, number, groups in may_go):
        return  # what goes is the nearest that can
    most = min(go / number for go, number, _ in may_go)
    worst = max(mixtures, key=lambda m: m.least / m.number)
    of_groups = f", from {worst.groups} groups of equal size" if worst.groups > 1 else ""
    way = checks.at_most(most) if most > 0 else "choose another method"
    raise RequestError(
        f"sparsity={sparsity:g} leaves a block with fewer experts than must stay: a token takes {worst.taken} of "
        f"{worst.number}{of_groups}, so {_at_least(worst) * worst.groups} are needed: {way}"
    )


def _at_least(mixture: Mixture) -> int:
    """How many bundles, one expert of each group, must stay."""
    return -(-mixture.least // mixture.groups)


def choose(mixtures: list[Mixture], scores: list[Tensor], method: Expert, sparsity: float) -> list[Tensor]:
    """Keep-masks, (E,) each: the experts of lowest scores go, as many as come nearest to the sparsity.

    One expert of every group goes at a time. Raises ValueError when a mixture cannot keep the experts that it must.
    """
    bundles = [_bundles(mixture, s) for mixture, s in zip(mixtures, scores, strict=True)]
    values = [s.double()[inside].mean(1) for s, inside in zip(scores, bundles, strict=True)]
    costs = [torch.full((len(v),), mixture.groups) for v, mixture in zip(values, mixtures, strict=True)]
    needed = [_at_least(mixture) for mixture in mixtures]
    if method.scope == "global":  # all keep what the most demanding must: mixtures of a model are alike
        kept = select.nearest(values, costs, sparsity * sum(m.number for m in mixtures), at_least=max(needed))
    else:
        kept = [
            select.nearest([v], [c], sparsity * m.number, at_least=least)[0]
            for v, c, m, least in zip(values, costs, mixtures, needed, strict=True)
        ]
    masks = []
    for mixture, inside, stays in zip(mixtures, bundles, kept, strict=True):
        mask = torch.zeros(mixture.number, dtype=torch.bool)
        mask[inside[stays].flatten()] = True
        masks.append(mask)
    return masks


def _bundles(mixture: Mixture, scores: Tensor) -> Tensor:
    """(E / G, G) numbers of experts that go together, one of each group, the least important first."""
    in_groups = scores.cpu().view(mixture.groups, -1)
    first = torch.arange(mixture.groups)[:, None] * in_groups.shape[1]
    return (in_groups.argsort(dim=1, stable=True) + first).t()


# ---- the trial ----


def try_all(mixtures: list[Mixture], *, leaves_mean: bool) -> None:
    """Try the first mixture of each kind.

    leaves_mean  experts leave their mean in their place, and the router stays
    Raises RequestError, which names the check that failed.
    """
    tried = set()
    for mixture in mixtures:
        tensors = (*mixture.held, *mixture.routers)
        kind = (
            type(mixture.module),
            *(type(module) for module in mixture.module.modules()),
            *(tuple(slices.tensor.shape) for slices in tensors),
        )
        if kind not in tried:
            tried.add(kind)
            _try(mixture, leaves_mean)


def _try(mixture: Mixture, leaves_mean: bool) -> None:
    if failed := _first_failure(mixture, leaves_mean):
        raise RequestError(
            f"method=expert cannot prune {mixture.name} ({type(mixture.module).__name__}): {failed}. Use +method=weight, or "
            "+method=layer"
        )


@torch.no_grad()
def _first_failure(mixture: Mixture, leaves_mean: bool) -> str | None:
    """The check that fails, in words; None where all hold."""
    run, call = experts.run, mixture.call
    whole = run(mixture.module, call)
    routed = experts.routing(mixture)
    given = experts.outputs(mixture.experts, routed.hidden, routed.chosen)
    summed = (given * routed.gates[..., None].to(given)).sum(1)
    if not _close(summed, experts.weighed(mixture, routed)):
        return "its experts do not give the sum of what each gives, weighed by its gate"
    if leaves_mean or mixture.number - mixture.groups < mixture.least:
        return None
    if not mixture.routers:
        return "nothing was found that chooses its experts"
    often = routed.chosen.flatten().bincount(minlength=mixture.number)
    gone = [
        int(i)
        for i in (
            often.view(mixture.groups, -1).argmax(1)
            + torch.arange(mixture.groups, device=often.device) * (mixture.number // mixture.groups)
        )
    ]
    try:
        with experts.masked(mixture, gone):
            expected, others = run(mixture.module, call), experts.routing(mixture)
    except RequestError as error:
        return str(error)
    if set(others.chosen.unique().tolist()) & set(gone):
        return "an expert of the lowest logit is chosen all the same"
    if _close(expected, whole):
        return "an expert that no token may choose makes no difference"
    keep = torch.ones(mixture.number, dtype=torch.bool)
    keep[gone] = False
    with _without(mixture, keep):
        try:
            found = run(mixture.module, call)
        except Exception as error:  # whatever its own code says of shapes that it does not know
            return f"without an expert it fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    if not _close(found, expected):
        return "without an expert it does not give what it gives when no token may choose that expert"
    return None


@contextmanager
def _without(mixture: Mixture, keep: Tensor) -> Iterator[None]:
    """While open, the mixture is without the experts that are not kept."""
    tensors = [(slices, slices.tensor) for slices in (*mixture.held, *mixture.routers)]
    surgery.remove_experts(mixture, keep)
    try:
        yield
    finally:
        for slices, tensor in tensors:
            setattr(slices.module, slices.name, tensor)
        surgery.set_expert_counts(mixture)
        anatomy.forget(mixture.module)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding, which the order of sums changes."""
    found, expected = found.float(), expected.float()
    if found.shape != expected.shape or not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return False
    allowed = 1e-4 if found.dtype == torch.float32 else 3e-2
    return bool((found - expected).norm() <= allowed * expected.norm())


# ---- scores ----


def _statistics(model: PreTrainedModel, criterion: Criterion, mixtures: list[Mixture], given: Given) -> list[Sums]:
    """What calibration text tells of each mixture; nothing where the criterion reads none."""
    if not criterion.reads_text:
        return [{} for _ in mixtures]
    assert given.tokens is not None
    text = given.tokens

    def measure() -> sharing.Tensors:
        sums = expert_statistics.gather(model, mixtures, text)
        return {f"{number}.{name}": value for number, of_one in enumerate(sums) for name, value in of_one.items()}

    found = given.memo(f"experts of {[mixture.name for mixture in mixtures]}", measure)
    names = [key.partition(".")[2] for key in found if key.startswith("0.")]
    return [{name: found[f"{number}.{name}"].cpu() for name in names} for number in range(len(mixtures))]


def _score(criterion: Criterion, mixture: Mixture, seen: Sums, generator: torch.Generator) -> Tensor:
    """(E,), higher = keep."""
    given: dict[str, Any] = {
        "units": mixture.number,
        "generator": generator,
        "tensors": {
            slices.name: slices.tensor.detach().unflatten(0, (mixture.number, slices.each)).squeeze(1)
            for slices in mixture.held
        },
        **seen,
    }
    return scoring.scored(criterion, given, (mixture.number,), f"the experts of block {mixture.block}")


def _unreached(mixtures: list[Mixture], seen: list[Sums]) -> int | None:
    """How many experts no calibration token took, said in a warning; None where no text was read."""
    if not all(seen):
        return None
    numbers = {m.block: (s["counts"] == 0).nonzero().flatten().tolist() for m, s in zip(mixtures, seen, strict=True)}
    total = sum(map(len, numbers.values()))
    if total:
        named = "; ".join(f"block {block}: {', '.join(map(str, some))}" for block, some in numbers.items() if some)
        log.warning(
            "the calibration text never reached %d of %d experts (%s), of which nothing is known, so that they go first: "
            "raise calibration.sequences, or calibrate on text of more kinds",
            total,
            sum(mixture.number for mixture in mixtures),
            named if len(named) < 300 else f"{named[:300]} …",
        )
    return total


@torch.inference_mode()
def _drops(model: PreTrainedModel, method: Expert, mixtures: list[Mixture], given: Given) -> pd.DataFrame:
    """What the metric loses when no token may choose an expert: block, unit, importance, measured, one line an expert."""
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    same = mixtures if exact is model else chosen(experts.find(exact), method)
    probe = drop.probe(method.drop, given.tokens, given.tokenizer)
    run = drop.Resumed(exact, probe)
    found, lines = [], []
    for mixture in tqdm(same, "measuring drops", leave=False):
        for expert in range(mixture.number):
            with experts.masked(mixture, [expert]):
                hidden = run.through(mixture.block)
            found.append(run.after(mixture.block, hidden, 1)[0])
            lines.append((mixture.block, expert))
    values = drop.importance(drop.Scheme(method.drop.metric, probe), run.whole(), np.stack(found))
    return pd.DataFrame(lines, columns=["block", "unit"]).assign(importance=values, measured=True)
