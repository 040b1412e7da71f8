"""Every counted column of a row against counts made by hand, for every family of method and every execution on a CPU."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import GATED, random_tokens, tiny_model
from sweep import run, saving
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model, Perplexity
from sweep.measuring import counting
from sweep.models import anatomy, loading
from sweep.pruning import methods
from sweep.pruning.families import Dense, Drop, Head, Layer, Method, Neuron, Vocab, Weight, checked_weight

BLOCKS, VOCABULARY, HIDDEN, INNER, EXPERTS, TAKEN = 3, 259, 16, 24, 3, 2
SHAPE = GATED | {"vocab_size": VOCABULARY, "num_hidden_layers": BLOCKS, "max_position_embeddings": 128}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "biased": {"model_type": "qwen2"},
    "experts": {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": TAKEN},
}
TIMED = Efficiency(prompt_tokens=8, output_tokens=3, batch_size=2, warmup=0, repeats=0)
MATRIX = r"layers\.\d+\.(.*_proj\.weight|mlp\.experts\.(gate_up|down)_proj)"  # of parameters' names
FFN = r"layers\.\d+\.mlp\.(.*_proj\.weight|experts\.(gate_up|down)_proj)"
ATTENTION = r"layers\.\d+\.self_attn\.._proj\.weight"
ROWS = r"(embed_tokens|lm_head)\.weight"


@dataclass(frozen=True)
class Case:
    """A pruning, the parameters that it targets, and what it leaves of its units."""

    method: Method
    targets: str  # of full names of parameters, by regular expression
    sparsity: float = 0.5
    model: str = "untied"
    execution: Execution = field(default=Execution("dense"))
    units: float | None = None  # the fraction of them that goes
    measured: int | None = None  # units whose drop is measured
    left: tuple[int, ...] | None = None  # the numbers of the blocks that stay, where not all do

    def __str__(self) -> str:
        settings = [f"{k}={v}" for k, v in vars(self.method).items() if v != getattr(type(self.method), k, None)]
        return " ".join([self.model, *settings, f"{self.sparsity:g}", self.execution.name])


def weight(**settings: Any) -> Weight:
    return Weight("weight", **settings)


CASES = [
    *[Case(Dense(), MATRIX, 0.0, model) for model in MODELS],
    *[Case(weight(), MATRIX, 0.5, model) for model in MODELS],
    *[Case(weight(embeddings=True, lm_head=True), f"{MATRIX}|{ROWS}", 0.9, model) for model in MODELS],
    Case(weight(lm_head=True), f"{MATRIX}|{ROWS}", 0.7, "tied"),
    Case(weight(lm_head=True), rf"{MATRIX}|lm_head\.weight", 0.7),
    Case(weight(embeddings=True, criterion="random"), rf"{MATRIX}|embed_tokens\.weight", 0.7),
    Case(weight(exclude=("*.0.*",)), MATRIX.replace(r"layers\.\d+", r"layers\.[12]"), 0.4),
    Case(weight(targets="ffn"), FFN, 0.3),
    Case(weight(targets="ffn", criterion="wanda"), FFN, 0.3, "experts"),
    Case(weight(targets="attention", allocation="global"), ATTENTION, 0.3, "biased"),
    Case(weight(criterion="sparsegpt", pattern="2:4"), MATRIX),
    *[
        Case(
            weight(embeddings=True, lm_head=True),
            f"{MATRIX}|{ROWS}",
            0.8,
            model,
            Execution(name, kernel, fallback=True),
        )
        for model in MODELS
        for name, kernel in (("bitmap", "torch"), ("csr", "auto"))
    ],  # type: ignore[arg-type]
    Case(weight(pattern="2:4"), MATRIX, 0.5, "biased", Execution("semi_structured", fallback=True)),
    Case(Neuron(criterion="l2"), FFN, units=0.5),
    Case(Neuron(criterion="flap"), FFN, units=0.5),  # adds biases
    Case(Neuron(criterion="l2", blocks=(0, 2), repair=True), r"layers\.[02]\.mlp\..*_proj\.weight", units=0.5),
    Case(Neuron(criterion="drop"), FFN, units=0.5, measured=BLOCKS * INNER),
    Case(Neuron(criterion="drop", steps=2, drop=Drop(screen="taylor", screen_margin=0.125)), FFN, units=0.5),
    Case(Head(criterion="l2", unit="query", scope="layer"), ATTENTION, 1 / 3, "biased", units=0.5),
    Case(Head(criterion="l2", scope="layer"), ATTENTION, units=0.5),
    Case(Head(criterion="drop", blocks=(1,)), r"layers\.1\.self_attn\.._proj\.weight", units=0.5, measured=2),
    Case(Layer(criterion="random"), r"layers\.\d+\..*", 1 / 3, units=1 / 3),
    Case(Layer(criterion="random", blocks=(1,)), r"layers\.1\..*", 0.9, "experts", units=1.0, left=(0, 2)),
    Case(Layer(criterion="drop", blocks=(0, 1)), r"layers\.[01]\..*", units=0.5, measured=2),
    *[Case(Vocab(), ROWS, 0.3, model, units=78 / VOCABULARY) for model in MODELS],
]


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = SHAPE | MODELS[name]
    config = AutoConfig.for_model(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # biases are zero at first
    return model


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """By name, a tied one once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def matrices_of(name: str, p: Tensor) -> list[Tensor]:
    """A parameter, or what each expert has of it: gate and up are two matrices."""
    if p.ndim != 3:
        return [p]
    return [matrix for expert in p for matrix in expert.chunk(2 if "gate_up" in name else 1)]


