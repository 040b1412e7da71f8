"""FFNs, experts and attention of models of many layouts: found without a record of them, and cut as zeroing tells."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_models
from conftest import random_tokens, tiny_model
from sweep.models import anatomy, candidates, flow, parts, proof, surgery
from sweep.models.candidates import Experts, Ffn
from sweep.pruning import criteria, methods, units
from sweep.pruning.families import Head, Neuron
from sweep.settings import RequestError

# What is particular about each layout, and its query heads and key-value groups.
LAYOUTS = {
    "phi3": (4, 2),  # queries, keys and values in one matrix, gate and up in another, counts in the configuration
    "falcon": (4, 1),  # one key for all heads, in the matrix of the queries; the FFN beside the attention
    "gpt_bigcode": (4, 1),
    "olmo2": (4, 2),  # norms over all heads
    "cohere2": (4, 2),
    "glm4": (4, 2),
    "deepseek_v3": (4, 4),  # latent keys and values; experts, and one that all tokens share
    "gpt_oss": (4, 2),  # sinks; experts with biases, gate and up by turns
    "qwen3_moe": (4, 2),
    "rembert": (4, 4),  # attention in several modules
    "recurrent_gemma": (4, 2),  # attention in some blocks alone
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(2, 10, seed=1)).logits


def zero(part: candidates.Part, gone: Tensor) -> None:
    """Zero the columns of the output matrix, or all weights of what goes where a norm averages over all units."""
    with torch.no_grad():
        if isinstance(part, Experts):
            down = part.slices[-1]
            for unit in gone.nonzero().flatten().tolist():
                expert, neuron = divmod(unit, part.neurons)
                down.parameter[expert].select(down.axis - 1, neuron).zero_()
            return
        columns = gone.repeat_interleave(anatomy.weight(part.output).shape[1] // len(gone))
        anatomy.weight(part.output)[:, columns] = 0
        for each in part.slices if part.rescaled else ():
            if isinstance(each.module, nn.Linear):
                each.module.weight[~each.stays(~gone)] = 0


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(
    "method", [Neuron(sparsity_of="units"), Head(sparsity_of="units", unit="query")], ids=lambda m: m.family
)
def test_units_that_were_removed_in_all_blocks_are_as_if_zeroed(kind: str, method: Neuron | Head) -> None:
    model = tiny_models.make(kind)
    whole, shrunk = logits(model), copy.deepcopy(model)
    pruned = methods.prune(shrunk, method, 0.5, random_tokens(2, 10))
    assert abs(pruned.units_removed - pruned.units // 2) <= 4 * units.ALIGNED
    gone = {(block, unit) for block, unit in pruned.gone.tolist()}
    found = units.parts(model, method)
    for part, numbers in zip(found, units._numbered(found), strict=True):
        zero(part.of, torch.tensor([(part.block, unit) in gone for unit in numbers.tolist()]))
    made = float((logits(model) - whole).norm())
    assert float((logits(shrunk) - logits(model)).norm()) < 1e-3 * made


@pytest.mark.parametrize("kind", LAYOUTS)
def test_head_counts_are_found(kind: str) -> None:
    found = parts.attentions(tiny_models.make(kind))
    assert {(attention.heads, attention.groups) for attention in found} == {LAYOUTS[kind]}


@pytest.mark.parametrize("criterion", [c.name for c in criteria.declared("unit") if not (c.measured or c.compensates)])
def test_neurons_of_experts_go_by_every_criterion_as_many_of_each(criterion: str) -> None:
    model = tiny_models.make("qwen3_moe")
    anatomy.look(model)  # as loading does
    assert methods.targets(model, Neuron()) == {name for name in anatomy.tensors(model) if ".experts." in name}
    methods.prune(model, Neuron(criterion=criterion, sparsity_of="units"), 0.5, random_tokens(4, 10), seed=1)
    left = parts.ffns(model)
    assert sum(part.width for part in left) == 4 * 8 * 12
    assert all(isinstance(part, Experts) and part.neurons % units.ALIGNED == 0 for part in left)
    assert torch.isfinite(logits(model)).all()


def test_an_expert_is_scored_on_the_tokens_that_are_routed_to_it() -> None:
    model = tiny_models.make("qwen3_moe")
    tokens, method = random_tokens(3, 10), Neuron(criterion="activation")
    (part, *_) = units.parts(model, method)
    (seen, *_) = units._statistics(model, method, [part], tokens)
    experts = part.of.module
    read: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: read.append((args[0], args[1])))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    hidden, chosen = read[0][0].flatten(0, -2), read[0][1].flatten(0, -2)
    for expert in range(8):
        x = hidden[(chosen == expert).any(-1)]
        gate, up = (x @ experts.gate_up_proj[expert].detach().t()).chunk(2, -1)
        total = (nn.functional.silu(gate) * up).square().sum(0)
        own = seen["activations"].input_square[expert * 24 : (expert + 1) * 24]
        torch.testing.assert_close(own.float(), total.detach(), rtol=1e-4, atol=1e-6)
        assert int(seen["activations"].tokens[expert * 24]) == len(x)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Neuron(criterion="flap"), "criterion=flap, which leaves the mean .* is not for the neurons of experts"),
        (Neuron(criterion="drop"), "criterion=drop, which is measured .* is not for the neurons of experts"),
        (Neuron(repair=True), "repair=true is not for the neurons of experts"),
    ],
)
def test_what_needs_one_matrix_is_refused_for_experts(method: Neuron, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        methods.prune(tiny_models.make("qwen3_moe"), method, 0.5, random_tokens(2, 10))


@pytest.mark.parametrize(
    ("kind", "find", "message"),
    [
        (
            "bloom",
            parts.attentions,
            "method=head cannot cut Bloom.*: block 0, cut by way of trial, fails: RuntimeError .*",
        ),
        ("bitnet", parts.ffns, "method=neuron cannot cut BitNet.*: block 0, cut by way of trial, .* differs by .*"),
        ("bitnet", parts.attentions, "method=head cannot cut BitNet.*: block 0, cut by way of trial, .* differs by .*"),
        ("mamba", parts.ffns, "method=neuron cannot cut Mamba.*: no linear layer .*neuron by neuron"),
        ("mamba", parts.attentions, "method=head cannot cut Mamba.*: no linear layer .* reads heads"),
    ],
)
def test_a_type_that_cannot_be_cut_is_told_why_and_what_it_can(kind: str, find: object, message: str) -> None:
    with pytest.raises(RequestError, match=rf"{message}.*Use \+method=weight method.targets=\w+, or \+method=layer"):
        find(tiny_models.make(kind))


def test_a_cut_that_takes_a_wrong_row_fails_the_proof() -> None:
    model = tiny_model("llama")
    with flow.passed(model) as seen:
        (ffn, *_) = candidates.ffns(model, seen)
        gate, up = ffn.slices
        wrong = Ffn(0, ffn.module, ffn.inputs, ffn.output, (gate, copy.copy(up)), ffn.width)
        object.__setattr__(wrong.slices[1], "owners", up.owners.roll(1))
        assert isinstance(proof.tried(anatomy.blocks(model)[0], ffn, seen.calls[0]), Ffn)
        assert "differs by" in str(proof.tried(anatomy.blocks(model)[0], wrong, seen.calls[0]))


def test_looking_and_trying_leave_a_model_as_it_was() -> None:
    model = tiny_models.make("recurrent_gemma").train()
    before = copy.deepcopy(model.state_dict())
    needed = [parameter.requires_grad for parameter in model.parameters()]
    parts.attentions(model)
    parts.ffns(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert needed == [parameter.requires_grad for parameter in model.parameters()]
    assert model.training and not any("forward" in vars(module) for module in model.modules())


def test_blocks_of_unequal_width_change_no_number_of_the_configuration() -> None:
    model = tiny_models.make("openai-gpt")
    before = model.config.to_dict()
    methods.prune(model, Head(sparsity_of="units", criterion="random"), 0.5, None, seed=1)
    assert len({attention.heads for attention in parts.attentions(model)}) > 1
    assert model.config.to_dict() == before


def test_experts_that_would_keep_different_numbers_are_refused() -> None:
    (part, *_) = parts.ffns(tiny_models.make("qwen3_moe"))
    keep = torch.ones(part.width, dtype=torch.bool)
    keep[0] = False
    with pytest.raises(ValueError, match=r"block 0: experts would keep \[23, 24\] neurons; every expert .* the same"):
        surgery.remove_units(part, keep)


def test_the_configuration_does_not_state_what_holds_of_some_blocks_alone() -> None:
    model = tiny_models.make("granite")
    before = model.config.to_dict()
    methods.prune(model, Head(blocks=(0, 1, 2), scope="layer", criterion="random"), 0.5, None)
    methods.prune(model, Neuron(blocks=(0, 1, 2), scope="layer", criterion="random"), 0.5, None)
    assert model.config.to_dict() == before
    assert [attention.heads for attention in parts.attentions(model)] == [2, 2, 2, 4]
