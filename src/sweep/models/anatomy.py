"""Where the parts of a decoder are that need no record of a family: its blocks, and what can be pruned in them by weight.

A matrix is what multiplies activations as one, whatever holds it: a linear layer, a parameter of many experts, a bare
parameter. No name tells that: the model reads a few tokens once, and what it does is noted by its modules (`watching`).
Routers, convolutions, norms, positions and states are none.
"""

from __future__ import annotations

import bisect
import fnmatch
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.formats import stand_in
from sweep.formats.packing import packed
from sweep.models import adapted, decoders, transformers_private, watching
from sweep.models.decoders import DECODERS
from sweep.models.watching import Piece
from sweep.settings import RequestError

Linear: TypeAlias = nn.Linear | Conv1D  # GPT-2 writes its linear layers as Conv1D, whose weight is (in, out)
# What chooses or weighs experts without a ranking that would show it goes by the name of its module.
ROUTERS = {"router", "gate", "shared_expert_gate", "modality_router"}
# What decoders call the attention module of a block, families without a record among them.
ATTENTION = {known.attention for known in DECODERS.values()} | {"self_attention"}


def weight(linear: Linear) -> Tensor:
    """The matrix of a linear layer as (out, in); for GPT-2's Conv1D, which stores (in, out), a transposed view."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


# ---- what was seen of a model ----


@dataclass(frozen=True)
class Layout:
    """How a parameter that is of no linear layer holds matrices."""

    parts: int  # matrices: along the first of three dimensions, or rows one behind the other in two
    merged: Literal["", "first", "last"] = ""  # which two of three dimensions are one of the matrix
    flipped: bool = False  # stored (in, out)
    chosen: bool = True  # a token goes through some of the parts only: they are experts
    taken: int = 0  # parts that a token goes through, on average, rounded

    def view(self, parameter: Tensor) -> Tensor:
        """(parts, out, in), writing through."""
        match self.merged, parameter.ndim:
            case "first", _:
                found = parameter.flatten(0, 1)[None]
            case "last", _:
                found = parameter.flatten(1)[None]
            case _, 2:
                found = parameter.unflatten(0, (self.parts, -1))
            case _:
                found = parameter
        return found.transpose(1, 2) if self.flipped else found


@dataclass
class _Noted:
    """What was seen of one module's own parameters."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # of two dimensions and more: why they are no matrices to prune
    runs: int = 0  # how often the module runs when a text is read
    block: weakref.ref[nn.Module] | None = (
        None  # the first that the module is in: some models share modules among blocks
    )


_MERGED: tuple[Literal["", "first", "last"], ...] = ("", "first", "last")
_NOTED: weakref.WeakKeyDictionary[nn.Module, _Noted] = weakref.WeakKeyDictionary()
_STACKS: weakref.WeakKeyDictionary[PreTrainedModel, list[weakref.ref[nn.ModuleList]]] = weakref.WeakKeyDictionary()


def look(model: PreTrainedModel) -> None:
    """Have the model read a few tokens, unless it has, and note what its parameters are.

    One without its weights, on the meta device, reads nothing: what its parameters are is guessed then.
    Raises RequestError when it cannot.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    if model in _STACKS and all(module in _NOTED for module in model.modules() if _has_matrix(module)):
        return
    seen = watching.look(model)
    stacks = _find_stacks(model, list(seen.ran))
    _STACKS[model] = [weakref.ref(stack) for stack in stacks]
    _note(model, seen, stacks)


def _stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The lists of blocks that a text goes through, in the order in which it comes to them."""
    known = [stack for stack in (reference() for reference in _STACKS.get(model, [])) if stack is not None]
    if known:
        return known
    every = _find_stacks(model, [path for path, _ in model.named_modules()])
    if len(every) == 1 or any(parameter.is_meta for parameter in model.parameters()):
        return every  # clear without a look
    look(model)
    return _stacks(model)


def _find_stacks(model: PreTrainedModel, ran: list[str]) -> list[nn.ModuleList]:
    """The lists, none inside another, of modules that ran and hold matrices; what is itself a matrix is no block."""
    order = {path: place for place, path in enumerate(ran)}
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(f"{outer}." for outer in found)):
            first = min((order[f"{path}.{n}"] for n in range(len(module)) if f"{path}.{n}" in order), default=None)
            if first is not None and any(not isinstance(block, Linear) and _holds_matrix(block) for block in module):
                found[path] = first
    if not found:
        raise RequestError(
            f"{type(model).__name__} has no list of blocks that a text goes through, so it is no decoder that sweep knows"
        )
    return [model.get_submodule(path) for path in sorted(found, key=found.__getitem__)]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())


