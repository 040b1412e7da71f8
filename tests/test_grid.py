"""What a quantised matrix may hold, and that its codes come back from its values."""

from __future__ import annotations

import pytest
import torch

from sweep.formats.grid import Grid

SCALES = torch.tensor([[1e-6], [0.013], [0.0], [300.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_every_code_comes_back_from_its_value(bits: int, dtype: torch.dtype) -> None:
    scales = SCALES.clamp(min=1e-3) if dtype == torch.float16 else SCALES  # whose small numbers are not so exact
    for lowest in (None, -(2 ** (bits - 1))):
        grid = Grid(bits, scales, lowest=lowest)
        codes = torch.arange(grid.range[0], grid.range[1] + 1, dtype=torch.int8).expand(len(scales), -1)
        expected = codes.where(scales != 0, 0)
        values = grid.values(codes, dtype)
        assert torch.equal(grid.codes(values), expected) and grid.holds(values)
        assert torch.equal(values == 0, expected == 0)


def test_a_weight_goes_to_the_nearest_code_of_its_group() -> None:
    grid = Grid(4, torch.tensor([[1.0, 10.0]]), group=2)
    weight = torch.tensor([[0.4, -100.0, 14.9, 16.0]])
    assert grid.codes(weight).tolist() == [[0, -7, 1, 2]]
    assert grid.values(grid.codes(weight), torch.float32).tolist() == [[0, -7, 10, 20]] and not grid.holds(weight)


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="codes of 2 to 8 bits, got 9"):
        Grid(9, torch.ones(1, 1))
    for scales in (torch.ones(3), torch.ones(3, 1).double(), torch.full((3, 1), torch.inf)):
        with pytest.raises(ValueError, match=r"scales of a grid are \(out, groups\) finite float32, got"):
            Grid(8, scales)
    with pytest.raises(ValueError, match="one scale a row, got 2"):
        Grid(8, torch.ones(3, 2))
    with pytest.raises(ValueError, match="smallest code of 4 bits is -8, got -9"):
        Grid(4, torch.ones(3, 1), lowest=-9)
    with pytest.raises(ValueError, match=r"a scale for 32 columns, \(3, 2\) in all, is none of a matrix 3 x 70"):
        Grid(8, torch.ones(3, 2), group=32).codes(torch.ones(3, 70))
    with pytest.raises(ValueError, match=r"a scale for a row, \(3, 1\) in all, is none of a matrix 2 x 5"):
        Grid(8, torch.ones(3, 1)).values(torch.ones(2, 5, dtype=torch.int8), torch.float32)
