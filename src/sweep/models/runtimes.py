"""Which programs load a checkpoint of a model: rules, which are tried in the tests but for vLLM's.

sweep loads what sweep writes. transformers loads what its configuration can say. vLLM loads that too where the model's
class lets its attention be replaced (`is_backend_compatible` of transformers). llama.cpp is told a
model in `sweep.export`, in one of its architectures: it reads widths and heads block by block for few of them alone, `deci`,
which is Llama with blocks of any shape, and `openelm`, which also norms queries and keys (`hparams.n_head(il)` in its
src/models). A model whose blocks are alike goes into the architecture of its own type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sweep.formats.packing import packed
from sweep.models import anatomy, checkpoint, cut_tokenizer, layers
from sweep.settings import RequestError


@dataclass(frozen=True)
class Architecture:
    """Which architectures of GGUF hold a type of transformers."""

    even: str  # whose blocks are alike
    uneven: str | None = None  # whose blocks may differ; None where llama.cpp has none
    norm_offset: float = 0.0  # what the type adds to the weights of its norms when it runs


# By the `model_type` of transformers' configurations.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "deci"),
    "mistral": Architecture("llama", "deci"),
    "qwen2": Architecture("qwen2", "deci"),
    "qwen3": Architecture("qwen3", "openelm"),
    "gemma": Architecture("gemma", norm_offset=1.0),
}
_FACTORS = ("llama", "deci")  # read a factor for each frequency of the rotary embedding


def loads_in(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The programs that load the checkpoint of a model as it is now, the commonest first."""
    whole = tokenizer is None or cut_tokenizer.kept_ids(tokenizer) is None
    plain = whole and _in_transformers(model)
    served = plain and bool(getattr(type(model), "_supports_attention_backend", False))
    found = {"transformers": plain, "sweep": True, "llama.cpp": _in_llama_cpp(model, tokenizer), "vLLM": served}
    return [name for name, loads in found.items() if loads]


def _in_transformers(model: PreTrainedModel) -> bool:
    try:
        return checkpoint.is_plain(model)
    except Exception:  # whatever a library says of a class that it cannot build from a configuration
        return False


def _in_llama_cpp(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    if packed(model):
        return False
    try:
        rope(layers.configuration(model), chosen(model, shape(model)))
        if tokenizer is not None:
            merging(tokenizer)
    except RequestError:
        return False
    return True


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, of each block where they may differ; 0 = the block has no such sublayer."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]  # key-value heads
    neurons: tuple[int, ...]
    head_dim: int

    @property
    def is_even(self) -> bool:
        return all(len(set(sizes)) == 1 for sizes in (self.heads, self.groups, self.neurons))


def shape(model: PreTrainedModel) -> Shape:
    """Counted in the matrices. Raises RequestError for a type or a block that llama.cpp is not told of here."""
    config, state = layers.configuration(model), model.state_dict()
    find(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = [f"{name}." for name in anatomy.block_names(model)]
    heads = [_size(state, f"{block}self_attn.o_proj.weight", 1) // head_dim for block in blocks]
    groups = [_size(state, f"{block}self_attn.k_proj.weight", 0) // head_dim for block in blocks]
    neurons = [_size(state, f"{block}mlp.down_proj.weight", 1) for block in blocks]
    return Shape(tuple(heads), tuple(groups), tuple(neurons), head_dim)


def _size(state: dict[str, Tensor], name: str, dimension: int) -> int:
    return state[name].shape[dimension] if name in state else 0


def find(model: PreTrainedModel) -> Architecture:
    """Raises RequestError where none is declared for the model's type."""
    kind = layers.configuration(model).model_type
    if kind not in ARCHITECTURES:
        raise RequestError(
            f"models of type {kind} cannot be written as GGUF by sweep, which knows {', '.join(ARCHITECTURES)}: convert the "
            "checkpoint with llama.cpp's own convert_hf_to_gguf.py, which needs a folder that transformers loads"
        )
    return ARCHITECTURES[kind]


def chosen(model: PreTrainedModel, found: Shape) -> str:
    """The architecture that holds the model. Raises RequestError where its blocks differ and none holds that."""
    known, kind = find(model), layers.configuration(model).model_type
    if found.is_even and found.heads[0] and found.neurons[0]:
        return known.even
    alike = "prune it to blocks that are alike: method.scope=layer, or method=layer"
    if known.uneven is None:
        raise RequestError(
            f"the blocks of this model differ in their heads or neurons, and llama.cpp has no architecture for {kind} with "
            f"such blocks: {alike}"
        )
    if known.uneven == "openelm" and (not tied(model) or 0 in found.heads):
        what = "lack attention" if 0 in found.heads else "differ, and its head is not its embedding"
        raise RequestError(f"blocks of this model {what}, which llama.cpp cannot hold for {kind}: {alike}")
    return known.uneven


def tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def rope(config: PreTrainedConfig, arch: str) -> dict[str, Any]:
    """What the rotary embedding is. Raises RequestError for one that the architecture cannot hold."""
    said = dict(getattr(config, "rope_parameters", None) or {})
    found = {"rope_type": "default", "rope_theta": getattr(config, "rope_theta", 1e4), **said}
    kinds = ("default", "linear", "llama3") if arch in _FACTORS else ("default", "linear")
    if found["rope_type"] not in kinds or found.get("partial_rotary_factor", 1.0) != 1.0:
        raise RequestError(
            f"rotary embeddings of the kind {found} cannot be written as GGUF by sweep for llama.cpp's {arch}: convert the "
            "checkpoint with llama.cpp's own convert_hf_to_gguf.py"
        )
    return found


def merging(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """What a tokenizer says of its merges. Raises RequestError for one that does not merge pairs."""
    backend = getattr(cut_tokenizer.original(tokenizer), "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        raise RequestError(
            f"the tokenizer ({type(tokenizer).__name__}) is of the kind {model.get('type', 'that is written in Python')}, "
            "and sweep writes those that merge pairs (BPE) as GGUF: convert the checkpoint with llama.cpp's own script"
        )
    return model
