"""Weight pruning: single weights of the blocks' linear layers, and of embeddings and head on request, are set to zero.

    targets -> how many each loses (allocation) -> block by block: calibrate, score or rebuild, select, write

Legend: weights are (out, in) views by name, in the order of the model; a mask is True where the weight is kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep import calibrate
from sweep.calibrate import Inputs
from sweep.formats.grid import Grid
from sweep.models import anatomy, surgery
from sweep.pruning import criteria, scores, scoring, select, sharing
from sweep.pruning.criteria import Criterion
from sweep.pruning.families import Weight, checked_weight, groups
from sweep.pruning.masks import Masks
from sweep.pruning.pruned import Pruned
from sweep.settings import RequestError
from sweep.solver import Choose, Rounding, no_rounding

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
_OF_INPUTS: dict[str, Callable[[Inputs], Any]] = {"input_norm": lambda x: x.norm, "hessian": lambda x: x.hessian}
_LARGE = {"hessian", "gradient_norm"}  # as large as a matrix: held for the matrices of a block, never for all


@dataclass(frozen=True)
class Job:
    """What the stages of one pruning have in common."""

    model: PreTrainedModel
    method: Weight
    tokens: Tensor | None  # (sequences, length) calibration text
    seed: int  # of random scores
    sequential: bool  # blocks are calibrated on what the pruned blocks before them put out
    device: torch.device | None  # where blocks are calibrated and pruned, one at a time; None = where they lie
    shapes: dict[str, torch.Size]  # of the targets, in order
    memo: sharing.Memo  # where the norms of what the dense model's layers read come from
    gone: bool = False  # zeros are weights that an earlier step removed, and stay removed
    masks: Masks = field(default_factory=Masks)  # of what is pruned so far
    rounding: Rounding = no_rounding  # what quantises a matrix in the pass that prunes it
    grids: dict[str, Grid] = field(default_factory=dict)  # of what is quantised so far

    @cached_property
    def criterion(self) -> Criterion:
        return criteria.find(self.method.criterion, self.method.of)

    @cached_property
    def scores_by(self) -> Criterion:
        """What ranks weights of several matrices: the criterion, or for one that corrects within each, its deputy."""
        return criteria.find(self.criterion.corrects_after or self.criterion.name, self.method.of)

    def weights(self) -> Weights:
        """The targets. Asked for anew, because views of a block do not follow it to another device and back."""
        everything = _everything(self.model, self.method)
        return {name: everything[name] for name in self.shapes}

    def text(self) -> Tensor:
        if self.tokens is None:
            raise ValueError(
                f"method.criterion={self.method.criterion}, method.allocation={self.method.allocation} "
                "read calibration text: pass tokens"
            )
        return self.tokens

    def score(self, name: str, weight: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        """The importance of one matrix, (out, in) float32; -inf for what an earlier step removed.

        seen  what the criterion reads of calibration text, by name; of an embedding, which reads no activations and is
              scored by |W|, not all of it
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        given = {
            "weight": weight,
            "generator": torch.Generator().manual_seed(int.from_bytes(digest[:7])),
            **{what: value.to(weight.device) for what, value in seen.items()},
        }
        criterion = self.scores_by
        if not given.keys() >= set(criterion.reads):
            criterion = criteria.find("magnitude", self.method.of)
        importance = scoring.scored(criterion, given, weight.shape, name).to(weight.device, torch.float32)
        return importance.masked_fill(weight == 0, -torch.inf) if self.gone else importance


def prune(
    model: PreTrainedModel,
    method: Weight,
    sparsity: float,
    tokens: Tensor | None = None,
    *,
    seed: int = 0,
    sequential: bool = True,
    device: torch.device | str | None = None,
    memo: sharing.Memo = sharing.unshared,
    rounding: Rounding = no_rounding,
) -> Pruned:
    """Prune the model in place. The arguments are those of `Job`.

    Raises RequestError for what the model cannot meet, before anything is changed; ValueError that names the layer when
    weights or activations are not finite; RuntimeError when the removed count is not the requested one.
    """
    method = checked_weight(method, sparsity)
    found = targets(model, method)
    _check_finite(found)
    shapes = {name: weight.shape for name, weight in found.items()}
    del found
    job = Job(model, method, tokens, seed, sequential, None if device is None else torch.device(device), shapes, memo)
    size = sum(shape.numel() for shape in shapes.values())
    removed, dampings = 0, []
    for step in range(1, method.steps + 1):
        # the cubic schedule of Zhu & Gupta 2017, arXiv:1710.01878: most goes early, while there is most to spare
        goal = sparsity * (1 - (1 - step / method.steps) ** 3) if step < method.steps else sparsity
        now = replace(job, gone=step > 1, rounding=rounding if step == method.steps else no_rounding)
        removed, damping = _prune_to(now, goal)
        dampings.append(damping)
    expected = (
        sum(_removed_by_pattern(method.pattern, shapes).values()) if method.pattern else select.count(size, sparsity)
    )
    if removed != expected:
        raise RuntimeError(f"{removed} of {size} weights were removed, {expected} asked")
    return Pruned(
        targets=size,
        removed=removed,
        calibration_tokens=0 if tokens is None else tokens.numel(),
        damping=max(filter(None, dampings), default=None),
        masks=job.masks,
        grids=job.grids,
    )


