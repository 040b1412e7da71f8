"""In what a file holds tensors, what of their values that leaves, and what llama.cpp makes of what matrices read.

On a CPU llama.cpp multiplies by a matrix of float16 after rounding what it reads to float16, and by one of 8 or 4 bits after
rounding it to 8 bits, 32 numbers a scale (`vec_dot_type` in its ggml-cpu.c): a model is as far from itself in that as from
llama.cpp. In a file of float32 nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Type:
    """Of a file, by the name that is typed."""

    matrices: Kind
    tokens: Kind  # of the embedding and the head
    file: gguf.LlamaFileType
    tolerance: float  # how far llama.cpp's logits may be from the model's, of the largest


TYPES: dict[str, Type] = {
    "f32": Type(Kind.F32, Kind.F32, gguf.LlamaFileType.ALL_F32, 1e-3),
    "f16": Type(Kind.F16, Kind.F16, gguf.LlamaFileType.MOSTLY_F16, 1e-2),
    "q8_0": Type(Kind.Q8_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0, 5e-2),
    "q4_0": Type(Kind.Q4_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q4_0, 5e-2),
}
_READ_AS = {Kind.F32: Kind.F32, Kind.F16: Kind.F16}  # by a matrix of that kind; by others in 8 bits


def stored(tensor: Tensor, kind: str, of_tokens: bool) -> tuple[Any, None, Kind]:
    """(data, its shape unless it tells it, its type): what the writer wants."""
    own = _kind(tensor.shape, kind, of_tokens)
    return gguf.quants.quantize(tensor.contiguous().cpu().numpy(), own), None, own


def _kind(shape: torch.Size, kind: str, of_tokens: bool) -> Kind:
    """In what a tensor is stored: rows that no blocks of 32 fill in float16."""
    if len(shape) < 2:
        return Kind.F32
    wanted = TYPES[kind].tokens if of_tokens else TYPES[kind].matrices
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return Kind.F16 if shape[-1] % block else wanted


@torch.no_grad()
def round_weights(model: PreTrainedModel, kind: str) -> None:
    """Have a model take the values that a file of it holds."""
    tokens = _of_tokens(model)
    for parameter in model.parameters():
        parameter.copy_(_rounded(parameter.detach(), _kind(parameter.shape, kind, id(parameter) in tokens)))


@contextmanager
def reading(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """What the model's matrices read is rounded as llama.cpp rounds it."""
    tokens = _of_tokens(model)
    with ExitStack() as restore:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                own = _kind(module.weight.shape, kind, id(module.weight) in tokens)
                hook = _rounding(_READ_AS.get(own, Kind.Q8_0))
                restore.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _rounding(kind: Kind) -> Any:
    return lambda module, args: (_rounded(args[0], kind), *args[1:])


def _rounded(tensor: Tensor, kind: Kind) -> Tensor:
    data = gguf.quants.quantize(tensor.contiguous().cpu().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind)).view_as(tensor).to(tensor.device)


def _of_tokens(model: PreTrainedModel) -> set[int]:
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(each.weight) for each in parts if each is not None}
