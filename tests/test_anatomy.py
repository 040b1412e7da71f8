"""The parts of a decoder: what its family's record says is what its modules and its configuration hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import FAMILIES, random_tokens, tiny_model
from sweep.config import Model, Perplexity
from sweep.measuring import perplexity
from sweep.models import anatomy, decoders, parts
from sweep.models.decoders import DECODERS
from sweep.pruning import methods
from sweep.pruning.families import Head, Layer, Neuron
from sweep.settings import RequestError


def test_every_family_with_a_record_is_tested() -> None:
    assert set(FAMILIES) == set(DECODERS)


def test_the_parts_of_a_family_are_all_matrices_of_its_blocks(family: str) -> None:
    model = tiny_model(family)
    found = zip(anatomy.blocks(model), parts.ffns(model), parts.attentions(model), strict=True)
    for block, ffn, attention in found:
        held = {id(parameter) for parameter in block.parameters() if parameter.ndim == 2}
        assert {id(m.weight) for m in (*ffn.inputs, ffn.output, *attention.inputs, attention.output)} == held
    assert len(anatomy.linears(model)) == sum(p.ndim == 2 for b in anatomy.blocks(model) for p in b.parameters())


def test_what_the_configuration_says_is_what_the_matrices_are(family: str) -> None:
    model = tiny_model(family)
    config = model.config.to_dict()
    ffn, attention = parts.ffns(model)[1], parts.attentions(model)[1]
    assert decoders.size(config, "blocks") == len(anatomy.blocks(model)) == 2
    assert decoders.size(config, "hidden") == anatomy.weight(ffn.output).shape[0] == 16
    assert decoders.size(config, "neurons") == ffn.width == 24
    assert decoders.size(config, "heads") == attention.heads == 4
    assert (decoders.size(config, "groups") or attention.heads) == attention.groups
    assert (decoders.size(config, "head_dim") or 4) == attention.head_dim == 4
    assert decoders.size(config, "positions") == 64


@pytest.mark.parametrize("method", [Layer(), Neuron(scope="layer"), Head(scope="layer")], ids=lambda m: m.family)
def test_the_configuration_follows_a_cut(family: str, method: Layer | Neuron | Head) -> None:
    model = tiny_model(family)
    methods.prune(model, method, 0.5, random_tokens())
    config, attention = model.config.to_dict(), parts.attentions(model)[0]
    assert decoders.size(config, "blocks") == len(anatomy.blocks(model)) == (1 if method.family == "layer" else 2)
    assert decoders.size(config, "neurons") == parts.ffns(model)[0].width == (12 if method.family == "neuron" else 24)
    assert attention.heads == (2 if method.family == "head" else 4)
    if "head_dim" in config:  # else fewer heads would be read as larger ones
        assert decoders.size(config, "heads") == attention.heads
        assert decoders.size(config, "groups") == attention.groups


def test_counts_that_attention_keeps_agree_with_its_matrices_after_a_cut(family: str) -> None:
    model = tiny_model(family)
    methods.prune(model, Head(scope="layer", criterion="l2"), 0.5, None)
    (attention, *_) = parts.attentions(model)
    counts = {"num_heads": attention.heads, "num_key_value_heads": attention.groups, "split_size": attention.columns}
    counts |= {"num_attention_heads": attention.heads, "num_key_value_groups": attention.heads_per_group}
    for name, count in counts.items():
        assert getattr(attention.module, name, count) == count, name


@pytest.mark.parametrize(
    ("config", "of", "key", "size"),
    [
        ({"model_type": "gpt2", "n_layer": 3}, "blocks", "n_layer", 3),
        ({"model_type": "bloom", "n_layer": 3}, "blocks", "n_layer", 3),  # without a record
        ({"model_type": "gpt2", "num_hidden_layers": 3}, "blocks", "num_hidden_layers", 3),  # which transformers reads
        ({"num_hidden_layers": 3, "n_layer": 4}, "blocks", "num_hidden_layers", 3),
        ({"model_type": "gpt2", "n_inner": None}, "neurons", "n_inner", 0),
        ({}, "positions", "max_position_embeddings", 0),
    ],
)
def test_a_size_is_found_by_the_familys_key_then_by_any(config: dict, of: str, key: str, size: int) -> None:
    assert (decoders.key(config, of), decoders.size(config, of)) == (key, size)


def test_a_window_beyond_the_positions_is_refused_whatever_their_key(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"perplexity.seqlen=65 is more than the 64 positions of m: use at most 64"):
        perplexity.check(Perplexity("wikitext2", 65), None, Model("m", "local", path=str(tmp_path)))


def test_a_cut_vocabulary_of_a_family_without_a_record_is_loaded_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    config = AutoConfig.for_model("bloom", vocab_size=len(tokenizer), hidden_size=16, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    outcome = sweep.prune(model, tokenizer, method="vocab", sparsity=0.3, criterion="random")
    sweep.save(model, outcome.tokenizer, tmp_path / "saved")
    loaded, again = sweep.load_model(tmp_path / "saved")
    ids = again("some text", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