def ran(
    case: Case,
    checkpoint_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    save: str | None = None,
    **other: Any,
) -> tuple[dict, dict, dict[str, Tensor]]:
    """(row, tables, parameters after pruning) of the case, run as a cell is."""
    tokenizer, after = AutoTokenizer.from_pretrained(checkpoint_folder), dict[str, Tensor]()
    monkeypatch.setattr(loading, "load", lambda *_: (model, tokenizer))
    prepare = run.execution.prepare

    def noting(pruned: PreTrainedModel, *rest: Any) -> tuple[PreTrainedModel, str]:
        after.update(parameters(pruned))
        return prepare(pruned, *rest)

    monkeypatch.setattr(run.execution, "prepare", noting)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and so on. " * 30)
    method = checked_weight(case.method, case.sparsity) if isinstance(case.method, Weight) else case.method
    cell = Cell(
        Model("tiny", "local", str(checkpoint_folder)),
        method,
        case.sparsity,
        Benchmarks(()),
        Calibration(str(tmp_path / "text.txt"), 2, 12),
        TIMED,
        case.execution,
        Perplexity(str(tmp_path / "text.txt"), 16, windows=2),
        dtype="float32",
        device="cpu",
    )
    row, tables = run.run_cell(replace(cell, **other), save)
    return row, tables, after


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_counted_column_is_what_a_hand_count_says(
    case: Case, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    model = make(case.model)
    before, all_blocks = parameters(model), list(anatomy.blocks(model))
    row, tables, after = ran(case, tiny_checkpoint, tmp_path, monkeypatch, model)
    left = [number for number, block in enumerate(all_blocks) if any(block is b for b in anatomy.blocks(model))]
    assert case.left is None or case.left == tuple(left)
    after = {re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{left[int(m[1])]}.", name): p for name, p in after.items()}

    def gone(chosen: Callable[[str], Any]) -> float:
        """The fraction removed of the parameters whose names are chosen."""
        whole = lost = 0
        for name, old in before.items():
            if chosen(name):
                whole += old.numel()
                new = after.get(name, torch.zeros(0))
                lost += int(((old != 0) & (new == 0)).sum()) if new.shape == old.shape else old.numel() - new.numel()
        for name, new in after.items():
            if chosen(name) and name not in before:  # a bias that stands for what went
                lost -= new.numel()
        return lost / whole

    assert row["sparsity_achieved"] == pytest.approx(gone(lambda name: re.search(f"({case.targets})$", name)))
    assert row["sparsity_block_parameters"] == pytest.approx(gone(lambda name: ".layers." in name))
    assert row["sparsity_all_parameters"] == pytest.approx(gone(lambda _: True))
    assert row.get("sparsity_units") == (None if case.units is None else pytest.approx(case.units))
    if not isinstance(case.method, Head | Layer | Neuron):  # whose units are few, and of several sizes
        assert row["sparsity_achieved"] == pytest.approx(case.sparsity, abs=2e-3)

    nonzeros = {name: int((p != 0).sum()) for name, p in after.items()}
    held = coded = of_blocks = 0
    for name, p in after.items():
        for matrix in matrices_of(name, p):
            packed = case.execution.name in ("bitmap", "csr") and re.search(r"layers.*_proj(\.weight)?$", name)
            there = int((matrix != 0).sum())
            bits = 32 * matrix.numel()
            if re.search(f"({MATRIX})$", name):
                bits = min(bits, matrix.numel() + 32 * there)
                of_blocks += bits
            coded += bits
            if not packed or there == matrix.numel():
                held += 4 * matrix.numel()
            elif case.execution.name == "csr":  # a value and a column each, and where each row begins
                held += 8 * there + 4 * (len(matrix) + 1)
            else:  # a bit a place in words of 64, the values and 64 bytes after them, and where each row begins
                held += 8 * len(matrix) * math.ceil(matrix.shape[1] / 64) + 4 * there + 64 + 4 * (len(matrix) + 1)
    assert row["parameters"] == sum(p.numel() for p in after.values())
    assert row["nonzero_parameters"] == sum(nonzeros.values())
    assert row["weights_bytes"] == row["stored_bytes"] == held
    assert row["coded_bytes"] == math.ceil(coded / 8)
    weights = sum(p.numel() for name, p in after.items() if re.search(f"({MATRIX})$", name))
    assert row["bits_per_weight"] == pytest.approx(of_blocks / weights)

    macs = nonzero_macs = 0.0
    for name, p in after.items():
        if re.search(f"({MATRIX})$", name):
            share = TAKEN / EXPERTS if "experts" in name else 1.0
            macs, nonzero_macs = macs + share * p.numel(), nonzero_macs + share * nonzeros[name]
    head = "lm_head.weight" if "lm_head.weight" in after else "model.embed_tokens.weight"
    assert row["macs_per_token"] == round(macs + after[head].numel())
    assert row["nonzero_macs_per_token"] == round(nonzero_macs + nonzeros[head])

    cached = 0  # keys and values, of two texts of 8 + 3 tokens
    for name, p in after.items():
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            cached += len(p) * 2 * 11 * 4
    assert row["kv_cache_bytes"] == cached
    assert (row["perplexity_tokens"], row["perplexity_windows"]) == (2 * 16, 2)
    assert row.get("units_measured") == (int(tables["units"].measured.sum()) if "units" in tables else None)
    assert ("units" in tables) == (getattr(case.method, "criterion", "") == "drop")
    if case.measured is not None:
        assert row["units_measured"] == case.measured and len(tables["units"]) == case.measured

    left = tables["layers"][tables["layers"]["left"].notna()]
    assert set(left["left"]) == ({"router"} if case.model == "experts" else set())
    lines = tables["layers"].drop(left.index).set_index(["block", "matrix"])[["weights", "zeros"]]
    for name, old in before.items():
        if re.search(f"({MATRIX})$", name):
            block, matrix = re.search(r"layers\.(\d+)\.(.*)$", name).groups()  # type: ignore[union-attr]
            matrix, kept = matrix.removesuffix(".weight"), nonzeros.get(name, 0)
            if "experts" not in matrix:
                assert lines.loc[(int(block), matrix)].tolist() == [old.numel(), old.numel() - kept]
                continue
            mine = [
                m
                for b, m in lines.index
                if b == int(block)
                and re.fullmatch(matrix.replace("experts.", r"experts\.\d\.").replace("gate_up", "(gate|up)"), m)
            ]
            assert len(mine) == EXPERTS * (2 if "gate_up" in matrix else 1)
            sums = lines.loc[[(int(block), m) for m in mine]].sum().tolist()
            assert sums == [old.numel(), old.numel() - kept]
    assert lines.weights.sum() == sum(p.numel() for name, p in before.items() if re.search(f"({MATRIX})$", name))


@pytest.mark.parametrize("criterion", ["magnitude", "random", "sparsegpt"])
@pytest.mark.parametrize("execution", ["dense", "bitmap"])
def test_zeros_of_the_dense_model_are_not_removed(
    criterion: Any, execution: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("biased")
    for block in anatomy.blocks(model):
        block.self_attn.q_proj.bias.data.zero_()
        block.mlp.up_proj.weight.data[:, ::2] = 0
    before = parameters(model)
    unpruned = ran(Case(Dense(), "", 0.0), tiny_checkpoint, tmp_path, monkeypatch, copy.deepcopy(model))[0]
    for name in ("sparsity_achieved", "sparsity_block_parameters", "sparsity_all_parameters"):
        assert unpruned[name] == 0.0
    case = Case(weight(criterion=criterion), "", 0.6, execution=Execution(execution, "torch"))
    row, tables, after = ran(case, tiny_checkpoint, tmp_path, monkeypatch, model)
    were = sum(int((p != 0).sum()) for p in before.values())
    lost = were - sum(int((p != 0).sum()) for p in after.values())
    in_blocks = [p for name, p in before.items() if ".layers." in name]
    matrices = sum(p.numel() for p in in_blocks if p.ndim == 2)
    assert 0 < row["sparsity_achieved"] == pytest.approx(lost / matrices)
    assert row["sparsity_achieved"] < 0.6
    assert row["sparsity_block_parameters"] == pytest.approx(lost / sum(p.numel() for p in in_blocks))
    assert row["sparsity_all_parameters"] == pytest.approx(lost / unpruned["parameters"])
    assert row["nonzero_parameters"] == were - lost
    zeros = matrices - sum(int((p != 0).sum()) for name, p in after.items() if re.search(f"({MATRIX})$", name))
    assert tables["layers"].zeros.sum() == zeros  # which says what is zero, whatever has made it so


SAVED = [c for c in CASES if c.execution.name == "bitmap" or c.method.family in ("neuron", "head", "layer", "vocab")]


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_a_saved_model_has_the_row_and_the_bytes_of_one_that_is_not(
    case: Case, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    row, _, _ = ran(case, tiny_checkpoint, tmp_path, monkeypatch, make(case.model))
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "another"))  # in which no drop is measured yet
    saved, _, _ = ran(case, tiny_checkpoint, tmp_path, monkeypatch, make(case.model), str(tmp_path / "saved"))
    timed = re.compile("seconds|memory")
    assert {k: v for k, v in row.items() if not timed.search(k)} == {
        k: v for k, v in saved.items() if not timed.search(k)
    }
    files = [load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")]
    assert row["stored_bytes"] == sum(t.nbytes for weights in files for t in weights.values())


def test_a_checkpoint_of_every_family_has_the_bytes_that_are_counted(
    family: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = tiny_model(family)
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", {"method": {}})
    files = [load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")]
    assert counting.stock(model).stored_bytes == sum(t.nbytes for weights in files for t in weights.values())


def test_what_is_gone_is_counted_in_every_family(family: str) -> None:
    for method in (weight(), Neuron(criterion="l2"), Head(criterion="l2"), Layer(criterion="random")):
        model = tiny_model(family)
        before, targets = counting.stock(model), methods.targets(model, method)
        outcome = methods.prune(model, method, 0.5, random_tokens())
        found = counting.removed(before, counting.stock(model), targets)
        assert found["sparsity_achieved"] == pytest.approx(outcome.removed / outcome.targets)


def test_a_decoded_token_reads_a_row_of_a_lookup_and_the_experts_that_it_goes_through() -> None:
    untied, tied = (counting.stock(make(name)) for name in ("untied", "tied"))
    whole = counting.size(untied)["weights_bytes"]
    assert counting.read_bytes(untied) == pytest.approx(whole - 4 * (VOCABULARY - 1) * HIDDEN)
    assert counting.read_bytes(tied) == counting.size(tied)["weights_bytes"]
    positions = counting.stock(tiny_model("gpt2"))  # whose 64 positions are a lookup too
    assert counting.read_bytes(positions) == pytest.approx(counting.size(positions)["weights_bytes"] - 4 * 63 * 16)

    experts = counting.stock(make("experts"))
    of_one = 4 * BLOCKS * 3 * HIDDEN * INNER
    rest = counting.size(experts)["weights_bytes"] - EXPERTS * of_one - 4 * VOCABULARY * HIDDEN
    assert counting.read_bytes(experts) == pytest.approx(rest + TAKEN * of_one + 4 * HIDDEN)
    # of three experts a token leaves one alone; two tokens leave the same one alone in one case of three
    assert counting.read_bytes(experts, 2) == pytest.approx(
        rest + (EXPERTS - 1 / EXPERTS) * of_one + 4 * HIDDEN * (2 - 1 / VOCABULARY)
    )


def test_linear_layers_beside_the_blocks_multiply_too() -> None:
    config = AutoConfig.for_model(
        "opt",
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    blocks = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert counting.size(counting.stock(model))["macs_per_token"] == blocks + 2 * 8 * 16 + 64 * 8


def test_stock_keeps_no_block_in_memory() -> None:
    model = tiny_model("llama")
    before = counting.stock(model)
    del model.model.layers[0]
    assert before.blocks[0][1]() is None
    found = counting.matrices(before, counting.stock(model)).groupby("block")[["weights", "zeros"]].sum()
    assert found.loc[0].weights == found.loc[0].zeros > 0 and found.loc[1].zeros == 0