def _holds_matrix(module: nn.Module) -> bool:
    return (
        any(isinstance(inner, Linear) for inner in module.modules())
        or bool(packed(module))
        or any(parameter.ndim == 3 for parameter in module.parameters())
    )


def _note(model: PreTrainedModel, seen: watching.Seen, stacks: list[nn.ModuleList]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    met: dict[tuple[type, str], Layout] = {}  # experts of a block that no token came to are as those of another
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if layout := _layout(parameter, seen.pieces.get(f"{path}.{name}", [])):
                met.setdefault((type(module), name), layout)
    for path, module in model.named_modules():
        noted = _NOTED[module] = _Noted(runs=seen.ran.get(path, 0))
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2:
                continue
            full = f"{path}.{name}" if path else name
            layout = None if isinstance(module, Linear) else met.get((type(module), name))
            reason = _why_left(module, path, full, names[id(parameter)], seen, layout)
            if reason:
                noted.left[name] = reason
            elif layout is not None:
                noted.layouts[name] = layout
    for block in reversed([block for stack in stacks for block in stack]):
        for module in block.modules():
            _NOTED[module].block = weakref.ref(block)


def _guessed(module: nn.Module, path: str) -> _Noted:
    """What a module of a model that was not looked at seems to hold."""
    if path.rpartition(".")[2] in ROUTERS:
        return _Noted(left={"weight": "router"})
    return _Noted(
        {name: Layout(len(p), flipped=transformers_private.are_flipped(module)) for name, p in fused(module).items()}
    )


def _why_left(
    module: nn.Module, path: str, full: str, first: str, seen: watching.Seen, layout: Layout | None
) -> str | None:
    """Why a parameter of two dimensions and more is no matrix to prune; None where it is one."""
    linear = isinstance(module, Linear)
    if full != first:
        return f"the same tensor as {first}"
    if full in seen.routers or (path.rpartition(".")[2] in ROUTERS and (linear or layout is not None)):
        return "router"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    if isinstance(module, nn.Embedding):
        return "lookup"
    if linear and weight(module).shape[0] == 1:
        return "vector"
    return None if linear or layout is not None else "multiplies no activations as a matrix"


def _layout(parameter: Tensor, pieces: list[tuple[Piece, int]]) -> Layout | None:
    """How a parameter holds the matrices that were seen; None where none was, or none that a view of it can be."""
    if not pieces or not parameter.is_contiguous():
        return None
    chosen = len({tokens for _, tokens in pieces}) > 1 or pieces[0][1] < watching.TOKENS
    taken = round(sum(tokens for _, tokens in pieces) / watching.TOKENS)
    for merged in _MERGED if parameter.ndim == 3 else _MERGED[:1]:
        for flipped in (False, True):
            parts = len(parameter)
            if parameter.ndim == 2:  # of several matrices that lie one behind the other, each is multiplied by itself
                lengths = {piece.columns if flipped else piece.rows for piece, _ in pieces}
                parts = max(1, len(parameter) // min(lengths)) if len(lengths) == 1 else 1
            layout = Layout(1 if merged else parts, merged, flipped, chosen, taken)
            if len(parameter) % layout.parts == 0 and _fits(layout.view(parameter), [piece for piece, _ in pieces]):
                return layout
    return None


def _fits(view: Tensor, pieces: list[Piece]) -> bool:
    """Whether the pieces are rows, or all, of one of the matrices of a view (parts, out, in)."""
    _, rows, columns = view.shape
    return all(
        piece.columns == columns
        and piece.rows <= rows
        and (piece.rows == 1 or piece.row_step == view.stride(1))
        and (columns == 1 or piece.column_step == view.stride(2))
        for piece in pieces
    )


# ---- blocks ----


def forget(module: nn.Module) -> None:
    """Look anew at a module and what is inside it when next asked: its parameters hold other numbers of matrices."""
    for inner in module.modules():
        _NOTED.pop(inner, None)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks, in order: of several lists of them the longest."""
    return max(_stacks(model), key=len)


def block_names(model: PreTrainedModel) -> list[str]:
    """The name of every block of `blocks`, in order."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    return [names[id(block)] for block in blocks(model)]


def all_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The blocks of all lists that a text goes through, by name, list by list in the order in which it comes to them.

    The model is looked at, so that `matrices` knows what is in them.
    """
    look(model)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    return {names[id(block)]: block for stack in _stacks(model) for block in stack}


def most_runs(model: PreTrainedModel) -> int:
    """How often a text goes through one of the blocks: once in most models."""
    return max(_NOTED[block].runs for block in all_blocks(model).values())


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the blocks: what the text goes through between its ids and the head."""
    return model.get_submodule(block_names(model)[0].rpartition(".")[0].rpartition(".")[0])


def replace_forward(restore: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `forward` stand in for what the module does, until `restore` is closed."""
    own = module.__dict__.get("forward")
    restore.callback(lambda: module.__dict__.pop("forward") if own is None else setattr(module, "forward", own))
    module.forward = forward


# ---- matrices ----


def linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Every linear layer inside the blocks, by its full name, in order. Embeddings and head are outside the blocks."""
    inside = {id(module) for block in all_blocks(model).values() for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if id(module) in inside and isinstance(module, Linear)
    }


def matrices(block: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Every matrix inside a block that can be pruned, (out, in), as a view that writes through.

    prefix  the block's own name, without which names are those within the block
    The matrices of experts are named by expert: `mlp.experts.3.up_proj`. What several blocks share is in the first's.
    """
    found = {}
    for path, module in block.named_modules(prefix=prefix):
        noted = _NOTED.get(module) or _guessed(module, path)
        if noted.block is not None and noted.block() is not block:
            continue
        if isinstance(module, Linear) and "weight" not in noted.left and "weight" in module._parameters:
            found[path] = weight(module).detach()
        for name, layout in noted.layouts.items():
            if name not in module._parameters:  # packed
                continue
            found |= _named(module, path, name, layout)
    return found


def all_matrices(model: PreTrainedModel, *, embeddings: bool = False, head: bool = False) -> dict[str, Tensor]:
    """Every weight matrix of the blocks by its full name, and those of the embeddings and the head on request, as views.

    They stand in the order in which text meets them. One that embeddings and head share is named once, as the head's where
    both are asked for.
    """
    found: dict[str, Tensor] = {}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings and not (head and _tied(model)):
        found[_name(model, embedding)] = weight(embedding).detach()
    for name, block in all_blocks(model).items():
        found |= matrices(block, name)
    if head and output is not None:
        found[_name(model, output)] = weight(output).detach()
    return found


def owners(model: PreTrainedModel, views: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that matrices are views of, by the matrices' names."""
    held = sorted((p for p in model.parameters() if p.numel()), key=Tensor.data_ptr)
    places = [parameter.data_ptr() for parameter in held]
    return {name: held[bisect.bisect(places, view.data_ptr()) - 1] for name, view in views.items()}


def shared_names(model: PreTrainedModel) -> list[str]:
    """The names of the embeddings and of the head, where these are one matrix; else none."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [_name(model, module) for module in modules] if _tied(model) else []


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _name(model: PreTrainedModel, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def without(found: dict[str, Tensor], patterns: Iterable[str], key: str) -> dict[str, Tensor]:
    """The matrices whose names no pattern meets, in which * stands for any characters.

    Raises RequestError, which names the key that gave the patterns, for one that meets no name.
    """
    for pattern in patterns:
        hit = set(fnmatch.filter(found, pattern))
        if not hit:
            raise RequestError(
                f"{key}={pattern} matches none of the matrices, such as {', '.join(list(found)[:3])}; * stands for any "
                "characters"
            )
        found = {name: matrix for name, matrix in found.items() if name not in hit}
    return found


def left(model: PreTrainedModel) -> dict[str, str]:
    """The parameters of two dimensions and more in the blocks that are no matrices to prune, each with the reason."""
    return {
        f"{path}.{name}": reason
        for block_name, block in all_blocks(model).items()
        for path, module in block.named_modules(prefix=block_name)
        for name, reason in _NOTED.get(module, _Noted()).left.items()
        if name in module._parameters
    }


def products(model: PreTrainedModel) -> list[Tensor]:
    """Every parameter of one matrix that a token's hidden state is multiplied by: in the decoder, and the head.

    Some decoders have some beside their blocks, such as OPT's between embeddings and blocks of another width.
    """
    look(model)
    modules = {id(m): m for block in [decoder(model), *all_blocks(model).values()] for m in block.modules()}
    found = []
    for module in modules.values():
        noted = _NOTED.get(module, _Noted())
        if (
            isinstance(module, Linear)
            and noted.left.get("weight", "vector") == "vector"
            and "weight" in module._parameters
        ):
            found.append(module.weight)
        found += [
            getattr(module, name)
            for name, layout in noted.layouts.items()
            if layout.parts == 1 and name in module._parameters
        ]
        found += adapted.factors(module)
    head = model.get_output_embeddings()
    return found if head is None else [*found, head.weight]


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a model consists of: its parameters, a tied one once, and of those that hold several matrices each one.

    Names are the parameters' without `.weight`, so that a matrix is called as in `matrices`.
    """
    look(model)
    found: dict[str, Tensor] = {}
    for full, parameter in model.named_parameters():
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        layout = _NOTED[module].layouts.get(name) if module in _NOTED else None
        if layout is not None and layout.parts > 1:
            found |= _named(module, path, name, layout)
        else:
            found[full.removesuffix(".weight")] = parameter
    return found


def experts(model: PreTrainedModel) -> dict[str, float]:
    """The matrices of parameters that hold several, by the names of `tensors`, with the share that one token goes through.

    How many experts a token takes the configuration says, or else what was seen. Experts that went and left a constant in
    their place (`experts.Novices`) are among those that it chooses from.
    """
    look(model)
    routed = {
        inner: len(module.get_buffer("places"))
        for module in model.modules()
        if "places" in dict(module.named_buffers(recurse=False))
        for inner in module.modules()
    }
    taken = decoders.size(model.config.get_text_config().to_dict(), "experts_per_token")
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        noted = _NOTED.get(module, _Noted())
        for name, layout in noted.layouts.items():
            if layout.parts > 1 and name in module._parameters:
                number = routed.get(module, layout.parts)
                share = min(taken or layout.taken or number, number) / number if layout.chosen else 1.0
                found |= dict.fromkeys(_named(module, path, name, layout), share)
        for stack in stand_in.stacks(module).values():  # packed
            share = taken / routed.get(module, len(stack)) if taken else 1.0
            found |= {name: share for name in packed(module, f"{path}.") if name not in found}
    return found


def fused(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters in which a module, not what is inside it, keeps matrices of many experts, (experts, ., .), by name."""
    own = {} if isinstance(module, nn.Conv1d) else dict(module.named_parameters(recurse=False))
    noted = _NOTED.get(module)
    return {
        name: parameter
        for name, parameter in own.items()
        if parameter.ndim == 3 and (noted is None or (name in noted.layouts and not noted.layouts[name].merged))
    }


def held(module: nn.Module, path: str) -> dict[str, tuple[Layout, dict[str, Tensor]]]:
    """The parameters of a module whose matrices its own code multiplies: how they hold them, and which, (out, in), as views
    by full name. Linear layers that multiply as such layers do are none."""
    noted = _NOTED.get(module) or _guessed(module, path)
    layouts = dict(noted.layouts)
    if isinstance(module, Linear) and "weight" not in noted.left and not multiplies_plainly(module):
        layouts["weight"] = Layout(1, flipped=isinstance(module, Conv1D))
    return {
        name: (
            layout,
            {path: weight(module).detach()} if isinstance(module, Linear) else _named(module, path, name, layout),
        )
        for name, layout in layouts.items()
        if name in module._parameters
    }


def multiplies_plainly(module: nn.Module) -> bool:
    """Whether a linear layer multiplies by its matrix and adds its bias, and nothing else."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _named(module: nn.Module, path: str, name: str, layout: Layout) -> dict[str, Tensor]:
    """The matrices (out, in) of a parameter of a module, by name."""
    view = layout.view(getattr(module, name).detach())
    if layout.parts > 1:
        return _of_parts(module, f"{path}." if path else "", name, view)
    return {path if name == "weight" else f"{path}.{name}" if path else name: view[0]}


def _of_parts(module: nn.Module, path: str, name: str, view: Tensor) -> dict[str, Tensor]:
    return {
        f"{path}{part}.{matrix}": found
        for part, tensor in enumerate(view)
        for matrix, found in transformers_private.gate_and_up(module, name, tensor).items()
    }
