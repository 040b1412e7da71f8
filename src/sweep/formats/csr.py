"""Compressed sparse rows, as torch holds and MKL multiplies them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sweep.formats import declared
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing


class CsrLinear(PackedLinear):
    """A linear layer whose matrix is torch's compressed sparse rows: int32 columns, which MKL multiplies."""

    format = declared.CSR
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid | None = None) -> None:
        super().__init__(weight.shape, bias)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            rows = weight.detach().to_sparse_csr()
        index = (rows.crow_indices().int(), rows.col_indices().int())
        matrix = torch.sparse_csr_tensor(*index, rows.values(), rows.shape, check_invariants=True)
        self.register_buffer("weight", matrix)

    def dense(self) -> Tensor:
        return self.weight.to_dense()

    def held(self) -> tuple[Tensor, ...]:
        return self.weight.values(), self.weight.crow_indices(), self.weight.col_indices()

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.weight.values()))

    def forward(self, x: Tensor) -> Tensor:
        product = (self.weight @ x.reshape(-1, self.in_features).t()).t()
        product = product if self.bias is None else product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)


def packing(kernel: str, dtype: torch.dtype) -> Packing:
    return Packing("torch csr", CsrLinear)
