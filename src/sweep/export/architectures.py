"""A decoder as llama.cpp has it: the model's sizes and tensors in the architecture that holds it (`models.runtimes`).

What an architecture is not told, such as another activation, is not looked for here alone: the file is tried.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sweep.models import anatomy, layers, runtimes
from sweep.models.runtimes import ARCHITECTURES, Shape
from sweep.settings import RequestError

_NEIGHBOURS = ("llama", "deci")  # rotate neighbouring entries of a head, where transformers rotates its halves
_PADDED = 32  # neurons of an FFN that does nothing, one block of the quantised forms


def describe(writer: gguf.GGUFWriter, model: PreTrainedModel, found: Shape) -> None:
    """Write the sizes and constants of the model. Raises RequestError for rotary embeddings that llama.cpp has not."""
    config = layers.configuration(model)
    writer.add_block_count(len(found.heads))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(model.get_input_embeddings().weight.shape[1])
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    heads, groups, neurons = _written(found, writer.arch)
    per_block = writer.arch in {known.uneven for known in ARCHITECTURES.values()}
    writer.add_head_count(heads if per_block else heads[0])
    writer.add_head_count_kv(groups if per_block else groups[0])
    writer.add_feed_forward_length(neurons if per_block else neurons[0])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(found.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = runtimes.rope(config, writer.arch)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _written(found: Shape, arch: str) -> tuple[list[int], list[int], list[int]]:
    """The sizes as the file has them: what llama.cpp cannot lack stands there with zeros (`_zeros`)."""
    heads, groups = list(found.heads), list(found.groups)
    if heads[0] == 0:  # the first block's count tells whether the model has attention at all
        heads[0] = groups[0] = 1
    return heads, groups, [width or _PADDED for width in found.neurons]


def _context(config: PreTrainedConfig) -> int:
    """The tokens that are read as the model reads them: llama.cpp's architectures here know no window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    length = int(config.max_position_embeddings)
    return min(length, int(window)) if window and slides else length


@torch.no_grad()
def tensors(model: PreTrainedModel, arch: str, found: Shape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its name there, in float32, made one at a time.

    Raises RequestError for a tensor that the architecture has no name for.
    """
    names = gguf.get_tensor_name_map(_number(arch), len(found.heads))
    offset, head = runtimes.find(model).norm_offset, model.get_output_embeddings()
    again = {f"{name}.weight" for name, module in model.named_modules() if module is head and runtimes.tied(model)}
    for block, prefix in enumerate(anatomy.block_names(model)):
        yield from _zeros(block, found, hidden=model.get_input_embeddings().weight.shape[1])
        if arch == "openelm":
            again |= {f"{prefix}.self_attn.{part}_proj.weight" for part in "kv"}
    state = model.state_dict()
    for name, tensor in state.items():
        if name in again:
            continue
        value, part = tensor.float(), name.rpartition(".")[0].rpartition(".")[2]
        if arch == "openelm" and part == "q_proj":  # queries, keys and values are one matrix
            value = torch.cat([state[name.replace("q_proj", f"{each}_proj")].float() for each in "qkv"])
            name = name.replace("q_proj", "qkv_proj")
        elif part in ("q_proj", "k_proj") and arch in _NEIGHBOURS:
            value = _as_neighbours(value, found.head_dim)
        elif part.endswith("norm"):
            value = value + offset
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None:
            raise RequestError(
                f"llama.cpp's {arch} has no place for the tensor {name}: the model cannot be written as GGUF"
            )
        yield told, value
    if runtimes.rope(layers.configuration(model), arch)["rope_type"] == "llama3":
        yield from _factors(model, arch, found)


def _number(arch: str) -> gguf.MODEL_ARCH:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _as_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose halves are rotated together, (heads · head_dim, ...), in the order in which neighbours are."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _zeros(block: int, found: Shape, hidden: int) -> Iterator[tuple[str, Tensor]]:
    """A sublayer that does nothing, where llama.cpp needs one: attention of the first block, and the FFN of any.

    `deci` passes over a whole block that has no FFN, with the attention that it has.
    """
    size = found.head_dim
    if found.heads[block] == 0 and block == 0:
        for part in ("attn_q", "attn_k", "attn_v"):
            yield f"blk.{block}.{part}.weight", torch.zeros(size, hidden)
        yield f"blk.{block}.attn_output.weight", torch.zeros(hidden, size)
        yield f"blk.{block}.attn_norm.weight", torch.ones(hidden)
    if found.neurons[block] == 0:
        for part in ("ffn_gate", "ffn_up"):
            yield f"blk.{block}.{part}.weight", torch.zeros(_PADDED, hidden)
        yield f"blk.{block}.ffn_down.weight", torch.zeros(hidden, _PADDED)
        yield f"blk.{block}.ffn_norm.weight", torch.ones(hidden)


def _factors(model: PreTrainedModel, arch: str, found: Shape) -> Iterator[tuple[str, Tensor]]:
    """By what each frequency of the rotary embedding is divided, as the model itself has it."""
    theta = float(runtimes.rope(layers.configuration(model), arch)["rope_theta"])
    plain = theta ** -(torch.arange(0, found.head_dim, 2, dtype=torch.float32) / found.head_dim)
    yield "rope_freqs.weight", plain / anatomy.decoder(model).rotary_emb.inv_freq.float().cpu()  # type: ignore[union-attr, operator]
