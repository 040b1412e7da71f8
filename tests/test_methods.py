"""Pruning, on a tiny random model of every family: exact counts, nothing else touched, shrunk equals masked."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from transformers import PreTrainedModel

from conftest import random_tokens, tiny_model
from sweep import config, settings
from sweep.config import GROUPS
from sweep.models import anatomy, parts
from sweep.pruning import methods, select, unit_statistics
from sweep.pruning.families import FAMILIES, Dense, Head, Layer, Method, Neuron, Vocab, Weight
from sweep.settings import RequestError


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(seed=1)).logits


def taylor_abs(
    model: PreTrainedModel, tokens: torch.Tensor, labels: Literal["text", "model"] = "text"
) -> list[torch.Tensor]:
    outputs = [ffn.output for ffn in parts.ffns(model)]
    found = unit_statistics.gather(model, outputs, [1] * len(outputs), tokens, labels=labels)
    return [seen.product_abs.float() for seen in found]


@pytest.mark.parametrize("targets", ["all", "attention", "ffn"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_weights_are_removed_exactly_and_by_magnitude(family: str, targets: str, sparsity: float) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = methods.prune(model, Weight("weight", targets=targets), sparsity, None)
    linears = anatomy.linears(model)
    touched = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert touched <= {f"{name}.weight" for name in linears}
    zeroed = 0
    for name, linear in linears.items():
        old, new = before[f"{name}.weight"], linear.weight
        gone = (new == 0) & (old != 0)
        if gone.any():
            assert abs(int(gone.sum()) - old.numel() * sparsity) < 1
            assert old[~gone].abs().min() >= old[gone].abs().max()
            assert torch.equal(new[~gone], old[~gone])
            zeroed += int(gone.sum())
    assert pruned.removed == zeroed == select.count(pruned.targets, sparsity)
    if targets == "all":
        assert pruned.targets == sum(linear.weight.numel() for linear in linears.values())
    assert abs(pruned.sparsity - sparsity) < 0.01


def test_attention_and_ffn_share_the_linear_layers_between_them(family: str) -> None:
    model = tiny_model(family)
    count = {
        targets: methods.prune(copy.deepcopy(model), Weight("weight", targets=targets), 0.0, None).targets
        for targets in ("all", "attention", "ffn")
    }
    assert count["attention"] + count["ffn"] == count["all"]
    assert 0 < count["attention"] < count["all"]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_a_shrunk_model_computes_what_the_masked_one_does(family: str, scope: str, sparsity: float) -> None:
    model = tiny_model(family)
    tokens = random_tokens()
    importance = taylor_abs(model, tokens)
    shrunk = copy.deepcopy(model)
    pruned = methods.prune(shrunk, Neuron(criterion="taylor_abs", scope=scope), sparsity, tokens)
    removed = 0
    for ffn, small, scores in zip(parts.ffns(model), parts.ffns(shrunk), importance, strict=True):
        gone = scores.argsort(stable=True)[: ffn.width - small.width]
        removed += len(gone)
        with torch.no_grad():
            anatomy.weight(ffn.output)[:, gone] = 0
    assert removed == select.count(48, sparsity) if scope == "global" else removed == 2 * select.count(24, sparsity)
    assert pruned.removed / pruned.targets == pytest.approx(removed / 48)
    torch.testing.assert_close(logits(shrunk), logits(model), rtol=1e-4, atol=1e-4)


def test_every_block_keeps_a_neuron(family: str) -> None:
    model = tiny_model(family)
    methods.prune(model, Neuron(scope="global"), 46 / 48, random_tokens())
    assert [ffn.width for ffn in parts.ffns(model)] == [1, 1]


def test_calibration_changes_nothing_and_holds_nothing(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    scores = taylor_abs(model, random_tokens())
    assert [s.shape for s in scores] == [(24,), (24,)]
    assert all(s.gt(0).any() and s.ge(0).all() for s in scores)
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("labels", ["text", "model"])
def test_neuron_importance_is_the_literal_sum_over_tokens(
    family: str, labels: Literal["text", "model"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model(family), random_tokens()
    # as if the likeliest token were drawn at every position
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(1, keepdim=True))
    ffn = parts.ffns(model)[1]
    seen = []

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    handle = ffn.output.register_forward_pre_hook(keep)
    out = model(input_ids=tokens).logits[:, :-1]
    wanted = tokens[:, 1:] if labels == "text" else out.argmax(-1)
    (-out.log_softmax(-1).gather(-1, wanted[..., None]).sum()).backward()
    handle.remove()
    expected = (seen[0].detach() * seen[0].grad).abs().flatten(0, -2).sum(0)
    assert (expected > 1e-6).any()
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(taylor_abs(model, tokens, labels)[1], expected, rtol=1e-4, atol=1e-7)


def test_drawn_next_tokens_follow_the_model_and_the_seed() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    outputs = [ffn.output for ffn in parts.ffns(model)]

    def signed(seed: int, labels: Literal["text", "model"] = "model") -> torch.Tensor:
        return unit_statistics.gather(model, outputs, [1, 1], tokens, labels=labels, seed=seed)[1].product

    assert torch.equal(signed(0), signed(0)) and not torch.equal(signed(0), signed(1))
    draws = torch.stack([signed(seed) for seed in range(64)])  # the expected gradient of a log-likelihood is zero
    error = draws.std(0) / 8
    assert (draws.mean(0).abs() < 4 * error).all()
    assert (signed(0, "text").abs() > 4 * error).any()


def test_dense_removes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    assert methods.prune(model, Dense(), 0.0, None).removed == 0
    assert torch.equal(logits(model), before)


def test_nan_weights_are_named_with_their_layer() -> None:
    model = tiny_model("llama")
    name, linear = next(iter(anatomy.linears(model).items()))
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name}: 1 of .* weights are NaN or infinite"):
        methods.prune(model, Weight("weight"), 0.5, None)


NAMES = [
    (kind, name) for kind in {**FAMILIES, **GROUPS}.values() for name in settings.choices(kind) if name != "family"
]


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=lambda v: getattr(v, "__name__", v))
def test_a_name_that_is_not_listed_is_refused_however_it_is_asked_for(kind: type, name: str) -> None:
    needed: dict[type, dict] = {
        config.Model: {"name": "m", "source": "local"},
        Weight: {"family": "weight"},
        Vocab: {"family": "vocab"},
    }
    with pytest.raises(RequestError, match=f"{name} must be one of .*; got 'unheard'"):
        kind(**{**needed.get(kind, {}), name: "unheard"})


@pytest.mark.parametrize(
    "method",
    [Weight("weight"), Weight("weight", allocation="global"), Neuron(), Head(), Layer(), Vocab("vocab")],
    ids=lambda m: f"{m.family} {getattr(m, 'allocation', '')}",
)
def test_a_criterion_that_is_not_declared_is_an_error(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never another criterion's scores, however the name came past the door."""
    monkeypatch.setattr(settings, "choices", lambda kind: {})
    method = replace(method, criterion="forgotten")
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = SimpleNamespace(unk_token_id=0, eos_token_id=0, all_special_ids=[0])
    with pytest.raises(RequestError, match="method.criterion must be one of .*; got 'forgotten'"):
        methods.prune(model, method, 0.5, random_tokens(), tokenizer=tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_family_of_settings_has_its_work() -> None:
    assert set(methods.WORK) == set(FAMILIES.values())
