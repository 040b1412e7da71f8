"""Experts of mixtures: found and tried on every type, scored as their papers say, removed for real."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny_models
from sweep.measuring import counting
from sweep.models import checkpoint, experts
from sweep.pruning import criteria, expert_statistics, methods
from sweep.pruning import experts as pruning
from sweep.pruning.families import Drop, Expert
from sweep.settings import RequestError

TOKENS = torch.randint(3, 259, (6, 20), generator=torch.Generator().manual_seed(3))
IDS = TOKENS[:2]

# A type for each way in which experts are held or chosen.
FAMILIES = {
    "qwen3_moe": "gate and up in one, a softmax over all",
    "deepseek_v3": "groups of experts, a sigmoid, a correction, shared experts",
    "gpt_oss": "transposed, gate and up alternate, biases of experts and router",
    "dbrx": "two dimensions",
    "ernie4_5_moe": "a correction of two dimensions within the router",
    "lfm2_moe": "a correction outside the router",
    "nemotron_h": "no gate matrix; mixtures in some blocks alone",
    "qwen2_moe": "a shared expert with a gate of its own",
}
# Types that cannot be pruned so, with what is said of them.
REFUSED = {
    "llama": r"no block of LlamaForCausalLM calls experts.*\+method=neuron",
    "llama4_text": r"feed_forward.experts is called in a way of its own",
    "jetmoe": r"input_linear is called in a way of its own",
    "longcat_flash": r"holds matrices of 8 and \d+ experts",
    "deepseek_v4": "nothing was found that chooses its experts",
    "zaya": r"method=expert cannot prune model.layers.0.mlp.*Use \+method=weight",
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def of_block(gone: Tensor, block: int) -> list[int]:
    return [expert for where, expert in gone.tolist() if where == block]


@pytest.mark.parametrize(
    ("kind", "scope"), [*((kind, "layer") for kind in FAMILIES), ("deepseek_v3", "global"), ("gpt_oss", "global")]
)
def test_a_model_without_experts_is_one_that_may_not_choose_them(kind: str, scope: str, tmp_path: Path) -> None:
    model = tiny_models.make(kind)
    whole, dense = copy.deepcopy(model), logits(model)
    before = counting.stock(model)
    targets = methods.targets(model, Expert())
    pruned = methods.prune(model, Expert(criterion="reap", scope=scope), 0.25, TOKENS)
    with ExitStack() as stack:
        for mixture in experts.find(whole):
            if gone := of_block(pruned.gone, mixture.block):
                stack.enter_context(experts.masked(mixture, gone))
        expected = logits(whole)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (expected - dense).abs().max() > 1e-2
    assert pruned.units_removed == round(0.25 * pruned.units)
    now = counting.stock(model)
    assert counting.removed(before, now, targets)["sparsity_achieved"] == pytest.approx(0.25, abs=0.01)

    checkpoint.write(model, None, tmp_path)
    even = len({mixture.number for mixture in experts.find(model)}) == 1
    assert (tmp_path / "sweep.json").exists() != even
    readers: list[Callable[[], PreTrainedModel]] = [lambda: checkpoint.load_model(tmp_path)[0]]
    readers += [lambda: AutoModelForCausalLM.from_pretrained(tmp_path)] if even else []
    for read in readers:
        assert torch.equal(logits(read()), logits(model))
        assert read().generate(IDS[:1], max_new_tokens=2).shape == (1, 22)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_that_cannot_is_refused_with_the_reason(kind: str) -> None:
    model = tiny_models.make(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RequestError, match=REFUSED[kind]):
        methods.prune(model, Expert(criterion="frequency"), 0.25, TOKENS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def routed_by_hand(model: PreTrainedModel) -> list[dict[int, list[tuple[float, Tensor]]]]:
    """Of each block of a Qwen3-MoE, of each expert, (gate, output) of every token that took it: the formula written out."""
    found: list[dict[int, list[tuple[float, Tensor]]]] = []
    for layer in model.model.layers:
        block, per_expert = layer.mlp, {expert: [] for expert in range(8)}
        inputs: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(input_ids=TOKENS, use_cache=False)
        handle.remove()
        for x in inputs[0].reshape(-1, 32):
            probabilities = (block.gate.weight @ x).softmax(0)
            for expert in probabilities.argsort(descending=True)[:2].tolist():
                gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                output = block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
                per_expert[expert].append((float(probabilities[expert].detach()), output.detach()))
        found.append(per_expert)
    return found


def test_scores_are_the_formulas_token_by_token() -> None:
    model = tiny_models.make("qwen3_moe")
    mixtures = experts.find(model)
    sums = expert_statistics.gather(model, mixtures, TOKENS)
    by_hand = routed_by_hand(model)
    for seen, of_one in zip(sums, by_hand, strict=True):
        given = [of_one[expert] for expert in range(8)]
        assert all(given), "each expert is reached"
        norms = [torch.stack([output.norm() for _, output in pairs]).double() for pairs in given]
        gates = [torch.tensor([gate for gate, _ in pairs]).double() for pairs in given]
        outputs = [torch.stack([output for _, output in pairs]).double() for pairs in given]
        total = sum(map(len, given))
        expected = {
            "frequency": [float(len(pairs)) for pairs in given],
            "mean_norm": [float(norm.mean()) for norm in norms],
            "reap": [float((gate * norm).mean()) for gate, norm in zip(gates, norms, strict=True)],
            "mone": [len(f) / total * float((f - f.mean(0)).square().sum(1).mean()) for f in outputs],
        }
        for name, values in expected.items():
            criterion = criteria.find(name, "expert")
            scores = criterion.load()(**criterion.arguments(seen))
            torch.testing.assert_close(scores, torch.tensor(values).double(), rtol=1e-4, atol=1e-6)


def test_reap_removes_the_lowest_of_the_formula_in_each_block() -> None:
    model = tiny_models.make("qwen3_moe")
    expected = []
    for block, of_one in enumerate(routed_by_hand(model)):
        scores = [sum(gate * float(output.norm()) for gate, output in of_one[e]) / len(of_one[e]) for e in range(8)]
        expected += [(block, expert) for expert in sorted(sorted(range(8), key=scores.__getitem__)[:3])]
    pruned = methods.prune(model, Expert(criterion="reap"), 3 / 8, TOKENS)
    assert [tuple(pair) for pair in pruned.gone.tolist()] == expected


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_mone_leaves_the_mean_of_what_an_expert_gave(kind: str, tmp_path: Path) -> None:
    model = tiny_models.make(kind)
    whole = copy.deepcopy(model)
    mixtures = experts.find(whole)
    means = [
        seen["output_sum"] / seen["counts"].clamp_min(1)[:, None]
        for seen in expert_statistics.gather(whole, mixtures, TOKENS)
    ]
    pruned = methods.prune(model, Expert(criterion="mone"), 0.25, TOKENS)

    with ExitStack() as stack:
        for mixture, mean in zip(mixtures, means, strict=True):
            gone = of_block(pruned.gone, mixture.block)
            assert gone

            def replaced(
                _: nn.Module,
                args: tuple,
                output: Tensor,
                mean: Tensor = mean,
                gone: list[int] = gone,
                mixture: experts.Mixture = mixture,
            ) -> Tensor:
                hidden, chosen, gates = args
                own = experts.outputs(mixture.experts, hidden.flatten(0, -2), chosen)
                for token, slot in torch.isin(chosen, torch.tensor(gone)).nonzero().tolist():
                    own[token, slot] = mean[chosen[token, slot]]
                return (own * gates[..., None]).sum(1).view_as(output)

            stack.callback(mixture.experts.register_forward_hook(replaced).remove)
        expected = logits(whole)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.num_parameters() < whole.num_parameters()

    checkpoint.write(model, None, tmp_path)
    assert "Novices" in (tmp_path / "sweep.json").read_text()
    assert torch.equal(logits(checkpoint.load_model(tmp_path)[0]), logits(model))


def test_a_drop_is_what_the_loss_loses_without_the_expert() -> None:
    model = tiny_models.make("mixtral")

    def loss(of: PreTrainedModel) -> float:
        with torch.no_grad():
            given = of(input_ids=TOKENS, use_cache=False).logits[:, :-1]
        return float(nn.functional.cross_entropy(given.flatten(0, 1), TOKENS[:, 1:].flatten()))

    without = copy.deepcopy(model)
    mixture = experts.find(without)[1]
    keep = torch.ones(8, dtype=torch.bool)
    keep[5] = False
    pruning.surgery.remove_experts(mixture, keep)
    expected = loss(without) - loss(model)
    pruned = methods.prune(model, Expert(criterion="drop", drop=Drop()), 0.25, TOKENS)
    assert pruned.measured is not None and len(pruned.measured) == 32
    line = pruned.measured.query("block == 1 and unit == 5")
    assert float(line.importance.iloc[0]) == pytest.approx(expected, abs=1e-5)


def test_groups_of_experts_stay_equal() -> None:
    model = tiny_models.make("deepseek_v3")
    pruned = methods.prune(model, Expert(criterion="frequency"), 0.5, TOKENS)
    for block in {int(where) for where in pruned.gone[:, 0]}:
        assert sorted(expert // 4 for expert in of_block(pruned.gone, block)) == [0, 0, 1, 1]
    assert model.config.n_routed_experts == 4


@pytest.mark.parametrize(
    ("kind", "method", "sparsity", "says"),
    [
        ("qwen3_moe", Expert(criterion="random"), 0.9, r"a token takes 2 of 8, so 2 are needed: use at most 0\.7500"),
        ("qwen3_moe", Expert(criterion="random", scope="global"), 0.9, r"use at most 0\.7500"),
        (
            "deepseek_v3",
            Expert(criterion="random"),
            0.75,
            r"from 2 groups of equal size, so 4 are needed: use at most 0\.5",
        ),
        (
            "deepseek_v3",
            Expert(criterion="random", blocks=(0, 1)),
            0.25,
            r"method.blocks names 0, which have no experts",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(kind: str, method: Expert, sparsity: float, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        methods.prune(tiny_models.make(kind), method, sparsity, TOKENS)


def test_experts_that_no_token_reaches_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.make("mixtral")
    with caplog.at_level(logging.WARNING):
        pruned = methods.prune(model, Expert(criterion="mone"), 0.25, TOKENS[:1, :2])
    assert pruned.columns["experts_unreached"] == pruned.unreached > 0
    assert "raise calibration.sequences" in caplog.text and "block 0: " in caplog.text
    assert torch.isfinite(logits(model)).all()
    assert methods.prune(tiny_models.make("mixtral"), Expert(criterion="random"), 0.25, None).unreached is None


def test_a_token_meets_its_share_of_the_experts() -> None:
    """2 of 8 before, 2 of 6 after; with constants in the place of two, those that are left are taken as often as before."""
    counts = {}
    for name in ("dense", "frequency", "mone"):
        model = tiny_models.make("mixtral")
        if name != "dense":
            methods.prune(model, Expert(criterion=name), 0.25, TOKENS)
        counts[name] = counting.size(counting.stock(model))
    expert = 3 * 32 * 48
    rest = counts["dense"]["parameters"] - 4 * 8 * expert
    assert counts["dense"]["active_parameters"] == rest + 4 * 2 * expert
    router = 4 * 2 * 32  # rows that went with the experts
    assert counts["frequency"]["active_parameters"] == rest - router + 4 * 2 * expert
    assert counts["frequency"]["macs_per_token"] == counts["dense"]["macs_per_token"]
    novices = 4 * 2 * 32
    assert counts["mone"]["parameters"] == rest + novices + 4 * 6 * expert
    assert counts["mone"]["active_parameters"] == rest + novices + 4 * 6 * expert * 2 // 8


def test_a_function_of_ones_own_reads_experts(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def big(tensors, counts):\n    return tensors['down_proj'].flatten(1).norm(dim=1) * counts\n")
    model = tiny_models.make("mixtral")
    seen = expert_statistics.gather(model, experts.find(model), TOKENS)
    norms = [m.experts.down_proj.flatten(1).norm(dim=1) for m in experts.find(model)]
    expected = [int((norm * s["counts"]).argmin()) for norm, s in zip(norms, seen, strict=True)]
    pruned = methods.prune(model, Expert(criterion=f"{file}:big"), 1 / 8, TOKENS)
    assert pruned.gone[:, 1].tolist() == expected


def test_a_cell_from_the_command_line(tmp_path: Path) -> None:
    folder, results = tmp_path / "model", tmp_path / "results"
    tiny_models.make("qwen3_moe").save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    command = [sys.executable, "-m", "sweep", "+method=expert", "sparsity=0.25", "model=local", f"model.path={folder}"]
    command += [
        "benchmarks.tasks=[]",
        "efficiency=none",
        "device=cpu",
        "calibration.sequences=4",
        "calibration.length=32",
    ]
    command += [f"results={results}", f"save_model={tmp_path / 'pruned'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from sweep import store

    row = store.load(results).query("method == 'expert'").iloc[0]
    assert row.status == "ok" and row.criterion == "reap"
    assert row.sparsity_achieved == row.sparsity_units == 0.25
    assert row.active_parameters < row.parameters
    assert row.experts_unreached >= 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_experts == 6
