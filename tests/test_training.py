"""Recovery by training: what was removed stays so to the bit, what is left learns, and the same is done twice alike."""

from __future__ import annotations

import copy
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sweep
import tiny_models
from conftest import random_tokens, tiny_model
from sweep import cache, isolate, plan, run
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model
from sweep.execution import prepare
from sweep.isolate import Limits
from sweep.measuring import counting
from sweep.models import anatomy, checkpoint, loading, surgery
from sweep.models.adapted import Adapted
from sweep.models.logits import Tail
from sweep.pruning.families import Weight
from sweep.pruning.masks import Masks
from sweep.quantization.forms import Quantize
from sweep.recovery import adapters, distillation, kinds, training
from sweep.recovery.kinds import Recover
from sweep.recovery.training import Budget, Objective
from sweep.settings import RequestError, build

BUDGET = Budget(steps=6, batch=3, learning_rate=1e-2)
Run = Callable[..., list[float]]


def lora(model: PreTrainedModel, tokens: Tensor, objective: Objective, budget: Budget = BUDGET, masks=None, **more):
    return adapters.train_adapters(model, tokens, objective, budget, masks, **{"rank": 4, **more})


RECOVER: dict[str, Run] = {"lora": lora, "distill": distillation.train_weights}


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def family(request: pytest.FixtureRequest) -> str:
    """Gated FFNs; layers that are stored (in, out), and have biases; logits that are capped."""
    return request.param


@pytest.fixture(params=RECOVER)
def recover(request: pytest.FixtureRequest) -> Run:
    found = RECOVER[request.param]
    return lambda *args, **more: found(*args, **({"budget": BUDGET} | more))


def pruned(model: PreTrainedModel) -> Masks:
    """Half of each matrix is gone, by magnitude."""
    masks = Masks()
    for name, matrix in anatomy.all_matrices(model).items():
        masks[name] = matrix.abs() > matrix.abs().median()
        surgery.zero_weights(matrix, masks[name])
    return masks


def cut(model: PreTrainedModel) -> PreTrainedModel:
    """Neurons and heads are gone, of the two blocks unequally many."""
    for method, share in (("neuron", 0.3), ("head", 0.5)):
        sweep.prune(model, tiny_models.tokenizer(), method=method, sparsity=share, criterion="random", scope="layer")
    return model


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: PreTrainedModel, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_removed_stays_so_and_all_else_is_as_it_was_but_the_matrices(
    family: str, recover: Run, dtype: torch.dtype
) -> None:
    model = tiny_model(family).to(dtype)
    masks, before = pruned(model), state(model)
    tokens = random_tokens(3)
    recover(model, tokens, training.next_token(tokens), masks=masks)
    matrices = anatomy.all_matrices(model)
    for name, keep in masks.items():
        assert not matrices[name][~keep].count_nonzero() and matrices[name].dtype == dtype
        assert (matrices[name] != 0).sum() >= 0.99 * keep.sum()  # which weights are gone is all that is
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in matrices} and before.keys() == model.state_dict().keys()
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_the_loss_on_the_training_text_falls(family: str, recover: Run) -> None:
    model, tokens = tiny_model(family), random_tokens(3)
    masks, objective = pruned(model), training.next_token(tokens)
    before = training.mean_loss(model, tokens, objective)
    done = recover(model, tokens, objective, masks=masks, budget=replace(BUDGET, steps=40))
    assert training.mean_loss(model, tokens, objective) < before - 0.1
    assert done[0] == pytest.approx(before, rel=1e-4) and done[-1] < done[0]


