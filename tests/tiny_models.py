"""A tiny random model of every type of causal language model that transformers has.

Sizes are found by looking at a type's configuration: what counts layers, widths, heads, experts and so on is made small
by what its name says, wherever it stands, in sub-configurations too. What no name tells is in `BESIDE`, and the types of
which there is no tiny model that reads text are in `LEFT_OUT`, each with its reason.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 272  # the bytes, three special tokens, and rows that no token of `tokenizer` has
LAYERS = 4  # types with blocks of several kinds have each among the first four, but for those in BESIDE
SPREAD = 0.2  # of weights, about 1 / sqrt(hidden): states keep their size, and logits differ

_LAYERS = r"(num_|n_)(hidden_|decoder_|encoder_)?layers?|num_blocks|(en|de)coder_layers"

# The first pattern that the whole name of a number matches says what it becomes; what none matches stays as it is.
SIZES: dict[str, int] = {
    r"type_vocab_size|task_type_vocab_size": 2,
    r".*vocab_size.*|encoder_hash_byte_group_vocab": VOCABULARY,
    r"hidden_size(_global)?|d_model|n_embd|(in|out)_hidden_size|dim_model_base|word_embed_proj_dim|emb(edding)?_dim": 32,
    r"lru_width|embedding_size|(adapter_)?input_size|adapter_(in|out)_dim|backbone_hidden_size|mamba_d_ssm": 32,
    r"query_pre_attn_scalar": 32,
    r"hidden_size_per_layer_input|vision_output_dim|projector_(in|out)put_dim": 8,
    r"moe_intermediate_size|expert_ffn_hidden_size|shared_.*intermediate_size": 24,
    r".*intermediate_size.*|((en|de)coder_)?ffn_dim|n_inner|ffn_hidden_size|dff|dim_ff|d_ff|mlp_dim": 48,
    r"(num|n)_(key_value|kv)_heads|kv_n_heads|(num_)?(swa|global).*key_value_heads|num_key_value_heads_.*": 2,
    r"(num_|n_)?((en|de)coder_|swa_)?(num_)?(attention_|query_)?heads?|n_layer_heads|index_n_heads": 4,
    r"linear_num_heads|linear_num_(key|value)_heads|mamba_n_heads|n_mamba_heads|mamba_num_heads": 4,
    r"head_dim|swa_head_dim|global_head_dim|qk_(nope|rope)_head_dim|v_head_dim|index_head_dim|kv_channels|d_kv": 8,
    r"linear_(key_|value_)?head_dim|dim_head|attention_head_dim|rotary_dim|mamba_head_dim": 8,
    r"qk_head_dim|mamba_d_head": 16,
    r"(q|kv|o)_lora_rank|moe_latent_size|gated_norm_rank|hc_lowrank|laurel_rank|d_rel": 16,
    r"(mamba_)?d_state|(mamba_|ssm_)?state_size|time_step_rank|mamba_dt_rank|o_groups|low_rank": 8,
    r"num_experts|(n_routed|num_local|moe_num)_experts": 8,
    r"(moe_|num_)?(n|num)_shared_experts|n_shared_experts": 1,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts": 2,
    r"n_group|num_expert_group|n_groups|mamba_n_groups|topk_group|(mamba_)?chunk_size|index_topk_blocks": 2,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_(source|target)_positions": 128,
    r"original_max_position_embeddings|max_sequence_length": 64,
    r"sliding_window(_size)?|local_attention|attention_chunk_size|index_topk|window_size|rel_extent": 16,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"zero_expert_num": 2,
    r"pad_token_id": 0,
    r"bos_token_id|cls_token_id|decoder_start_token_id": 1,
    r"eos_token_id|forced_eos_token_id|sep_token_id|eod_token_id": 2,
    r"(image|video|audio|boi|eoi|boa|eoa|vision_start|vision_end)_token_(id|index)": VOCABULARY - 1,
}

_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
# Of a type, by the path of the field: what its names do not tell.
BESIDE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {f"text_config.{name}": value for name, value in _SLIDING.items()},
    "dots3_note_text": _SLIDING,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _QSA.items()},
    "qwen4_exp_text": _QSA,
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local", "local", "local"],  # the other kind draws random hashes anew each time
        "local_attn_chunk_length": 8,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "xlnet": {"d_head": 8, "attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}

# Types of which no tiny model is made, and why.
LEFT_OUT: dict[str, str] = {
    "gemma3n": "its image part needs the package timm; gemma3n_text is the language model inside",
    "gemma4_assistant": "drafts for another model, whose states and cache it reads; alone it reads no text",
    "gemma4_unified_assistant": "drafts for another model, whose states and cache it reads; alone it reads no text",
    "musicgen": "predicts codes of sound, several books at once, and reads no text",
    "musicgen_melody": "predicts codes of sound, several books at once, and reads no text",
}


def types() -> list[str]:
    """The model types that transformers has a causal language model of."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in LEFT_OUT]


def config(kind: str) -> PreTrainedConfig:
    """The configuration of a tiny model of this type."""
    return shrunk(AutoConfig.for_model(kind), BESIDE.get(kind, {}))


def shrunk(whole: PreTrainedConfig, beside: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration with small sizes, and with what else is given by the path of its field."""
    return type(whole)(**_shrunk(whole, beside or {}))


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of this type, on the CPU, whose logits depend on every token before."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32).eval()
    _stir(model)
    return model.to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _shrunk(whole: PreTrainedConfig, beside: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that differ in a tiny model from its own defaults."""
    given = {name: value for name, value in vars(whole).items() if not name.startswith("_")}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            own = {
                path.removeprefix(f"{name}."): other for path, other in beside.items() if path.startswith(f"{name}.")
            }
            fields[name] = type(value)(**_shrunk(value, own))
        elif (size := _sized(name, value)) != value:  # what was derived from others is derived anew
            fields[name] = size
    if given.get("head_dim", 0) is None:  # some types do without and some do not
        fields["head_dim"] = 8
    if "kv_lora_rank" in given:  # latent attention has keys and values for each query head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    layers = max((value for name, value in given.items() if re.fullmatch(_LAYERS, name) and value), default=0)
    lists = {name: value for name, value in given.items() if isinstance(value, list | tuple) and len(value) == layers}
    if lists:
        kept = _of_every_kind(list(zip(*lists.values(), strict=True)))
        fields |= {name: [_sized(name, value[layer]) for layer in kept] for name, value in lists.items()}
    fields |= {name: SPREAD for name in ("initializer_range", "init_std") if name in given}
    fields |= {name: True for name in ("is_decoder", "causal") if given.get(name) is False}
    return fields | {path: value for path, value in beside.items() if "." not in path}


def _sized(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if re.fullmatch(_LAYERS, name):
        return LAYERS
    return next((min(size, value) for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)


def _of_every_kind(layers: list[Any]) -> list[int]:
    """`LAYERS` layers in order, those of each kind among them where so many suffice: the first of each, then the first."""
    first = [number for number, kind in enumerate(layers) if kind not in layers[:number]]
    rest = [number for number in range(len(layers)) if number not in first]
    return sorted([*first, *rest][:LAYERS])


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Give what starts at a constant, such as biases and norms, or near zero, values of its own: else half of a model is
    not tried."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif parameter.std() < SPREAD / 2:
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
