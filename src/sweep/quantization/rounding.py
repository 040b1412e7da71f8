"""From a matrix to its grid: to the nearest value, and column by column for the solver.

Legend: a weight is (out, in); columns of a group share a scale, and a row without groups is one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import gguf
import numpy as np
import torch
from gguf import quants
from torch import Tensor

from sweep.formats.grid import Grid
from sweep.quantization.forms import Form


def scales(form: Form, groups: Tensor) -> Tensor:
    """(...,) float32 the scale of each group, as the form keeps it: its largest weight has the code of largest size.

    groups  (..., columns) float32
    Of codes that go further on one side, the weight of largest size comes to lie there, whatever its sign.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    found = largest.abs() / (2 ** (form.bits - 1) - 1) if form.lowest is None else largest / form.lowest
    return found.to(torch.float16 if form.gguf else torch.bfloat16).float()


def nearest(form: Form, columns: int | None, weight: Tensor) -> tuple[Tensor, Grid]:
    """(the values nearest to a weight, (out, in) in its dtype; their grid).

    columns  that share a scale; None where a row does
    Raises ValueError where these do not divide the matrix.
    """
    if form.gguf:
        return _by_gguf(form, weight)
    width = weight.shape[1] if columns is None else columns
    _check_width(weight.shape[1], width)
    grid = Grid(form.bits, scales(form, weight.detach().float().unflatten(1, (-1, width))), columns, form.lowest)
    return grid.values(grid.codes(weight), weight.dtype), grid


def _by_gguf(form: Form, weight: Tensor) -> tuple[Tensor, Grid]:
    kind = gguf.GGMLQuantizationType[form.gguf]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    _check_width(weight.shape[1], block)
    packed = quants.quantize(weight.detach().float().cpu().numpy(), kind)
    values = torch.from_numpy(quants.dequantize(packed, kind)).to(weight.device, weight.dtype)
    kept = packed.reshape(len(weight), -1, size)[:, :, :2].copy().view(np.float16)[:, :, 0]  # each block begins with it
    grid = Grid(form.bits, torch.from_numpy(kept.astype(np.float32)).to(weight.device), block, form.lowest)
    return values, grid


def _check_width(width: int, group: int) -> None:
    if width % group:
        raise ValueError(f"its {width} columns are no multiple of the {group} that share a scale")


class Rounder:
    """Rounds matrices that are solved column by column, (columns, R): see `solver.Rounder`.

    A group gets its scale when its first column is settled, from what its columns are then, those left out that go.
    """

    def __init__(self, form: Form, columns: int | None) -> None:
        self._form, self._columns = form, columns
        self._scales: list[Tensor] = []  # (R,) of each group so far

    def __call__(self, column: int, left: Tensor, goes: Tensor) -> Tensor:
        if column % (self._columns or len(left) + column) == 0:
            ahead = slice(self._columns)
            self._scales.append(scales(self._form, left[ahead].masked_fill(goes[ahead], 0).t()))
            self._now = Grid(self._form.bits, self._scales[-1][:, None], None, self._form.lowest)
        return self._now.values(self._now.codes(left[0][:, None]), torch.float32)[:, 0]

    def grids(self, sizes: Sequence[int]) -> list[Grid]:
        together = torch.stack(self._scales, 1)
        return [Grid(self._form.bits, each.clone(), self._columns, self._form.lowest) for each in together.split(sizes)]
