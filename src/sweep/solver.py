"""A matrix column by column, each at the price of those that follow: what SparseGPT and GPTQ have in common.

Legend: weights are (out, in) float32; H = X^T X, (in, in) float32, sums over the calibration tokens what the layer reads.
Several matrices that read the same input are solved together, stacked as rows (R, in): rows are independent problems, and
what is costly depends on H alone. `keep` masks are chosen per matrix by a function of its scores: True = keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sweep.formats.grid import Grid

Choose = Callable[[Tensor, float, float], Tensor]  # (scores, share of columns before these, with these) -> keep
_COLUMNS = 128  # whose masks are chosen at a time, as in SparseGPT's paper
_COLUMNS_INNER = 16
_SOLVED = 256  # a triangular matrix of this size is inverted at once
_MOST_DAMPING = 1e3  # of the mean of the diagonal; with more, H says nothing


class Rounder(Protocol):
    """What rounds the columns of stacked matrices as they are settled, from left to right, each once."""

    def __call__(self, column: int, left: Tensor, goes: Tensor) -> Tensor:
        """(R,) the values of a column, rounded.

        left  (columns from this one on, R) what they are now
        goes  of the same shape, True where a weight goes, as far as that is known
        """

    def grids(self, sizes: Sequence[int]) -> list[Grid]:
        """Of each matrix, after the last column; so many rows each."""


Rounding = Callable[[str], Rounder | None]  # of a matrix by its name; None for one that is not quantised


def no_rounding(name: str) -> None:
    """For those who quantise nothing."""


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """(H with its diagonal raised, the lower Cholesky factor of H reversed in both dimensions, the damping it took).

    damping  share of the mean of the diagonal that is added to it; ten times more each time H is still not positive
             definite in float32
    Features that were never active have a diagonal of zero; they get a one, which leaves them apart from all others.
    Raises ValueError when H is not finite or no damping helps.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise ValueError("the calibration activations are not finite")
    mean = float(diagonal.mean()) or 1.0
    while damping <= _MOST_DAMPING:
        raised = hessian.clone()
        raised.diagonal().add_(damping * mean)
        raised.diagonal()[diagonal == 0] = 1.0
        factor, problem = torch.linalg.cholesky_ex(raised.flip(0, 1))
        if not problem and torch.isfinite(factor.diagonal()).all():  # to which what is not finite in a row spreads
            return raised, factor, damping
        damping = max(10 * damping, 1e-6)
    raise ValueError(f"the Hessian is not positive definite even with {_MOST_DAMPING:g} times its mean on the diagonal")


def by_column(
    weights: Sequence[Tensor],
    hessian: Tensor,
    damping: float,
    *,
    choose: Sequence[Choose] | None = None,
    m: int = 1,
    gone: Sequence[Tensor] | None = None,
    rounder: Rounder | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Each weight's (new values, keep-mask), and the damping used.

    choose   of each weight: its mask for some of its columns, from their scores; None: what is zero goes, and no other
    m        columns are chosen in groups of m when the pattern is n:m
    gone     of each weight, True where it was removed before: removed again before any other
    rounder  rounds what stays to the values that it may take; None: any

    Column by column, what is lost of a weight, w_j - w'_j, is taken over by the columns to the right: column i gains
    -(w_j - w'_j) U_ji / U_jj, where H^-1 = U^T U, and w'_j is 0 of a weight that goes and its rounded value of one that
    stays. The score by which weights are chosen is w_j^2 / U_jj^2, the rise in squared error. U is the inverse of the
    reversed Cholesky factor of H: H is factored once and its inverse never formed.
    """
    _, factor, damping = damped(hessian, damping)
    before = None if gone is None else torch.cat(list(gone)).t()
    share = inverse_of_lower(factor).flip(0, 1)
    diagonal = share.diagonal().clone()
    share.div_(-diagonal[:, None])
    sizes = [len(weight) for weight in weights]
    left = torch.cat(list(weights)).t().contiguous()  # (in, R): a column of W is contiguous
    goes = left == 0 if choose is None else torch.zeros_like(left, dtype=torch.bool)
    inner = m * max(1, _COLUMNS_INNER // m)
    outer = inner * max(1, _COLUMNS // inner)
    columns = len(left)

    def choose_from(start: int, end: int) -> None:
        if choose is not None:
            scores = (left[start:end] / diagonal[start:end, None]).square_()
            scores = (scores if before is None else scores.masked_fill_(before[start:end], -1.0)).t().contiguous()
            masks = [c(s, start / columns, end / columns) for c, s in zip(choose, scores.split(sizes), strict=True)]
            goes[start:end] = ~torch.cat(masks).t()

    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        lost = torch.empty_like(left[start:end])
        if m == 1:
            choose_from(start, end)
        for a in range(start, end, inner):
            b = min(a + inner, end)
            for j in range(a, b):
                if m > 1 and j % m == 0:
                    choose_from(j, j + m)
                row = _settle(j, left, goes, rounder, lost[j - start])
                left[j + 1 : b].addr_(share[j, j + 1 : b], row)
            left[b:end].addmm_(share[a:b, b:end].t(), lost[a - start : b - start])
        left[end:].addmm_(share[start:end, end:].t(), lost)
    left.masked_fill_(goes, 0)
    return list(zip(left.t().split(sizes), (~goes).t().split(sizes), strict=True)), damping


def _settle(column: int, left: Tensor, goes: Tensor, rounder: Rounder | None, lost: Tensor) -> Tensor:
    """Give a column the values that it keeps, but for zeros; what is lost of it is written to `lost`, (R,), and returned."""
    if rounder is None:
        return lost.copy_(goes[column]).mul_(left[column])
    settled = rounder(column, left[column:], goes[column:]).masked_fill_(goes[column], 0)
    lost.copy_(left[column]).sub_(settled)
    left[column] = settled
    return lost


def inverse_of_lower(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: twice as fast as to solve for the columns of an identity.

    [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]
    """
    size, half = len(factor), len(factor) // 2
    if size <= _SOLVED:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False)
    inverse = torch.zeros_like(factor)
    first = inverse[:half, :half] = inverse_of_lower(factor[:half, :half])
    second = inverse[half:, half:] = inverse_of_lower(factor[half:, half:])
    inverse[half:, :half] = second @ (factor[half:, :half] @ first).neg_()
    return inverse
