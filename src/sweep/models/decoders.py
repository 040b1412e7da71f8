"""What no looking tells of families of decoders, one record each: what the configuration calls their sizes, which are
asked for before a model is loaded. No torch.

A record states what differs from Llama, so that a family that is built like it is a word in a list. Neither pruning of
weights nor that of units needs one: `anatomy` finds matrices, `parts` FFNs and attentions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keys:
    """What a family's configuration calls its sizes. A key that it does not have is passed over."""

    blocks: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    neurons: str = "intermediate_size"
    expert_neurons: str = "moe_intermediate_size"
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"  # as many as there are heads where the configuration names none
    head_dim: str = "head_dim"
    positions: str = "max_position_embeddings"
    experts_per_token: str = "num_experts_per_tok"


@dataclass(frozen=True)
class Decoder:
    """A family."""

    attention: str = "self_attn"  # what a block calls its attention
    keys: Keys = Keys()


LLAMA = Decoder()
# By the `model_type` of transformers' configurations.
DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi"), LLAMA),
    "opt": Decoder(keys=Keys(neurons="ffn_dim")),
    "gpt2": Decoder(
        attention="attn",
        keys=Keys(blocks="n_layer", hidden="n_embd", neurons="n_inner", heads="n_head", positions="n_positions"),
    ),
    "gpt_neox": Decoder(attention="attention"),
}


def key(config: Mapping[str, Any], of: str) -> str:
    """What a configuration calls one of its sizes.

    of  a field of Keys
    Of a family without a record, or of none, it is the first key of any family that the configuration has.
    """
    own = DECODERS.get(config.get("model_type", ""), LLAMA)
    names = [getattr(decoder.keys, of) for decoder in (own, *DECODERS.values())]
    return next((name for name in names if config.get(name)), names[0])


def size(config: Mapping[str, Any], of: str) -> int:
    """One of the sizes that a configuration states, by a field of Keys; 0 where it does not, or not as one number."""
    found = config.get(key(config, of))
    return found if isinstance(found, int) else 0
