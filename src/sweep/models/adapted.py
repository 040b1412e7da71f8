"""Low-rank adapters beside the matrix of a linear layer: what it gives is x (W + B A)^T, and W stays as it is.

The layer keeps its class, its name and its matrix, so that whatever asks for matrices meets W alone: it is counted,
quantised and packed as ever, and the factors A and B lie beside it in their own dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FACTORS = ("lora_A", "lora_B")


class Adapted:
    """Mixed into the class of a linear layer that has adapters.

    lora_A  (rank, in)
    lora_B  (out, rank), whatever the adapter is scaled by in it
    """

    lora_A: Tensor
    lora_B: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)  # type: ignore[misc]


def adapt(linear: nn.Linear | Conv1D, a: Tensor, b: Tensor) -> None:
    """Give a linear layer adapters, rounded to the dtype of its matrix. In place."""
    kind, dtype = type(linear), linear.weight.dtype
    linear.__class__ = type(kind.__name__, (Adapted, kind), {"__module__": kind.__module__})
    for name, factor in zip(FACTORS, (a, b), strict=True):
        linear.register_parameter(name, nn.Parameter(factor.detach().to(dtype), requires_grad=False))


def factors(module: nn.Module) -> list[nn.Parameter]:
    """The adapters of a module; none where it has none."""
    return [getattr(module, name) for name in FACTORS] if isinstance(module, Adapted) else []
