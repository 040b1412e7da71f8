"""Importance of experts: tensors in, scores out. Higher = keep.

E experts of one block; of each, sums over the calibration tokens that took it: n how many, g their gates as the model
weighs with them, f (D,) what the expert gives of the token before the gate. Every function returns (experts,) float64. What
the parameters are: `READABLE` in criteria.py.
"""

from __future__ import annotations

from torch import Tensor


def frequency(counts: Tensor) -> Tensor:
    """n: how many tokens took the expert."""
    return counts.double()


def mean_norm(counts: Tensor, norm_sum: Tensor) -> Tensor:
    """Mean of ||f||_2 over the tokens that took the expert; 0 where none did."""
    return norm_sum / counts.clamp_min(1)


def reap(counts: Tensor, gated_norm_sum: Tensor) -> Tensor:
    """Mean of g * ||f||_2 over the tokens that took the expert; 0 where none did (arXiv:2510.13999).

    What the expert adds to those that it is asked for, however many these are: a rare expert can be worth more than one
    that is asked often.
    """
    return gated_norm_sum / counts.clamp_min(1)


def mone(counts: Tensor, output_sum: Tensor, output_square: Tensor) -> Tensor:
    """Share of the tokens that took the expert * variance of f over them, E ||f - mean f||^2 (arXiv:2507.00390).

    output_sum     (experts, D) sum of f
    output_square  (experts,) sum of ||f||^2

    An expert that is seldom asked, or always answers the same, is replaced by its mean at little cost.
    """
    number = counts.clamp_min(1).double()
    variance = output_square / number - (output_sum / number[:, None]).square().sum(1)
    return counts / counts.sum().clamp_min(1) * variance.clamp_min(0)
