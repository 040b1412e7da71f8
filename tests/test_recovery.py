"""Recovery: what was removed stays away to the bit, and what is left comes nearer to the dense model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sweep
import tiny_models
from conftest import random_tokens
from sweep import config
from sweep.models import anatomy
from sweep.pruning.masks import Masks
from sweep.recovery import kinds, local, recover
from sweep.recovery.given import Given
from sweep.recovery.kinds import Recover
from sweep.recovery.local import solve
from sweep.settings import RequestError
from sweep.texts import text

TEXT = {"sequences": 12, "length": 32}


def test_what_is_solved_is_least_squares_on_the_kept_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, start = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((40, 9), (40, 4), (4, 9)))
    keep = torch.rand(4, 9, generator=draw) < 0.6
    found = solve(x.t() @ x, y.t() @ x, start, keep, 60, 0.0)
    assert not found[~keep].any()
    for row, its in enumerate(keep):
        wanted = torch.linalg.lstsq(x[:, its], y[:, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(found[row][its], wanted)
    pulled = solve(x.t() @ x, y.t() @ x, start, keep, 60, 1e6)
    torch.testing.assert_close(pulled, start * keep, rtol=1e-3, atol=1e-3)


@pytest.fixture
def loaded(tiny_checkpoint: Path) -> tuple[PreTrainedModel, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint), AutoTokenizer.from_pretrained(tiny_checkpoint)


def _distance(model: PreTrainedModel, dense: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Of what leaves the blocks."""
    with torch.no_grad():
        one, other = (m(input_ids=tokens, output_hidden_states=True).hidden_states[-1] for m in (model, dense))
    return float((one - other).square().mean())


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "wanda", "sparsity": 0.5, "pattern": "2:4"},
        {"method": "neuron", "sparsity": 0.5},
        {"method": "head", "sparsity": 0.5},
        {"method": "layer", "sparsity": 0.5},
        {"method": "layer", "sparsity": 0.3, "unit": "attention"},
        {"method": "neuron", "sparsity": 0.5, "criterion": "flap"},  # which leaves a bias that the dense model has not
    ],
    ids=lambda asked: "-".join(str(value) for key, value in asked.items() if key != "sparsity"),
)
def test_local_recovery_brings_the_model_nearer_to_the_dense_one_with_the_same_zeros_and_shapes(
    asked: dict[str, Any], loaded: tuple[PreTrainedModel, Any]
) -> None:
    dense, tokenizer = loaded
    pruned, mended, again = (copy.deepcopy(dense) for _ in range(3))
    sweep.prune(pruned, tokenizer, sequences=4, length=32, **asked)
    for model in (mended, again):
        sweep.prune(model, tokenizer, sequences=4, length=32, recover={"name": "local", "text": TEXT}, **asked)
    tokens = text.calibration_tokens(
        config.Calibration("pydoc", 12, 32), tokenizer, seed=1
    )  # of the text it was trained on
    assert _distance(mended, dense, tokens) < 0.9 * _distance(pruned, dense, tokens)
    before, after, same = (anatomy.all_matrices(model) for model in (pruned, mended, again))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight == 0, before[name] == 0) and torch.equal(weight, same[name])


def _local(model: PreTrainedModel, dense: PreTrainedModel, masks: Masks | None = None, **more: Any) -> recover.Trained:
    asked = Recover("local", steps=more.pop("steps", 60), ridge=more.pop("ridge", 0.0))
    return local.local(Given(model, lambda: dense, random_tokens(16), masks or Masks(), asked, seed=0, **more))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen3_moe"])
def test_weights_that_are_off_come_back_where_the_text_tells_them(kind: str) -> None:
    """With nothing removed and no ridge the dense model's outputs are met: in sequence, in parallel, by experts."""
    dense = tiny_models.make(kind)
    model, draw = copy.deepcopy(dense), torch.Generator().manual_seed(0)
    for matrix in anatomy.all_matrices(model).values():
        matrix += 0.1 * matrix.std() * torch.randn(matrix.shape, generator=draw)
    tokens = random_tokens(16)
    before = _distance(model, dense, tokens)
    done = _local(model, dense)
    assert _distance(model, dense, tokens) < 1e-2 * before
    assert done.steps == 60 * len(anatomy.all_matrices(model))


