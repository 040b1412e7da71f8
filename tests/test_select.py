"""Selection: exact counts in every dtype, kept scores at least as high as dropped ones, one rule for ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sweep.pruning import select


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_count_is_exact_and_the_lowest_go(dtype: torch.dtype, sparsity: float) -> None:
    scores = torch.randn(37, 41, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    removed = select.count(scores.numel(), sparsity)
    keep = select.lowest(scores, removed)
    assert keep.shape == scores.shape
    assert int((~keep).sum()) == removed
    if removed:
        assert scores[keep].min() >= scores[~keep].max()


@pytest.mark.parametrize("removed", range(13))
def test_ties_go_by_index(removed: int) -> None:
    scores = torch.tensor([2.0, 1, 1, 3, 1, 2, 0, 1, 1, 2, 2, 0])
    expected = np.argsort(scores.numpy(), kind="stable")[:removed]
    keep = select.lowest(scores, removed)
    assert sorted(expected) == (~keep).nonzero().squeeze(1).tolist()


def test_nan_and_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        select.lowest(torch.tensor([1.0, float("nan"), 2.0]), 1)
    with pytest.raises(ValueError, match="cannot remove 4 of 3 entries"):
        select.lowest(torch.ones(3), 4)


@pytest.mark.parametrize("removed", [0, 1, 20, 21, 33, 70])
def test_rows_that_are_ranked_in_parts_lose_the_same(removed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(0, 4, (7, 10), generator=torch.Generator().manual_seed(removed)).float()  # full of ties
    whole = select.lowest_by_row(scores, removed)
    for at_once in (1, 20, 35):
        monkeypatch.setattr(select, "_AT_ONCE", at_once)
        assert torch.equal(select.lowest_by_row(scores, removed), whole)
    assert whole.numel() - int(whole.sum()) == removed
