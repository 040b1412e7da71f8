"""The studies of published tables, each at its own settings as far as a tiny random model of the same family allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import FAMILIES
from sweep import store, versions
from sweep.config import Calibration
from sweep.texts import text
from test_cli import run

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "perplexity.windows=1",
    "calibration.sequences=4",
    "calibration.length=32",
    "efficiency=none",
    "efficiency.prompt_tokens=8",
    "efficiency.output_tokens=2",
    "benchmarks.tasks=[]",
    "dtype=float32",
    "device=cpu",
    "threads=1",
]
STUDIES = {  # the part of each study that is run, and how many of the published numbers stand beside ours then
    "wanda_llama2": ("llama", "meta-llama/Llama-2-7b-hf", ["+method=wanda", "method.pattern=null,2:4"], 3),
    "ria_llama3": ("llama", "meta-llama/Meta-Llama-3-8B", ["+method=ria", "method.pattern=null,2:4"], 3),
    "sparsegpt_opt": ("opt", "facebook/opt-125m", [], 2),
    "flap_llama": ("llama", "huggyllama/llama-7b", ["+method=neuron", "method.importance=flap"], 1),
}


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each family, with a tokenizer of bytes."""
    opt = tmp_path_factory.mktemp("opt")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.save_pretrained(opt)
    torch.manual_seed(0)
    settings = {**FAMILIES["opt"], "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    config = AutoConfig.for_model("opt", **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(opt)
    return {"llama": tiny_checkpoint, "opt": opt}


@pytest.mark.parametrize("study", STUDIES)
def test_a_published_study_runs_and_says_that_its_protocol_differs(
    study: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    family, name, part, beside = STUDIES[study]
    for file in ("c4_train.txt", "wikitext2.txt"):  # the names of the studies, another text
        (tmp_path / file).write_text(text.calibration_text(Calibration("pydoc")))
    place = [f"model.path={checkpoints[family]}", f"model.name={name}", "perplexity.source=wikitext2.txt"]
    run("-m", f"+experiment={study}", "model=local", *place, *SMALL, *part, cwd=tmp_path)
    rows = sweep.load(tmp_path / "results")
    assert (rows.status == "ok").all() and set(rows.model) == {name} and (rows.method == "dense").sum() == 1
    published = str(ROOT / "experiments" / study / "published.csv")
    lines = run("results", "--against", published, cwd=tmp_path, code=1, module="sweep.report").splitlines()
    assert f"dense {name}" in lines[0] and "PROTOCOL DIFFERS" in lines[0]
    assert sum("not run" not in line for line in lines if line.startswith(f"| {name}")) == beside


# Studies whose rows come from an older measuring version or from uncommitted code. They say so in their README, will be
# recorded anew, and then leave this list; no study is added to it.
RECORDED_BEFORE = {"break_even", "first_look", "rare_words", "small_weights", "weight_criteria", "weight_vs_neuron"}
RECORDED = {path.parent.name: path for path in sorted(ROOT.glob("experiments/*/results"))}


@pytest.mark.parametrize("study", RECORDED)
def test_a_study_is_recorded_by_this_version_from_committed_code(study: str) -> None:
    rows = store.load(RECORDED[study])
    dirty = rows.git_commit.fillna("-dirty").str.endswith("-dirty")  # an installed wheel has no commit to come back to
    current = not dirty.any() and set(rows.measuring_version) == {versions.MEASURING_VERSION}
    if study not in RECORDED_BEFORE:
        assert current, (
            f"{dirty.sum()} of {len(rows)} rows are of uncommitted code, versions {set(rows.measuring_version)}"
        )
        return
    assert not current, f"{study} is recorded as it should be: take it out of RECORDED_BEFORE"
    page = (ROOT / "experiments" / study / "README.md").read_text()
    (said,) = [part for part in page.split("\n\n") if part.startswith("**Recorded**")]
    for word in [*rows.measuring_version.astype(int).astype(str), *rows.git_commit.str[:7]]:
        assert re.search(rf"\b{word}\b", said), word
    assert ("uncommitted" in said) == dirty.any()


def test_the_list_of_studies_to_be_recorded_anew_names_studies() -> None:
    assert set(RECORDED) >= RECORDED_BEFORE
