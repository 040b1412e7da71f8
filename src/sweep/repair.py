"""Least-squares repair: after units are cut, the output matrix is refitted so that its block answers as it did.

X (T, columns) the input of an output matrix W (out, columns) on calibration text, K the columns that stay:
W' = argmin ||X_K W'^T - X W^T||^2 + damping, solved from the Gram matrix X^T X alone. Blocks are taken in order and
each sees what the cut and refitted ones before it give, so that errors are met where they arise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import models, surgery
from sweep.calibrate import inputs_observed
from sweep.unit_statistics import BATCH, first_tensor

DAMPING = 0.3  # of the mean diagonal of the Gram matrix; 0.01 fits the calibration text and no other

Cut = tuple[int, models.Linear, Callable[[Tensor], None], Tensor]  # block, output matrix, how to cut, columns to keep


@torch.no_grad()
def cut_and_refit(model: PreTrainedModel, cuts: Sequence[Cut], tokens: Tensor) -> None:
    """Cut every part down to the columns it keeps, and refit its output matrix. In place.

    tokens  (sequences, length) calibration text
    """
    hidden, calls = block_inputs(model, tokens)
    blocks = models.blocks(model)
    pending = {block: [cut for cut in cuts if cut[0] == block] for block in range(len(blocks))}
    last = max(block for block, *_ in cuts)
    for index in tqdm(range(last + 1), desc="refitting", unit="block", leave=False):
        for _, output, remove, keep in pending[index]:
            if not keep.all():
                weight = refit(models.weight(output), _gram(blocks[index], output, hidden, calls[index]), keep)
                remove(keep)
                surgery.set_weights(output, weight)
        if index < last:
            hidden = [_run(blocks[index], batch, calls[index]) for batch in hidden]


def refit(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """W' = W G[:, K] (G[K, K] + damping)^-1, where the damping pulls towards the weights that are there.

    weight   (out, columns)
    gram     (columns, columns) float32, X^T X
    keep     (columns,) bool
    returns  (out, kept) float32

    Written as W_K + W_R G[R, K] (G[K, K] + damping)^-1 with R the removed columns: the same for no damping, and with
    damping a column that nothing can stand in for costs nothing to the others.
    """
    keep = keep.to(gram.device)
    kept, gone = weight[:, keep].float(), weight[:, ~keep].float()
    inner = gram[keep][:, keep].double()
    inner.diagonal().add_(DAMPING * gram.diagonal().mean().double())
    change = torch.linalg.solve(inner, gram[keep][:, ~keep].double() @ gone.t().double())
    return kept + change.t().float()


def block_inputs(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """(what enters the first block, one tensor a batch; the other arguments with which each block is called).

    The arguments are those for a single sequence: masks and positions are the same for all, as none is padded.
    """
    blocks = models.blocks(model)
    calls: list[dict[str, Any]] = []
    entering: list[Tensor] = []

    def on_first(_: nn.Module, args: tuple, kwargs: dict) -> None:
        entering.append(first_tensor(args, kwargs))

    def on_any(_: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append({"args": args[1:], "kwargs": {k: v for k, v in kwargs.items() if k != "hidden_states"}})

    handles = [block.register_forward_pre_hook(on_any, with_kwargs=True) for block in blocks]
    try:
        model(input_ids=tokens[:1].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    handle = blocks[0].register_forward_pre_hook(on_first, with_kwargs=True)
    try:
        for block in blocks:  # what comes after the embedding is not wanted: every block passes on what it gets
            block.forward = lambda *args, **kwargs: first_tensor(args, kwargs)
        for batch in tokens.split(BATCH):
            model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
        for block in blocks:
            del block.forward  # the class's own is seen again
    return entering, calls


def _gram(block: nn.Module, output: models.Linear, hidden: list[Tensor], call: dict[str, Any]) -> Tensor:
    """X^T X over all batches, (columns, columns) float32."""
    columns = models.weight(output).shape[1]
    gram = torch.zeros(columns, columns, device=output.weight.device)

    def observe(_: int, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        gram.addmm_(rows.t(), rows)

    with inputs_observed([output], observe):
        for batch in hidden:
            _run(block, batch, call)
    return gram


def _run(block: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    return first_tensor((block(hidden, *call["args"], **call["kwargs"]),), {})
