"""Selection: scores to boolean keep-masks. True = keep. Counts are exact.

exactly the asked number of entries is removed, those of the lowest scores. Of equal scores the one with the lower
index is removed first: a threshold alone would remove every tie, and bfloat16 weights are full of ties.

Matrices are (out, in). n:m is as in the literature: of each m neighbours along the input, the n highest are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # entries of whole rows that are ranked together: what counts their ties takes 16 bytes each
_HALF = 1 << 16  # a float32 is placed by its upper 16 bits, then by its lower 16


def count(n: int, sparsity: float) -> int:
    """How many of n entries a sparsity removes: the nearest whole number."""
    return round(sparsity * n)


def lowest(scores: Tensor, removed: int) -> Tensor:
    """Keep-mask of the shape of `scores` that removes exactly the `removed` lowest.

    Raises ValueError when a score is NaN, or `removed` is not in 0..n.
    """
    flat = scores.flatten()
    if flat.dtype != torch.float64:
        flat = flat.to(torch.float32 if flat.is_floating_point() else torch.float64)
    if not 0 <= removed <= flat.numel():
        raise ValueError(f"cannot remove {removed} of {flat.numel()} entries")
    _refuse_nan(flat)
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_lowest(flat[None], removed)[0]
    keep = flat > threshold
    surplus = flat.numel() - removed - int(keep.sum())  # ties at the threshold that stay, the last of them
    if surplus:
        ties = (flat == threshold).nonzero().squeeze(1)
        keep[ties[len(ties) - surplus :]] = True
    return keep.view_as(scores)


def lowest_by_row(scores: Tensor, removed: int) -> Tensor:
    """Keep-mask that removes the lowest of each row: `removed` in all, as many in each row, the first rows one more.

    Raises ValueError as `lowest` does.
    """
    rows, columns = scores.shape
    if not 0 <= removed <= scores.numel():
        raise ValueError(f"cannot remove {removed} of {scores.numel()} entries")
    _refuse_nan(scores)
    each, more = divmod(removed, rows)
    keep = torch.ones_like(scores, dtype=torch.bool)
    at_once = max(1, _AT_ONCE // max(columns, 1))
    for begin, end in pairwise(sorted({*range(0, rows, at_once), more, rows})):
        number = each + (begin < more)
        if number:
            keep[begin:end] = _lowest_of_each(scores[begin:end], number)
    return keep


def _lowest_of_each(scores: Tensor, number: int) -> Tensor:
    """Keep-mask that removes the `number` lowest of each row."""
    threshold = _kth_lowest(scores, number)
    keep = scores > threshold
    surplus = scores.shape[1] - number - keep.sum(1, keepdim=True)  # ties at the threshold that stay
    if surplus.any():
        ties = scores == threshold
        keep |= ties & (ties.flip(1).cumsum(1).flip(1) <= surplus)  # counted from the end
    return keep


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep-mask with the n highest of each m neighbours along the last dimension.

    Raises ValueError when a score is NaN or the last dimension is not divisible by m.
    """
    if scores.shape[-1] % m:
        raise ValueError(f"{n}:{m} needs an input dimension divisible by {m}, not {scores.shape[-1]}")
    _refuse_nan(scores)
    groups = scores.reshape(-1, m).t().contiguous()  # (m, groups)
    keep = torch.empty_like(groups, dtype=torch.bool)
    for j in range(m):  # the rank of an entry is how many are removed before it: m is small, and sorting slower
        rank = (groups[:j] <= groups[j]).sum(0) + (groups[j + 1 :] < groups[j]).sum(0)
        keep[j] = rank >= m - n
    return keep.t().reshape(scores.shape)


