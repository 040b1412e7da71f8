"""Recovery: what was removed stays away to the bit, and what is left comes nearer to the dense model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sweep
from sweep import config
from sweep.models import anatomy
from sweep.pruning.masks import Masks
from sweep.recovery import kinds, recover
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
    ],
    ids=lambda asked: asked["method"],
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


def test_what_cannot_be_recovered_is_refused(loaded: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = loaded
    with pytest.raises(RequestError, match="method=dense removes nothing"):
        sweep.prune(model, tokenizer, method="dense", recover="local")
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
