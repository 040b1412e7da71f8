"""Weight pruning: every criterion x selection x family meets its counts; masks and values against literal references."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import FAMILIES, GATED, random_tokens, tiny_model
from sweep import calibrate, saving, solver
from sweep.measuring import counting
from sweep.models import anatomy
from sweep.pruning import criteria, rebuild, select, weights
from sweep.pruning.criteria import Criterion
from sweep.pruning.families import Weight
from sweep.settings import RequestError
from sweep.solver import Choose

MOE = {
    "mixtral": {**GATED, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {**GATED, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2},
}
CRITERIA = criteria.names("weight")
READING = [c.name for c in criteria.declared("weight") if c.reads_text]
RANKING = [c for c in criteria.declared("weight") if not c.corrects_after]  # by scores that can be seen
SELECTIONS = [{"scope": "matrix"}, {"scope": "row"}, {"scope": "global"}, {"pattern": "2:4"}, {"pattern": "4:8"}]


@cache
def _made(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return tiny_model(family)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MOE[family], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make(family: str) -> PreTrainedModel:
    return copy.deepcopy(_made(family))


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    pairs = zip(anatomy.block_names(model), anatomy.blocks(model), strict=True)
    return {name: weight for prefix, block in pairs for name, weight in anatomy.matrices(block, prefix).items()}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(seed=1)).logits


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: next(iter(s.values())))
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
def test_counts_are_exact_and_nothing_else_is_touched(family: str, criterion: str, selection: dict) -> None:
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsity = 0.5 if "pattern" in selection else 0.3
    excluded = next(iter(matrices(model)))
    method = Weight("weight", criterion=criterion, exclude=(excluded,), **selection)
    pruned = weights.prune(model, method, sparsity, random_tokens())
    found = matrices(model)
    kept_out = found.pop(excluded)
    assert torch.equal(kept_out, matrices(make(family))[excluded])
    assert pruned.targets == sum(w.numel() for w in found.values())
    assert pruned.removed == select.count(pruned.targets, sparsity)
    assert sum(int((w == 0).sum()) for w in found.values()) == pruned.removed
    inside = {parameter.data_ptr() for block in anatomy.blocks(model) for parameter in block.parameters()}
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2 or tensor.data_ptr() not in inside or "router" in name or name.endswith("gate.weight"):
            assert torch.equal(tensor, before[name]), name
    for name, weight in found.items():
        zero = weight == 0
        if "pattern" in selection:
            n, m = map(int, selection["pattern"].split(":"))
            assert (zero.reshape(-1, m).sum(1) == m - n).all(), name
        elif selection["scope"] != "global":
            assert abs(int(zero.sum()) - 0.3 * weight.numel()) < 1, name
        if selection.get("scope") == "row":
            assert int(zero.sum(1).max() - zero.sum(1).min()) <= 1, name
    assert torch.isfinite(logits(model)).all()
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("family", MOE)
def test_pruned_experts_are_saved_and_give_equal_logits(
    family: str, criterion: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = make(family)
    weights.prune(model, Weight("weight", criterion=criterion), 0.5, random_tokens())
    facts = {"method": {"family": "weight", "criterion": criterion}, "sparsity": 0.5, "calibration": None}
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", facts)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model))
    for name, weight in matrices(again).items():
        assert torch.equal(weight, matrices(model)[name]), name


def test_a_token_multiplies_by_the_experts_that_it_goes_through() -> None:
    model = make("mixtral")  # 2 blocks, hidden 16, 3 experts of 24 neurons of which a token takes 2
    attention = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16)
    counts = counting.size(counting.stock(model))
    assert counts["macs_per_token"] == attention + 2 * 2 * (3 * 16 * 24) + 64 * 16
    weights.prune(model, Weight("weight", targets="ffn"), 0.5)
    assert counting.size(counting.stock(model))["nonzero_macs_per_token"] == attention + 2 * (3 * 16 * 24) + 64 * 16


def literal_norms(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """||x|| of what every linear layer reads, by running the whole model and keeping everything."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if name in matrices(model)
    ]
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).norm(dim=0) for name, xs in seen.items()}


