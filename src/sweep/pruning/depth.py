"""Depth pruning: whole blocks are removed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.models import anatomy, surgery
from sweep.pruning import criteria, drop, scoring, select, sharing, unit_statistics
from sweep.pruning.criteria import Criterion
from sweep.pruning.families import Layer
from sweep.pruning.pruned import Pruned


def prune(
    model: PreTrainedModel,
    method: Layer,
    sparsity: float,
    tokens: Tensor | None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    memo: sharing.Memo = sharing.unshared,
) -> Pruned:
    """Remove the least important blocks in place, in `method.steps` rounds of measuring and removing.

    Raises ValueError when the request leaves no block.
    """
    criterion = criteria.find(method.criterion, method.of)
    generator = torch.Generator().manual_seed(seed)
    sizes = [sum(p.numel() for p in block.parameters()) for block in anatomy.blocks(model)]
    candidates = list(range(len(sizes))) if method.blocks is None else list(method.blocks)  # as numbered at first
    left = list(range(len(sizes)))
    costs = {block: sizes[block] if method.sparsity_of == "parameters" else 1 for block in candidates}
    tables = []
    for step in range(1, method.steps + 1):
        open_ = [block for block in left if block in costs]
        places = [left.index(block) for block in open_]
        if criterion.measured:
            scores = _drops(model, drop.probe(method.drop, tokens, tokenizer), method, places)
            tables.append(pd.DataFrame({"block": open_, "unit": 0, "importance": scores.tolist(), "measured": True}))
        else:
            scores = _scores(model, criterion, tokens, generator, memo if step == 1 else sharing.unshared)[places]
        budget = sum(costs.values()) * sparsity * step / method.steps - sum(
            cost for block, cost in costs.items() if block not in left
        )
        keep = select.nearest(
            [scores],
            [torch.tensor([costs[block] for block in open_])],
            budget,
            at_least=int(len(open_) == len(left)),
        )[0]
        gone = {block for block, stays in zip(open_, keep.tolist(), strict=True) if not stays}
        surgery.remove_blocks(model, [block not in gone for block in left])
        left = [block for block in left if block not in gone]
    targets = sum(sizes[block] for block in candidates)
    removed = targets - sum(sizes[block] for block in candidates if block in left)
    if sum(p.numel() for block in anatomy.blocks(model) for p in block.parameters()) != sum(sizes) - removed:
        raise RuntimeError("the blocks that are left do not have the parameters that they should")
    return Pruned(
        targets=targets,
        removed=removed,
        calibration_tokens=0 if tokens is None else tokens.numel(),
        units=len(candidates),
        gone=np.setdiff1d(np.arange(len(sizes)), left),
        measured=drop.latest(tables),
    )


def _scores(
    model: PreTrainedModel,
    criterion: Criterion,
    tokens: Tensor | None,
    generator: torch.Generator,
    memo: sharing.Memo,
) -> Tensor:
    """(blocks,), higher = keep."""
    blocks = list(anatomy.blocks(model))
    given: dict[str, Any] = {"units": len(blocks), "generator": generator}
    if criterion.reads_text:
        assert tokens is not None
        text = tokens
        found = memo("block cosines", lambda: {"cosines": unit_statistics.block_cosines(blocks, model, text)})
        given["cosine"] = found["cosines"].cpu()
    return scoring.scored(criterion, given, (len(blocks),), "the blocks")


@torch.inference_mode()
def _drops(model: PreTrainedModel, probe: drop.Probe, method: Layer, wanted: list[int]) -> Tensor:
    """(wanted,) float64: what the metric loses without each of these blocks."""
    run = drop.Resumed(model if model.dtype == torch.float32 else copy.deepcopy(model).float(), probe)
    without = [run.without_block(block) for block in tqdm(wanted, "measuring drops", leave=False)]
    return torch.from_numpy(drop.importance(drop.Scheme(method.drop.metric, probe), run.whole(), np.stack(without)))
