"""The studies of published tables, each at its own settings as far as a tiny random model of the same family allows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import FAMILIES
from sweep import store, versions
from sweep.config import Calibration
from sweep.report import asked, decision, frontier, overview
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
RECORDED_BEFORE = {"break_even", "weight_vs_neuron"}
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


PLANNED = """
import json, sys
from hydra.core.global_hydra import GlobalHydra
from sweep import __main__, runner, versions

def keep(plan, options, launch=None):
    cells = [step.cell for step in (*plan.done, *plan.todo)]
    rows = {(cell.method.family, cell.sparsity, cell.seed, cell.execution.name) for cell in cells}
    print(json.dumps([len(plan.todo), sorted(rows)]))
    return 0

runner.run_plan = keep
for words in json.loads(sys.argv.pop()):
    sys.argv[1:] = words
    GlobalHydra.instance().clear()
    try:
        __main__._main()
    except SystemExit:  # of a command without -m
        pass
"""


def test_a_recorded_study_plans_the_cells_that_it_has() -> None:
    """What it ran has not changed with a default since: how the weights are run, for one."""
    small = {study: path for study, path in RECORDED.items() if len(store.load(path)) < 30}
    place = ["device=cpu", "threads=1", "-m"]
    commands = [[f"+experiment={study}", f"results={path}", *place] for study, path in small.items()]
    code = [sys.executable, "-c", PLANNED, json.dumps(commands)]
    said = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    for (study, path), line in zip(small.items(), said.stdout.splitlines(), strict=True):
        rows = store.load(path)
        recorded = set(zip(rows.method, rows.sparsity, rows.seed, rows.execution, strict=True))
        assert {tuple(cell) for cell in json.loads(line)[1]} == recorded, study


def test_what_a_report_says_to_run_further_is_new_and_of_that_recipe_alone(tmp_path: Path) -> None:
    """Through the real door, as it stands under the decision table."""
    said: list[tuple[str, list[str]]] = []
    for study in ("generation", "prune_or_quantise", "recovery"):
        rows = frontier.numbered(frontier.with_paired_latency(asked.read([str(RECORDED[study])])))
        found = overview.overview(rows, asked.quality_metrics(rows))
        assert found is not None
        further = decision.decide(found, rows).further
        assert further
        read = rows[rows.criterion == "wanda"] if study != "recovery" else rows[rows.recovery == "local"]
        of_seeds = decision._surer(pd.Series({"name": study, "sparsity": 0.5}), read)
        commands = [*of_seeds, *(command for _, command in further if "benchmarks.tasks" not in command)]
        said += [(study, shlex.split(command)[3:]) for command in commands]
    machine = ["device=cpu", "threads=1"]
    commands = [[word for word in words if not word.startswith(("device=", "threads="))] for _, words in said]
    code = [sys.executable, "-c", PLANNED, json.dumps([[*machine, *words] for words in commands])]
    told = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(lines) == len(said) >= 7
    for (_, words), (todo, cells) in zip(said, lines, strict=True):
        pruned = [cell for cell in cells if cell[0] != "dense" or "quantize" in " ".join(words)]
        assert todo >= 1 and 1 <= len(pruned) <= 4, words
    assert (
        sum("hydra.sweeper.grids=null" in words for _, words in said) == 3
    )  # seeds of one recipe, not the study's grid


def test_further_benchmarks_are_those_of_papers() -> None:
    named = yaml.safe_load((ROOT / "conf" / "benchmarks" / "zero_shot.yaml").read_text())["tasks"]
    assert tuple(named) == decision._FURTHER_TASKS


@pytest.mark.parametrize("study", RECORDED)
def test_a_study_of_zeroed_weights_says_how_it_runs_them(study: str) -> None:
    """So that its cells keep their names whatever the default is."""
    if (store.load(RECORDED[study]).method == "weight").any():
        stated = yaml.safe_load((ROOT / "conf" / "experiment" / f"{study}.yaml").read_text())["defaults"]
        assert any("override /execution" in entry for entry in stated)


def test_the_list_of_studies_to_be_recorded_anew_names_studies() -> None:
    assert set(RECORDED) >= RECORDED_BEFORE