def test_the_mean_loss_is_what_transformers_says(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(3)
    expected = model(input_ids=tokens, labels=tokens).loss.item()
    assert training.mean_loss(model, tokens, training.next_token(tokens)) == pytest.approx(expected, rel=1e-5)


def test_a_step_is_one_of_adam_along_the_gradient_of_the_kept_weights() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2)
    masks, before = pruned(model), copy.deepcopy(model)
    budget = Budget(steps=1, batch=2, learning_rate=1e-2, schedule="constant", warmup=0)
    distillation.train_weights(model, tokens, training.next_token(tokens), budget, masks)
    before(input_ids=tokens, labels=tokens).loss.backward()
    for name, keep in masks.items():
        gradient = before.get_submodule(name).weight.grad * keep
        moved = model.get_submodule(name).weight.detach() - before.get_submodule(name).weight.detach()
        clear = gradient.abs() > 1e-4  # of smaller ones Adam's epsilon is a part
        torch.testing.assert_close(moved[clear], -1e-2 * gradient[clear].sign(), rtol=1e-2, atol=0)


def test_the_same_training_twice_gives_the_same_and_another_seed_does_not(recover: Run) -> None:
    tokens, found = random_tokens(5), []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        recover(model, tokens, training.next_token(tokens), masks=pruned(model), seed=seed)
        found.append(model)
    assert same(found[0], state(found[1])) and not same(found[0], state(found[2]))


@pytest.mark.parametrize("merge", [True, False])
def test_a_killed_run_goes_on_to_the_same_weights(
    recover: Run, merge: bool, tmp_path: Path, request: pytest.FixtureRequest, every_state_is_written: None
) -> None:
    if not merge and "distill" in request.node.name:
        pytest.skip("has no adapters")
    more = {} if merge else {"merge": False}
    tokens, file = random_tokens(5), tmp_path / "of_a_cell" / "state"
    objective = training.next_token(tokens)
    whole = tiny_model("llama")
    recover(whole, tokens, objective, masks=pruned(whole), **more)

    seen = 0

    def killed(number: int) -> training.Loss:
        nonlocal seen
        seen += 1
        if seen > 3 * BUDGET.batch:
            raise KeyboardInterrupt
        return objective(number)

    half = tiny_model("llama")
    masks = pruned(half)
    with pytest.raises(KeyboardInterrupt):
        recover(half, tokens, killed, masks=masks, state=file, **more)
    assert file.exists()
    again = tiny_model("llama")
    done = recover(again, tokens, objective, masks=pruned(again), state=file, **more)
    assert same(again, state(whole)) and len(done) == BUDGET.steps and not file.exists()


def test_a_loss_that_is_no_number_is_refused(recover: Run) -> None:
    model, tokens = tiny_model("llama"), random_tokens(3)
    with pytest.raises(
        RequestError, match=r"the loss is (nan|inf) at step \d of 6.*lower recover.learning_rate, which is"
    ):
        recover(model, tokens, training.next_token(tokens), budget=replace(BUDGET, learning_rate=1e20))
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="a weight is no number after the last step.*lower recover.learning_rate"):
        recover(model, tokens, training.next_token(tokens), budget=Budget(1, 1, math.inf, "constant", 0))


def test_every_sequence_is_read_before_any_comes_again() -> None:
    found = training.order(5, 12, seed=3)
    assert len(found) == 12 and sorted(found[:5]) == sorted(found[5:10]) == list(range(5))
    assert found == training.order(5, 12, seed=3) != training.order(5, 12, seed=4)


