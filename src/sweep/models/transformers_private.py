"""What is used of transformers beyond what it offers: what a quantised file leaves, the kernel of attention, and how
fused experts are laid out.

All of it is in this file; tests/test_private.py says which of it a new release has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sweep.settings import RequestError


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
    try:
        with no_init_weights():
            model = kind._from_config(copy.deepcopy(config), dtype=dtype)
        model.tie_weights()
    except ValueError as error:
        raise RequestError(
            f"transformers builds no {kind.__name__} of this configuration: {str(error)[:200]}"
        ) from error
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


def fused_ffn(experts: nn.Module) -> list[tuple[str, int, Tensor]]:
    """(parameter, axis, owners) of each fused parameter that has neurons, the one that reads them last; none of another.

    owners  (experts, length) int64: neuron i of expert e is e * (neurons of one) + i
    """
    own = dict(experts.named_parameters(recurse=False))
    down, first = own.get("down_proj"), own.get("gate_up_proj", own.get("up_proj"))
    if down is None or first is None or down.ndim != 3 or first.ndim != 3 or len(down) != len(first):
        return []
    flipped = getattr(experts, "is_transposed", first.shape[1] == down.shape[2])
    count, neurons = len(down), down.shape[1 if flipped else 2]
    rows = first.shape[2 if flipped else 1]
    if rows % neurons:
        return []
    unit = torch.arange(neurons)
    fused = (
        unit.repeat(rows // neurons)
        if getattr(experts, "is_concatenated", True)
        else unit.repeat_interleave(rows // neurons)
    )
    of = torch.arange(count)[:, None] * neurons
    name = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    found = [(name, 2 if flipped else 1, of + fused)]
    if f"{name}_bias" in own:
        found.append((f"{name}_bias", 1, of + fused))
    return [*found, ("down_proj", 1 if flipped else 2, of + unit)]


@contextmanager
def experts_one_by_one(experts: nn.Module) -> Iterator[None]:
    """While open, fused experts are multiplied by the module's own code, and by no kernel that hides its products."""
    config: Any = getattr(experts, "config", None)
    if not hasattr(config, "_experts_implementation"):
        yield
        return
    before = config._experts_implementation
    try:
        config._experts_implementation = "eager"
        yield
    finally:
        config._experts_implementation = before
