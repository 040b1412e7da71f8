"""Three lines of Python prune a model: the same as the command line does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import tiny_model
from sweep import plan, run
from sweep.config import Calibration
from sweep.models import parts
from sweep.pruning import families, weights
from sweep.pruning.families import Weight
from sweep.settings import RequestError
from sweep.texts import text


def test_three_lines_prune_as_a_cell_does(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    pruned = sweep.prune(model, tokenizer, method="wanda", sparsity=0.5, sequences=4, length=32, pattern="2:4")
    assert pruned.sparsity == 0.5 and pruned.calibration_tokens == 128
    other = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokens = text.calibration_tokens(Calibration("pydoc", 4, 32), tokenizer, 0)
    weights.prune(other, Weight("weight", criterion="wanda", pattern="2:4"), 0.5, tokens)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_families_of_units_are_pruned_too(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    sweep.prune(model, tokenizer, method="neuron", sparsity=0.5, scope="layer", sequences=4, length=32)
    assert [ffn.width for ffn in parts.ffns(model)] == [12, 12]


METHODS: dict[str, dict] = {
    "weight": {"method": "magnitude"},
    "neuron": {"method": "neuron", "criterion": "l2"},
    "neurons of a layer": {"method": "neuron", "criterion": "l2", "scope": "layer"},
    "one block": {"method": "neuron", "criterion": "l2", "blocks": [0]},
    "head": {"method": "head", "criterion": "l2"},
    "query heads": {"method": "head", "criterion": "l2", "unit": "query", "scope": "layer"},
    "layer": {"method": "layer", "criterion": "random"},
    "vocab": {"method": "vocab", "criterion": "random"},
}


@pytest.mark.parametrize("asked", METHODS.values(), ids=METHODS)
def test_what_is_pruned_is_saved_and_loaded_by_the_lines_that_the_docstring_shows(
    family: str, asked: dict, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Through `sweep.save`; and through the model's own `save_pretrained`, whose folder transformers reads or refuses."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    config = tiny_model(family).config
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config).eval()
    pruned = sweep.prune(model, tokenizer, sparsity=0.4, sequences=2, length=8, **asked)
    assert pruned.removed > 0
    small = pruned.tokenizer or tokenizer
    ids = small("the cat sat on the mat", return_tensors="pt").input_ids
    expected = model(input_ids=ids).logits

    sweep.save(model, small, tmp_path / "saved")
    loaded, again = sweep.load_model(tmp_path / "saved")
    assert again("the cat Q").input_ids == small("the cat Q").input_ids
    assert torch.equal(loaded(input_ids=ids).logits, expected)

    model.save_pretrained(tmp_path / "own")
    loaded, nothing = sweep.load_model(tmp_path / "own")
    assert nothing is None and torch.equal(loaded(input_ids=ids).logits, expected)
    if not (tmp_path / "own" / "sweep.json").is_file():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "own")(input_ids=ids).logits, expected)
    if asked["method"] == "vocab":
        with pytest.raises(RequestError, match="write model and tokenizer with sweep.save"):
            small.save_pretrained(tmp_path / "own")
        with pytest.raises(RequestError, match="give the tokenizer that pruning returned"):
            sweep.save(model, tokenizer, tmp_path / "wrong")


def test_a_model_whose_blocks_differ_says_what_its_own_save_pretrained_cannot(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    sweep.prune(model, tokenizer, method="neuron", criterion="l2", blocks=[0], sparsity=0.5)
    with pytest.raises(RequestError, match="blocks differ in width.*knows no max_shard_size: leave it out"):
        model.save_pretrained(tmp_path / "own", max_shard_size="1MB")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    copied.save_pretrained(tmp_path / "copy")  # the copy, and not what it was copied from
    assert not sweep.load_model(tmp_path / "copy")[0].lm_head.weight.any()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "wonda"}, "method must be one of magnitude, .*; got 'wonda'. Did you mean 'wanda'"),
        ({"method": "wanda", "sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"method": "wanda", "patern": "2:4"}, "unknown key 'method.patern'. Did you mean 'pattern'"),
        ({"method": "neuron", "device": "cpu"}, "device is read by weight methods and by quantize.method=gptq only"),
        ({"method": "wanda", "length": 10**7}, "bytes, which cannot give 16 sequences of 10000000 tokens"),
    ],
)
def test_a_wrong_request_is_refused(tiny_checkpoint: Path, asked: dict, message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(RequestError, match=message):
        sweep.prune(model, tokenizer, **{"sparsity": 0.5, **asked})


DOORS: dict[str, dict] = {  # from Python; on the command line the same, under the method's family and criterion
    "magnitude": {"method": "magnitude", "scope": "global"},
    "random weights": {"method": "random", "seed": 3},
    "wanda": {"method": "wanda", "pattern": "2:4", "seed": 1},
    "dense activations": {"method": "ria", "sequential": False},
    "outliers": {"method": "wanda", "allocation": "owl"},
    "sparsegpt": {"method": "sparsegpt", "targets": "ffn"},
    "neuron": {"method": "neuron", "seed": 2},
    "neurons that are mended": {"method": "neuron", "criterion": "l2", "repair": True},
    "drop on text": {"method": "neuron", "criterion": "drop", "group": 4},
    "drop on a task": {"method": "head", "criterion": "drop", "metric": "f1", "task": "continents", "documents": 20},
    "head": {"method": "head"},
    "layer": {"method": "layer"},
    "vocab": {"method": "vocab"},  # which counts the whole text
    "random vocab": {"method": "vocab", "criterion": "random", "seed": 4},
}
FEW = {"source": "pydoc", "sequences": 4, "length": 32}


def composed(checkpoint: Path, asked: dict) -> dict:
    """What the command line composes for a request of `sweep.prune`."""
    own = {k: v for k, v in asked.items() if k not in ("method", "sparsity", "seed", "sequential")}
    name = asked["method"]
    family = {"family": name} if name in families.FAMILIES else {"family": "weight", "criterion": name}
    return {
        "model": {"name": "tiny", "source": "local", "path": str(checkpoint)},
        "method": family | own,
        "sparsity": asked.get("sparsity", 0.5),
        "seed": asked.get("seed", 0),
        "benchmarks": {"tasks": []},
        "calibration": FEW | {"sequential": asked.get("sequential", True)},
        "efficiency": {"repeats": 0, "prompt_tokens": 8},
        "execution": {},
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
    }


@pytest.mark.parametrize("asked", DOORS.values(), ids=DOORS)
def test_both_doors_prune_alike(tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path, asked: dict) -> None:
    (cell, _) = plan.prepare(composed(tiny_checkpoint, asked))
    run.run_cell(cell, save_model=str(tmp_path / "pruned"))
    by_command, its_tokenizer = sweep.load_model(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    before = sum(int((p != 0).sum()) for p in model.parameters())
    pruned = sweep.prune(model, tokenizer, **{"sparsity": 0.5, "sequences": 4, "length": 32, **asked})
    assert sum(int((p != 0).sum()) for p in model.parameters()) < before
    found, expected = (dict(m.named_parameters()) for m in (model, by_command))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert getattr(pruned.tokenizer, "kept_ids", None) == getattr(its_tokenizer, "kept_ids", None)


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "neuron", "criterion": "drop", "metric": "f1"},
        {"method": "neuron", "criterion": "drop", "task": "pydoc"},
        {"method": "layer", "criterion": "drop", "screen": "taylor"},
        {"method": "wanda", "pattern": "2:4", "sparsity": 0.3},
        {"method": "wanda", "pattern": "5:7", "sparsity": 2 / 7},
        {"method": "wanda", "allocation": [0.5, 0.5, 0.5]},
        {"method": "wanda", "skip_lowest": 0.9},
        {"method": "head", "blocks": [7]},
        {"method": "neuron", "sparsity": 0.99},
        {"method": "neuron", "multiple_of": 100},
        {"method": "layer", "sparsity": 0.9},
        {"method": "wanda", "sparsity": -0.1},
        {"method": "head", "unit": "heads"},
        {"method": "wanda", "seed": -1},
    ],
    ids=str,
)
def test_both_doors_refuse_alike(tiny_checkpoint: Path, asked: dict) -> None:
    with pytest.raises(RequestError) as on_the_command_line:
        plan.prepare(composed(tiny_checkpoint, asked))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(RequestError) as from_python:
        sweep.prune(model, tokenizer, **{"sparsity": 0.5, "sequences": 4, "length": 32, **asked})
    assert str(from_python.value) == str(on_the_command_line.value)
    whole = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
