"""Where the parts of a decoder are that need no record of a family: its blocks and matrices."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.formats import stand_in
from sweep.formats.packing import packed
from sweep.models import decoders, transformers_private
from sweep.models.decoders import DECODERS
from sweep.settings import RequestError

Linear: TypeAlias = nn.Linear | Conv1D  # GPT-2 writes its linear layers as Conv1D, whose weight is (in, out)
ROUTERS = {"router", "gate", "shared_expert_gate"}  # linear layers that choose experts
# What decoders call the attention module of a block, families without a record among them.
ATTENTION = {known.attention for known in DECODERS.values()} | {"self_attention"}


def weight(linear: Linear) -> Tensor:
    """The matrix of a linear layer as (out, in); for GPT-2's Conv1D, which stores (in, out), a transposed view."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks, in order: the longest list of modules of one class that is not inside another."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    nested = {id(inner) for outer in lists for inner in outer.modules() if inner is not outer}  # such as experts
    lists = [m for m in lists if id(m) not in nested]
    if not lists:
        raise RequestError(f"{type(model).__name__} has no list of equal blocks, so it is no decoder that sweep knows")
    return max(lists, key=len)


def block_names(model: PreTrainedModel) -> list[str]:
    """The name of every block, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks(model)]


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the blocks: what the text goes through between its ids and the head."""
    return model.get_submodule(block_names(model)[0].rpartition(".")[0].rpartition(".")[0])


def replace_forward(restore: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `forward` stand in for what the module does, until `restore` is closed."""
    own = module.__dict__.get("forward")
    restore.callback(lambda: module.__dict__.pop("forward") if own is None else setattr(module, "forward", own))
    module.forward = forward


def linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Every linear layer inside the blocks, by its full name, in order. Embeddings and head are outside the blocks."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if id(module) in inside and isinstance(module, Linear)
    }


def products(model: PreTrainedModel) -> list[Linear]:
    """Every linear layer that a token's hidden state goes through: in the decoder, routers left out, and the head.

    Some decoders have some beside their blocks, such as OPT's between embeddings and blocks of another width.
    """
    found = [
        module
        for path, module in decoder(model).named_modules()
        if isinstance(module, Linear) and path.rpartition(".")[2] not in ROUTERS
    ]
    head = model.get_output_embeddings()
    return found if head is None else [*found, head]


def matrices(block: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Every weight matrix of the linear layers and experts inside a block, (out, in), as a view that writes through.

    prefix  the block's own name, without which names are those within the block
    The matrices of experts, which transformers keep fused in three dimensions, are named by expert: `mlp.experts.3.up_proj`.
    Routers decide which expert reads a token; they are tiny, and no linear layers to prune.
    """
    found = {}
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, Linear) and path.rpartition(".")[2] not in ROUTERS:
            found[path] = weight(module).detach()
        for name, parameter in fused(module).items():
            found |= expert_matrices(module, f"{path}.", name, parameter)
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
    for name, block in zip(block_names(model), blocks(model), strict=True):
        found |= matrices(block, name)
    if head and output is not None:
        found[_name(model, output)] = weight(output).detach()
    return found


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


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a model consists of: its parameters, a tied one once, and of fused experts each one's matrices.

    Names are the parameters' without `.weight`, so that a matrix is called as in `matrices`.
    """
    found: dict[str, Tensor] = {}
    for full, parameter in model.named_parameters():
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        if name in fused(module):
            found |= expert_matrices(module, f"{path}.", name, parameter)
        else:
            found[full.removesuffix(".weight")] = parameter
    return found


def fused(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters in which a module, not what is inside it, keeps matrices of many experts, (experts, ., .), by name."""
    own = {} if isinstance(module, nn.Conv1d) else dict(module.named_parameters(recurse=False))
    return {name: parameter for name, parameter in own.items() if parameter.ndim == 3}


def experts(model: PreTrainedModel) -> dict[str, float]:
    """The matrices of experts, by the names of `tensors`, with the share of the experts that one token goes through.

    All of them where the configuration does not say how many a token takes.
    """
    taken = decoders.size(model.config.get_text_config().to_dict(), "experts_per_token")
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        for name, parameter in fused(module).items():
            share = taken / len(parameter) if taken else 1.0
            found |= dict.fromkeys(expert_matrices(module, f"{path}.", name, parameter), share)
        for stack in stand_in.stacks(module).values():  # packed
            share = taken / len(stack) if taken else 1.0
            found |= {name: share for name in packed(module, f"{path}.") if name not in found}
    return found


def expert_matrices(module: nn.Module, path: str, name: str, fused: Tensor) -> dict[str, Tensor]:
    """The matrices of all experts in the fused parameter `name` of a module, (out, in), as views; `path` ends in a dot."""
    return {
        f"{path}{expert}.{matrix}": found
        for expert, tensor in enumerate(fused.detach())
        for matrix, found in transformers_private.expert_matrices(module, name, tensor).items()
    }