def literal_wanda(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    """The paper's formula and its per-output sort; True = keep."""
    keep = torch.ones_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        metric = weight[row].abs() * norm
        keep[row, metric.sort(stable=True).indices[: round(sparsity * weight.shape[1])]] = False
    return keep


@pytest.mark.parametrize("sequential", [False, True])
def test_wandas_masks_are_those_of_a_literal_implementation(family: str, sequential: bool) -> None:
    tokens, literal, pruned = random_tokens(), make(family), make(family)
    weights.prune(pruned, Weight("weight", criterion="wanda"), 0.5, tokens, sequential=sequential)
    masks = {}
    if sequential:  # block after block, each on the text as the pruned blocks before it leave it
        for block in anatomy.block_names(literal):
            norms = literal_norms(literal, tokens)
            for name, weight in matrices(literal).items():
                if name.startswith(f"{block}."):
                    masks[name] = literal_wanda(weight, norms[name], 0.5)
                    weight.masked_fill_(~masks[name], 0)
    else:
        norms = literal_norms(literal, tokens)
        masks = {name: literal_wanda(weight, norms[name], 0.5) for name, weight in matrices(literal).items()}
    for name, weight in matrices(pruned).items():
        assert torch.equal(weight != 0, masks[name]), name


@pytest.mark.parametrize("criterion", [c for c in RANKING if not c.draws], ids=lambda c: c.name)
@pytest.mark.parametrize("scope", ["matrix", "row", "global"])
def test_kept_scores_are_at_least_the_dropped_ones(criterion: Criterion, scope: str) -> None:
    model, tokens = make("llama"), random_tokens()
    seen = {
        "weight": {name: weight.clone() for name, weight in matrices(model).items()},
        "input_norm": literal_norms(model, tokens),
        "gradient_norm": calibrate.gradient_norms(model, tokens, matrices(model)),
    }
    function = criterion.load()
    importance = {name: function(**{what: seen[what][name] for what in criterion.reads}) for name in seen["weight"]}
    weights.prune(model, Weight("weight", criterion=criterion.name, scope=scope), 0.4, tokens, sequential=False)
    parts = [(importance[name], weight != 0) for name, weight in matrices(model).items()]
    if scope == "global":
        parts = [(torch.cat([s.flatten() for s, _ in parts]), torch.cat([k.flatten() for _, k in parts]))]
    elif scope == "row":
        parts = [(row, keep) for s, k in parts for row, keep in zip(s, k, strict=True)]
    for importance_here, keep in parts:
        assert importance_here[keep].min() >= importance_here[~keep].max() * (1 - 1e-5)


def test_gradients_are_the_literal_ones(family: str) -> None:
    model, tokens = make(family), random_tokens(1)
    views = matrices(model)
    found = calibrate.gradient_norms(model, tokens, views)
    out = model(input_ids=tokens).logits[:, :-1]
    (-out.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum()).backward()
    for name, module in model.named_modules():
        if name in views:
            gradient = module.weight.grad.t() if views[name].stride(0) == 1 else module.weight.grad
            torch.testing.assert_close(found[name], gradient.abs(), rtol=1e-4, atol=1e-6)


def test_gradients_of_several_sequences_do_not_cancel() -> None:
    model, tokens = make("llama"), random_tokens(3)
    views = matrices(model)
    alone = [calibrate.gradient_norms(model, sequence[None], views) for sequence in tokens]
    together = calibrate.gradient_norms(model, tokens, views)
    for name, norms in together.items():
        torch.testing.assert_close(norms, torch.stack([one[name] for one in alone]).norm(dim=0))


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=draw, dtype=torch.float64) / columns**0.5 + x
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), x.t() @ x


