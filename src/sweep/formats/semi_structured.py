"""Of each four neighbours along the input two at most: what the sparse tensor cores of CUDA multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from sweep.formats import declared
from sweep.formats.declared import Format
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing


class SemiStructuredLinear(PackedLinear):
    """A linear layer whose matrix is torch's 2:4 form: of each four neighbours two, and their places. On CUDA alone."""

    format = declared.SEMI_STRUCTURED
    matrix: SparseSemiStructuredTensor

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid | None = None) -> None:
        super().__init__(weight.shape, bias, weight.dtype)
        matrix = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
        self.register_buffer("matrix", matrix, persistent=False)

    def dense(self) -> Tensor:
        return self.matrix.to_dense()

    def held(self) -> list[Tensor]:
        names, _ = self.matrix.__tensor_flatten__()
        return [getattr(self.matrix, name) for name in names]

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.matrix, bias)


def is_two_of_four(weight: Tensor, grid: Grid | None = None) -> bool:
    """Whether each four neighbours along the input, (out, in), hold two non-zeros at most."""
    rows, columns = weight.shape
    return columns % 4 == 0 and int((weight.reshape(rows, -1, 4) != 0).sum(2).max()) <= 2


def packing(form: Format, kernel: str, dtype: torch.dtype) -> Packing:
    return Packing("torch 2:4", SemiStructuredLinear, suits=is_two_of_four)
