"""The bitmap format: one bit a weight says whether it is there, and the non-zeros follow each other.

    mask     (out, words) int64; bit j of word w of a row is column 64 w + j, words = ceil(in / 64)
    offsets  (out + 1,) int32; the non-zeros of row r are values[offsets[r] : offsets[r + 1]]
    values   (nonzeros + padding,) bfloat16 or float32; the last 64 bytes are padding that a wide load may touch

At sparsity s it takes (1 - s) + 1/16 of dense bfloat16, and so it shrinks from 7 % on; float32 takes 1/32 more.
`expand` here is plain torch: what runs without a compiler, and what the compiled kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sweep.formats import compiled, declared
from sweep.formats.declared import Format
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing

WORD = 64  # columns a word of the mask
PADDING = 64  # bytes after the values
DTYPES = (torch.bfloat16, torch.float32)


def compress(weight: Tensor, dtypes: Collection[torch.dtype] = DTYPES) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, values, offsets) of a matrix (out, in). Raises ValueError for what the format cannot hold."""
    if weight.dim() != 2 or weight.dtype not in dtypes:
        raise ValueError(
            f"bitmap holds matrices of bfloat16 or float32, got {weight.dim()} dimensions of {weight.dtype}"
        )
    rows, columns = weight.shape
    if rows * columns >= 2**31:
        raise ValueError(f"bitmap counts up to 2**31 weights in a matrix, got {rows} x {columns}")
    weight = weight.detach().contiguous()
    there = weight != 0
    padded = np.zeros((rows, -(-columns // WORD) * WORD), dtype=bool)
    padded[:, :columns] = there.numpy()
    mask = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i8").reshape(rows, -1))
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = there.sum(1).cumsum(0)
    values = torch.cat([weight[there], torch.zeros(PADDING // weight.element_size(), dtype=weight.dtype)])
    return mask, values, offsets


def expand(mask: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """The matrix (out, in) again."""
    bits = np.unpackbits(mask.numpy().view(np.uint8), axis=1, bitorder="little")[:, :columns]
    dense = torch.zeros(bits.shape, dtype=values.dtype)
    dense[torch.from_numpy(bits).bool()] = values[: int(offsets[-1])]
    return dense


def check(
    mask: Tensor, values: Tensor, offsets: Tensor, columns: int, dtypes: Collection[torch.dtype] = DTYPES
) -> None:
    """Refuse arrays that do not belong together, such as those of a damaged file: the kernels trust them.

    Raises ValueError.
    """
    rows = len(offsets) - 1
    shapes = mask.shape == (rows, -(-columns // WORD)) and values.dim() == 1 and values.dtype in dtypes
    if not shapes or mask.dtype != torch.int64 or offsets.dtype != torch.int32:
        raise ValueError(
            f"no bitmap of {columns} columns: mask {tuple(mask.shape)} {mask.dtype}, values "
            f"{tuple(values.shape)} {values.dtype}, offsets {tuple(offsets.shape)} {offsets.dtype}"
        )
    bits = np.unpackbits(np.ascontiguousarray(mask.numpy()).view(np.uint8), axis=1, bitorder="little")
    counts = torch.from_numpy(bits.sum(1, dtype=np.int64))
    padded = int(offsets[-1]) + PADDING // values.element_size()
    if (
        offsets[0] != 0
        or not torch.equal(offsets.diff().long(), counts)
        or bits[:, columns:].any()
        or len(values) != padded
    ):
        raise ValueError(
            f"damaged bitmap: its mask has {int(counts.sum())} weights, its offsets end at "
            f"{int(offsets[-1])}, and {len(values)} values are there"
        )


class BitmapLinear(PackedLinear):
    """A linear layer that holds its matrix in the bitmap format alone.

    kernel  one of `kernels()`, or "torch": expand the matrix for every call, which is slow and runs anywhere
    """

    format = declared.BITMAP
    mask: Tensor
    values: Tensor
    offsets: Tensor

    def __init__(self, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None, kernel: str):
        check(mask, values, offsets, columns)
        super().__init__((len(offsets) - 1, columns), bias, values.dtype)
        for name, tensor in (("mask", mask), ("values", values), ("offsets", offsets)):
            self.register_buffer(name, tensor)
        self.kernel = kernel
        self._compiled_version = compiled.version(kernel)

    def dense(self) -> Tensor:
        return expand(self.mask, self.values, self.offsets, self.in_features)

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.values[: int(self.offsets[-1])]))

    def facts(self) -> int:
        return self.in_features

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        compiled.refuse_gradients(self, x)
        if self._compiled_version is None:
            return nn.functional.linear(x, self.dense(), bias)
        matrix = (self.mask, self.values, self.offsets, bias, self.in_features)
        return compiled.linear("bitmap_linear", x, *matrix, rows=self.out_features, version=self._compiled_version)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"


def packing(form: Format, kernel: str, dtype: torch.dtype) -> Packing:
    """How matrices are packed for this kernel, `auto` for the fastest here; where it cannot run, for "torch"."""
    kernel, lacks = compiled.chosen(form, kernel, dtype)

    def make(weight: Tensor, bias: Tensor | None, grid: Grid | None = None) -> BitmapLinear:
        return BitmapLinear(*compress(weight), weight.shape[1], bias, kernel)

    def read(tensors: Mapping[str, Tensor], columns: int) -> BitmapLinear:
        mask, values, offsets = (tensors[name] for name in ("mask", "values", "offsets"))
        bias = tensors["bias"].to(dtype) if "bias" in tensors else None
        return BitmapLinear(mask, values.to(dtype), offsets, columns, bias, kernel)

    return Packing(f"bitmap {kernel}", make, lacks=lacks, read=read)
