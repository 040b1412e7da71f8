"""What was saved is what is loaded: equal logits for every kind of unit and every family, uniform or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sweep
from conftest import random_tokens, tiny_model
from sweep import saving
from sweep.config import Model
from sweep.models import checkpoint, loading, parts
from sweep.pruning import methods
from sweep.pruning.families import Head, Layer, Method, Neuron, Vocab
from sweep.settings import RequestError

FACTS = {"model": "m", "method": {}}


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(seed=1) if ids is None else ids).logits


@pytest.mark.parametrize(
    "method",
    [Neuron(), Neuron(scope="layer"), Neuron(criterion="flap"), Head(), Head(unit="query", scope="layer"), Layer()],
    ids=lambda m: f"{m.family}-{getattr(m, 'scope', 'all')}-{m.criterion}-{getattr(m, 'unit', '')}",
)
def test_saved_and_loaded_logits_are_equal(family: str, method: Method, tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_model(family)
    methods.prune(model, method, 0.5, random_tokens())
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    saving.save(model, tokenizer, tmp_path / "saved", FACTS)
    loaded, _ = sweep.load_model(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    if not (tmp_path / "saved" / "sweep.json").exists():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=0)
    generated = loaded.generate(random_tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(
        generated, model.generate(random_tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    )


@pytest.mark.parametrize("method", [Neuron(scope="layer"), Head(scope="layer"), Layer()])
def test_equal_widths_are_saved_as_transformers_does(method: Method, tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_model("llama")
    methods.prune(model, method, 0.5, random_tokens())
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    assert not (tmp_path / "saved" / "sweep.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_unequal_widths_load_as_a_local_model_and_in_another_dtype(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_model("llama")
    methods.prune(model, Neuron(blocks=(0,)), 0.5, random_tokens())
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    loaded, _ = loading.load(Model("m", "local", path=str(tmp_path / "saved")), "bfloat16", "cpu")
    assert [ffn.width for ffn in parts.ffns(loaded)] == [12, 24] and loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded).float(), logits(model.bfloat16()).float())
    assert not any("remote" in path.read_text() for path in (tmp_path / "saved").glob("*.json"))


def test_a_cut_vocabulary_is_saved_with_its_tokenizer(tmp_path: Path, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    ids = tokenizer("the cat sat on the mat", return_tensors="pt").input_ids
    small = methods.prune(model, Vocab(), 0.9, ids, tokenizer=tokenizer).tokenizer
    saving.save(model, small, tmp_path / "saved", FACTS)
    loaded, again = sweep.load_model(tmp_path / "saved")
    assert again("the cat Q").input_ids == small("the cat Q").input_ids
    assert again.decode(again("the cat").input_ids) == "the cat"
    ids = small("the mat", return_tensors="pt").input_ids
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
    assert not (tmp_path / "saved" / "tokenizer.json").exists()  # its ids are not the model's


def test_what_cannot_be_loaded_is_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="nowhere is no checkpoint: there is no config.json"):
        sweep.load_model("nowhere")
    model = tiny_model("llama")
    methods.prune(model, Neuron(blocks=(0,)), 0.5, random_tokens())
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    (tmp_path / "saved" / checkpoint.FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(RequestError, match="has format 99, and this version of sweep reads 1 and"):
        sweep.load_model(tmp_path / "saved")
