"""Selection: scores to boolean keep-masks. True = keep. Counts are exact.

Exactly round(sparsity * n) entries are dropped, those of the lowest scores. Of equal scores the one with the lower
index is dropped first: a threshold alone would drop every tie, and bfloat16 weights are full of ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def count(n: int, sparsity: float) -> int:
    """How many of n entries a sparsity removes: the nearest whole number."""
    return round(sparsity * n)


def lowest(scores: Tensor, drop: int) -> Tensor:
    """Keep-mask of the shape of `scores` that drops exactly the `drop` lowest.

    Raises ValueError when a score is NaN, or `drop` is not in 0..n.
    """
    flat = scores.flatten()
    if not 0 <= drop <= flat.numel():
        raise ValueError(f"cannot drop {drop} of {flat.numel()} entries")
    if torch.isnan(flat).any():
        raise ValueError(f"{int(torch.isnan(flat).sum())} of {flat.numel()} scores are NaN")
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(drop).values
    keep = flat > threshold
    surplus = flat.numel() - drop - int(keep.sum())  # ties at the threshold that stay
    ties = (flat == threshold).nonzero().squeeze(1)
    keep[ties[ties.numel() - surplus :]] = True
    return keep.view_as(scores)


def lowest_across(scores: Sequence[Tensor], drop: int, at_least: int = 0) -> list[Tensor]:
    """Keep-masks that drop exactly the `drop` lowest of all tensors together.

    at_least  entries that every tensor keeps, its highest ones, whatever the others score
    Raises ValueError when `drop` leaves less than `at_least` in each.
    """
    protected = [s.clone() for s in scores]
    for s in protected:
        if at_least:
            s[s.topk(min(at_least, s.numel())).indices] = torch.inf
    joined = torch.cat(protected)
    if drop > joined.numel() - at_least * len(scores):
        raise ValueError(f"dropping {drop} of {joined.numel()} leaves less than {at_least} in each of {len(scores)}")
    return list(lowest(joined, drop).split([s.numel() for s in scores]))


def nearest(scores: Sequence[Tensor], costs: Sequence[Tensor], budget: float, at_least: int = 0) -> list[Tensor]:
    """Keep-masks that drop the lowest entries of all tensors together, as many as cost nearest to `budget`.

    costs     what each entry costs, in the shape of its score; with equal costs the count is the nearest possible
    at_least  entries that every tensor keeps, its highest ones, whatever the others score
    Raises ValueError when a score is NaN, or the budget exceeds what may be dropped by more than one entry's cost.
    """
    protected = [s.double().clone() for s in scores]
    for s in protected:
        if at_least:
            s[s.topk(min(at_least, s.numel())).indices] = torch.inf
    joined = torch.cat(protected)
    if torch.isnan(joined).any():
        raise ValueError(f"{int(torch.isnan(joined).sum())} of {joined.numel()} scores are NaN")
    order = joined.argsort(stable=True)
    order = order[: int((joined != torch.inf).sum())]
    price = torch.cat(list(costs))[order].double()
    spent = torch.cat([torch.zeros(1, dtype=torch.double), price.cumsum(0)])
    if budget > spent[-1] + (price[-1] if len(price) else 0):
        raise ValueError(f"a budget of {budget:g} is more than can be dropped ({spent[-1]:g}) when each of "
                         f"{len(scores)} keeps {at_least}")  # fmt: skip
    drop = int((spent - budget).abs().argmin())
    keep = torch.ones(joined.numel(), dtype=torch.bool)
    keep[order[:drop]] = False
    return list(keep.split([s.numel() for s in scores]))
