"""What stands where a model's code reads a matrix itself, `layer.weight` or one of many experts, instead of calling a layer.

Products by it are the packed layers' own. Whatever else is asked of it, the dense matrix answers, made for that one
answer: right, and slow. It is no tensor: torch asks it by the protocol `__torch_function__` what to do instead.

A matrix is (out, in), as PyTorch multiplies it, or flipped, (in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sweep.formats.packing import PackedLinear


class StandIn:
    """What is read of a tensor of weights. Cannot be written to."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def dense(self) -> Tensor:
        """The tensor that it stands for."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        multiply = _PRODUCTS.get(getattr(func, "__name__", ""))
        if multiply is not None and (product := multiply(*args, **kwargs)) is not None:
            return product
        return func(*_dense(args), **_dense(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy and pickle of what is not made yet
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __mul__(self, other: Any) -> Tensor:
        return self.dense() * other

    def __add__(self, other: Any) -> Tensor:
        return self.dense() + other

    def detach(self) -> StandIn:
        return self

    def dim(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = [*args, *kwargs.values()]
        return self if all(each in (self.dtype, self.device) for each in wanted) else self.dense().to(*args, **kwargs)


def _dense(value: Any) -> Any:
    """The value with the dense matrix in every stand-in's place, those in lists and the like too."""
    if isinstance(value, list | tuple):
        return type(value)(map(_dense, value))
    if isinstance(value, dict):
        return {name: _dense(each) for name, each in value.items()}
    return value.dense() if isinstance(value, StandIn) else value


@dataclass(frozen=True, eq=False)
class Matrix(StandIn):
    """A matrix whose rows are those of several packed ones, one below the other.

    whole  the shape in which it is read, where that has more dimensions than a matrix
    """

    parts: tuple[PackedLinear, ...]
    flipped: bool = False
    whole: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        if self.whole is not None:
            return self.whole
        out = sum(part.out_features for part in self.parts)
        return _shape((out, self.parts[0].in_features), self.flipped)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return next(iter(self.parts[0].held())).device

    def dense(self) -> Tensor:
        matrix = torch.cat([part.dense() for part in self.parts])
        return (matrix.t() if self.flipped else matrix).reshape(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, out) products of the inputs (…, in)."""
        if len(self.parts) == 1:
            return self.parts[0].multiply(x, bias)
        products = torch.cat([part.multiply(x, None) for part in self.parts], -1)
        return products if bias is None else products + bias

    def t(self) -> Any:
        return self.dense().t() if self.whole is not None else replace(self, flipped=not self.flipped)

    def transpose(self, first: int, second: int) -> Any:
        return self.dense().transpose(first, second) if self.whole is not None or first == second else self.t()

    T = mT = property(t)


@dataclass(frozen=True, eq=False)
class Stack(StandIn):
    """The matrices of many experts, (experts, out, in), or each of them flipped.

    flat  experts lie below each other in two dimensions, until they are viewed in three
    """

    matrices: tuple[Matrix, ...]
    flat: bool = False

    @property
    def _whole(self) -> torch.Size:
        return torch.Size((len(self.matrices), *self.matrices[0].shape))

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        experts, rows, columns = self._whole
        return torch.Size((experts * rows, columns)) if self.flat else self._whole

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.matrices[0].dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.matrices[0].device

    def dense(self) -> Tensor:
        return torch.stack([matrix.dense() for matrix in self.matrices]).reshape(self.shape)

    def __getitem__(self, index: Any) -> Any:
        ids = index.tolist() if isinstance(index, Tensor) and not index.is_floating_point() else index
        if self.flat or isinstance(ids, bool | tuple | slice) or ids is None or ids is Ellipsis:
            return self.dense()[index]
        if isinstance(ids, list):
            if len(index.shape) != 1 or index.dtype == torch.bool:
                return self.dense()[index]
            return Stack(tuple(self.matrices[i] for i in ids))
        return self.matrices[ids]

    def view(self, *shape: Any) -> Any:
        wanted = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if [a for a, b in zip(wanted, self._whole, strict=False) if a not in (-1, b)] or len(wanted) != 3:
            return self.dense().view(*shape)
        return replace(self, flat=False)

    def transpose(self, first: int, second: int) -> Any:
        if self.flat or {first % 3, second % 3} != {1, 2}:
            return self.dense().transpose(first, second)
        return Stack(tuple(matrix.t() for matrix in self.matrices))

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)


def _shape(sizes: tuple[int, int], flipped: bool) -> torch.Size:
    return torch.Size(reversed(sizes) if flipped else sizes)


# ---- products, each None where it is not one of a packed layer: the dense matrix then answers ----


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if isinstance(input, Tensor) and isinstance(weight, Matrix) and not weight.flipped and weight.whole is None:
        return weight.linear(input, bias)
    return None


def _matmul(input: Any, other: Any) -> Tensor | None:
    if isinstance(input, Tensor) and isinstance(other, Matrix) and other.flipped and other.whole is None:
        return other.linear(input)
    return _bmm(input, other)


def _bmm(input: Any, mat2: Any) -> Tensor | None:
    """(experts, n, out) of tensors (experts, n, in) by a flipped stack, or (experts, out, n) of a stack by tensors."""
    if isinstance(input, Tensor) and isinstance(mat2, Stack) and _of(mat2, flipped=True) and input.dim() == 3:
        return torch.stack([m.linear(x) for m, x in zip(mat2.matrices, input, strict=True)])
    if isinstance(input, Stack) and isinstance(mat2, Tensor) and _of(input, flipped=False) and mat2.dim() == 3:
        return torch.stack([m.linear(x.t()).t() for m, x in zip(input.matrices, mat2, strict=True)])
    return None


def _grouped(
    input: Any, mat2: Any, offs: Tensor | None = None, bias: None = None, out_dtype: torch.dtype | None = None
) -> Tensor | None:
    """(n, out) of the inputs (n, in), which lie expert by expert and end at `offs`, by a flipped stack."""
    if not (isinstance(input, Tensor) and isinstance(mat2, Stack) and _of(mat2, flipped=True) and offs is not None):
        return None
    if bias is not None or out_dtype not in (None, input.dtype):
        return None
    found, start = [], 0
    for matrix, end in zip(mat2.matrices, offs.tolist(), strict=True):
        if end > start:
            found.append(matrix.linear(input[start:end]))
            start = end
    return torch.cat([*found, input.new_zeros(len(input) - start, mat2.shape[2])])


def _of(stack: Stack, *, flipped: bool) -> bool:
    return not stack.flat and stack.matrices[0].flipped is flipped


_PRODUCTS: dict[str, Callable[..., Tensor | None]] = {  # by torch's name of the function, or of the tensor's method
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _bmm,
    "_grouped_mm": _grouped,  # what torch.nn.functional.grouped_mm calls
}


def stacked(experts: Iterable[Iterable[PackedLinear]], *, flipped: bool, flat: bool = False) -> Stack:
    """The stand-in for experts' matrices, of each the packed layers whose rows lie below each other."""
    return Stack(tuple(Matrix(tuple(parts), flipped) for parts in experts), flat)


def stand_ins(module: nn.Module) -> dict[str, StandIn]:
    """What a module has in the place of parameters of its own, by their names."""
    return {name: value for name, value in vars(module).items() if isinstance(value, StandIn)}


def stacks(module: nn.Module) -> dict[str, Stack]:
    """Of these, those of many experts."""
    return {name: value for name, value in stand_ins(module).items() if isinstance(value, Stack)}
