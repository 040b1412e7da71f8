"""Checkpoints as files for llama.cpp: what stands in them always, and what llama.cpp makes of them where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sweep
import tiny_models
from conftest import tiny_model
from sweep.export import __main__ as door
from sweep.export import architectures, gguf_file, gguf_types, trying
from sweep.models import runtimes
from sweep.settings import RequestError

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="needs llama.cpp's package, which takes minutes to build: pip install 'sweep-pruning[gguf]'",
)
CUTS = {
    "dense": {"method": "dense"},
    "neurons": {"method": "neuron", "sparsity": 0.3, "criterion": "l2"},
    "heads": {"method": "head", "sparsity": 0.3, "criterion": "l2"},
    "groups": {"method": "head", "sparsity": 0.3, "criterion": "l2", "unit": "group"},
    "blocks": {"method": "layer", "sparsity": 0.3, "criterion": "random"},
    "attention": {"method": "layer", "sparsity": 0.3, "criterion": "random", "unit": "attention"},
    "ffns": {"method": "layer", "sparsity": 0.3, "criterion": "random", "unit": "ffn"},
}


def model_of(kind: str, **beside: object) -> PreTrainedModel:
    """Four blocks, whose weights are large enough for logits that differ."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": tiny_models.VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            **beside,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which are ones and zeros else
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(folder: Path, kind: str, cut: str = "dense", **beside: object) -> Path:
    model, tokenizer = model_of(kind, **beside), tiny_models.tokenizer()
    done = sweep.prune(model, tokenizer, sequences=2, length=32, **CUTS[cut])
    sweep.save(model, done.tokenizer or tokenizer, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_matrix_of_the_model_stands_in_the_file(kind, cut, tmp_path):
    model, tokenizer = gguf_file.load(saved(tmp_path, kind, cut))
    file = tmp_path / "model.gguf"
    loads = runtimes.loads_in(model, tokenizer)
    assert ("transformers" in loads) == ("vLLM" in loads) == (not (tmp_path / "model/sweep.json").exists())
    try:
        gguf_file.write(model, tokenizer, file, "f16", "gpt-2")
    except RequestError as error:
        assert "llama.cpp" not in loads
        assert kind in ("gemma", "qwen3") and "alike" in str(error)
        return
    assert "llama.cpp" in loads
    read = gguf.GGUFReader(file)
    arch = read.fields["general.architecture"].contents()
    heads = read.fields[f"{arch}.attention.head_count"].contents()
    assert (isinstance(heads, list)) == (arch in ("deci", "openelm"))
    weights = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    held = sum(int(t.n_elements) for t in read.tensors if "norm" not in t.name and t.data.any())
    assert held == weights


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("llama", "dense"),
        ("llama", "heads"),
        ("llama", "attention"),
        ("llama", "ffns"),
        ("qwen2", "neurons"),
        ("qwen3", "dense"),
        ("qwen3", "neurons"),
        ("gemma", "dense"),
    ],
)
def test_llama_cpp_computes_what_the_model_does(kind, cut, tmp_path):
    """In float32, where nothing is rounded, to the last digits: what is wrong is not hidden by rounding.

    But gemma's activation, which llama.cpp looks up in a table of float16.
    """
    found = gguf_file.export(saved(tmp_path, kind, cut), tmp_path / "model.gguf", "f32")
    assert (
        found["apart"] <= (1e-3 if kind == "gemma" else 1e-4)
        and found["rounding"] == 0
        and found["greedy"] == trying.GREEDY
    )
    assert (tmp_path / "model.gguf").is_file()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_what_llama_cpp_rounds_moves_the_model_as_far(kind, tmp_path):
    found = gguf_file.export(saved(tmp_path, "llama", "heads"), tmp_path / "model.gguf", kind)
    assert 0.1 < found["apart"] / found["rounding"] < 10


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_what_matrices_read_is_rounded_as_their_kind_says(kind):
    model, ids = model_of("llama"), [1, 2, 3, 4]
    plain = trying.logits(model, ids)
    with gguf_types.reading(model, kind):
        rounded = trying.logits(model, ids)
    off = float((rounded - plain).abs().max() / plain.abs().max())
    assert {"f32": off == 0, "f16": 0 < off < 1e-2, "q8_0": 1e-4 < off < 0.2}[kind]
    assert torch.equal(trying.logits(model, ids), plain)


@needs_llama_cpp
def test_a_file_that_computes_something_else_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "_as_neighbours", lambda rows, head_dim: rows)
    with pytest.raises(RequestError, match="logits are .* nothing is written"):
        gguf_file.export(saved(tmp_path, "llama"), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_type_without_a_declaration_is_refused():
    with pytest.raises(RequestError, match="models of type gpt2 cannot be written as GGUF by sweep, which knows llama"):
        runtimes.find(tiny_model("gpt2"))
    assert "llama.cpp" not in runtimes.loads_in(tiny_model("gpt2"), None)


def test_packed_matrices_are_refused_and_dense_ones_offered(tmp_path):
    from sweep import config, execution

    model = model_of("llama")
    sweep.prune(model, tiny_models.tokenizer(), method="magnitude", sparsity=0.5)
    model, _ = execution.prepare(model, config.Execution(name="bitmap"), {})
    sweep.save(model, tiny_models.tokenizer(), tmp_path / "model")
    with pytest.raises(RequestError, match="format bitmap, which llama.cpp has not.*execution.saved=plain"):
        gguf_file.load(tmp_path / "model")


def test_without_llama_cpp_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(trying.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="sweep-pruning\\[gguf\\]"):
        door.main(["gguf", str(tmp_path), str(tmp_path / "model.gguf")])
    assert not list(tmp_path.iterdir())


def test_a_cut_vocabulary_keeps_its_own_numbers(tmp_path):
    model, tokenizer = model_of("llama"), tiny_models.tokenizer()
    done = sweep.prune(model, tokenizer, method="vocab", sparsity=0.4)
    gguf_file.write(model, done.tokenizer, tmp_path / "model.gguf", "f16", "gpt-2")
    tokens = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(model.get_input_embeddings().weight)
    assert all(tokens[row] == token for token, row in done.tokenizer.get_vocab().items())
