"""Importance of whole units (FFN neurons, attention heads), of blocks and of tokens: tensors in, scores out. Higher = keep.

A unit is a set of columns of its block's output matrix W, (out, columns): one column for a neuron, head_dim columns
for a head. T tokens, x (T, columns) the input of W, g (T, columns) the gradient of the summed loss with respect to x (of
the text's own next tokens, or for `taylor_sampled` of ones drawn from the model),
(x g)_u the product summed over the columns of unit u: the first-order change of the loss if x_u were doubled.
Every function of units returns (units,) float32. What the parameters are: `READABLE` in criteria.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BALANCE = 0.3  # tuned on the development pages of pydoc (benchmarks/neuron_criteria.py)


@dataclass
class Activations:
    """What calibration text tells of the units of one block; sums over tokens, float64."""

    tokens: int | Tensor  # (columns,) where not all columns read every token, such as those of experts
    input_sum: Tensor  # (columns,)  sum of x
    input_scatter: Tensor  # (columns,)  sum of squared deviations of x from its mean

    @property
    def input_square(self) -> Tensor:
        """(columns,) sum of x squared. The difference of two sums like this would leave no digit of a small scatter."""
        return self.input_scatter + self.input_sum.square() / _at_least(self.tokens, 1)


@dataclass
class Gradients(Activations):
    """What a backward pass over it tells beside that; sums over tokens, float64."""

    product: Tensor  # (units,)  sum of (x g)_u
    product_abs: Tensor  # (units,)  sum of |(x g)_u|
    product_energy: Tensor  # (units,)  sum of (x g)_u squared
    product_square: Tensor  # (units,)  sum over sequences of the squared sum of (x g)_u over the sequence


def _at_least(count: int | Tensor, least: int) -> int | Tensor:
    return count.clamp_min(least) if isinstance(count, Tensor) else max(count, least)


def random(units: int, generator: torch.Generator) -> Tensor:
    """Uniform noise: the baseline that every criterion must beat, and plain L2 does not."""
    return torch.rand(units, generator=generator)


def l2(rows: list[Tensor], weight: Tensor, size: int) -> Tensor:
    """L2 norm of all weights of a unit: its rows of the input matrices and its columns of the output matrix.

    rows    each (rows, in), with the same number of rows for every unit; (0) of them for heads that share theirs
    weight  (out, columns)
    """
    total = weight.float().square().sum(0).view(-1, size).sum(1)
    for matrix in rows:
        total = total + matrix.float().square().sum(1).view(total.numel(), -1).sum(1)
    return total.sqrt()


def activation(activations: Activations, size: int) -> Tensor:
    """L2 norm of the unit's activation over the calibration tokens, whatever reads it."""
    return activations.input_square.view(-1, size).sum(1).sqrt().float()


def wanda_sp(weight: Tensor, activations: Activations, size: int) -> Tensor:
    """Sum over the unit's weights of |W_ij| * ||x_j||_2: Wanda's score of each weight, summed per unit.

    The structured variant of Wanda that An et al. 2023 (arXiv:2312.11983) compare with.
    """
    norm = activations.input_square.sqrt()
    return (weight.float().abs().sum(0).to(norm.device) * norm).view(-1, size).sum(1).float()


def flap(weight: Tensor, activations: Activations, size: int) -> Tensor:
    """Variance of x_j over tokens * ||W_j||_2^2, standardised within the block (An et al. 2023, arXiv:2312.11983).

    A channel that hardly fluctuates can be replaced by its mean, which goes into a bias. The standardisation makes
    blocks comparable: without it the blocks with the loudest residual stream would keep everything.
    """
    variance = activations.input_scatter / _at_least(activations.tokens - 1, 1)
    fluctuation = (variance * weight.float().square().sum(0).to(variance.device)).view(-1, size).sum(1)
    spread = fluctuation.std().clamp_min(torch.finfo(torch.float32).tiny)
    return ((fluctuation - fluctuation.mean()) / spread).float()


def taylor(gradients: Gradients) -> Tensor:
    """-sum over tokens of (x g)_u: the loss increase when the unit is removed, to first order.

    It predicts the measured drop of one unit almost perfectly. It is a poor guide for removing many: half of the
    values are negative, and those cancel in sums over tokens that other text would weigh otherwise.
    """
    return -gradients.product.float()


def taylor_abs(gradients: Gradients) -> Tensor:
    """Sum over tokens of |(x g)_u| (after Molchanov et al. 2019, arXiv:1906.10771).

    Without cancellation between tokens: a unit that helps some tokens and harms others is in use.
    """
    return gradients.product_abs.float()


def taylor_norms(gradients: Gradients) -> Tensor:
    """Product of the L1 and the L2 norm of (x g)_u over tokens; ranks as their geometric mean.

    The L1 norm (`taylor_abs`) asks how much a unit matters on the whole, the L2 norm how much where it matters most.
    """
    return (gradients.product_abs * gradients.product_energy.sqrt()).float()


def taylor_balanced(gradients: Gradients) -> Tensor:
    """The geometric mean m of the L1 and the L2 norm of (x g)_u over tokens, divided by mean(m)^BALANCE of the block.

    Where blocks compete, comparing m itself strips those whose values are small on the whole, and dividing by the mean
    gives every block the same share. In between is better than either, after the normalisation by block of Molchanov et
    al. 2017 (arXiv:1611.06440).
    """
    middle = (gradients.product_abs * gradients.product_energy.sqrt()).sqrt()
    return (middle / middle.mean().clamp_min(torch.finfo(torch.float32).tiny) ** BALANCE).float()


def taylor_sampled(sampled_gradients: Gradients) -> Tensor:
    """`taylor_balanced` of gradients for drawn next tokens.

    The text's own are one outcome each, and where the model does not expect it, its gradient is large and says little of
    other text. Drawn ones give the true Fisher information where the text's give the empirical (Kunstner et al. 2019,
    arXiv:1905.12558).
    """
    return taylor_balanced(sampled_gradients)


def fisher(gradients: Gradients) -> Tensor:
    """Sum over sequences of (sum over the sequence of (x g)_u)^2: the empirical Fisher information of a unit's gate.

    The second-order estimate of the loss increase (Theis et al. 2018, arXiv:1801.05787; Kwon et al. 2022,
    arXiv:2204.09656), with the Hessian's diagonal replaced by the Fisher information's.
    """
    return gradients.product_square.float()


def block_influence(cosine: Tensor) -> Tensor:
    """1 - mean cosine between a block's input and output (Men et al. 2024, ShortGPT, arXiv:2403.03853).

    cosine  (blocks,) mean over tokens

    A block that hardly turns the hidden state can be left out; one that only stretches it scores low as well.
    """
    return 1 - cosine


def frequency(counts: Tensor, zipf: Tensor) -> Tensor:
    """The rank of each token by how often it stands in the text; equal counts go by how frequent the word is that it spells.

    counts   (tokens,) int64
    zipf     (tokens,) float64, log10 of occurrences in 10^9 words of general text, 0 to 8; -1 for a row of no token
    returns  (tokens,) int64, all different: what is still equal goes by id, since later merges of a tokenizer are rarer.
             No sum of the three, in which a large count would round the others away
    """
    order = np.lexsort((-np.arange(len(counts)), zipf.numpy(), counts.numpy()))
    return torch.from_numpy(order).argsort()
