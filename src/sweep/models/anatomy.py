"""Where the parts of a decoder are.

What differs between architectures is data: `ARCHITECTURES` says where the parts of a block are. Linear layers are found
by type, so that magnitude pruning works on a decoder that is not listed.

Of attention, H query heads share G key-value groups (H = G without grouped-query attention), D dimensions a head. Query head h
belongs to group h // (H / G), and owns columns h*D .. (h+1)*D of the output matrix. Modules compute H and G from the
shapes of their matrices; the few attributes that they keep beside are set by surgery.remove_heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from sweep.settings import RequestError

Linear: TypeAlias = nn.Linear | Conv1D  # GPT-2 writes its linear layers as Conv1D, whose weight is (in, out)


@dataclass(frozen=True)
class Architecture:
    """Attribute paths inside one block."""

    attention: str  # the attention module
    ffn_in: tuple[str, ...]  # matrices whose outputs are the FFN's neurons: one, or gate and up
    ffn_out: str  # the matrix that reads the neurons


_LLAMA = Architecture("self_attn", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")


ROUTERS = {"router", "gate", "shared_expert_gate"}  # linear layers that choose experts


ATTENTION = {"self_attn", "attn", "attention", "self_attention"}  # what decoders call the attention module of a block


ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], _LLAMA),
    "phi": Architecture("self_attn", ("mlp.fc1",), "mlp.fc2"),
    "opt": Architecture("self_attn", ("fc1",), "fc2"),
    "gpt2": Architecture("attn", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": Architecture("attention", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
}


@dataclass(frozen=True)
class Ffn:
    """The feed-forward network of one block: neuron i is row i of each `inputs` and column i of `output`."""

    block: int
    inputs: tuple[Linear, ...]
    output: Linear

    @property
    def width(self) -> int:
        return weight(self.output).shape[1]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks, in order: the longest list of modules of one class that is not inside another."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    nested = {id(inner) for outer in lists for inner in outer.modules() if inner is not outer}  # such as experts
    lists = [m for m in lists if id(m) not in nested]
    if not lists:
        raise RequestError(f"{type(model).__name__} has no list of equal blocks, so it is no decoder that sweep knows")
    return max(lists, key=len)


def architecture(model: PreTrainedModel) -> Architecture:
    """Where the parts of a block are. Raises RequestError for a model type that is not listed."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise RequestError(
            f"the parts of a '{kind}' block are not known: use +method=weight, which needs none, or add a "
            f"line to ARCHITECTURES in sweep/models/anatomy.py. Known: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


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
            found |= _expert_matrices(module, f"{path}.", name, parameter)
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
            found |= _expert_matrices(module, f"{path}.", name, parameter)
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
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return {
        matrix: taken / len(parameter) if taken else 1.0
        for path, module in model.named_modules()
        for name, parameter in fused(module).items()
        for matrix in _expert_matrices(module, f"{path}.", name, parameter)
    }


def _expert_matrices(module: nn.Module, path: str, name: str, fused: Tensor) -> dict[str, Tensor]:
    found = {}
    for expert, matrix in enumerate(fused.detach()):
        matrix = matrix.t() if getattr(module, "is_transposed", False) else matrix
        if name == "gate_up_proj" and getattr(module, "is_concatenated", True):
            found[f"{path}{expert}.gate_proj"], found[f"{path}{expert}.up_proj"] = matrix.chunk(2)
        else:
            found[f"{path}{expert}.{name}"] = matrix
    return found


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


def linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Every linear layer inside the blocks, by its full name, in order. Embeddings and head are outside the blocks."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if id(module) in inside and isinstance(module, Linear)
    }


def ffns(model: PreTrainedModel) -> list[Ffn]:
    """The feed-forward network of every block, in order."""
    parts = architecture(model)
    return [
        Ffn(index, tuple(block.get_submodule(path) for path in parts.ffn_in), block.get_submodule(parts.ffn_out))
        for index, block in enumerate(blocks(model))
    ]


def weight(linear: Linear) -> Tensor:
    """The matrix of a linear layer as (out, in); for GPT-2's Conv1D, which stores (in, out), a transposed view."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


_SEPARATE = ("q_proj", "k_proj", "v_proj")


_FUSED = ("c_attn", "query_key_value")  # GPT-2: all queries, all keys, all values; GPT-NeoX: the three of each head


_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")


_HEAD_DIM = ("head_dim", "head_size")


@dataclass(frozen=True)
class Attention:
    """The attention of one block."""

    block: int
    name: str  # of the module, in the whole model
    module: nn.Module
    inputs: tuple[Linear, ...]  # query, key, value; or the one fused matrix
    output: Linear
    head_dim: int
    interleaved: bool  # the fused matrix holds the three of each head together

    @property
    def heads(self) -> int:
        return weight(self.output).shape[1] // self.head_dim

    @property
    def groups(self) -> int:
        if len(self.inputs) == 1:
            return self.heads
        return weight(self.inputs[1]).shape[0] // self.head_dim


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention of every block, in order. Raises RequestError for a module whose parts are not recognised."""
    path = architecture(model).attention
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for index, block in enumerate(blocks(model)):
        module = block.get_submodule(path)
        inputs = [getattr(module, name) for name in _SEPARATE if hasattr(module, name)]
        fused = [name for name in _FUSED if hasattr(module, name)]
        outputs = [getattr(module, name) for name in _OUTPUT if hasattr(module, name)]
        head_dim = next((getattr(module, name) for name in _HEAD_DIM if hasattr(module, name)), None)
        if len(outputs) != 1 or head_dim is None or (len(inputs), len(fused)) not in ((3, 0), (0, 1)):
            raise RequestError(
                f"method=head: the heads of {type(module).__name__} are not known: use +method=weight "
                "method.targets=attention, or add the names of its matrices to sweep/models/py"
            )
        matrices = tuple(inputs) or (getattr(module, fused[0]),)
        found.append(
            Attention(index, names[id(module)], module, matrices, outputs[0], head_dim, fused == ["query_key_value"])
        )
    return found
