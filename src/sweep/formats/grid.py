"""The values that a quantised matrix may take: a whole number, its code, times the scale of the row or of a group in it.

The stage that quantises rounds a matrix to its grid and leaves the values in the model. A format takes the codes back from
them, which is exact: a value in bfloat16 lies within half a bit in 256 of its code times the scale, and no code of up to
eight bits is rounded to another by that. Zero is a value of every grid, so a pruned weight stays pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BITS = 8  # codes are int8


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of one matrix (out, in).

    bits    of a code: -(2^(bits - 1) - 1) .. 2^(bits - 1) - 1
    scales  (out, groups) float32, finite; 0 in a group that is all zeros, and negative where a form counts from the other end
    group   columns that share a scale; None where a row does, and groups = 1
    lowest  the smallest code, where it is not that: the forms of GGUF use one more at that end
    Raises ValueError for what is none.
    """

    bits: int
    scales: Tensor
    group: int | None = None
    lowest: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MOST_BITS:
            raise ValueError(f"a grid has codes of 2 to {MOST_BITS} bits, got {self.bits}")
        if self.scales.dim() != 2 or self.scales.dtype != torch.float32 or not self.scales.isfinite().all():
            raise ValueError(
                f"the scales of a grid are (out, groups) finite float32, got {tuple(self.scales.shape)} {self.scales.dtype}"
            )
        if self.group is None and self.scales.shape[1] != 1:
            raise ValueError(f"a grid without groups has one scale a row, got {self.scales.shape[1]}")
        if not -(2 ** (self.bits - 1)) <= self.range[0] <= 0:
            raise ValueError(f"the smallest code of {self.bits} bits is {-(2 ** (self.bits - 1))}, got {self.lowest}")

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        highest = 2 ** (self.bits - 1) - 1
        return (-highest if self.lowest is None else self.lowest), highest

    def codes(self, weight: Tensor) -> Tensor:
        """(out, in) int8: the nearest code of each weight, any float dtype; ties to even."""
        scales = self._by_column(weight.shape)
        codes = (weight.float() / scales).masked_fill(scales == 0, 0)
        return codes.round_().clamp_(*self.range).to(torch.int8)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """(out, in) what codes (out, in) stand for, rounded once, from float32 to the dtype."""
        return (codes.float() * self._by_column(codes.shape)).to(dtype)

    def holds(self, weight: Tensor) -> bool:
        """Whether a matrix (out, in) has values of the grid alone."""
        return torch.equal(self.values(self.codes(weight), weight.dtype), weight)

    def _by_column(self, shape: torch.Size) -> Tensor:
        """The scales as they stand at the matrix: (out, 1), or (out, in). Raises ValueError where they do not fit it."""
        rows, columns = shape
        groups = 1 if self.group is None else columns / self.group
        if self.scales.shape != (rows, groups):
            every = "a row" if self.group is None else f"{self.group} columns"
            raise ValueError(
                f"a grid with a scale for {every}, {tuple(self.scales.shape)} in all, is none of a matrix {rows} x {columns}"
            )
        return self.scales if self.group is None else self.scales.repeat_interleave(self.group, 1)