def nearest(scores: Sequence[Tensor], costs: Sequence[Tensor], budget: float, at_least: int = 0) -> list[Tensor]:
    """Keep-masks that remove the lowest entries of all tensors together, as many as cost nearest to `budget`.

    costs     what each entry costs, in the shape of its score; with equal costs the count is the nearest possible
    at_least  entries that every tensor keeps, its highest ones, whatever the others score
    Raises ValueError when a score is NaN, or the budget exceeds what may be removed by more than one entry's cost.
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
        raise ValueError(
            f"a budget of {budget:g} is more than can be removed ({spent[-1]:g}) when each of "
            f"{len(scores)} keeps {at_least}"
        )
    removed = int((spent - budget).abs().argmin())
    keep = torch.ones(joined.numel(), dtype=torch.bool)
    keep[order[:removed]] = False
    return list(keep.split([s.numel() for s in scores]))


def counts_across(scores: Callable[[], Iterable[Tensor]], removed: int) -> list[int]:
    """How many each tensor loses when the `removed` lowest of all together go: with `lowest`, the same as a global rank.

    scores  yields the tensors anew at each call; they are read one at a time and never held together
    """
    if removed == 0:
        return [0 for _ in scores()]
    threshold, below = _threshold(scores, removed)
    losses, ties_left = [], removed - below
    for s in scores():
        ties = min(ties_left, int((s == threshold).sum()))
        ties_left -= ties
        losses.append(int((s < threshold).sum()) + ties)
    return losses


def apportion(quotas: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers next to the quotas that sum to exactly `total`, by largest remainder, none above its size.

    The first of equal remainders is rounded up. Raises ValueError when the quotas are not near enough to the total.
    """
    floors = [min(int(quota + 1e-9), size) for quota, size in zip(quotas, sizes, strict=True)]
    missing = total - sum(floors)
    order = sorted(range(len(quotas)), key=lambda i: floors[i] - quotas[i])
    order = [i for i in order if floors[i] < sizes[i]]
    if not 0 <= missing <= len(order):
        raise ValueError(f"quotas that sum to {sum(quotas):g} cannot be rounded to a total of {total}")
    for i in order[:missing]:
        floors[i] += 1
    return floors


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The k-th lowest of each row, (rows, 1). On a CPU by numpy, whose vectorised partition is ten times as fast."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(scores.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _refuse_nan(scores: Tensor) -> None:
    nan = torch.isnan(scores)
    if nan.any():
        raise ValueError(f"{int(nan.sum())} of {scores.numel()} scores are NaN")


def _threshold(scores: Callable[[], Iterable[Tensor]], removed: int) -> tuple[Tensor, int]:
    """(the removed-th lowest score, how many are lower than it), by counting and without sorting.

    Two histograms of 65,536 places find it in time proportional to n: the first over the upper 16 bits of each score,
    the second over the lower 16 of those that share the place. Read as integers, floats are ordered as their values
    are, once the negative ones are turned round.
    """
    high, before = _place((_ordered(s) >> 16 for s in scores()), removed, offset=_HALF // 2)
    low, before_low = _place(
        (key[(key >> 16) == high] & (_HALF - 1) for key in map(_ordered, scores())), removed - before, offset=0
    )
    key = torch.tensor((high << 16) | low, dtype=torch.int64)
    bits = torch.where(key < 0, key ^ 0x7FFFFFFF, key).to(torch.int32)
    return bits.view(torch.float32).to(next(iter(scores())).device), before + before_low


def _ordered(scores: Tensor) -> Tensor:
    """Scores as integers in the same order, int32."""
    bits = (scores.flatten().to(torch.float32) + 0.0).view(torch.int32)  # the sum makes -0.0 the 0.0 that it equals
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _place(values: Iterable[Tensor], removed: int, offset: int) -> tuple[int, int]:
    """(the place of the removed-th lowest value, how many are in lower places)."""
    histogram: Tensor | int = 0
    for value in values:
        histogram = histogram + torch.bincount(value + offset, minlength=_HALF)
    assert isinstance(histogram, Tensor)
    upto = histogram.cumsum(0)
    place = int(torch.searchsorted(upto, removed))
    return place - offset, int(upto[place] - histogram[place])
