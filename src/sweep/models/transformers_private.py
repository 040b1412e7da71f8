"""What is used of transformers beyond what it offers: what a quantised file leaves, the kernel of attention, and how
fused experts are laid out.

All of it is in this file; tests/test_private.py says which of it a new release has changed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def forget_quantiser(model: PreTrainedModel) -> None:
    """Take away what loading from a quantised file leaves, and saving refuses: the weights are no longer quantised."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def attention_kernel(config: PreTrainedConfig) -> str:
    """The kernel that attention was set to run with: "sdpa", "eager", … It can be set by what is offered, not asked for."""
    return config._attn_implementation


def built(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a configuration builds, its weights whatever lies in memory; tensors that modules make are made."""
    with no_init_weights():
        model = kind._from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    return model


def run_alike(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Have a model run with the kernels of attention and experts that another runs with."""
    if attention_kernel(model.config) != attention_kernel(other.config):
        model.set_attn_implementation(attention_kernel(other.config))
    if model.get_experts_implementation() != other.get_experts_implementation():
        model.set_experts_implementation(other.get_experts_implementation())


def gate_and_up(experts: nn.Module, name: str, matrix: Tensor) -> dict[str, Tensor]:
    """The matrices, (out, in), that one expert's matrix (out, in) of the fused parameter `name` holds, by name, as views.

    Gate and up are two where they lie one behind the other, and one `gate_up_proj` where their rows alternate.
    """
    if name == "gate_up_proj" and getattr(experts, "is_concatenated", True):
        gate, up = matrix.chunk(2)
        return {"gate_proj": gate, "up_proj": up}
    return {name: matrix}


def are_flipped(experts: nn.Module) -> bool:
    """Whether the slices of the fused parameters are (in, out)."""
    return getattr(experts, "is_transposed", False)


def tells_neurons(experts: nn.Module) -> bool:
    """Whether `expert_neurons` knows how these experts make their neurons: not where they have biases, for one."""
    plain = (
        not getattr(experts, "is_transposed", False)
        and getattr(experts, "is_concatenated", True)
        and not getattr(experts, "has_bias", False)
    )
    return plain and all(hasattr(experts, name) for name in ("_apply_gate", "gate_up_proj", "down_proj"))


def expert_neurons(experts: Any, expert: int, x: Tensor) -> Tensor:
    """(tokens, neurons) what an expert's down matrix reads, of the (tokens, hidden) `x` that reach the expert."""
    return experts._apply_gate(nn.functional.linear(x, experts.gate_up_proj[expert]))
