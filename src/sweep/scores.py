"""Importance scores: tensors in, scores out. Higher = keep. One plain function a criterion.

Legend: a weight is (out, in); scores have the shape of what they score and are float32.
"""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W_ij| (Han et al. 2015, arXiv:1506.02626).

    weight   (out, in)  any float dtype
    returns  (out, in)  float32
    """
    return weight.detach().abs().to(torch.float32)
