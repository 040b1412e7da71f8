"""Logits and gradients piece by piece are those of the whole, and the whole is nowhere held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import FAMILIES, GATED, TINY, random_tokens, tiny_model
from sweep import calibrate, cost
from sweep.config import Perplexity
from sweep.measuring import perplexity, scorer
from sweep.models import anatomy, logits, parts, watching
from sweep.models.logits import Tail, descend
from sweep.pruning import drop, unit_statistics

EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": GATED | EXPERTS,
    "cohere": GATED | {"logit_scale": 0.3},
    "granite": GATED | {"logits_scaling": 3.0},
    "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},  # whose blocks give tuples
    "gemma2": FAMILIES["gemma2"] | {"final_logit_softcapping": 0.5},
}


def other(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **OTHERS[name], bos_token_id=1, eos_token_id=2, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def outputs(model: PreTrainedModel) -> list[nn.Module]:
    return [ffn.output for ffn in parts.ffns(model)]


@pytest.fixture(params=[*FAMILIES, *(f"other {name}" for name in OTHERS)])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    kind, _, name = request.param.rpartition(" ")
    return other(name) if kind else tiny_model(name)


def test_the_states_give_the_models_own_logits(any_model: PreTrainedModel) -> None:
    tail, tokens = Tail(any_model), random_tokens(3, 9)
    assert tail.is_split
    with torch.no_grad():
        states = tail.states(input_ids=tokens).flatten(0, 1)
        whole = any_model(input_ids=tokens).logits.flatten(0, 1)
        for piece in tail.pieces(states):
            torch.testing.assert_close(tail.logits(states[piece]), whole[piece], rtol=1e-5, atol=1e-6)
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in any_model.modules())


def test_the_gradient_of_pieces_is_the_gradient_of_the_loss(
    any_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "ENTRIES", 5 * 64)  # five positions of a vocabulary of 64
    tokens = random_tokens(3, 9)
    whole = any_model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(whole, tokens[:, 1:].flatten(), reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in any_model.named_parameters() if p.grad is not None}
    any_model.zero_grad(set_to_none=True)
    tail, sizes = Tail(any_model), []

    def wanted(probabilities: Tensor, some: slice) -> Tensor:
        sizes.append(len(probabilities))
        torch.testing.assert_close(probabilities, whole[some].softmax(-1), rtol=1e-4, atol=1e-6)
        return tokens[:, 1:].flatten()[some]

    descend(tail, tail.states(input_ids=tokens)[:, :-1].flatten(0, 1), wanted)
    assert sizes == [5, 5, 5, 5, 4]
    assert expected.keys() == {name for name, p in any_model.named_parameters() if p.grad is not None}
    for name, parameter in any_model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_model_that_does_more_to_its_states_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), random_tokens(3, 9)
    forward = type(model).forward

    def with_a_twist(self: Any, input_ids: Tensor, **other: Any) -> Any:
        found = forward(self, input_ids=input_ids, **other)
        found.logits = found.logits + 2 * input_ids[..., None]  # follows from no state
        found.logits = found.logits * torch.arange(64)
        return found

    monkeypatch.setattr(type(model), "forward", with_a_twist)
    tail = Tail(model)
    assert not tail.is_split
    states = tail.states(input_ids=tokens)
    assert torch.equal(states, model(input_ids=tokens).logits) and torch.equal(tail.logits(states[0]), states[0])
    descend(tail, states[:, :-1].flatten(0, 1), lambda _, some: tokens[:, 1:].flatten()[some])
    mine = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    whole = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(whole, tokens[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(mine, model.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-3, atol=1e-5)


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    return anatomy.matrices(anatomy.blocks(model)[0], anatomy.block_names(model)[0])


def requests(tokens: Tensor) -> list[scorer.Request]:
    return [(row, len(row) - 1) for row in tokens.tolist()]


WORK: dict[str, Callable[[PreTrainedModel, Tensor], Any]] = {
    "units, own labels": lambda m, t: unit_statistics.gather(m, outputs(m), [1, 1], t, labels="text"),
    "units, drawn labels": lambda m, t: unit_statistics.gather(m, outputs(m), [1, 1], t, labels="model"),
    "units, no labels": lambda m, t: unit_statistics.gather(m, outputs(m), [1, 1], t, labels=None),
    "weights": lambda m, t: calibrate.gradient_norms(m, t, matrices(m)),
    "blocks": lambda m, t: unit_statistics.block_cosines(list(anatomy.blocks(m)), m, t),
    "first order": lambda m, t: drop.first_order(m, drop.probe_of_text(t), outputs(m)),
    "scores": lambda m, t: scorer.score(m, requests(t), budget=4096, widest=0),
    "likeliest": lambda m, t: scorer.score(m, requests(t), budget=4096, widest=0, top=3, alternatives=[]),
}


@pytest.mark.parametrize("work", WORK)
def test_no_work_makes_more_logits_at_once_than_it_may(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "ENTRIES", 5 * 64)
    model, seen = tiny_model("llama"), []
    handle = model.lm_head.register_forward_hook(
        lambda _, __, output: watching.is_aside() or seen.append(output.numel())
    )
    WORK[work](model, random_tokens())
    handle.remove()
    assert 0 < max(seen) <= 5 * 64


def test_windows_of_a_perplexity_are_read_in_pieces(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    (tmp_path / "text.txt").write_text("A text of some length. " * 40)
    settings = Perplexity(str(tmp_path / "text.txt"), seqlen=256)
    whole, _ = perplexity.measure(model, tokenizer, settings, None, 4)
    monkeypatch.setattr(logits, "ENTRIES", 7 * len(tokenizer))
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    pieces, _ = perplexity.measure(model, tokenizer, settings, None, 4)
    handle.remove()
    assert max(seen) == 7 and len(seen) > 100
    assert pieces["text/perplexity"] == pytest.approx(whole["text/perplexity"], rel=1e-6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
@pytest.mark.parametrize("labels", ["text", "model"])
def test_a_large_vocabulary_takes_no_more_memory_than_its_pieces(labels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "ENTRIES", 2**20)
    shape = TINY | {"vocab_size": 65_536, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **shape), dtype=torch.bfloat16).eval()
    tokens = torch.randint(3, 65_536, (8, 64), generator=torch.Generator().manual_seed(0))
    unit_statistics.gather(model, outputs(model), [1, 1], tokens[:1, :4], labels=labels)  # the allocator's own
    with cost.PeakMemory("cpu") as memory:
        unit_statistics.gather(model, outputs(model), [1, 1], tokens, labels=labels)
    assert memory.peak is not None and memory.base is not None
    assert memory.peak - memory.base < 48 * 2**20  # a batch's logits are 64 MiB in float32, and there were five of them
