"""The families of decoders whose parts are known, one record each: where they are, and what the configuration calls their
sizes. No torch.

A record states what differs from Llama, so that a family that is built like it is a word in a list. Pruning of weights
needs no record: linear layers are found by type. What follows from a record is in `anatomy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


def _counts() -> dict[str, str]:
    return {
        "num_heads": "heads",
        "num_attention_heads": "heads",
        "num_key_value_heads": "groups",
        "num_key_value_groups": "heads_per_group",
        "split_size": "columns",
    }


@dataclass(frozen=True)
class Decoder:
    """Where the parts of a block are: names within it, and of attention's parts within the attention module."""

    attention: str = "self_attn"
    attention_in: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # or the one matrix that holds all three
    interleaved: bool = False  # such a matrix holds the three of each head together, not all queries first
    attention_out: str = "o_proj"
    head_dim: str = "head_dim"  # the attribute that keeps the size of a head, which no shape tells
    # Attributes that keep what a cut changes, by the property of `parts.Attention` that each agrees with. Those that
    # the module does not have are passed over.
    counts: Mapping[str, str] = field(default_factory=_counts)
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # matrices whose outputs are the neurons
    ffn_out: str = "mlp.down_proj"  # the matrix that reads the neurons
    keys: Keys = Keys()


LLAMA = Decoder()
# By the `model_type` of transformers' configurations.
DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), LLAMA),
    "phi": Decoder(attention_out="dense", ffn_in=("mlp.fc1",), ffn_out="mlp.fc2"),
    "opt": Decoder(attention_out="out_proj", ffn_in=("fc1",), ffn_out="fc2", keys=Keys(neurons="ffn_dim")),
    "gpt2": Decoder(
        attention="attn",
        attention_in=("c_attn",),
        attention_out="c_proj",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        keys=Keys(blocks="n_layer", hidden="n_embd", neurons="n_inner", heads="n_head", positions="n_positions"),
    ),
    "gpt_neox": Decoder(
        attention="attention",
        attention_in=("query_key_value",),
        interleaved=True,
        attention_out="dense",
        head_dim="head_size",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
    ),
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
    """One of the sizes that a configuration states, by a field of Keys; 0 where it does not."""
    return int(config.get(key(config, of)) or 0)