def literal_sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """The optimal-brain-surgeon steps of the paper with an explicit inverse for each column, float64."""
    weight, columns = weight.clone(), weight.shape[1]
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    size = torch.stack([inverse[0, 0] for inverse in inverses])
    removed = select.count(weight.numel(), sparsity)
    for j in range(columns):
        if pattern is None and j % 128 == 0:
            end = min(j + 128, columns)
            go = round(removed * end / columns) - round(removed * j / columns)
            metric = weight[:, j:end] ** 2 / size[j:end]
            mask = torch.zeros(metric.numel(), dtype=torch.bool)
            mask[metric.flatten().sort(stable=True).indices[:go]] = True
            mask, first = mask.view_as(metric), j
        elif pattern is not None and j % pattern[1] == 0:
            metric = weight[:, j : j + pattern[1]] ** 2 / size[j : j + pattern[1]]
            mask = torch.zeros_like(metric, dtype=torch.bool)
            mask.scatter_(1, metric.sort(dim=1, stable=True).indices[:, : pattern[1] - pattern[0]], True)
            first = j
        error = torch.where(mask[:, j - first], weight[:, j], 0.0) / inverses[j][0, 0]
        weight[:, j:] -= torch.outer(error, inverses[j][0])
        weight[:, j] = torch.where(mask[:, j - first], 0.0, weight[:, j])
    return weight


def chooser(method: Weight, weight: Tensor, sparsity: float) -> Choose:
    return weights._choose(method, select.count(weight.numel(), sparsity))


@pytest.mark.parametrize("pattern", [None, "2:4", "1:3"])
@pytest.mark.parametrize("columns", [24, 48, 288])
def test_sparsegpt_agrees_with_a_literal_dense_algebra_reference(pattern: str | None, columns: int) -> None:
    weight, hessian = problem(8, columns)
    m = int(pattern[-1]) if pattern else 1
    sparsity = 0.5 if m == 1 else 1 - int(pattern[0]) / m
    pair = (int(pattern[0]), m) if pattern else None
    expected = literal_sparsegpt(weight, hessian, sparsity, pair)
    choose = chooser(Weight("weight", pattern=pattern), weight, sparsity)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        ((values, keep),), damping = rebuild.sparsegpt([weight.to(dtype)], hessian.to(dtype), [choose], 0.01, m=m)
        assert damping == 0.01
        assert torch.equal(keep, expected != 0)
        torch.testing.assert_close(values.double(), expected, rtol=tolerance, atol=tolerance)


def test_matrices_with_one_input_are_solved_as_if_alone() -> None:
    weight, hessian = problem(12, 32)
    choose = [chooser(Weight("weight"), part, 0.5) for part in weight.split([8, 4])]
    for solve in (rebuild.sparsegpt, rebuild.alps):
        alone = [solve([part], hessian, [c], 0.01)[0][0] for part, c in zip(weight.split([8, 4]), choose, strict=True)]
        together, _ = solve(list(weight.split([8, 4])), hessian, choose, 0.01)
        if solve is rebuild.sparsegpt:  # the penalty of ADMM follows all rows together
            for (a, mask_a), (b, mask_b) in zip(alone, together, strict=True):
                assert torch.equal(mask_a, mask_b)
                torch.testing.assert_close(a, b)
        assert [int((~keep).sum()) for _, keep in together] == [128, 64]


def error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    return float(((values - weight) @ hessian * (values - weight)).sum())


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_alps_leaves_less_error_than_sparsegpt(pattern: str | None) -> None:
    for seed in range(3):
        weight, hessian = problem(32, 64, seed)
        method = Weight("weight", pattern=pattern)
        choose, m = chooser(method, weight, 0.5), 4 if pattern else 1
        solved = (
            rebuild.alps([weight], hessian, [choose], 0.01),
            rebuild.sparsegpt([weight], hessian, [choose], 0.01, m=m),
        )
        left = [error(weight, found[0][0][0], hessian) for found in solved]
        assert left[0] < 0.95 * left[1]


def test_the_refit_is_the_least_squares_solution_on_the_support() -> None:
    weight, hessian = problem(6, 20)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found = weight * keep
    for _ in range(4):  # restarts, to converge
        found = rebuild.solve_on_support(found, keep, weight @ hessian, hessian)
    for row in range(6):
        on = keep[row].nonzero().squeeze(1)
        exact = torch.linalg.solve(hessian[on][:, on], (weight[row] @ hessian)[on])
        torch.testing.assert_close(found[row, on], exact, rtol=1e-5, atol=1e-6)
        assert not found[row, ~keep[row]].any()