def test_experts_are_recovered_under_their_masks(caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_models.make("qwen3_moe")
    model = copy.deepcopy(dense)
    masks = sweep.prune(model, tiny_models.tokenizer(), method="magnitude", sparsity=0.5).masks
    before = _distance(model, dense, random_tokens(16))
    _local(model, dense, masks, ridge=0.01)
    assert _distance(model, dense, random_tokens(16)) < 0.8 * before and not caplog.records
    assert not any(matrix[~masks[name]].any() for name, matrix in anatomy.all_matrices(model).items())


def test_a_killed_local_recovery_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_state_is_written: None
) -> None:
    dense, file = tiny_models.make("llama"), tmp_path / "of_a_cell" / "state"

    def pruned() -> tuple[PreTrainedModel, Masks]:
        model = copy.deepcopy(dense)
        return model, sweep.prune(model, tiny_models.tokenizer(), method="magnitude", sparsity=0.5).masks

    whole, masks = pruned()
    _local(whole, dense, masks)
    half, masks = pruned()
    recovered, blocks = local._recover_block, []

    def killed(given: Given, at: Any, *more: Any) -> int:
        blocks.append(at.index)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return recovered(given, at, *more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(local, "_recover_block", killed)
        _local(half, dense, masks, state=file)
    again, masks = pruned()
    monkeypatch.setattr(local, "_recover_block", lambda *args: blocks.append(args[1].index) or recovered(*args))
    done = _local(again, dense, masks, state=file)
    assert blocks == [0, 1, 2, 2, 3] and not file.exists()
    assert done.steps == 60 * len(anatomy.all_matrices(again))
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", kinds.KINDS)
def test_what_was_zero_before_pruning_is_not_filled(name: str, loaded: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = loaded
    sweep.prune(model, tokenizer, method="magnitude", sparsity=0.5)
    asked = {"name": name, "text": {"length": 16}, "steps": 2, "rank": 4}
    sweep.prune(model, tokenizer, method="neuron", sparsity=0.25, sequences=2, length=16, recover=asked)
    matrices = anatomy.all_matrices(model)
    zeros = {name: int((matrix == 0).sum()) for name, matrix in matrices.items()}
    assert sum(zeros.values()) >= 0.4 * sum(matrix.numel() for matrix in matrices.values())


def test_a_recovered_model_is_saved_and_loaded_again(loaded: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    asked = {"name": "local", "text": TEXT}
    sweep.prune(model, tokenizer, method="neuron", sparsity=0.3, sequences=4, length=32, recover=asked, quantize="int8")
    sweep.save(model, tokenizer, tmp_path / "saved")
    again, _ = sweep.load_model(tmp_path / "saved")
    tokens = random_tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_blocks_that_are_none_of_the_dense_model_are_refused() -> None:
    dense, model = tiny_models.make("llama"), tiny_models.make("llama")
    sweep.prune(model, tiny_models.tokenizer(), method="layer", criterion="random", sparsity=0.5)
    anatomy.all_matrices(model)["model.layers.1.mlp.up_proj"].add_(1)
    with pytest.raises(RequestError, match="which block of the dense model block 1 of 2 was: none has its weights"):
        _local(model, dense)


def test_what_cannot_be_recovered_is_refused(loaded: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = loaded
    with pytest.raises(RequestError, match="method=dense removes nothing"):
        sweep.prune(model, tokenizer, method="dense", recover="local")
    with pytest.raises(RequestError, match="recover=lora mends what pruning has done, and sparsity=0 removes nothing"):
        sweep.prune(model, tokenizer, method="magnitude", sparsity=0.0, recover="lora")
    with pytest.raises(RequestError, match="cannot follow method=vocab"):
        sweep.prune(model, tokenizer, method="vocab", sparsity=0.1, recover="local")
    with pytest.raises(RequestError, match=r"gives 38\d\d sequences of 32 tokens, 4 of which pruning reads"):
        wanted = {"name": "local", "text": {"sequences": 3818, "length": 32}}
        sweep.prune(model, tokenizer, method="wanda", sparsity=0.5, sequences=4, length=32, recover=wanted)
    with pytest.raises(RequestError, match="recover.name must be one of none, local"):
        sweep.prune(model, tokenizer, method="magnitude", sparsity=0.5, recover="locale")
    with pytest.raises(RequestError, match=r"quantize.joint=true quantises in the pass that prunes"):
        sweep.prune(
            model,
            tokenizer,
            method="sparsegpt",
            sparsity=0.5,
            recover="local",
            quantize={"name": "int8", "method": "gptq", "joint": True},
        )


def test_what_local_recovery_cannot_do_is_said(caplog: pytest.LogCaptureFixture) -> None:
    dense, model = tiny_models.make("llama"), tiny_models.make("llama")
    anatomy.all_matrices(dense)["model.layers.1.mlp.up_proj"][0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"model.layers.1.mlp.up_proj: the recovered weights are not finite; raise"
    ):
        _local(model, dense)
    strange = tiny_models.make("llama")
    for block in anatomy.blocks(strange):  # rows are gone, and those that are left do not tell which
        block.mlp.up_proj.weight.data = block.mlp.up_proj.weight.data[:-1] + 1
        block.mlp.gate_proj.weight.data = block.mlp.gate_proj.weight.data[:-1] + 1
        block.mlp.down_proj.weight.data = block.mlp.down_proj.weight.data[:, :-1]
    _local(strange, tiny_models.make("llama"))
    assert "recover=local left 8 matrices as they are: it cannot tell what they were" in caplog.text


def test_a_broken_model_is_refused(loaded: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded

    def spoil(given: recover.Given) -> recover.Trained:
        next(iter(anatomy.all_matrices(given.model).values())).fill_(float("nan"))
        return recover.Trained(0, 1, "matrices")

    monkeypatch.setitem(recover.WORK, "local", spoil)
    tokens = torch.randint(3, 90, (2, 16))
    with pytest.raises(FloatingPointError, match="recover=local left a model whose loss on held-out text is nan"):
        recover.recover(model, Recover("local"), lambda: model, tokens, tokens, Masks())


def test_every_kind_is_declared_and_has_its_work() -> None:
    assert set(recover.WORK) == set(kinds.KINDS)
    assert [stage.name for stage in config.STAGES] == ["prune", "recovery", "quantize"]
