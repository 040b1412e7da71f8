"""How much each matrix of the blocks lost, whatever has pruned it: the table `layers` of a cell."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from sweep import models

Sizes = list[tuple[nn.Module, dict[str, int]]]  # of each block: its module, and the weights of its matrices by name


def sizes(model: PreTrainedModel) -> Sizes:
    """What `table` compares with, taken before the model is pruned."""
    return [(block, {name: weight.numel() for name, weight in models.matrices(block).items()})
            for block in models.blocks(model)]  # fmt: skip


def table(before: Sizes, model: PreTrainedModel) -> pd.DataFrame:
    """One line a matrix: block (its number in the unpruned model), matrix, weights, zeros.

    zeros  weights that are zero or not there any more, those of removed neurons, heads and blocks among them
    """
    left = {id(block) for block in models.blocks(model)}
    lines = []
    for number, (block, matrices) in enumerate(before):
        now = models.matrices(block) if id(block) in left else {}
        for name, size in matrices.items():
            kept = int(torch.count_nonzero(now[name])) if name in now else 0
            lines.append((number, name, size, size - kept))
    return pd.DataFrame(lines, columns=["block", "matrix", "weights", "zeros"])
