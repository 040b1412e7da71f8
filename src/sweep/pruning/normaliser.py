"""The head's log-normaliser near known states, at a hundredth of the head's cost: to second order, the rest bounded.

log Z(h) = log sum over v of exp(w_v h + b_v). With mu and S the mean and the covariance of the rows w_v under the
softmax at h, log Z(h + e) = log Z(h) + mu e + e'S e / 2 + rest. The rest is the integral over s in [0, 1] of
(1 - s)^2 / 2 times the third central moment of z_v = w_v e under the softmax at h + s e. With R >= |z_v - mu e| for all
v, the variance there is at most V = exp(R) e'S e, the mean moved by at most V, and so |rest| <= (R + V) V / 6.

Legend: P positions, C states at each, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sweep.calibrate import exact_device

_ROWS_AT_ONCE = 8192  # of the head


@dataclass(frozen=True)
class Expansion:
    """log Z around one state a position."""

    states: Tensor  # (P, d)
    values: Tensor  # (P,) log Z there
    means: Tensor  # (P, d) mu
    covariances: Tensor  # (P, d, d) S
    metric: Tensor  # (d, d) L, any: ||L'e|| measures the change e
    radii: Tensor  # (P,) max over v of ||L^-1 (w_v - mu)||, so that R = radius * ||L'e||

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(log Z to second order, bound on the rest) at (C, P, d) states: both (C, P), the bound possibly infinite."""
        change = states - self.states
        by_position = change.transpose(0, 1)  # (P, C, d)
        first = torch.bmm(by_position, self.means[:, :, None]).squeeze(2).t()
        second = (torch.bmm(by_position, self.covariances) * by_position).sum(2).clamp_min(0).t()
        reach = self.radii * torch.linalg.vector_norm(change @ self.metric, dim=2)
        variance = reach.exp() * second
        return self.values + first + second / 2, (reach + variance) * variance / 6


def expand(weight: Tensor, bias: Tensor | None, states: Tensor) -> Expansion:
    """The expansion around (P, d) states, for a head `weight` (V, d), of which some rows are worked on at a time.

    Costs V d^2 multiplications a position. The metric is the covariance of the head's rows, all alike: in it they lie in about a ball.
    """
    pieces = weight.split(_ROWS_AT_ONCE)

    def logits() -> Iterator[tuple[Tensor, Tensor]]:
        shifts = [None] * len(pieces) if bias is None else bias.split(_ROWS_AT_ONCE)
        return ((rows, nn.functional.linear(states, rows, shift)) for rows, shift in zip(pieces, shifts, strict=True))

    values = torch.logsumexp(torch.stack([torch.logsumexp(some, 1) for _, some in logits()]), 0)
    means = torch.zeros_like(states)
    for rows, some in logits():
        means.addmm_((some - values[:, None]).exp_(), rows)
    width, centre = weight.shape[1], weight.mean(0)
    spread = torch.zeros(width, width, dtype=weight.dtype, device=weight.device)
    for rows in pieces:
        spread.addmm_((rows - centre).t(), rows - centre)
    spread = (spread / len(weight)).to(exact_device(weight.device), torch.double)
    spread.diagonal().add_(1e-6 * spread.diagonal().mean())
    metric = torch.linalg.cholesky(spread)
    inverse = torch.linalg.inv(metric).to(weight)
    centres = (means - centre) @ inverse.t()
    covariances = torch.zeros(len(states), width, width, dtype=weight.dtype, device=weight.device)
    radii = torch.zeros_like(values)
    for rows, some in tqdm(logits(), "expanding the head", len(pieces), unit="piece", leave=False):
        shares = (some - values[:, None]).exp_().sqrt_()
        for share, mean, covariance in zip(shares, means, covariances, strict=True):
            scaled = (rows - mean) * share[:, None]
            covariance.addmm_(scaled.t(), scaled)
        radii = torch.maximum(radii, torch.cdist(centres, (rows - centre) @ inverse.t()).amax(1))
    return Expansion(states, values, means, covariances, metric.to(weight), radii)
