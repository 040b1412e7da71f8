"""The FFN and the attention of each block, of the families in `decoders`.

Shapes: of attention, H query heads share G key-value groups (H = G without grouped-query attention), D dimensions a head.
Query head h belongs to group h // (H / G), and owns rows h*D .. (h+1)*D of the query matrix and the same columns of the
output matrix; group g owns rows g*D .. (g+1)*D of the key and value matrices. Modules compute H and G from the shapes of
their matrices; the few attributes that they keep beside are set by `surgery.remove_heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sweep.models.anatomy import Linear, blocks, weight
from sweep.models.decoders import DECODERS, Decoder
from sweep.settings import RequestError


@dataclass(frozen=True)
class Ffn:
    """The feed-forward network of one block: neuron i is row i of each `inputs` and column i of `output`."""

    block: int
    inputs: tuple[Linear, ...]
    output: Linear

    @property
    def width(self) -> int:
        return weight(self.output).shape[1]


@dataclass(frozen=True)
class Attention:
    """The attention of one block."""

    block: int
    name: str  # of the module, in the whole model
    module: nn.Module
    inputs: tuple[Linear, ...]  # query, key, value; or the one fused matrix
    output: Linear
    head_dim: int
    family: Decoder

    @property
    def columns(self) -> int:
        return weight(self.output).shape[1]

    @property
    def heads(self) -> int:
        return self.columns // self.head_dim

    @property
    def groups(self) -> int:
        if len(self.inputs) == 1:
            return self.heads
        return weight(self.inputs[1]).shape[0] // self.head_dim

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups


def is_known(model: PreTrainedModel) -> bool:
    """Whether the parts of the model's blocks are known."""
    return model.config.model_type in DECODERS


def family(model: PreTrainedModel) -> Decoder:
    """Where the parts of a block are. Raises RequestError for a model type without a record."""
    kind = model.config.model_type
    if kind not in DECODERS:
        raise RequestError(
            f"the parts of a '{kind}' block are not known: use +method=weight, which needs none, or add a "
            f"line to DECODERS in sweep/models/decoders.py. Known: {', '.join(DECODERS)}"
        )
    return DECODERS[kind]


def ffns(model: PreTrainedModel) -> list[Ffn]:
    """The feed-forward network of every block, in order. Raises RequestError where its parts are not known."""
    known = family(model)
    found = []
    for index, block in enumerate(blocks(model)):
        *inputs, output = _parts(block, (*known.ffn_in, known.ffn_out), "method=neuron", "ffn")
        found.append(Ffn(index, tuple(inputs), output))
    return found


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention of every block, in order. Raises RequestError where its parts are not known."""
    known = family(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for index, block in enumerate(blocks(model)):
        (module,) = _parts(block, (known.attention,), "method=head", "attention")
        paths = *known.attention_in, known.attention_out, known.head_dim
        *inputs, output, head_dim = _parts(module, paths, "method=head", "attention")
        found.append(Attention(index, names[id(module)], module, tuple(inputs), output, head_dim, known))
    return found


def _parts(module: nn.Module, paths: tuple[str, ...], method: str, targets: str) -> list[Any]:
    try:
        return [attrgetter(path)(module) for path in paths]
    except AttributeError as error:
        raise RequestError(
            f"{method}: {type(module).__name__} is not built as its model type says ({error}): use +method=weight "
            f"method.targets={targets}"
        ) from error
