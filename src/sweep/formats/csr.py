"""Compressed sparse rows, as torch holds and MKL multiplies them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sweep.formats import declared
from sweep.formats.declared import Format
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing


class CsrLinear(PackedLinear):
    """A linear layer whose matrix is torch's compressed sparse rows: int32 columns, which MKL multiplies."""

    format = declared.CSR
    matrix: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid | None = None) -> None:
        super().__init__(weight.shape, bias, weight.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            rows = weight.detach().to_sparse_csr()
        index = (rows.crow_indices().int(), rows.col_indices().int())
        matrix = torch.sparse_csr_tensor(*index, rows.values(), rows.shape, check_invariants=True)
        self.register_buffer("matrix", matrix)

    def dense(self) -> Tensor:
        return self.matrix.to_dense()

    def held(self) -> tuple[Tensor, ...]:
        return self.matrix.values(), self.matrix.crow_indices(), self.matrix.col_indices()

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.matrix.values()))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = (self.matrix @ x.reshape(-1, self.in_features).t()).t().contiguous()  # as a linear layer gives it
        product = product if bias is None else product + bias
        return product.reshape(*x.shape[:-1], self.out_features)


def packing(form: Format, kernel: str, dtype: torch.dtype) -> Packing:
    return Packing("torch csr", CsrLinear)