def replay(model: PreTrainedModel, method: Weight, masks: Masks) -> Pruned:
    """Zero what masks of this model's matrices do not keep, in place."""
    size = sum(weight.numel() for weight in targets(model, method).values())
    masks.apply(model)
    return Pruned(targets=size, removed=masks.count(), masks=masks)


def targets(model: PreTrainedModel, method: Weight) -> Weights:
    """The matrices that a weight method prunes. Raises RequestError for what the model does not have or cannot meet."""
    kept = _everything(model, method)
    if method.targets != "all":
        attention = method.targets == "attention"
        blocks = tuple(f"{name}." for name in anatomy.all_blocks(model))
        kept = {
            name: weight
            for name, weight in kept.items()
            if not name.startswith(blocks) or bool(anatomy.ATTENTION & set(name.split("."))) == attention
        }
    kept = anatomy.without(kept, method.exclude, "method.exclude")
    if not kept:
        raise RequestError(
            f"method.targets={method.targets} with method.exclude={list(method.exclude)} leaves nothing "
            "to prune: change one of the two"
        )
    if method.pattern:
        _, m = groups(method.pattern)
        for name, weight in kept.items():
            if weight.shape[1] % m:
                raise RequestError(
                    f"method.pattern={method.pattern} needs input dimensions divisible by {m}, but {name} "
                    f"has {weight.shape[1]}: add method.exclude=[{name}] or choose another pattern"
                )
    if isinstance(method.allocation, tuple) and len(method.allocation) != len(anatomy.all_blocks(model)):
        raise RequestError(
            f"method.allocation lists {len(method.allocation)} sparsities; the model has "
            f"{len(anatomy.all_blocks(model))} blocks: give one for each"
        )
    return kept


def _everything(model: PreTrainedModel, method: Weight) -> Weights:
    return anatomy.all_matrices(model, embeddings=method.embeddings, head=method.lm_head)


def _check_finite(found: Weights) -> None:
    for name, weight in found.items():
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite")


# ---- allocation: how many weights each matrix loses ----


def allocate(job: Job, sparsity: float) -> dict[str, int]:
    """How many weights each matrix loses; they sum to exactly round(sparsity * size), unless a pattern decides.

    uniform  every matrix the same share
    global   as a rank over all matrices by the criterion's score of the dense model (its deputy's, if it corrects)
    owl      blocks with fewer outliers lose more
    a list   each block its share
    Shares are moved together, and rounded by largest remainder, so that the total is exact.
    """
    allocation = job.method.allocation
    if job.method.pattern:
        return _removed_by_pattern(job.method.pattern, job.shapes)
    sizes = [shape.numel() for shape in job.shapes.values()]
    total = select.count(sum(sizes), sparsity)
    if allocation == "global":
        return dict(zip(job.shapes, select.counts_across(dense_scores(job), total), strict=True))
    shares = [sparsity] * len(sizes)
    if allocation != "uniform":
        blocks = anatomy.all_blocks(job.model)
        of_block = owl(job, sparsity) if allocation == "owl" else dict(zip(blocks, allocation, strict=True))
        own = [next((of_block[b] for b in of_block if name.startswith(f"{b}.")), sparsity) for name in job.shapes]
        shares = _moved(own, sizes, total)
    quotas = [share * size for share, size in zip(shares, sizes, strict=True)]
    return dict(zip(job.shapes, select.apportion(quotas, sizes, total), strict=True))


