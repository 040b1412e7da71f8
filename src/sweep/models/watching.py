"""What a model does with its parameters while it reads a text: seen, not told by names.

Every product of a matrix passes here as torch computes it, whoever asks for it: a linear layer that is called, code that
reads a layer's weight itself, a loop over experts, or one product of all experts at once. So what is seen of a matrix does
not depend on how its model is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sweep.settings import RequestError

TOKENS = 11  # of the text that is read to look: no size of a model
_aten = torch.ops.aten
_ASIDE = ContextVar("aside", default=False)
_COPIES = {_aten._to_copy, _aten.clone}
_RANKINGS = {_aten.topk, _aten.sort, _aten.argsort, _aten.argmax, _aten.max}


@contextmanager
def aside() -> Iterator[None]:
    """While open, what models read is a few tokens to find or to try something, and no text of a method: it is not counted
    among what that costs."""
    before = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(before)


def is_aside() -> bool:
    return _ASIDE.get()


@dataclass(frozen=True)
class Piece:
    """A matrix (out, in), or some rows of one, as it is multiplied: where its numbers lie in the parameter that holds them.

    Element (i, j) is the parameter's number start + i * row_step + j * column_step.
    """

    start: int
    rows: int
    columns: int
    row_step: int
    column_step: int

    @classmethod
    def of(cls, matrix: Tensor) -> Piece:
        """A matrix (out, in), a view of the parameter, or of a copy in the parameter's order."""
        rows, columns = matrix.shape
        row_step, column_step = matrix.stride()
        return cls(int(matrix.storage_offset()), rows, columns, row_step, column_step)

    def meets(self, other: Piece) -> bool:
        """Whether rows of one are rows of the other."""
        apart, within = (
            divmod(other.start - self.start, self.row_step) if self.rows > 1 else (0, other.start - self.start)
        )
        return self.columns == other.columns and not within and -other.rows < apart < self.rows


OnProduct = Callable[[Tensor, Piece, Tensor], None]  # the parameter, the piece, what it reads (tokens, in)