# ---- distillation ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_towards_the_dense_model_is_its_divergence(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, other, tokens = tiny_model("llama"), tiny_model("llama", seed=1), random_tokens(2)

    def log_probs(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return (model(input_ids=tokens).logits[:, :-1] / temperature).log_softmax(-1)

    p, q = log_probs(dense), log_probs(other)
    whole = float((p.exp() * (p - q)).sum(-1).mean()) * temperature**2
    teacher = distillation.distributions(dense, tokens, temperature)
    assert teacher.ids.shape == (2, 11, 64)  # all that the vocabulary has
    assert training.mean_loss(other, tokens, distillation.towards(teacher, temperature)) == pytest.approx(whole, 1e-4)

    monkeypatch.setattr(distillation, "TOP", 5)
    teacher = distillation.distributions(dense, tokens, temperature)
    assert teacher.ids.shape == (2, 11, 5)
    merged = training.mean_loss(other, tokens, distillation.towards(teacher, temperature))
    assert 0 < merged < whole  # outcomes that are merged are told apart no more
    assert training.mean_loss(dense, tokens, distillation.towards(teacher, temperature)) == pytest.approx(0, abs=1e-5)
    rest = torch.cat([p.topk(5).values, (1 - p.topk(5).values.exp().sum(-1, keepdim=True)).log()], -1)
    of_q = q.gather(-1, p.topk(5).indices)
    of_q = torch.cat([of_q, (1 - of_q.exp().sum(-1, keepdim=True)).log()], -1)
    assert merged == pytest.approx(float((rest.exp() * (rest - of_q)).sum(-1).mean()) * temperature**2, rel=1e-3)


def test_distilled_a_model_comes_nearer_to_the_dense_one(recover: Run) -> None:
    model, tokens = tiny_model("llama"), random_tokens(6)
    objective = distillation.towards(distillation.distributions(model, tokens))
    masks = pruned(model)
    before = training.mean_loss(model, tokens, objective)
    recover(model, tokens, objective, masks=masks, budget=replace(BUDGET, steps=20))
    assert training.mean_loss(model, tokens, objective) < 0.8 * before


def test_embeddings_norms_and_biases_are_trained_where_asked() -> None:
    model = tiny_model("gpt2")
    matrices = {f"{name}.weight" for name in anatomy.all_matrices(model)}

    def beside(**asked: bool) -> set[str]:
        return distillation.trainable(model, **asked).keys() - matrices

    assert beside() == set()
    assert beside(embeddings=True) == {"transformer.wte.weight"}  # which the head shares
    norms = {
        f"{name}.{part}"
        for name in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f")
        for part in ("weight", "bias")
    }
    assert beside(norms=True) == {f"transformer.{name}" for name in norms}
    assert beside(biases=True) == {name.removesuffix("weight") + "bias" for name in matrices}
    tokens, before = random_tokens(3), state(model)
    distillation.train_weights(model, tokens, training.next_token(tokens), BUDGET, norms=True, biases=True)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == matrices | beside(norms=True, biases=True)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_are_distilled_under_their_masks(kind: str) -> None:
    model, tokens = tiny_models.make(kind), random_tokens(3)
    objective = training.next_token(tokens)
    masks, before = pruned(model), training.mean_loss(model, tokens, objective)
    distillation.train_weights(model, tokens, objective, BUDGET, masks)
    matrices = anatomy.all_matrices(model)
    assert not any(matrices[name][~keep].count_nonzero() for name, keep in masks.items())
    assert training.mean_loss(model, tokens, objective) < before


# ---- adapters ----


def test_adapters_of_fused_experts_are_refused() -> None:
    model, tokens = tiny_models.make("qwen3_moe"), random_tokens(3)
    with pytest.raises(
        RequestError, match=r"matrices of Qwen3Moe\w+, such as .*experts.*, are in none: use recover=distill"
    ):
        lora(model, tokens, training.next_token(tokens))


def test_a_rank_larger_than_a_matrix_is_refused_without_weights(family: str) -> None:
    with torch.device("meta"):
        model = type(tiny_model(family))(tiny_model(family).config)
    smallest = min(min(matrix.shape) for matrix in anatomy.all_matrices(tiny_model(family)).values())
    adapters.check_rank(model, smallest)
    with pytest.raises(
        RequestError, match=rf"recover.rank={smallest + 1} is more than .* use at most {smallest}, or train"
    ):
        adapters.check_rank(model, smallest + 1)


@pytest.mark.parametrize("changed", [lambda model: model, cut], ids=["whole", "cut"])
def test_merged_adapters_give_what_they_give_apart(
    family: str, changed: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    tokens, found = random_tokens(3), []
    for merge in (True, False):
        model = changed(tiny_model(family))
        lora(model, tokens, training.next_token(tokens), merge=merge)
        with torch.no_grad():
            found.append(model(input_ids=tokens).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_is_merged_under_a_mask_is_what_was_trained(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(3)
    objective, masks = training.next_token(tokens), pruned(model)
    budget = Budget(steps=7, batch=3, learning_rate=1e-2, schedule="constant", warmup=0)
    last = lora(copy.deepcopy(model), tokens, objective, budget, masks)[-1]  # before the seventh step
    lora(model, tokens, objective, replace(budget, steps=6), masks)
    assert training.mean_loss(model, tokens, objective) == pytest.approx(last, rel=1e-5)


def test_the_gradient_under_a_mask_is_autograds() -> None:
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((2, 3, 5), (4, 5), (2, 5), (4, 2)))
    mask = torch.rand(4, 5) > 0.5
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: adapters._Masked.apply(x, weight, mask, a, b), (x, a, b))


def adapted_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, tokens = tiny_model(family).to(dtype), random_tokens(3)
    lora(model, tokens, training.next_token(tokens), masks=pruned(model), merge=False)
    return model


def test_adapters_apart_are_counted(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(3)
    before, matrices = counting.stock(model), anatomy.all_matrices(model)
    lora(model, tokens, training.next_token(tokens), masks=pruned(model), merge=False)
    after = counting.stock(model)
    were, are = counting.size(before), counting.size(after)
    more = sum(4 * sum(matrix.shape) for matrix in matrices.values())  # of rank 4
    for name in ("parameters", "macs_per_token"):
        assert are[name] == were[name] + more
    for name in ("weights_bytes", "stored_bytes"):
        assert are[name] == were[name] + 4 * more
    assert counting.removed(before, after, matrices)["sparsity_achieved"] == pytest.approx(0.5, abs=0.01)
    assert anatomy.all_matrices(model).keys() == matrices.keys()  # adapters are none to prune or quantise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_apart_are_saved_and_reloaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = adapted_model(family, dtype), random_tokens(2)
    assert not checkpoint.is_plain(model)
    checkpoint.write(model, None, tmp_path)
    again, _ = checkpoint.load_model(tmp_path)
    assert same(again, state(model))
    with torch.no_grad():
        rough = 1e-5 if dtype == torch.float32 else 1e-2  # where tensors lie decides in which order products are summed
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(again(input_ids=tokens).logits, expected, rtol=rough, atol=rough)


@pytest.mark.parametrize("name", ["bitmap", "csr"])
def test_adapters_apart_run_beside_packed_matrices(name: str, family: str) -> None:
    model, tokens = adapted_model(family), random_tokens(2)
    counted = counting.size(counting.stock(model))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        packed, _ = prepare(copy.deepcopy(model), Execution(name, fallback=True))
        torch.testing.assert_close(packed(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    held = counting.size(counting.stock(packed))
    assert held["parameters"] == counted["parameters"] and held["macs_per_token"] == counted["macs_per_token"]


def test_the_head_and_the_states_of_a_tail_stay_the_models_while_adapters_are_in_it() -> None:
    model, tokens = tiny_model("gemma2"), random_tokens(2)  # whose logits are capped
    tail = Tail(model)
    assert tail.is_split
    done = lora(model, tokens, training.next_token(tokens), replace(BUDGET, batch=2))
    assert done[0] == pytest.approx(float(tiny_model("gemma2")(input_ids=tokens, labels=tokens).loss), rel=1e-4)


# ---- as kinds of the stage ----

FEW = {"steps": 3, "batch": 2, "rank": 4, "text": {"length": 16}}


@pytest.fixture
def cell(tiny_checkpoint: Path) -> Cell:
    return Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Weight("weight", criterion="wanda"),
        sparsity=0.5,
        benchmarks=Benchmarks(()),
        calibration=Calibration("pydoc", 4, 16),
        efficiency=Efficiency(repeats=0, prompt_tokens=4, output_tokens=2),
        execution=Execution(),
        dtype="float32",
        device="cpu",
    )


def recovered(cell: Cell, name: str, **asked: Any) -> Cell:
    settings = kinds.normalised(build(Recover, {"name": name, **FEW, **asked}, "recover"), cell.method)
    return replace(cell, recover=replace(settings, text=replace(settings.text, source="pydoc")))


@pytest.mark.parametrize("name", RECOVER)
@pytest.mark.parametrize("method", ["magnitude", "neuron", "head", "layer"])
def test_every_family_of_method_is_recovered_from_python(name: str, method: str, tiny_checkpoint: Path) -> None:
    model, tokenizer = sweep.load_model(tiny_checkpoint)
    before = copy.deepcopy(model)
    for each, recover in ((before, "none"), (model, {"name": name, **FEW})):
        sweep.prune(each, tokenizer, method=method, sparsity=0.5, sequences=2, length=16, recover=recover)
    were, are = anatomy.all_matrices(before), anatomy.all_matrices(model)
    assert were.keys() == are.keys()
    for matrix, weight in are.items():
        assert torch.equal(weight == 0, were[matrix] == 0) and not torch.equal(weight, were[matrix])


@pytest.mark.parametrize("name", RECOVER)
def test_a_row_says_what_was_trained_and_what_the_dense_model_was_asked(
    name: str, cell: Cell, cache_folder: Path
) -> None:
    before = run.run_cell(cell)[0]
    row, again = (run.run_cell(recovered(cell, name))[0] for _ in range(2))
    assert row["sparsity_achieved"] == before["sparsity_achieved"] and row["parameters"] == before["parameters"]
    assert (row["recovery_steps"], row["recovery_tokens"]) == (3, 3 * 2 * 16)
    assert row["recovery_trained"] == {"lora": "adapters of rank 4, merged", "distill": "matrices"}[name]
    assert row["recovery_loss_after"] == again["recovery_loss_after"] != row["recovery_loss_before"]
    assert row["recovery_loss_before"] == again["recovery_loss_before"] and row["recovery_seconds"] > 0
    assert len([entry for entry in cache.entries() if entry.path.parent.name == "statistics"]) >= 1


def test_a_killed_cell_goes_on_and_leaves_no_state(
    cell: Cell, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, every_state_is_written: None
) -> None:
    asked, states = recovered(cell, "distill"), cache.folder() / "recovery"
    whole = run.run_cell(asked)[0]
    backward, steps = training._backward, []

    def killed(*args: Any) -> float:
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return backward(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_backward", killed)
        run.run_cell(asked)
    (state,) = states.iterdir()
    held = torch.load(state)
    torch.save(held | {"seconds": 1000.0, "cpu_seconds": 2000.0}, state)  # it has worked long
    steps.clear()
    monkeypatch.setattr(training, "_backward", lambda *args: steps.append(args) or backward(*args))
    row = run.run_cell(asked)[0]
    assert len(steps) == 1 and row["recovery_loss_after"] == whole["recovery_loss_after"]
    assert not list(states.iterdir())
    assert 1000 < row["recovery_seconds"] < 1100 and 2000 < row["recovery_cpu_seconds"] < 2100


def _recovers(step: Callable[..., float], saved: Path, cell: Cell) -> Any:
    """Of a child, whose first step of recovery does something else."""
    training._backward = step
    return run.run_cell(cell, str(saved))


def _hangs(*_: Any) -> float:
    time.sleep(600)
    return 0.0


def _grows(*_: Any) -> float:
    held = []
    while True:
        held.append(bytearray(os.urandom(1) * 2**26))


@pytest.mark.parametrize(
    ("step", "limits", "status", "words"),
    [
        (_hangs, Limits(timeout=8), "timeout", "not finished after timeout=8 seconds"),
        (_grows, Limits(memory=2 * 2**30), "out_of_memory", "ended at memory_limit=2.00 GiB"),
    ],
)
def test_the_limits_of_a_cell_hold_in_its_recovery(
    step: Callable[..., float], limits: Limits, status: str, words: str, cell: Cell, cache_folder: Path, tmp_path: Path
) -> None:
    known = {"cell": "00000000000000aa", "model": "tiny", "method": "weight"}
    work = functools.partial(_recovers, step, tmp_path / "saved")
    row = isolate.run(recovered(cell, "distill"), known, str(tmp_path / "results"), limits, work=work).row
    assert row["status"] == status and words in row["error"] and f"in {step.__name__}" in row["error"]
    assert not (tmp_path / "saved").exists()


def test_a_recovery_that_diverges_saves_nothing(cell: Cell, cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the loss is (nan|inf) at step 2 of 3, and nothing is saved: lower"):
        run.run_cell(recovered(cell, "lora", learning_rate=1e20, temperature=2.0), str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"text": {"sequences": 5}},
            "sequences=5 is too little text: recover.steps=3 of recover.batch=2 sequences take 6",
        ),
        ({"name": "lora", "rank": 0}, "recover.rank must be at least 1"),
        ({"learning_rate": -1.0}, "recover.learning_rate must be at least 0"),
        ({"steps": 0}, "recover.steps must be at least 1"),
        ({"temperature": 0.0}, "recover.temperature must be at least 0.1"),
        ({"objective": "both"}, "recover.objective must be one of distill, next_token"),
    ],
)
def test_what_no_training_can_do_is_refused(asked: dict[str, Any], message: str, cell: Cell) -> None:
    with pytest.raises(RequestError, match=message):
        recovered(cell, **{"name": "distill", **asked})


def test_too_little_text_says_how_much_there_is(cell: Cell, cache_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"gives \d+ sequences of 4096 tokens, .* asks for 400 and holds out 8"):
        run.run_cell(recovered(cell, "distill", steps=100, batch=4, text={"length": 4096}))
    assert recovered(cell, "distill", steps=100, batch=4, passes=8).recover.text.sequences == 50


def test_a_rank_is_refused_before_the_model_is_loaded(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(
        RequestError, match=r"recover.rank=9 is more than model.layers.0.self_attn.k_proj has, which is 8 x"
    ):
        plan._check_targets(recovered(cell, "lora", rank=9))


def test_settings_that_a_kind_does_not_read_name_no_cell_anew(cell: Cell) -> None:
    for name, unread in (("local", {"rank": 3, "batch": 9}), ("lora", {"norms": True}), ("distill", {"rank": 3})):
        assert recovered(cell, name, **unread) == recovered(cell, name)
    assert recovered(cell, "lora", objective="next_token", temperature=2.0) == recovered(
        cell, "lora", objective="next_token"
    )
    assert recovered(cell, "lora", temperature=2.0) != recovered(cell, "lora")


@pytest.mark.parametrize("execution", ["bitmap", "int8"])
def test_adapters_apart_are_quantised_around_saved_and_run(
    execution: str, cell: Cell, cache_folder: Path, tmp_path: Path
) -> None:
    quantize = Quantize("int8", method="gptq") if execution == "int8" else Quantize()
    cell = replace(cell, execution=Execution(execution, fallback=True, saved=None), quantize=quantize)
    row, _ = run.run_cell(recovered(cell, "lora", rank=4, merge=False), str(tmp_path / "saved"))
    without, _ = run.run_cell(cell)
    assert row["recovery_trained"] == "adapters of rank 4, kept apart"
    assert row["sparsity_achieved"] == pytest.approx(without["sparsity_achieved"], abs=2e-3)  # gptq may zero more
    assert row["parameters"] > without["parameters"] and row["weights_bytes"] > without["weights_bytes"]
    again, _ = sweep.load_model(tmp_path / "saved")
    assert sum(isinstance(module, Adapted) for module in again.modules()) == 14
    assert counting.size(counting.stock(again))["macs_per_token"] == row["macs_per_token"]
