"""Compressed sparse rows, as torch holds and MKL multiplies them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


class CsrLinear(nn.Module):
    """A linear layer whose matrix is torch's compressed sparse rows: int32 columns, which MKL multiplies."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            rows = weight.detach().to_sparse_csr()
        index = (rows.crow_indices().int(), rows.col_indices().int())
        matrix = torch.sparse_csr_tensor(*index, rows.values(), rows.shape, check_invariants=True)
        self.register_buffer("weight", matrix)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.weight.values()))

    @property
    def held_bytes(self) -> int:
        """Bytes of the matrix as it is held; the bias is apart."""
        parts = (self.weight.values(), self.weight.crow_indices(), self.weight.col_indices())
        return sum(t.numel() * t.element_size() for t in parts)

    def forward(self, x: Tensor) -> Tensor:
        product = (self.weight @ x.reshape(-1, self.in_features).t()).t()
        product = product if self.bias is None else product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)
