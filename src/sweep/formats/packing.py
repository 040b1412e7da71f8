"""What every format gives: layers that hold a matrix in its form alone, and how they are made.

The module of a format has a layer, and a function `packing(kernel, dtype)` that decides what can run on this machine. A
layer gives back the very matrix that it was made from: what rounds weights is a stage before it, which leaves the grid that it
rounded to. A format that holds codes takes them from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sweep.formats.declared import DENSE, Format
from sweep.formats.grid import Grid
from sweep.formats.stand_in import Matrix


class PackedLinear(nn.Module):
    """A linear layer whose matrix lies in buffers, in a form of its own. For inference: no gradient flows through it.

    bias   (out,) or None, apart from the matrix and from its bytes
    dtype  of the inputs that it multiplies, and of the matrix when it is dense
    """

    format: ClassVar[Format]

    def __init__(self, shape: Iterable[int], bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.dtype = dtype

    def dense(self) -> Tensor:
        """The matrix, (out, in)."""
        raise NotImplementedError

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(…, out) products of the inputs (…, in), and the bias added."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    @property
    def weight(self) -> Matrix:
        """For code that reads a layer's matrix instead of calling the layer."""
        return Matrix((self,))

    def held(self) -> Iterable[Tensor]:
        """The tensors in which the matrix lies."""
        return self.buffers()

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held())

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.dense()))

    def facts(self) -> Any:
        """What sweep.json must say of the layer beside its tensors, for formats that are stored."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={self.nonzeros}, "
            f"bias={self.bias is not None}"
        )


class DenseMatrix(PackedLinear):
    """A matrix as it is, of experts some of whose other matrices are packed."""

    format = DENSE
    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape, None, matrix.dtype)
        self.register_buffer("matrix", matrix)

    def dense(self) -> Tensor:
        return self.matrix

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.matrix, bias)


def has_zeros(weight: Tensor, grid: Grid | None = None) -> bool:
    return bool(torch.count_nonzero(weight) < weight.numel())


@dataclass(frozen=True)
class Packing:
    """How matrices are packed on this machine, in one format and for one kernel.

    Both functions are given a matrix (out, in) and the grid that it was quantised to, None where it was not.
    """

    kernel: str  # that multiplies, as rows call it
    # a layer from a matrix, a bias and a grid; raises ValueError or RuntimeError for what the format cannot hold
    make: Callable[[Tensor, Tensor | None, Grid | None], PackedLinear]
    suits: Callable[[Tensor, Grid | None], bool] = has_zeros  # whether a matrix is to be packed
    lacks: str | None = None  # why a slow substitute runs in place of the kernel that was asked for
    # a layer from its tensors in a checkpoint, by their names in it, and its `facts`, for formats that are stored;
    # raises ValueError or KeyError for tensors that do not belong together
    read: Callable[[Mapping[str, Tensor], Any], PackedLinear] | None = None


_BESIDE = "_packed"  # ends the name of a layer beside which the code still reads the parameter by its own name


def beside(parameter: str) -> str:
    """The name of the layer that holds a parameter's matrix, where a stand-in has the parameter's own."""
    return f"{parameter}{_BESIDE}"


def matrix_name(layer: str) -> str:
    """What the matrix of a packed layer is called, by the layer's name in the model."""
    return layer.removesuffix(_BESIDE).removesuffix(".weight") if layer.endswith(_BESIDE) else layer


def packed(model: nn.Module, prefix: str = "") -> dict[str, PackedLinear]:
    """The packed layers of a model, or of a module, by name after the prefix."""
    return {f"{prefix}{name}": module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
