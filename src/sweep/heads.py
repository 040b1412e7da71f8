"""The attention of every block: which rows and columns belong to which head.

H query heads share G key-value groups (H = G without grouped-query attention), D dimensions a head. Query head h
belongs to group h // (H / G), and owns columns h*D .. (h+1)*D of the output matrix. Modules compute H and G from the
shapes of their matrices; the few attributes that they keep beside are set by surgery.remove_heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from sweep import models
from sweep.config import RequestError

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
    inputs: tuple[models.Linear, ...]  # query, key, value; or the one fused matrix
    output: models.Linear
    head_dim: int
    interleaved: bool  # the fused matrix holds the three of each head together

    @property
    def heads(self) -> int:
        return models.weight(self.output).shape[1] // self.head_dim

    @property
    def groups(self) -> int:
        if len(self.inputs) == 1:
            return self.heads
        return models.weight(self.inputs[1]).shape[0] // self.head_dim


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention of every block, in order. Raises RequestError for a module whose parts are not recognised."""
    path = models.architecture(model).attention
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for index, block in enumerate(models.blocks(model)):
        module = block.get_submodule(path)
        inputs = [getattr(module, name) for name in _SEPARATE if hasattr(module, name)]
        fused = [name for name in _FUSED if hasattr(module, name)]
        outputs = [getattr(module, name) for name in _OUTPUT if hasattr(module, name)]
        head_dim = next((getattr(module, name) for name in _HEAD_DIM if hasattr(module, name)), None)
        if len(outputs) != 1 or head_dim is None or (len(inputs), len(fused)) not in ((3, 0), (0, 1)):
            raise RequestError(
                f"method=head: the heads of {type(module).__name__} are not known: use +method=weight "
                "method.targets=attention, or add the names of its matrices to sweep/heads.py"
            )
        matrices = tuple(inputs) or (getattr(module, fused[0]),)
        found.append(
            Attention(index, names[id(module)], module, matrices, outputs[0], head_dim, fused == ["query_key_value"])
        )
    return found
