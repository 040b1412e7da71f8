"""Matrices of codes, as a stage has quantised them: a byte or half a byte a weight, or a byte for the non-zeros alone.

    codes    int8    (out, 64 words) int8, words = ceil(in / 64), 0 past the last column
             int4    (out, 32 words) uint8; byte j of a word has the codes of columns j and 32 + j in its low and high half,
                     each plus 8
             bitmap  (nonzeros + 64,) int8, with `mask` and `offsets` as in `bitmap`
    scales   (out, groups) of the grid; in 16 bits where that loses nothing

A layer gives back the values of the grid, rounded once from float32 as the stage did. Its products are those of the codes,
times the scale: they differ from the dense ones by the rounding of weights to bfloat16, which they leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sweep.formats import bitmap, compiled, declared
from sweep.formats.declared import Format
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing, has_zeros

WORD, HALF = bitmap.WORD, bitmap.WORD // 2
OFFSET = 8  # added to a code of half a byte
SCALES = (torch.bfloat16, torch.float16, torch.float32)  # what holds the scales: the first that does so exactly


class CodesLinear(PackedLinear):
    """A linear layer that holds the codes of its matrix and their scales alone.

    tensors  as the format has them, by name
    kernel   one of the format's, or "torch": expand the matrix for every call, which is slow and runs anywhere
    Raises ValueError for tensors that do not belong together, KeyError for one that is not there.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], columns: int, bias: Tensor | None, dtype: torch.dtype, kernel: str
    ) -> None:
        codes, scales = tensors["codes"], tensors["scales"]
        super().__init__((len(scales), columns), bias, dtype)
        for name, tensor in (("codes", codes), ("scales", scales)):
            self.register_buffer(name, tensor)
        self.kernel = kernel
        self._compiled_version = compiled.version(kernel)
        groups = scales.shape[1] if scales.dim() == 2 else 0
        fits = groups == 1 or (groups > 1 and columns % groups == 0 and columns // groups % HALF == 0)
        if scales.dtype not in SCALES or not fits or not scales.isfinite().all():
            raise ValueError(
                f"no scales of {columns} columns: {tuple(scales.shape)} {scales.dtype}; groups are multiples of {HALF}"
            )

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None where a row does."""
        groups = self.scales.shape[1]
        return None if groups == 1 else self.in_features // groups

    def whole_numbers(self) -> Tensor:
        """The codes (out, in) int8."""
        raise NotImplementedError

    @property
    def bits(self) -> tuple[Tensor | None, Tensor | None]:
        """(mask, offsets) of a bitmap."""
        return None, None

    def dense(self) -> Tensor:
        grid = Grid(8, self.scales.float(), self.group)
        return grid.values(self.whole_numbers(), self.dtype)

    def facts(self) -> int:
        return self.in_features

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        compiled.refuse_gradients(self, x)
        if x.dtype != self.dtype:
            raise RuntimeError(f"the input is {x.dtype}, the matrix is multiplied in {self.dtype}")
        if self._compiled_version is None:
            return nn.functional.linear(x, self.dense(), bias)
        matrix = (self.codes, self.scales, *self.bits, bias, self.in_features)
        return compiled.linear("codes_linear", x, *matrix, rows=self.out_features, version=self._compiled_version)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"


class Int8Linear(CodesLinear):
    format = declared.INT8

    def __init__(self, tensors: Mapping[str, Tensor], columns: int, *rest: object) -> None:
        super().__init__(tensors, columns, *rest)  # type: ignore[arg-type]
        _check_dense(self.codes, self.scales, torch.int8, columns, WORD)

    def whole_numbers(self) -> Tensor:
        return self.codes[:, : self.in_features]


class Int4Linear(CodesLinear):
    format = declared.INT4

    def __init__(self, tensors: Mapping[str, Tensor], columns: int, *rest: object) -> None:
        super().__init__(tensors, columns, *rest)  # type: ignore[arg-type]
        _check_dense(self.codes, self.scales, torch.uint8, columns, HALF)

    def whole_numbers(self) -> Tensor:
        words = self.codes.unflatten(1, (-1, HALF)).to(torch.int8)
        halves = torch.cat([words.bitwise_and(15), words.bitwise_right_shift(4).bitwise_and(15)], 2)
        return (halves - OFFSET).flatten(1)[:, : self.in_features]


class BitmapInt8Linear(CodesLinear):
    format = declared.BITMAP_INT8
    mask: Tensor
    offsets: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], columns: int, *rest: object) -> None:
        super().__init__(tensors, columns, *rest)  # type: ignore[arg-type]
        for name in ("mask", "offsets"):
            self.register_buffer(name, tensors[name])
        bitmap.check(self.mask, self.codes, self.offsets, columns, (torch.int8,))
        if len(self.offsets) != len(self.scales) + 1:
            raise ValueError(f"{len(self.scales)} rows of scales, and {len(self.offsets) - 1} of codes")

    @property
    def bits(self) -> tuple[Tensor, Tensor]:
        return self.mask, self.offsets

    def whole_numbers(self) -> Tensor:
        return bitmap.expand(self.mask, self.codes, self.offsets, self.in_features)


def _check_dense(codes: Tensor, scales: Tensor, dtype: torch.dtype, columns: int, bytes_a_word: int) -> None:
    expected = (len(scales), -(-columns // WORD) * bytes_a_word)
    if codes.shape != expected or codes.dtype != dtype:
        raise ValueError(
            f"codes of {len(scales)} x {columns} weights are {expected} {dtype}, got {tuple(codes.shape)} {codes.dtype}"
        )


def int8(codes: Tensor) -> dict[str, Tensor]:
    return {"codes": nn.functional.pad(codes, (0, -codes.shape[1] % WORD))}


def int4(codes: Tensor) -> dict[str, Tensor]:
    low, high = (int8(codes)["codes"] + OFFSET).to(torch.uint8).unflatten(1, (-1, 2, HALF)).unbind(2)
    return {"codes": (low | high << 4).flatten(1)}


def bitmap_int8(codes: Tensor) -> dict[str, Tensor]:
    return dict(zip(("mask", "codes", "offsets"), bitmap.compress(codes, (torch.int8,)), strict=True))


_LAYERS: dict[
    str, tuple[type[CodesLinear], Callable[[Tensor], dict[str, Tensor]]]
] = {  # and the tensors of codes (out, in)
    declared.INT8.name: (Int8Linear, int8),
    declared.INT4.name: (Int4Linear, int4),
    declared.BITMAP_INT8.name: (BitmapInt8Linear, bitmap_int8),
}


def packing(form: Format, kernel: str, dtype: torch.dtype) -> Packing:
    """How quantised matrices are packed for this kernel, `auto` for the fastest here; where it cannot run, for "torch"."""
    kernel, lacks = compiled.chosen(form, kernel, dtype)
    layer, tensors = _LAYERS[form.name]

    def make(weight: Tensor, bias: Tensor | None, grid: Grid | None) -> CodesLinear:
        if grid is None:
            raise ValueError(f"{form.name} holds weights that are quantised, and these are not")
        assert form.bits is not None
        if grid.bits > form.bits:
            raise ValueError(f"{form.name} holds codes of up to {form.bits} bits, got {grid.bits}")
        codes = grid.codes(weight)
        if not torch.equal(grid.values(codes, weight.dtype), weight):
            raise ValueError("it has values that its quantisation has not: something has changed it since")
        scales = next(grid.scales.to(kind) for kind in SCALES if torch.equal(grid.scales.to(kind).float(), grid.scales))
        return layer(tensors(codes) | {"scales": scales}, weight.shape[1], bias, weight.dtype, kernel)

    def read(stored: Mapping[str, Tensor], columns: int) -> CodesLinear:
        bias = stored["bias"].to(dtype) if "bias" in stored else None
        return layer(stored, columns, bias, dtype, kernel)

    def suits(weight: Tensor, grid: Grid | None) -> bool:
        return grid is not None and (layer is not BitmapInt8Linear or has_zeros(weight))

    return Packing(f"{form.name} {kernel}", make, suits, lacks, read)