def test_a_hessian_that_is_not_positive_definite_is_damped_further_and_reported() -> None:
    weight, _ = problem(4, 8)
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # lowest eigenvalue -0.05
    (_, damping) = rebuild.sparsegpt([weight], hessian, [chooser(Weight("weight"), weight, 0.5)], 0.01)
    assert damping == pytest.approx(0.1)
    with pytest.raises(ValueError, match="the calibration activations are not finite"):
        solver.damped(torch.full((4, 4), torch.nan), 0.01)
    with pytest.raises(ValueError, match="not positive definite even with"):
        solver.damped(torch.tensor([[1.0, 5000.0], [5000.0, 1.0]]), 0.01)


@pytest.mark.parametrize("criterion", READING)
def test_features_that_are_never_active_do_no_harm(criterion: str) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3:6] = 0  # the first block's attention never hears these
    weights.prune(model, Weight("weight", criterion=criterion), 0.5, random_tokens())
    assert torch.isfinite(logits(model)).all()


def test_nan_and_infinity_are_named_with_their_layer_and_nothing_is_pruned() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    before = matrices(model)["model.layers.0.mlp.up_proj"].clone()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: 1 of 384 weights are NaN or infinite"):
        weights.prune(model, Weight("weight"), 0.5)
    assert torch.equal(matrices(model)["model.layers.0.mlp.up_proj"], before)
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate_proj: .* activations .* not finite"):
        weights.prune(model, Weight("weight", criterion="wanda"), 0.5, random_tokens())


