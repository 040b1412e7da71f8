"""Least-squares repair: after units are cut, the output matrix is refitted so that its block answers as it did.

X (T, columns) the input of an output matrix W (out, columns) on calibration text, K the columns that stay:
W' = argmin ||X_K W'^T - X W^T||^2 + damping, solved from the Gram matrix X^T X alone. Blocks are taken in order and
each sees what the cut and refitted ones before it give, so that errors are met where they arise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import calibrate
from sweep.calibrate import Inputs, Text, inputs_observed
from sweep.models import anatomy, surgery

# Of the mean diagonal of the Gram matrix; 0.01 fits the calibration text and no other. Tuned on the development pages of
# pydoc (benchmarks/neuron_criteria.py).
DAMPING = 0.3

Cut = tuple[int, anatomy.Linear, Callable[[Tensor], None], Tensor]  # block, output matrix, how to cut, columns to keep


@torch.no_grad()
def cut_and_refit(model: PreTrainedModel, cuts: Sequence[Cut], tokens: Tensor) -> None:
    """Cut every part down to the columns it keeps, and refit its output matrix. In place.

    tokens  (sequences, length) calibration text
    """
    text = calibrate.enter(model, tokens)
    blocks = anatomy.blocks(model)
    pending = {block: [cut for cut in cuts if cut[0] == block] for block in range(len(blocks))}
    last = max(block for block, *_ in cuts)
    for index in tqdm(range(last + 1), desc="refitting", unit="block", leave=False):
        for _, output, remove, keep in pending[index]:
            if not keep.all():
                weight = refit(anatomy.weight(output), _gram(text, index, blocks[index], output), keep)
                remove(keep)
                surgery.set_weights(output, weight)
        if index < last:
            calibrate.through(text, index, blocks[index], advance=True)


def refit(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """W' = W G[:, K] (G[K, K] + damping)^-1, where the damping pulls towards the weights that are there.

    weight   (out, columns)
    gram     (columns, columns) float32, X^T X
    keep     (columns,) bool
    returns  (out, kept) float32

    Written as W_K + W_R G[R, K] (G[K, K] + damping)^-1 with R the removed columns: the same for no damping, and with
    damping a column that nothing can stand in for costs nothing to the others.
    """
    device = calibrate.exact_device(gram.device)
    keep, gram = keep.to(device), gram.to(device)
    kept, gone = weight.to(device)[:, keep].float(), weight.to(device)[:, ~keep].float()
    inner = gram[keep][:, keep].double()
    inner.diagonal().add_(DAMPING * gram.diagonal().mean().double())
    change = torch.linalg.solve(inner, gram[keep][:, ~keep].double() @ gone.t().double())
    return kept + change.t().float()


def _gram(text: Text, index: int, block: nn.Module, output: anatomy.Linear) -> Tensor:
    """X^T X of what `output` reads in block `index`, (columns, columns) float32."""
    inputs = Inputs.none(anatomy.weight(output).shape[1], output.weight.device, hessian=True)
    with inputs_observed([output], lambda _, x: inputs.add(x)):
        calibrate.through(text, index, block, advance=False)
    assert inputs.hessian is not None
    return inputs.hessian
