"""Criteria that also correct the weights that stay, so that the layer's output on calibration text changes least.

Legend: a weight is (out, in) float32; H = X^T X, (in, in) float32, sums over the calibration tokens what the layer reads.
Several matrices that read the same input are solved together, stacked as rows (R, in), as `solver` has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sweep import solver
from sweep.solver import Choose, Rounder

_ITERATIONS = 300  # of ADMM, at most
# rho rises by this factor after so many iterations: two thirds of the time of the paper's schedule, 1 % more error
_STEADY, _RISE = 2, 1.3
_SOLVE_STEPS = 12  # iterations of conjugate gradients


def sparsegpt(
    weights: Sequence[Tensor],
    hessian: Tensor,
    choose: Sequence[Choose],
    damping: float,
    *,
    m: int = 1,
    gone: Sequence[Tensor] | None = None,
    rounder: Rounder | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Each weight's (new values, keep-mask), and the damping used (Frantar & Alistarh 2023, arXiv:2301.00774).

    With a rounder the weights that stay are quantised in the same pass, so that each column makes good for both, as its
    paper has it. The arguments are those of `solver.by_column`.
    """
    return solver.by_column(weights, hessian, damping, choose=choose, m=m, gone=gone, rounder=rounder)


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
    scaled, _, damping = solver.damped(hessian, damping)
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