@pytest.mark.parametrize("criterion", READING)
def test_what_an_earlier_step_removed_stays_removed(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros: list[dict[str, Tensor]] = []
    step = weights._prune_to

    def watched(job: weights.Job, share: float) -> tuple[int, float | None]:
        result = step(job, share)
        zeros.append({name: weight == 0 for name, weight in job.weights().items()})
        return result

    monkeypatch.setattr(weights, "_prune_to", watched)
    pruned = weights.prune(make("llama"), Weight("weight", criterion=criterion, steps=3), 0.6, random_tokens())
    assert len(zeros) == 3 and pruned.sparsity == pytest.approx(0.6, abs=1e-3)
    for early, late in itertools.pairwise(zeros):
        assert sum(int(z.sum()) for z in early.values()) < sum(int(z.sum()) for z in late.values())
        assert all((late[name] | ~early[name]).all() for name in early)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_allocations_meet_one_total_and_their_blocks(criterion: str) -> None:
    totals = set()
    for allocation in ("uniform", "global", "owl", (0.3, 0.5)):
        model = make("llama")
        method = Weight("weight", criterion=criterion, allocation=allocation)
        pruned = weights.prune(model, method, 0.4, random_tokens())
        totals.add(pruned.removed)
        if isinstance(allocation, tuple):
            for share, prefix in zip(allocation, anatomy.block_names(model), strict=True):
                block = [w for name, w in matrices(model).items() if name.startswith(prefix)]
                removed = sum(int((w == 0).sum()) for w in block)
                assert removed == pytest.approx(share * sum(w.numel() for w in block), abs=len(block))
    assert len(totals) == 1


def test_owl_spares_the_block_with_more_outliers() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 0] *= 100
    weights.prune(model, Weight("weight", criterion="wanda", allocation="owl"), 0.5, random_tokens())
    removed = [
        sum(int((w == 0).sum()) for n, w in matrices(model).items() if n.startswith(b))
        for b in anatomy.block_names(model)
    ]
    total = sum(w.numel() for w in matrices(model).values()) / 2
    assert removed[0] - removed[1] == pytest.approx(2 * 0.08 * total, rel=0.02)  # the two ends of the range


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("parts", [{"embeddings": True}, {"lm_head": True}, {"embeddings": True, "lm_head": True}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # untied, tied
def test_embeddings_and_head_on_request(family: str, parts: dict, criterion: str) -> None:
    model, dense = make(family), make(family)
    pruned = weights.prune(model, Weight("weight", criterion=criterion, **parts), 0.5, random_tokens())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family == "gpt2")
    blocks = sum(w.numel() for w in matrices(model).values())
    size = model.get_input_embeddings().weight.numel()
    assert pruned.targets == blocks + size * (1 if tied else len(parts))
    for asked, embedding in (
        (parts.get("embeddings"), "get_input_embeddings"),
        (parts.get("lm_head"), "get_output_embeddings"),
    ):
        weight, before = getattr(model, embedding)().weight, getattr(dense, embedding)().weight
        changed = asked or tied
        assert torch.equal(weight, before) != bool(changed)
        if changed:
            assert int((weight == 0).sum()) >= size // 2


def test_sequential_or_not_is_what_the_blocks_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    inputs_of = calibrate.inputs_of
    monkeypatch.setattr(
        calibrate, "inputs_of", lambda text, *a, **k: (read.append(text.hidden[0].clone()), inputs_of(text, *a, **k))[1]
    )
    for sequential in (True, False):
        weights.prune(make("llama"), Weight("weight", criterion="wanda"), 0.9, random_tokens(), sequential=sequential)
    dense = make("llama")
    with torch.no_grad():
        hidden = dense(input_ids=random_tokens()[:4], output_hidden_states=True).hidden_states
    torch.testing.assert_close(read[3], hidden[1])
    assert not torch.allclose(read[1], hidden[1], atol=1e-3)
    assert torch.equal(read[0], read[2])


@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
def test_a_block_that_is_left_after_its_last_layer_has_told_the_same(family: str) -> None:
    model = make(family)
    block, name = anatomy.blocks(model)[0], anatomy.block_names(model)[0]
    found, ended = [], []
    for advance in (True, False):
        text = calibrate.enter(model, random_tokens())
        counting = block.register_forward_hook(lambda *_, advance=advance: ended.append(advance))
        found.append(calibrate.inputs_of(text, 0, block, name, hessian=True, advance=advance))
        counting.remove()
    assert ended == [True, True, False]  # the first of two batches runs to its end
    whole, left = found
    assert whole.keys() == left.keys() == anatomy.matrices(block, name).keys()
    for matrix, inputs in whole.items():
        assert left[matrix].tokens == inputs.tokens
        assert torch.equal(left[matrix].norm, inputs.norm)
        assert torch.equal(left[matrix].hessian, inputs.hessian)


@pytest.mark.parametrize("width", [3, 256, 300, 1100])  # one strip, several, more than fit evenly
def test_a_hessian_summed_in_strips_is_the_product_of_the_inputs(width: int) -> None:
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    inputs = calibrate.Inputs.none(width, x.device, hessian=True)
    inputs.add(x[0])
    inputs.add(x[1])
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(inputs.hessian, (rows.t() @ rows).float())
    torch.testing.assert_close(inputs.norm, rows.norm(dim=0).float())


def test_blocks_visit_the_device_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, there, most = make("llama"), set(), 0
    blocks = list(anatomy.blocks(model))
    move = torch.nn.Module.to

    def to(module: torch.nn.Module, place: object) -> torch.nn.Module:
        nonlocal most
        if module in blocks:
            (there.add if place == torch.device("cpu:0") else there.discard)(module)
            most = max(most, len(there))
        return move(module, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    weights.prune(model, Weight("weight", criterion="sparsegpt"), 0.5, random_tokens(), device="cpu:0")
    assert most == 1 and not there


def test_random_masks_follow_the_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        model = make("llama")
        weights.prune(model, Weight("weight", criterion="random"), 0.5, seed=seed)
        masks.append(torch.cat([(w != 0).flatten() for w in matrices(model).values()]))
    assert torch.equal(masks[0], masks[1])
    assert 0.4 < float((masks[0] == masks[2]).float().mean()) < 0.6


def test_an_unlisted_decoder_is_pruned_by_any_criterion() -> None:
    for criterion in CRITERIA:
        model = make("llama")
        model.config.model_type = "novel"
        assert weights.prune(model, Weight("weight", criterion=criterion), 0.5, random_tokens()).sparsity == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"exclude": ("*.nothing",)},
            r"method.exclude=\*.nothing matches none of the matrices, such as model.layers.0",
        ),
        ({"exclude": ("*",)}, "leaves nothing to prune"),
        (
            {"pattern": "2:5", "sparsity": 0.6},
            "method.pattern=2:5 needs input dimensions divisible by 5, but .* has 16",
        ),
        ({"pattern": "2:4", "sparsity": 0.6}, "method.pattern=2:4 removes exactly 0.5: set sparsity=0.5"),
        ({"pattern": "4:2"}, "method.pattern must be n:m with 0 < n < m, such as 2:4; got '4:2'"),
        ({"pattern": "2:4", "allocation": "owl"}, "method.allocation=owl has no meaning with method.pattern=2:4"),
        ({"pattern": "2:4", "scope": "row"}, "method.scope=row has no meaning with method.pattern"),
        ({"allocation": (0.5,)}, "method.allocation lists 1 sparsities; the model has 2 blocks"),
        ({"allocation": (0.5, 0.9)}, "have the mean 0.7: set sparsity=0.7"),
        ({"allocation": (-0.5, 1.5)}, r"a sparsity for each block, in \[0, 1\]"),
        ({"scope": "global", "allocation": "owl"}, "method.scope=global decides what each block loses"),
        ({"criterion": "wanda", "scope": "global", "embeddings": True}, "method.embeddings=true with a global rank"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_changed(changes: dict, message: str) -> None:
    model = make("llama")
    sparsity = changes.pop("sparsity", 0.5)
    with pytest.raises(RequestError, match=message):
        weights.prune(model, Weight("weight", **changes), sparsity, random_tokens())
    assert all((w != 0).all() for w in matrices(model).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"pattern": "2:5"}, "sparsity": 0.6}, "method.pattern=2:5 needs .* the model's hidden_size is 16"),
        ({"method": {"allocation": [0.5, 0.5, 0.5]}}, "method.allocation lists 3 sparsities; the model has 2 blocks"),
        (
            {"method": {"exclude": ["*.nothing"]}},
            r"method.exclude=\*.nothing matches none of the matrices, such as model",
        ),
        (
            {"method": {"pattern": "2:5", "exclude": ["*.0.*"]}, "sparsity": 0.6},
            "input dimensions divisible by 5, but model.layers.1.self_attn.q_proj has 16",
        ),
        (
            {"method": {"criterion": "wanda"}, "calibration": {"source": "pydoc", "sequences": 10**6}},
            "calibration.source=pydoc has .* bytes, which cannot give 1000000 sequences of 256 tokens",
        ),
    ],
)
def test_what_the_configuration_tells_is_refused_before_a_model_loads(
    changes: dict, message: str, tiny_checkpoint: Path
) -> None:
    from sweep import plan

    asked = {
        "model": {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)},
        "sparsity": 0.5,
        "benchmarks": {"tasks": ["pydoc"]},
        "calibration": {"source": "pydoc"},
        "efficiency": {},
        "execution": {},
        "perplexity": {},
        "device": "cpu",
    }
    with pytest.raises(RequestError, match=message):
        plan.prepare({**asked, **changes, "method": {"family": "weight", **changes["method"]}})


