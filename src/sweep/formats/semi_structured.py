"""Of each four neighbours along the input two at most: what the sparse tensor cores of CUDA multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from sweep.formats import declared
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing


class SemiStructuredLinear(PackedLinear):
    """A linear layer whose matrix is torch's 2:4 form: of each four neighbours two, and their places. On CUDA alone."""

    format = declared.SEMI_STRUCTURED
    weight: SparseSemiStructuredTensor

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid | None = None) -> None:
        super().__init__(weight.shape, bias)
        matrix = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
        self.register_buffer("weight", matrix, persistent=False)

    def dense(self) -> Tensor:
        return self.weight.to_dense()

    def held(self) -> list[Tensor]:
        names, _ = self.weight.__tensor_flatten__()
        return [getattr(self.weight, name) for name in names]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def is_two_of_four(weight: Tensor, grid: Grid | None = None) -> bool:
    """Whether each four neighbours along the input, (out, in), hold two non-zeros at most."""
    rows, columns = weight.shape
    return columns % 4 == 0 and int((weight.reshape(rows, -1, 4) != 0).sum(2).max()) <= 2


def packing(kernel: str, dtype: torch.dtype) -> Packing:
    return Packing("torch 2:4", SemiStructuredLinear, suits=is_two_of_four)