def _removed_by_pattern(pattern: str, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    n, m = groups(pattern)
    return {name: shape.numel() // m * (m - n) for name, shape in shapes.items()}


def _moved(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[float]:
    """The shares, all raised or lowered by one amount and kept within [0, 1], such that they remove the total."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        removed = sum(min(max(s + middle, 0.0), 1.0) * size for s, size in zip(shares, sizes, strict=True))
        low, high = (middle, high) if removed < total else (low, middle)
    return [min(max(s + high, 0.0), 1.0) for s in shares]


def owl(job: Job, sparsity: float) -> dict[str, float]:
    """The sparsity of each block (Yin et al. 2023, OWL, arXiv:2310.05175).

    A block's outliers are its Wanda scores above `outlier_ratio` times their mean. Blocks' shares of outliers, scaled
    to a range of twice `outlier_range`, are what they keep more or less than the average block.
    """
    shares: dict[str, float] = {}
    norms, weights = dense_norms(job), job.weights()
    for block in anatomy.all_blocks(job.model):
        found = [
            scores.wanda(weight, norms[name].to(weight.device))
            for name, weight in weights.items()
            if name.startswith(f"{block}.")
        ]
        if found:
            size = sum(s.numel() for s in found)
            bar = job.method.outlier_ratio * sum(float(s.sum()) for s in found) / size
            shares[block] = sum(int((s > bar).sum()) for s in found) / size
    spread = max(shares.values()) - min(shares.values()) or 1.0
    scaled = {block: share / spread * 2 * job.method.outlier_range for block, share in shares.items()}
    mean = sum(scaled.values()) / len(scaled)
    return {block: sparsity - (share - mean) for block, share in scaled.items()}


def dense_scores(job: Job) -> Callable[[], Iterable[Tensor]]:
    """A function that yields the scores of all targets as they are now, anew at each call, in order."""
    reads = set(job.scores_by.reads)
    if reads & _LARGE:
        found = {name: importance for name, _, importance in _streamed(replace(job, sequential=False))}
        return lambda: (found[name] for name in job.shapes)
    norms = dense_norms(job) if "input_norm" in reads else {}
    seen = {name: {"input_norm": norm} for name, norm in norms.items()}
    return lambda: (job.score(name, weight, seen.get(name, {})) for name, weight in job.weights().items())


def dense_norms(job: Job) -> dict[str, Tensor]:
    """||x_j||_2 of what each target reads, (in,) float32, with the model as it is now. An embedding has none."""

    def measure() -> dict[str, Tensor]:
        read = read_blocks(replace(job, sequential=False), hessian=False)
        return {name: inputs[name].norm for _, weights, inputs in read for name in weights if name in inputs}

    return job.memo(f"input norms of {list(job.shapes)}", measure)


# ---- selection within a matrix ----


def keep_mask(method: Weight, weight: Tensor, importance: Tensor, removed: int) -> Tensor:
    """Which weights of one matrix stay: exactly `removed` go.

    The lowest in score, or, with `skip_lowest`, the next ones above so many that stay; with `among_smallest` those of
    larger magnitude stay whatever they score. So a band of a criterion's order can be removed alone.
    """
    if method.pattern:
        return select.n_of_m(importance, *groups(method.pattern))
    lowest = select.lowest_by_row if method.scope == "row" else select.lowest
    skip = select.count(weight.numel(), method.skip_lowest)
    if method.among_smallest < 1:
        may_go = max(select.count(weight.numel(), method.among_smallest), skip + removed)  # both are rounded
        importance = importance.masked_fill(lowest(scores.magnitude(weight), may_go), torch.inf)
    keep = lowest(importance, skip + removed)
    return keep | ~lowest(importance, skip) if skip else keep


def _choose(method: Weight, removed: int) -> Choose:
    """`keep_mask` for some columns of a matrix at a time, such that all together lose exactly `removed`."""

    def choose(importance: Tensor, before: float, upto: float) -> Tensor:
        if method.pattern:
            return select.n_of_m(importance, *groups(method.pattern))
        if method.scope != "row":
            return select.lowest(importance, round(removed * upto) - round(removed * before))
        rows = len(importance)
        each, more = divmod(removed, rows)
        parts = [(importance[:more], each + 1), (importance[more:], each)]
        return torch.cat(
            [
                select.lowest_by_row(part, len(part) * (round(number * upto) - round(number * before)))
                for part, number in parts
                if len(part)
            ]
        )

    return choose


# ---- the work, block by block ----


def _prune_to(job: Job, sparsity: float) -> tuple[int, float | None]:
    """(how many weights were removed, the largest damping of a Hessian or None)."""
    job = replace(job, memo=sharing.once(sharing.unshared if job.gone else job.memo))  # a later step's model is its own
    counts = allocate(job, sparsity)
    removed, dampings = 0, []
    if job.criterion.corrects_after:
        for _, weights, inputs in read_blocks(job, hessian=True):
            removed_here, damping = _rebuild(job, weights, inputs, counts)
            removed += removed_here
            dampings.append(damping)
    else:
        for name, weight, importance in _scored(job):
            removed += _zero(job, name, weight, _mask(name, job.method, weight, importance, counts[name]), counts[name])
    return removed, max(dampings, default=None)


def _scored(job: Job) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight, scores) of every target; the caller prunes it before the next is scored."""
    reads = job.scores_by
    in_turn = reads.reads_text and (job.sequential or job.device is not None or bool(_LARGE & set(reads.reads)))
    if job.method.allocation != "global" and in_turn:
        yield from _streamed(job)
    else:
        yield from zip(job.shapes, job.weights().values(), dense_scores(job)(), strict=True)


def _streamed(job: Job) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`_scored` of a criterion that reads text, which is read for some matrices at a time.

    Where inputs and gradients are read, the gradients of all matrices are taken at first, and held.
    """
    reads = set(job.scores_by.reads)
    if not reads & {"input_norm", "hessian"}:
        for part in _parts(job):
            norms = calibrate.gradient_norms(job.model, job.text(), part)
            for name, weight in part.items():
                yield name, weight, job.score(name, weight, {"gradient_norm": norms.pop(name)})
        return
    weights = job.weights() if "gradient_norm" in reads else {}
    norms = calibrate.gradient_norms(job.model, job.text(), weights) if weights else {}
    for _, weights, inputs in read_blocks(job, hessian="hessian" in reads):
        for name, weight in weights.items():
            seen = {"gradient_norm": norms.pop(name)} if name in norms else {}
            if name in inputs:
                seen |= {what: read(inputs[name]) for what, read in _OF_INPUTS.items() if what in reads}
            yield name, weight, job.score(name, weight, seen)


def _parts(job: Job) -> Iterator[Weights]:
    """The targets in parts whose float32 gradients take no more than half the model; all at once if not sequential."""
    limit = sum(p.numel() * p.element_size() for p in job.model.parameters()) // 2
    part: Weights = {}
    for name, weight in job.weights().items():
        if job.sequential and part and 4 * (sum(w.numel() for w in part.values()) + weight.numel()) > limit:
            yield part
            part = {}
        part[name] = weight
    yield part


def read_blocks(job: Job, *, hessian: bool) -> Iterator[calibrate.Read]:
    """The targets block by block, with what each reads: see `calibrate.read_blocks`."""
    return calibrate.read_blocks(
        job.model,
        list(job.shapes),
        job.text(),
        hessian=hessian,
        sequential=job.sequential,
        device=job.device,
        words="pruning",
    )


def _rebuild(job: Job, weights: Weights, inputs: dict[str, Inputs], counts: dict[str, int]) -> tuple[int, float]:
    """Rebuild the matrices of one block, those with a common input together."""
    removed, most = 0, 0.0
    for names in calibrate.by_input(weights, inputs, lambda name: job.rounding(name) is None):
        first = names[0]
        if first not in inputs:  # an embedding
            mask = _mask(first, job.method, weights[first], job.score(first, weights[first], {}), counts[first])
            removed += _zero(job, first, weights[first], mask, counts[first])
            continue
        hessian, rounder = inputs[first].hessian, job.rounding(first)
        assert hessian is not None
        given = {
            "weights": [weights[name].float() for name in names],
            "hessian": hessian,
            "choose": [_choose(job.method, counts[name]) for name in names],
            "damping": job.method.damping,
            "m": groups(job.method.pattern)[1] if job.method.pattern else 1,
            "gone": [weights[name] == 0 for name in names] if job.gone else None,
            "rounder": rounder,
        }
        try:
            rebuilt, damping = job.criterion.load()(**job.criterion.arguments(given))
        except ValueError as error:
            raise ValueError(f"{first}: {error}") from error
        if damping > job.method.damping:
            log.warning(
                "%s: the Hessian was damped by %g instead of %g to be positive definite",
                first,
                damping,
                job.method.damping,
            )
        most = max(most, damping)
        for name, (values, keep) in zip(names, rebuilt, strict=True):
            if not torch.isfinite(values).all():
                raise ValueError(f"{name}: the rebuilt weights are not finite; raise method.damping")
            surgery.write_weights(weights[name], values)
            removed += _zero(job, name, weights[name], keep, counts[name])
        if rounder is not None:
            job.grids.update(zip(names, rounder.grids([len(weights[name]) for name in names]), strict=True))
    return removed, most


def _mask(name: str, method: Weight, weight: Tensor, importance: Tensor, removed: int) -> Tensor:
    try:
        return keep_mask(method, weight, importance, removed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _zero(job: Job, name: str, weight: Tensor, keep: Tensor, asked: int) -> int:
    """Zero what is not kept, and return how many that are. Raises RuntimeError unless they are `asked`, and zero."""
    job.masks[name] = keep
    surgery.zero_weights(weight, keep)
    removed = keep.numel() - int(keep.sum())
    if removed != asked:
        raise RuntimeError(f"{name}: {removed} weights removed, {asked} asked")
    if torch.count_nonzero(weight) > keep.numel() - asked:
        raise RuntimeError(f"{name}: more weights are left than the mask keeps")
    return removed
