"""Of each four neighbours along the input two at most: what the sparse tensor cores of CUDA multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor


class SemiStructuredLinear(nn.Module):
    """A linear layer whose matrix is torch's 2:4 form: of each four neighbours two, and their places. On CUDA alone."""

    weight: SparseSemiStructuredTensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        matrix = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
        self.register_buffer("weight", matrix, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.weight.to_dense()))

    @property
    def held_bytes(self) -> int:
        """Bytes of the matrix as it is held; the bias is apart."""
        names, _ = self.weight.__tensor_flatten__()
        return sum(t.numel() * t.element_size() for t in (getattr(self.weight, name) for name in names))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether each four neighbours along the input, (out, in), hold two non-zeros at most."""
    rows, columns = weight.shape
    return columns % 4 == 0 and int((weight.reshape(rows, -1, 4) != 0).sum(2).max()) <= 2