@pytest.mark.parametrize("criterion", [c.name for c in RANKING])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_bands_of_the_smaller_half_are_disjoint_and_together_the_half(criterion: str, scope: str) -> None:
    def zeros(sparsity: float, skip: float, what: str = criterion) -> dict[str, Tensor]:
        model = make("llama")
        method = Weight("weight", criterion=what, scope=scope, among_smallest=0.5, skip_lowest=skip)
        pruned = weights.prune(model, method, sparsity, random_tokens(), sequential=False)
        assert pruned.removed == select.count(pruned.targets, sparsity)
        return {name: weight == 0 for name, weight in matrices(model).items()}

    bands = [zeros(0.125, skip) for skip in (0.0, 0.125, 0.25, 0.375)]  # every matrix has a multiple of 8 weights a row
    half = zeros(0.5, 0.0, "magnitude")
    for name, whole in half.items():
        assert torch.equal(sum(band[name].int() for band in bands), whole.int()), name


def test_a_band_is_the_middle_of_the_order_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, importance = (torch.randn(6, 10, generator=generator) for _ in range(2))
    method = Weight("weight", criterion="wanda", scope="matrix", among_smallest=0.5, skip_lowest=0.1)
    gone = (~weights.keep_mask(method, weight, importance, 12)).flatten().nonzero().squeeze(1).tolist()
    smaller = weight.abs().flatten().argsort()[:30].tolist()
    assert sorted(sorted(smaller, key=lambda i: float(importance.flatten()[i]))[6:18]) == gone
