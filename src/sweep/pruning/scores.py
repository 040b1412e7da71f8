"""Importance scores: tensors in, scores out. Higher = keep. One plain function a criterion.

Legend: a weight is (out, in); `input_norm` is (in,), the L2 norm of each input feature over the calibration tokens.
Scores have the shape of what they score, are float32, and are never negative.
"""

import torch
from torch import Tensor

_TINY = 1e-30  # keeps a silent row or column from dividing by zero


def magnitude(weight: Tensor) -> Tensor:
    """|W_ij| (Han et al. 2015, arXiv:1506.02626).

    weight   (out, in)  any float dtype
    returns  (out, in)  float32
    """
    return weight.detach().abs().to(torch.float32)


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): what a criterion must beat to have found anything.

    weight   (out, in)  only its shape is read
    returns  (out, in)  float32
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2 (Sun et al. 2023, arXiv:2306.11695).

    weight      (out, in)  any float dtype
    input_norm  (in,)      float32
    returns     (out, in)  float32. The paper ranks within each row.

    A small weight on a loud feature can matter more than a large one on a silent feature.
    """
    return magnitude(weight) * input_norm


def ria(weight: Tensor, input_norm: Tensor) -> Tensor:
    """(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||x_j||_2^(1/2): relative importance and activations
    (Zhang et al. 2024, Plug-and-Play, ICLR 2024).

    weight      (out, in)  any float dtype
    input_norm  (in,)      float32
    returns     (out, in)  float32. The paper ranks within each matrix.

    Relative to its row and its column, no channel can lose all of its weights only because they are all small.
    """
    size = magnitude(weight)
    relative = size / size.sum(0, keepdim=True).clamp_min(_TINY) + size / size.sum(1, keepdim=True).clamp_min(_TINY)
    return relative * input_norm.sqrt()


def gradient(weight: Tensor, gradient_norm: Tensor) -> Tensor:
    """|W_ij| * ||g_ij||_2, the norm over calibration sequences (Das et al. 2023, GBLM-Pruner, arXiv:2311.04902).

    weight         (out, in)  any float dtype
    gradient_norm  (out, in)  root of the summed squares of each sequence's gradient of the loss, float32
    returns        (out, in)  float32. The paper ranks within each row.

    The first-order change of the loss if the weight went, without cancellation between texts.
    """
    return magnitude(weight) * gradient_norm
