"""Criteria that also correct the weights that stay, so that the layer's output on calibration text changes least.

Legend: a weight is (out, in) float32; H = X^T X, (in, in) float32, sums over the calibration tokens what the layer reads.
Several matrices that read the same input are solved together, stacked as rows (R, in): rows are independent problems, and
what is costly depends on H alone. `keep` masks are chosen per matrix by a function of its scores: True = keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Choose = Callable[[Tensor, float, float], Tensor]  # (scores, share of columns before these, with these) -> keep
_COLUMNS = 128  # of SparseGPT, whose masks are chosen so many columns at a time, as in its paper
_COLUMNS_INNER = 16
_SOLVED = 256  # a triangular matrix of this size is inverted at once
_MOST_DAMPING = 1e3  # of the mean of the diagonal; with more, H says nothing
_ITERATIONS = 300  # of ADMM, at most
# rho rises by this factor after so many iterations: two thirds of the time of the paper's schedule, 1 % more error
_STEADY, _RISE = 2, 1.3
_SOLVE_STEPS = 12  # iterations of conjugate gradients


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


def sparsegpt(
    weights: Sequence[Tensor],
    hessian: Tensor,
    choose: Sequence[Choose],
    damping: float,
    *,
    m: int = 1,
    gone: Sequence[Tensor] | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Each weight's (new values, keep-mask), and the damping used (Frantar & Alistarh 2023, arXiv:2301.00774).

    choose  of each weight: its mask for some of its columns, from their scores
    m       columns are chosen in groups of m when the pattern is n:m
    gone    of each weight, True where it was removed before: removed again before any other

    Column by column, what a weight w_j that goes would have given is taken over by the columns to the right: column i
    gains -w_j U_ji / U_jj, where H^-1 = U^T U. Its score is w_j^2 / U_jj^2, the rise in squared error. U is the inverse of
    the reversed Cholesky factor of H: H is factored once and its inverse never formed.
    """
    _, factor, damping = damped(hessian, damping)
    before = None if gone is None else torch.cat(list(gone)).t()
    upper = _inverse_of_lower(factor).flip(0, 1)
    diagonal = upper.diagonal().clone()
    share = upper.div_(-diagonal[:, None])
    sizes = [len(weight) for weight in weights]
    left = torch.cat(list(weights)).t().contiguous()  # (in, R): a column of W is contiguous
    goes = torch.empty_like(left, dtype=torch.bool)
    inner = m * max(1, _COLUMNS_INNER // m)
    outer = inner * max(1, _COLUMNS // inner)
    columns = len(left)

    def choose_from(start: int, end: int) -> Tensor:
        scores = (left[start:end] / diagonal[start:end, None]).square_()
        scores = (scores if before is None else scores.masked_fill_(before[start:end], -1.0)).t().contiguous()
        masks = [c(s, start / columns, end / columns) for c, s in zip(choose, scores.split(sizes), strict=True)]
        goes[start:end] = ~torch.cat(masks).t()
        return goes[start:end]

    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        lost = torch.empty_like(left[start:end])  # first which weights go, as ones, then what they were
        if m == 1:
            lost.copy_(choose_from(start, end))
        for a in range(start, end, inner):
            b = min(a + inner, end)
            for j in range(a, b):
                if m > 1 and j % m == 0:
                    lost[j - start : j - start + m] = choose_from(j, j + m)
                row = lost[j - start].mul_(left[j])
                left[j + 1 : b].addr_(share[j, j + 1 : b], row)
            left[b:end].addmm_(share[a:b, b:end].t(), lost[a - start : b - start])
        left[end:].addmm_(share[start:end, end:].t(), lost)
    left.masked_fill_(goes, 0)
    return list(zip(left.t().split(sizes), (~goes).t().split(sizes), strict=True)), damping


def alps(
    weights: Sequence[Tensor],
    hessian: Tensor,
    choose: Sequence[Choose],
    damping: float,
    *,
    gone: Sequence[Tensor] | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Each weight's (new values, keep-mask), and the damping used (Meng et al. 2024, ALPS, arXiv:2406.07831).

    The arguments are those of `sparsegpt`, without `m`, since all columns are chosen at once.

    Minimises tr (W - W0) H (W - W0)^T under the sparsity pattern. ADMM splits W, which minimises, from D, which has the
    pattern, with multipliers V and a penalty rho that rises while the support of D still changes:
        W = (W0 H - V + rho D) (H + rho I)^-1      D = project(W + V / rho)      V = V + rho (W - D)
    Features are first scaled so that H has a diagonal of one. On the support that is found, conjugate gradients, each
    row with its own step, solve for the values that stay; with that diagonal the Jacobi preconditioner is the identity.
    """
    scaled, _, damping = damped(hessian, damping)
    scale = scaled.diagonal().sqrt()
    scaled /= torch.outer(scale, scale)
    sizes = [len(weight) for weight in weights]
    split = torch.cat(list(weights)).mul_(
        scale
    )  # D; it and the others change in place, being the memory that this takes
    target = split @ scaled
    multiplier, values = torch.zeros_like(split), torch.empty_like(split)
    before = None if gone is None else torch.cat(list(gone))

    def project(candidate: Tensor) -> Tensor:
        scores = candidate.square() if before is None else candidate.square().masked_fill_(before, -1.0)
        return torch.cat([c(s, 0.0, 1.0) for c, s in zip(choose, scores.split(sizes), strict=True)])

    rho = 0.1
    keep = earlier = torch.ones_like(split, dtype=torch.bool)
    for iteration in range(_ITERATIONS):
        if iteration % _STEADY == 0:
            inverse = _inverse(scaled, rho)
        torch.mm(split.mul_(rho).add_(target).sub_(multiplier), inverse, out=values)
        torch.add(values, multiplier, alpha=1 / rho, out=split)
        keep = project(split)
        split.masked_fill_(~keep, 0)
        multiplier.add_(values.sub_(split), alpha=rho)
        if iteration % _STEADY == _STEADY - 1:
            if torch.equal(keep, earlier):
                break
            earlier = keep
            rho *= _RISE
    del multiplier, values, inverse
    solved = solve_on_support(split, keep, target, scaled) / scale
    return list(zip(solved.split(sizes), keep.split(sizes), strict=True)), damping


def _inverse(hessian: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1."""
    raised = hessian.clone()
    raised.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(raised))


def _inverse_of_lower(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: twice as fast as to solve for the columns of an identity.

    [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]
    """
    size, half = len(factor), len(factor) // 2
    if size <= _SOLVED:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False)
    inverse = torch.zeros_like(factor)
    first = inverse[:half, :half] = _inverse_of_lower(factor[:half, :half])
    second = inverse[half:, half:] = _inverse_of_lower(factor[half:, half:])
    inverse[half:, :half] = second @ (factor[half:, :half] @ first).neg_()
    return inverse


def solve_on_support(values: Tensor, keep: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """The values on the support `keep` that minimise tr W H W^T / 2 - tr W target^T, by conjugate gradients from `values`.

    values, keep, target  (R, in)
    """
    gone = ~keep
    values = values.masked_fill(gone, 0)
    residual = (target - values @ hessian).masked_fill_(gone, 0)
    direction, size = residual.clone(), (residual**2).sum(1, keepdim=True)
    solved = 1e-10 * size  # a row this near is left alone: what remains is rounding error
    for _ in range(_SOLVE_STEPS):
        moved = (direction @ hessian).masked_fill_(gone, 0)
        curvature = (direction * moved).sum(1, keepdim=True)
        going = (size > solved) & (curvature > 0)
        step = torch.where(going, size / curvature, 0.0)
        values.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
        size, before = (residual**2).sum(1, keepdim=True), size
        direction.mul_(torch.where(going, size / before, 0.0)).add_(residual)
    return values
