"""The only code that changes a model: write zeros, cut neurons. Nothing here decides what goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sweep import models


@torch.no_grad()
def zero_weights(linear: models.Linear, keep: Tensor) -> None:
    """Set the weights of a linear layer to zero where `keep`, (out, in) bool, is False. In place."""
    models.weight(linear).masked_fill_(~keep, 0)


def remove_neurons(ffn: models.Ffn, keep: Tensor) -> None:
    """Cut the FFN down to the neurons where `keep`, (N,) bool, is True; the matrices become smaller."""
    for linear in ffn.inputs:
        _narrow(linear, keep, output=True)
    _narrow(ffn.output, keep, output=False)


@torch.no_grad()
def _narrow(linear: models.Linear, keep: Tensor, *, output: bool) -> None:
    """Keep only some outputs, or some inputs, of a linear layer."""
    index = keep.nonzero().squeeze(1).to(linear.weight.device)
    conv = isinstance(linear, Conv1D)
    linear.weight = nn.Parameter(
        linear.weight.index_select(int(output == conv), index), requires_grad=linear.weight.requires_grad
    )
    if output and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=linear.bias.requires_grad)
    if conv:
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape
