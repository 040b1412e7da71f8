"""A checkpoint is loaded whole or refused: what is missing is never random, and what training left around names is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from conftest import random_tokens, tiny_model
from sweep import plan, saving
from sweep.config import Benchmarks, Cell, Efficiency, Execution, Model
from sweep.models import anatomy, headers, loading, pretrained, requirements
from sweep.pruning import methods
from sweep.pruning.families import Neuron, Vocab, Weight
from sweep.settings import RequestError
from test_cli import QUICK, run

State = dict[str, Tensor]
Edit = Callable[[State], State]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def edited(folder: Path, edit: Edit) -> Path:
    state = edit(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def configured(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def local(folder: Path) -> Model:
    return Model(folder.name, "local", path=str(folder))


def asked(model: Model, method: Any = None, tasks: tuple[str, ...] = ("pydoc",)) -> None:
    """As the sweep asks before its first cell."""
    cell = Cell(
        model, method or Weight("weight"), 0.5, Benchmarks(tasks), None, Efficiency(), Execution(), device="cpu"
    )
    plan.check_models([cell])


def refused(folder: Path, message: str) -> None:
    """Both before the first cell and on loading."""
    with pytest.raises(RequestError, match=message):
        headers.check(local(folder))
        asked(local(folder))
    with pytest.raises(RequestError, match=message):
        loading.load(local(folder), "float32", "cpu")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens()).logits


def without(part: str) -> Edit:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def renamed(old: str, new: str) -> Edit:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layers.1."), r"tensors missing: 9 \(model.layers.1.input_layernorm.weight, .*, … 6 more\)$"),
        (without("embed_tokens"), r"tensors missing: 1 \(model.embed_tokens.weight\)"),
        (without("lm_head"), r"missing: 1 \(lm_head.weight\). Save the model with its head"),
        (renamed("layers.1", "layers.2"), "tensors missing: 9 .*; tensors that are none of its own: 9 "),
        (renamed("lm_head", "score"), "missing: 1 .* none of its own: 1 .*another head than a language model's"),
        (renamed("q_proj.", "q_proj.base_layer."), "q_proj.base_layer.weight.*Merge the adapter first"),
        (renamed("q_proj.weight", "q_proj.qweight"), "The weights are quantised"),
        (renamed("up_proj.weight", "up_proj.weight_orig"), "Remove the parametrisations"),  # without its mask
        (renamed("up_proj.weight", "up_proj.parametrizations.weight.original0"), "Remove the parametrisations"),
        (
            lambda state: {name: t[:10] if "gate" in name else t for name, t in state.items()},
            r"tensors of another shape: 2 \(model.layers.0.mlp.gate_proj.weight \(10, 16\) and not \(24, 16\), ",
        ),
        (
            lambda state: state | {"model.layers.0.mlp.up_proj.weight": torch.full((24, 16), torch.nan)},
            r"NaN or infinite numbers in 1 of its tensors \(model.layers.0.mlp.up_proj.weight\)",
        ),
        (
            lambda state: state | {"model.norm.weight": torch.full((16,), -torch.inf)},
            "NaN or infinite .*model.norm.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, edit: Edit, message: str) -> None:
    refused(edited(folder, edit), message)
    with pytest.raises(RequestError, match=message) if "NaN" not in message else pytest.raises(RequestError):
        loading.check(local(folder))


def test_more_layers_than_the_configuration_tells_of_are_refused(folder: Path) -> None:
    refused(configured(folder, num_hidden_layers=1), "none of its own: 9 .model.layers.1.input_layernorm.weight")


INNER = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module._checkpoint_wrapped_module",
)
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_forward_module.")


def test_wrappers_around_names_are_read(family: str, tmp_path: Path) -> None:
    """DataParallel, torch.compile, PEFT and DeepSpeed around the model; FSDP and compilation around its blocks."""
    model = tiny_model(family)
    block = f"{anatomy.block_names(model)[0]}."
    for i, edit in enumerate(
        (
            *(lambda s, w=w: {w + n: t for n, t in s.items()} for w in WRAPPERS),
            *(renamed(block, f"{block}{w}.") for w in INNER),
        )
    ):
        place = tmp_path / str(i)
        model.config.save_pretrained(place)
        file = "pytorch_model.bin" if i % 2 else "model.safetensors"
        state = {name: tensor.clone() for name, tensor in edit(model.state_dict()).items()}
        torch.save(state, place / file) if i % 2 else save_file(state, place / file, {"format": "pt"})
        pretrained.check(place)
        assert torch.equal(logits(pretrained.load(place, torch.float32)), logits(model))


class Mask(nn.Module):
    """As torch.ao.pruning's FakeSparsity."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_pairs_of_torch_pruning_are_their_product(family: str, how: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    for module in anatomy.linears(model).values():
        if how == "prune":
            prune.l1_unstructured(module, "weight", amount=0.5)
        else:
            parametrize.register_parametrization(module, "weight", Mask(torch.rand_like(module.weight) > 0.5))
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert sum("mask" in name for name in state) == len(anatomy.linears(model))
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    pretrained.check(tmp_path)
    loaded = pretrained.load(tmp_path, torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert any((module.weight == 0).float().mean() > 0.4 for module in anatomy.linears(loaded).values())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.0.attention.masked_bias",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
            ],
        ),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("opt", ["model.decoder.version"]),
        ("phi", ["model.embed.position_ids"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_what_modules_make_anew_is_harmless(family: str, names: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    edited(tmp_path, lambda state: state | {name: torch.ones(4, 4, dtype=dtype) for name in names})
    pretrained.check(tmp_path)
    assert torch.equal(logits(pretrained.load(tmp_path, torch.float32)), logits(model))


@pytest.mark.parametrize("pair", [False, True])
def test_one_tensor_under_two_names_is_refused(folder: Path, pair: bool) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    names = [f"{name}_orig", f"{name}_mask"] if pair else [f"module.{name}"]
    edited(folder, lambda state: state | {other: state[name] * 2 for other in names})
    refused(folder, f"holds {name} twice, once in a wrapper or a pruning pair and once without: leave one out")


@pytest.mark.parametrize("method", [Weight("weight"), Neuron(criterion="l2")])
def test_a_head_of_its_own_is_kept_where_the_configuration_ties_it(folder: Path, tmp_path: Path, method: Any) -> None:
    assert "lm_head.weight" in load_file(configured(folder, tie_word_embeddings=True) / "model.safetensors")
    model, tokenizer = loading.load(local(folder), "float32", "cpu")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    methods.prune(model, method, 0.5, None)
    saving.save(model, tokenizer, tmp_path / "saved")
    again, _ = loading.load(local(tmp_path / "saved"), "float32", "cpu")
    assert torch.equal(logits(model), logits(again))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    pretrained.check(tmp_path)
    assert torch.equal(logits(pretrained.load(tmp_path, torch.float32)), logits(model))


def cut(file: Path, size: int = -64) -> None:
    file.write_bytes(file.read_bytes()[:size])


def in_shards(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return next(folder.glob("model-00002*"))


def as_pickle(folder: Path, content: Any = None, **options: Any) -> Path:
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state if content is None else content, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: cut(f / "model.safetensors"),
            r"model.safetensors is damaged: it has \d+ bytes where .* fetch it again",
        ),
        (lambda f: cut(f / "model.safetensors", 5), "model.safetensors is damaged: 5 bytes, less than its header"),
        (lambda f: cut(in_shards(f)), r"model-00002-of-00003.safetensors is damaged"),
        (
            lambda f: in_shards(f).unlink(),
            r"lacks 1 of the 3 files that model.safetensors.index.json names .model-00002",
        ),
        (
            lambda f: in_shards(f).with_name("model.safetensors.index.json").unlink(),
            "holds no weights .*there is model-00001-of-00003.safetensors; .*fetch the model.safetensors.index.json",
        ),
        (
            lambda f: in_shards(f).with_name("model.safetensors.index.json").write_text("{"),
            "index.json is damaged and no JSON",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"holds no weights .model.safetensors or pytorch_model.bin"),
        (
            lambda f: (f / "model.safetensors").rename(f / "adapter_model.safetensors"),
            "merge the adapter into its model",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter: merge"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "lla'), "config.json is damaged and no JSON"),
        (lambda f: cut(as_pickle(f), -2000), "pytorch_model.bin is damaged, or no file of tensors"),
        (lambda f: as_pickle(f, {"state_dict": {}, "epoch": 3}), "no tensor: save the model's state_dict.. alone"),
        (lambda f: as_pickle(f, nn.Linear(2, 2)), "pytorch_model.bin is damaged, or no file of tensors"),
        (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "holds no tokenizer"),
    ],
)
def test_damaged_and_missing_files_are_named(folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    with pytest.raises(RequestError, match=message):
        headers.check(local(folder))
        asked(local(folder))
    with pytest.raises(RequestError):
        loading.load(local(folder), "float32", "cpu")


def as_pickles(folder: Path) -> None:
    state = list(torch.load(as_pickle(folder)).items())
    (folder / "pytorch_model.bin").unlink()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, (state[:9], state[9:]), strict=True):
        torch.save(dict(part), folder / name)
    placed = {tensor: names[i >= 9] for i, (tensor, _) in enumerate(state)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_shards_and_pickles_of_both_formats_load(folder: Path) -> None:
    expected = logits(loading.load(local(folder), "float32", "cpu")[0])
    for write in (in_shards, lambda f: as_pickle(f, _use_new_zipfile_serialization=False), as_pickles):
        write(folder)
        headers.check(local(folder))
        asked(local(folder))
        assert torch.equal(logits(loading.load(local(folder), "float32", "cpu")[0]), expected)
        model = AutoModelForCausalLM.from_pretrained(folder)
        for file in (*folder.glob("model*"), *folder.glob("pytorch_model*")):
            file.unlink()
        model.save_pretrained(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_checkpoints_are_refused(folder: Path, method: str) -> None:
    refused(
        configured(folder, quantization_config={"quant_method": method}),
        rf"is quantised \({method}\), and pruning needs",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_matrices_are_refused_whatever_the_configuration_says(folder: Path, dtype: torch.dtype) -> None:
    edited(folder, lambda state: {name: t.to(dtype) if "gate" in name else t for name, t in state.items()})
    refused(folder, r"quantised weights \(model.layers.0.mlp.gate_proj.weight, .*: (I8|U8|F8_E4M3)\)")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, rf"pytorch_model.bin holds quantised weights \(model.layers.0.mlp.gate_proj.weight, .*: {dtype}\)")


ENCODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "bert": (AutoModelForMaskedLM, ENCODER, r"is an encoder, whose tokens see those after them .*\(bert\)"),
    "roberta": (AutoModel, ENCODER, "is an encoder"),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
        "is an encoder and a decoder .t5.",
    ),
    "bart": (
        AutoModelForSeq2SeqLM,
        {
            "vocab_size": 64,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        "an encoder and a decoder",
    ),
    "vit": (
        AutoModelForImageClassification,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "image_size": 32,
        },
        "is no language model .vit.",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_are_no_decoders_are_refused_in_short(folder: Path, kind: str) -> None:
    auto, sizes, message = OTHERS[kind]
    (folder / "model.safetensors").unlink()
    auto.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    refused(folder, message + ".*sweep prunes decoders that predict the next token of a text, such as llama")
    with pytest.raises(RequestError) as error:
        asked(local(folder))
    assert len(str(error.value)) < 300


def test_a_head_of_classes_is_no_language_model(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    refused(folder, "lm_head.weight.*score.weight.*another head")


def test_a_model_that_sees_later_tokens_is_found_out_by_trying(folder: Path) -> None:
    """XLNet has no setting that tells: alone, it reads in both directions."""
    (folder / "model.safetensors").unlink()
    config = AutoConfig.for_model("xlnet", vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(RequestError, match="is no decoder: what it says of a token changes with the tokens after it"):
        loading.load(local(folder), "float32", "cpu")


def test_decoders_are_found_to_be_decoders(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        requirements.check_causal(tiny_model(family).to(dtype), "here")


def test_numbers_too_large_for_the_dtype_are_refused_with_another(folder: Path) -> None:
    edited(folder, lambda state: state | {"model.norm.weight": torch.full((16,), 1e6)})
    asked(local(folder))
    loading.load(local(folder), "bfloat16", "cpu")
    with pytest.raises(RequestError, match="model.norm.weight. as float16: try dtype=bfloat16 or float32"):
        loading.load(local(folder), "float16", "cpu")


def test_a_tokenizer_that_cannot_begin_a_text_is_refused_where_text_is_scored(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token is None
    asked(local(folder), tasks=())
    with pytest.raises(RequestError, match="neither a BOS nor an EOS token, and benchmarks need one"):
        asked(local(folder))
    with pytest.raises(
        RequestError, match="method=vocab: the tokenizer has neither an unknown nor an end-of-text token"
    ):
        asked(local(folder), Vocab(), tasks=())
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    asked(local(folder), Vocab())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layers.1.mlp.up"), r"tensors missing: 1 \(model.layers.1.mlp.up_proj.weight\)"),
        (lambda state: state | {"model.extra": torch.ones(2)}, r"none of its own: 1 \(model.extra\)"),
        (
            lambda state: state | {"model.norm.weight": torch.ones(9)},
            r"another shape: 1 \(model.norm.weight \(9,\) and not",
        ),
    ],
)
def test_a_folder_of_sweep_is_held_to_the_same(folder: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    model, tokenizer = loading.load(local(folder), "float32", "cpu")
    methods.prune(model, Neuron(criterion="l2", blocks=(0,)), 0.5, None)
    saving.save(model, tokenizer, tmp_path / "own")
    asked(local(tmp_path / "own"))
    assert torch.equal(logits(loading.load(local(tmp_path / "own"), "float32", "cpu")[0]), logits(model))
    refused(edited(tmp_path / "own", edit), message)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path, cache_folder: Path) -> None:
    import gguf

    def write(file: Path, leave_out: str | None) -> Model:
        writer = gguf.GGUFWriter(file, "llama")
        for name, value in {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "head_count": 4,
            "head_count_kv": 2,
            "layer_norm_rms_eps": 1e-5,
            "rope_dimension_count": 8,
            "vocab_size": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tokenizer_model": "gpt2",
            "token_list": [f"t{i}" for i in range(64)],
            "token_merges": [],
            "token_types": [1] * 64,
            "token_scores": [0.0] * 64,
        }.items():
            getattr(writer, f"add_{name}")(value)
        shapes = {"token_embd": (64, 32), "output": (64, 32), "output_norm": (32,)}
        shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
        shapes |= {f"blk.0.{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        for name, size in shapes.items():
            if name != leave_out:
                writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))  # which transformers computes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Model(file.stem, "gguf", path=str(file))

    loading.load(write(tmp_path / "whole.gguf", None), "float32", "cpu")
    with pytest.raises(
        RequestError, match=r"lacks.gguf is not the model .* missing: 1 \(model.layers.0.mlp.up_proj.weight\)"
    ):
        loading.load(write(tmp_path / "lacks.gguf", "blk.0.ffn_up"), "float32", "cpu")
    lacks = Cell(
        Model("lacks", "gguf", path=str(tmp_path / "lacks.gguf")),
        Weight("weight"),
        0.5,
        Benchmarks(()),
        None,
        Efficiency(),
        Execution(),
    )
    plan.check_models([lacks])  # where other machines are to convert it, they tell
    with pytest.raises(RequestError, match="tensors missing: 1"):
        plan.check_models([lacks], convert=True)


def test_a_sweep_refuses_what_its_cells_would_fail_on(folder: Path, tmp_path: Path) -> None:
    """Through the command line: no cell runs, no row is left, and the message is all that is said."""
    edited(folder, without("layers.1."))
    asked = ["+method=weight", "sparsity=0.5", *QUICK, "benchmarks=pydoc", "efficiency=none"]
    said = run("model=local", f"model.path={folder}", *asked, cwd=tmp_path, code=2)
    assert "sweep: " in said and "tensors missing: 9" in said and "[1/2]" not in said and "Traceback" not in said
    assert not list((tmp_path / "results").rglob("*.parquet"))


def test_models_of_the_hub_are_held_to_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place, model = tmp_path / "hub" / "models--some--one", Model("some/one", "hub")
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    snapshot = Path(shutil.copytree(folder, place / "snapshots" / "abc"))

    def loaded() -> Tensor:
        headers.check(model)
        asked(model)
        return logits(loading.load(model, "float32", "cpu")[0])

    expected = loaded()
    edited(snapshot, lambda state: {f"module.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(loaded(), expected)
    whole = edited(snapshot, lambda state: {name.removeprefix("module."): tensor for name, tensor in state.items()})
    kept = (whole / "model.safetensors").read_bytes()
    edited(snapshot, lambda state: {name: t.to(torch.int8) if "gate" in name else t for name, t in state.items()})
    with pytest.raises(RequestError, match="holds quantised weights"):
        loading.load(model, "float32", "cpu")
    (whole / "model.safetensors").write_bytes(kept)
    edited(snapshot, without("layers.1."))
    with pytest.raises(RequestError, match="tensors missing: 9"):
        loaded()
    with pytest.raises(RequestError, match="tensors missing: 9"):
        loading.load(model, "float32", "cpu")
    configured(snapshot, quantization_config={"quant_method": "gptq"})
    with pytest.raises(RequestError, match=r"is quantised \(gptq\)"):
        headers.check(model)
    with pytest.raises(RequestError, match=r"is quantised \(gptq\)"):
        loading.load(model, "float32", "cpu")