class Products(TorchDispatchMode):
    """While open, `on_product` is called before each product of one of some parameters with what is none of them."""

    def __init__(self, parameters: Iterable[Tensor], on_product: OnProduct) -> None:
        super().__init__()
        self.on_product = on_product
        self._parameters = {place(parameter): parameter for parameter in parameters}
        # copies in another type or order, held so that nothing else comes to lie there, and where their numbers come from
        self._copies: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if kind in (_aten.mm, _aten.bmm):
            self._product(args[0], args[1])
        elif kind in (_aten.addmm, _aten.baddbmm):
            self._product(args[1], args[2])
        elif kind is _aten.mv:
            self._product(args[0], args[1][:, None])
        elif kind is _aten._grouped_mm:
            self._grouped(args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"])
        out = func(*args, **kwargs)
        if kind in _COPIES and self.owner(args[0]) is not None:
            self._note_copy(args[0], out)
        return out

    def owner(self, tensor: Tensor) -> Tensor | None:
        """The parameter that a tensor is a view of, or a copy of a part of."""
        where = place(tensor)
        return self._copies[where][1] if where in self._copies else self._parameters.get(where)

    def _note_copy(self, source: Tensor, copy: Tensor) -> None:
        parameter = self.owner(source)
        assert parameter is not None
        numbers = None  # the copy has the parameter's numbers in the parameter's order
        if copy.stride() != source.stride() or source.numel() != parameter.numel() or place(source) in self._copies:
            numbers = torch.empty_like(copy, dtype=torch.int64, device="cpu")
            numbers.copy_(self._numbers(source))
        self._copies[place(copy)] = copy, parameter, numbers

    def _numbers(self, view: Tensor) -> Tensor:
        """Of each element of a view, which number of its parameter it is."""
        entry = self._copies.get(place(view))
        if entry is None or entry[2] is None:
            whole = torch.arange(view.untyped_storage().nbytes() // view.element_size())
        else:
            whole = entry[2]
        return whole.as_strided(view.shape, view.stride(), view.storage_offset())

    def _product(self, left: Tensor, right: Tensor) -> None:
        """left (…, n, k) times right (…, k, m), with a parameter on one side."""
        mine, other = self.owner(left) is not None, self.owner(right) is not None
        if mine == other:
            return
        weight, x = (left, right.transpose(-2, -1)) if mine else (right.transpose(-2, -1), left)
        if weight.ndim == 3 and (weight.stride(0) == 0 or len(weight) == 1):  # one matrix for a batch of texts
            weight, x = weight[0], x.reshape(-1, x.shape[-1])
        for matrix, its in zip(weight, x, strict=True) if weight.ndim == 3 else [(weight, x)]:
            self._tell(matrix, its)

    def _grouped(self, x: Tensor, weight: Tensor, ends: Tensor) -> None:
        """x (tokens, in), sorted by the matrices (matrices, in, out) that read them; `ends` of each one's tokens."""
        if self.owner(weight) is None:
            return
        start = 0
        for matrix, end in zip(weight.transpose(-2, -1), ends.tolist(), strict=True):
            self._tell(matrix, x[start:end])
            start = end

    def _tell(self, matrix: Tensor, x: Tensor) -> None:
        parameter, entry = self.owner(matrix), self._copies.get(place(matrix))
        assert parameter is not None
        if entry is None or entry[2] is None:
            piece = Piece.of(matrix)
        else:
            numbers = self._numbers(matrix)
            order = numbers[0].argsort()  # the copy may hold them in another order than the parameter
            numbers, x = numbers[numbers[:, 0].argsort()][:, order], x[:, order.to(x.device)]
            first, (rows, columns) = int(numbers[0, 0]), numbers.shape
            row_step, column_step = (
                int(n) - first for n in (numbers[min(1, rows - 1), 0], numbers[0, min(1, columns - 1)])
            )
            if not torch.equal(
                numbers, first + torch.arange(rows)[:, None] * row_step + torch.arange(columns) * column_step
            ):
                return  # no matrix in the parameter, however one looks at it
            piece = Piece(first, rows, columns, row_step, column_step)
        self.on_product(parameter, piece, x)


@dataclass
class Seen:
    """What a model did with its parameters when it read a short text."""

    pieces: dict[
        str, list[tuple[Piece, int]]
    ]  # of each parameter that multiplied: the pieces, and tokens that each read
    routers: set[str]  # parameters whose products are ranked, one score for each of their rows
    ran: dict[str, int]  # the modules that ran, in the order of their first call, and how often


class _Choices(Products):
    """`Products` that also follows what comes of a product until it is ranked, such as to choose experts."""

    def __init__(self, parameters: Iterable[Tensor], on_product: OnProduct, on_ranking: Callable[[int], None]) -> None:
        super().__init__(parameters, self._follow)
        self._further, self._on_ranking = on_product, on_ranking
        self._from: dict[int, set[tuple[int, int]]] = {}  # of a result: the parameter it is a product of, and its rows
        self._held: list[Tensor] = []
        self._product_of: set[tuple[int, int]] | None = None

    def _follow(self, parameter: Tensor, piece: Piece, x: Tensor) -> None:
        self._product_of = (self._product_of or set()) | {(id(parameter), piece.rows)}
        self._further(parameter, piece, x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._product_of = None
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        sources = self._product_of
        if sources is None:
            sources = set().union(*(self._from.get(place(t), set()) for t in given if t.is_floating_point()))
        if func.overloadpacket in _RANKINGS and sources:
            dim = next((arg for arg in args[1:] if func.overloadpacket is not _aten.topk and type(arg) is int), -1)
            for parameter, rows in sources:
                if rows == given[0].shape[dim]:
                    self._on_ranking(parameter)
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and result.is_floating_point() and sources:
                self._from[place(result)] = sources
                self._held.append(result)
        return out


@aside()
@torch.no_grad()
def look(model: PreTrainedModel) -> Seen:
    """What the model does with its parameters. Raises RequestError when it cannot read a text of a few tokens."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    paths = {id(module): path for path, module in model.named_modules()}
    seen = Seen(defaultdict(list), set(), {})
    running: list[str] = []

    def note(parameter: Tensor, piece: Piece, x: Tensor) -> None:
        seen.pieces[names[id(parameter)]].append((piece, len(x)))

    def note_router(parameter: int) -> None:
        seen.routers.add(names[parameter])
        inside = f"{running[-1]}." if running else ""
        if inside and names[parameter].startswith(inside) and _only_chooses(model.get_submodule(running[-1])):
            seen.routers.update(name for name in seen.pieces if name.startswith(inside))  # a router of several layers

    def enter(module: nn.Module, *_: Any) -> None:
        path = paths[id(module)]
        running.append(path)
        seen.ran[path] = seen.ran.get(path, 0) + 1

    size = model.get_input_embeddings().weight.shape[0]
    text = (torch.arange(TOKENS, device=model.get_input_embeddings().weight.device) + 3)[None] % size
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True).remove)
        with _Choices(model.parameters(), note, note_router):
            try:
                model(input_ids=text, use_cache=False)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise RequestError(
                    f"{type(model).__name__} cannot read a text of {TOKENS} tokens alone, so that sweep cannot see what "
                    f"its matrices are: {error}"
                ) from error
    return seen


def _only_chooses(module: nn.Module) -> bool:
    """Whether a module that ranks scores does nothing else: it holds no experts and no lists of modules."""
    return not any(isinstance(m, nn.ModuleList) for m in module.modules()) and all(
        parameter.ndim < 3 for parameter in module.parameters()
    )


def place(tensor: Tensor) -> int:
    """Of where the numbers of a tensor lie, which views of it share."""
    return tensor.untyped_storage()._cdata
