"""What was saved is what is loaded: equal logits for every kind of unit and every family, uniform or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sweep
import tiny_models
from conftest import random_tokens, tiny_model
from sweep import execution, saving
from sweep.config import Execution, Model
from sweep.models import checkpoint, loading, parts
from sweep.pruning import methods
from sweep.pruning.families import Head, Layer, Method, Neuron, Vocab, Weight
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


KINDS = [
    "llama",
    "gpt2",
    "bart",
    "qwen3_moe",
    "gpt_oss",
    "dbrx",
    "deepseek_v4",
    "jamba",
    "mamba2",
    "gemma3n_text",
    "rwkv",
    "xlnet",
]


REFUSED = {("gemma3n_text", "layer"), ("xlnet", "layer")}  # before anything is saved


@pytest.mark.parametrize(
    ("kind", "how"),
    [(k, how) for k in KINDS for how in ("vocab", "layer", "bitmap") if (k, how) not in REFUSED],
)
def test_a_model_of_any_type_comes_back_as_it_was_saved(kind: str, how: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_models.make(kind), tiny_models.tokenizer()
    text = tokenizer("the quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids
    if how == "bitmap":
        methods.prune(model, Weight("weight"), 0.5, None)
        execution.prepare(model, Execution("bitmap"))
    elif how == "layer":
        methods.prune(model, Layer(criterion="random"), 0.5, None)
    else:
        tokenizer = methods.prune(model, Vocab(), 0.5, text, tokenizer=tokenizer).tokenizer
    ids = tokenizer("the lazy fox", return_tensors="pt").input_ids
    saving.save(model, tokenizer, tmp_path / "saved", FACTS)
    loaded, _ = sweep.load_model(tmp_path / "saved")
    assert {name: t.shape for name, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    with torch.no_grad():
        got, expected = (each(input_ids=ids, use_cache=False).logits for each in (loaded, model))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # what is read may lie otherwise, and sums with it
    if how == "layer" and not (tmp_path / "saved" / "sweep.json").exists():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            got = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_buffer_that_no_state_dict_holds_is_saved_where_it_was_changed(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    model.lm_head.register_buffer("extra", torch.ones(1), persistent=False)
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    loaded, _ = sweep.load_model(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), logits(tiny_model("llama")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda model: model.lm_head.register_forward_hook(lambda *given: 2 * given[2]),
            "its logits are .* of the largest apart",
        ),
        (
            lambda model: setattr(model.model, "norm", torch.nn.Identity()),
            "model.norm is a Identity, and the configuration",
        ),
    ],
)
def test_what_does_not_come_back_as_it_is_in_memory_does_not_count_as_saved(
    spoil: Callable[[PreTrainedModel], object], message: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    tokenizer, place = AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved"
    saving.save(tiny_model("llama"), tokenizer, place, FACTS)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    model = tiny_model("llama", seed=1)
    spoil(model)
    for other in (place, tmp_path / "new"):
        with pytest.raises(RequestError, match=message):
            saving.save(model, tokenizer, other, FACTS)
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_rounding_did_to_rotary_frequencies_is_no_difference(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    assert sweep.load_model(tmp_path / "saved")[0].model.rotary_emb.inv_freq.dtype == torch.float32
    assert not (tmp_path / "saved" / checkpoint.FILE).exists()


def test_folders_of_before_are_read(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Those that do not say what modules keep: head counts and sizes follow from the shapes."""
    model = tiny_model("opt")
    methods.prune(model, Head(scope="layer", criterion="l2"), 0.5, None)
    methods.prune(model, Neuron(blocks=(0,), criterion="l2"), 0.5, None)
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    file = tmp_path / "saved" / checkpoint.FILE
    assert json.loads(file.read_text())["format"] == checkpoint.DIFFERS
    file.write_text(json.dumps({"format": 1, "kept_token_ids": None}))
    loaded, _ = sweep.load_model(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.decoder.layers[0].fc1.out_features == 12


def test_facts_that_do_not_fit_are_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_model("llama")
    methods.prune(model, Neuron(blocks=(0,), criterion="l2"), 0.5, None)
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    file = tmp_path / "saved" / checkpoint.FILE
    facts = json.loads(file.read_text())
    for wrong in (
        {"absent": ["model.nothing"]},
        {"attributes": {"model.layers.7": {"a": 1}}},
        {"lists": {"model": [0]}},
    ):
        file.write_text(json.dumps(facts | {"differences": wrong}))
        with pytest.raises(RequestError, match="sweep.json is damaged: it does not fit the model of config.json"):
            sweep.load_model(tmp_path / "saved")


def test_what_cannot_be_loaded_is_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="nowhere is no checkpoint: there is no config.json"):
        sweep.load_model("nowhere")
    model = tiny_model("llama")
    methods.prune(model, Neuron(blocks=(0,)), 0.5, random_tokens())
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", FACTS)
    (tmp_path / "saved" / checkpoint.FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(RequestError, match="has format 99, and this version of sweep reads 1 and"):
        sweep.load_model(tmp_path / "saved")
