"""The real command line, as a user types it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import sweep
from sweep import command_line
from sweep.formats.declared import FORMATS
from sweep.report import frontier, variants

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "benchmarks.limit=4",
    "benchmarks.max_length=256",
    "efficiency.prompt_tokens=8",
    "efficiency.output_tokens=2",
    "efficiency.repeats=6",
    "efficiency.warmup=0",
    "calibration.sequences=4",
    "calibration.length=32",
    "dtype=float32",
    "threads=1",
]


TOO_FEW_TOKENS = "<s>" * 60  # bytes enough for the check before the cell, and a token for three of them


def run(*arguments: str, cwd: Path, code: int = 0, module: str = "sweep") -> str:
    """Run the command line in a folder; returns all it printed, after checking its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> list[str]:
    return ["model=local", f"model.path={tiny_checkpoint}", *QUICK]


def test_a_sweep_leaves_rows_skips_them_when_done_and_reports(tmp_path: Path, tiny: list[str]) -> None:
    command = ["+method=weight,neuron", "sparsity=0.25,0.5", "seed=0,1", *tiny, "-m"]
    first = run(*command, cwd=tmp_path)
    # two magnitude cells (they read no seed), four neuron cells, one dense baseline
    assert "7 cells (dense baselines included), 2 equal to another, 0 already done, 7 to run" in first
    assert "[7/7]" in first and "rows: results/cells" in first
    rows = sweep.load(tmp_path / "results")
    assert (rows.status == "ok").all()
    assert rows.method.value_counts().to_dict() == {"neuron": 4, "weight": 2, "dense": 1}
    assert set(pd.read_parquet(tmp_path / "results" / "cells").columns) == set(rows.columns)
    for row in rows[rows.method == "weight"].itertuples():
        assert row.sparsity_achieved == pytest.approx(row.sparsity, abs=1e-3)
        assert row.execution == "bitmap" and row.kernel.startswith("bitmap ")
    neuron = rows[rows.method == "neuron"]
    assert (neuron.execution == "shrunk").all()
    assert (neuron.weights_bytes < rows[rows.method == "dense"].weights_bytes.item()).all()
    assert rows["capitals/acc"].between(0, 1).all() and (rows["pydoc/token_perplexity"] > 1).all()
    samples = pd.read_parquet(tmp_path / "results" / "samples")
    assert set(samples.task) == {"pydoc", "pydoc_cloze", "capitals", "continents"}
    assert len(pd.read_parquet(tmp_path / "results" / "latency")) == 7 * 6 * 6

    again = run(*command, cwd=tmp_path)
    assert "7 already done, 0 to run" in again and "[1/" not in again

    run("results", cwd=tmp_path, module="sweep.report")
    report = tmp_path / "results" / "report"
    for name in (
        "overview",
        "capitals-acc-against-sparsity",
        "pydoc-token_perplexity-against-sparsity",
    ):
        assert (report / f"{name}.png").stat().st_size > 5000
        assert (report / f"{name}.svg").stat().st_size > 5000
    assert (report / "table.md").read_text().count("\n") >= 7  # seeds share a line


def test_one_cell_runs_without_m_and_with_its_baseline(tmp_path: Path, tiny: list[str]) -> None:
    run("+method=weight", "sparsity=0.5", "benchmarks=pydoc", *tiny, "results=elsewhere", cwd=tmp_path)
    rows = sweep.load(tmp_path / "elsewhere")
    assert sorted(rows.method) == ["dense", "weight"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere"]  # nothing else is left behind


def test_a_cell_that_fails_leaves_a_row_and_the_sweep_goes_on(tmp_path: Path, tiny: list[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TOO_FEW_TOKENS)
    output = run("+method=neuron,weight", "calibration.source=short.txt", *tiny, "-m", cwd=tmp_path, code=1)
    assert "1 of 3 cells are not ok" in output
    rows = sweep.load(tmp_path / "results").set_index("method")
    assert rows.status.to_dict() == {"dense": "ok", "neuron": "failed", "weight": "ok"}
    assert "calibration.source=short.txt gives 1" in rows.error["neuron"]
    assert pd.isna(rows["pydoc/token_perplexity"]["neuron"])
    text.write_text("enough text to calibrate a model of bytes. " * 100)
    assert "3 cells" in run("+method=neuron,weight", "calibration.source=short.txt", *tiny, "-m", cwd=tmp_path)


def test_on_failure_stop_stops(tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "short.txt").write_text(TOO_FEW_TOKENS)
    output = run(
        "+method=neuron,weight", "calibration.source=short.txt", "on_failure=stop", *tiny, "-m", cwd=tmp_path, code=1
    )
    assert "stopped: a cell failed (on_failure=stop)" in output
    assert sorted(sweep.load(tmp_path / "results").method) == ["dense", "neuron"]


def test_prune_quantise_or_both(tmp_path: Path, tiny: list[str]) -> None:
    command = [
        "+method=dense,wanda",
        "quantize=none,int8",
        "sparsity=0.5",
        "benchmarks=pydoc",
        "efficiency=none",
        *tiny,
    ]
    command = [word for word in command if not word.startswith("efficiency.")]
    planned = run(*command, "plan=true", "-m", cwd=tmp_path)
    for words in ("dense", "dense int8", "weight wanda 0.5", "weight wanda 0.5 int8"):
        assert f"  {words} (" in planned
    run(*command, "-m", cwd=tmp_path)
    rows = variants.with_variant(sweep.load(tmp_path / "results"))
    assert sorted(zip(rows.method, rows.quantize, rows.quantize_method.fillna("-"), rows.baseline, strict=True)) == [
        ("dense", "int8", "rtn", False),
        ("dense", "none", "-", True),
        ("weight", "int8", "rtn", False),
        ("weight", "none", "-", False),
    ]
    bits = rows.set_index(["method", "quantize"]).bits_per_weight
    assert bits["weight", "int8"] < bits["dense", "int8"] < bits["weight", "none"] < bits["dense", "none"] == 32
    assert rows.groupby(frontier.SAME_POINT, dropna=False).ngroups == 4
    assert "4 already done, 0 to run" in run(*command, "-m", cwd=tmp_path)


def test_plan_says_what_would_run_and_runs_nothing(tmp_path: Path, tiny: list[str]) -> None:
    output = run("+method=weight", "sparsity=0.1,0.2", "plan=true", *tiny, "-m", cwd=tmp_path)
    assert output.count("  run  ") == 3
    assert not (tmp_path / "results" / "cells").exists()


def test_a_study_is_several_grids_and_the_command_line_has_the_last_word(tmp_path: Path, tiny: list[str]) -> None:
    """break_even: zeros as they are, zeros packed, and neurons, each at sparsities of its own."""
    study = ["-m", "+experiment=break_even", "plan=true", *tiny]
    assert run(*study, cwd=tmp_path).count("  run  ") == 1 + 2 + 7 + 5
    assert run(*study, "sparsity=0.5", cwd=tmp_path).count("  run  ") == 1 + 3
    assert "the grid has 14 cells, more than max_cells=5" in run(*study, "max_cells=5", cwd=tmp_path, code=2)


def test_a_cell_of_quality_alone_has_no_times_and_no_zeros_for_them(tmp_path: Path, tiny: list[str]) -> None:
    words = [word for word in tiny if not word.startswith("efficiency.repeats")]
    output = run("+method=weight", "sparsity=0.5", "benchmarks=pydoc", "efficiency=none", *words, cwd=tmp_path)
    rows = sweep.load(tmp_path / "results")
    timed = [c for c in rows if "speedup" in c or "_ms" in c or c in ("tokens_per_second", "timed_repeats")]
    assert (rows.status == "ok").all() and rows[timed].isna().all(axis=None)
    assert "nothing was timed" in output and " ms a token" not in output
    assert rows["pydoc/token_perplexity"].notna().all() and (rows.peak_memory_bytes > 0).all()
    assert not (tmp_path / "results" / "latency").exists()
    run("results", "--no-html", cwd=tmp_path, module="sweep.report")


def test_a_model_of_few_positions_is_refused_only_for_a_prompt_that_is_timed(
    tmp_path: Path, tiny_checkpoint: Path, tiny: list[str]
) -> None:
    short = shutil.copytree(tiny_checkpoint, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    ours = ("model.path=", "efficiency.", "benchmarks.max_length=")
    words = [word for word in tiny if not word.startswith(ours)]
    words += [f"model.path={short}", "benchmarks=pydoc", "benchmarks.max_length=64", "results=rows"]
    for more in ([], ["-m"]):
        assert "128 tokens" not in run(*more, "+method=weight", *words, "efficiency=none", "plan=true", cwd=tmp_path)
        refused = run(*more, "+method=weight", *words, cwd=tmp_path, code=2)
        assert (
            "efficiency.prompt_tokens=128 and .output_tokens=16 are 144 tokens together, and the model has 64"
            in refused
        )
    run("+method=weight", *words, "efficiency=none", cwd=tmp_path)
    rows = sweep.load(tmp_path / "rows")
    assert len(rows) == 2 and set(rows.status) == {"ok"} and rows["pydoc/token_perplexity"].notna().all()
    assert rows[["kv_cache_bytes", "peak_memory_bytes", "base_memory_bytes"]].isna().all(axis=None)
    assert "expected: about" in run(
        "+method=weight", "sparsity=0.1", *words, "efficiency=none", "plan=true", cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparsity=0.5"], "sweep: no method given: add +method=NAME"),
        (["method=weight"], "sweep: 'method=weight' needs a plus"),
        (["+method=wieght"], "there is no such option. Did you mean 'weight'?"),
        (["+method=weight", "sparsity=1.5"], "sweep: sparsity must be in [0, 1), got 1.5"),
        (["+method=weight", "sparsity=0.1,0.2"], "lists several values: add -m to sweep over them"),
        (["+method=weight", "sparsity=0.1,1.2", "-m"], "sweep: sparsity must be in [0, 1), got 1.2"),
        (["+method=weight", "sparsty=0.1"], "sweep: unknown key 'sparsty'. Did you mean 'sparsity'?"),
        (["+method=weight", "benchmarks.limt=1"], "Did you mean 'benchmarks.limit'?"),
        (["+method=weight", "+speed=1"], "sweep: unknown key 'speed'"),
        (["method.steps=2"], "'method.steps' is a key of a method, and the command chooses none: add +method=NAME"),
        (["+method=weight", "device=tpu"], "sweep: device must be auto, cpu, cuda, cuda:N or mps; got 'tpu'"),
        (["+method=weight", "threads=9999"], "sweep: threads=9999 is more than the"),
        (
            ["+method=weight", "benchmarks.tasks=[capitols]"],
            "'capitols' is no task of sweep or lm-eval. Did you mean 'capitals'?",
        ),
        (["+method=weight", "model=local", "model.path=nowhere"], "sweep: model.path: there is no folder nowhere"),
        (["+method=weight", "model=hub"], "sweep: model.name is missing: set model.name=VALUE"),
        (["+method=weight", "data_root=nowhere"], "sweep: data_root: there is no folder nowhere"),
        (["+method=neuron", "sparsity=0.9999"], "leaves a block without a neuron"),
        (
            ["+method=dense", "quantize=int4", "quantize.group=128"],
            "gives 128 columns a scale, and the model's hidden_size is 576, which is no multiple: set quantize.group=32 or",
        ),
        (
            ["+method=wanda", "quantize=q4_1"],
            "sweep: quantize=q4_1: there is no such form. Did you mean 'q4_0'? Allowed: none, int8, int4, q8_0, q5_0, q4_0 "
            "(q4_1, q5_1 and the K-quants add an offset to each group, so that zero is none of their values",
        ),
        (
            ["+method=weight", "sparsity=range(0,1,0.01)", "max_cells=50", "-m"],
            "the grid has 100 cells, more than max_cells=50",
        ),
    ],
)
def test_a_mistake_is_a_line_and_no_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = run(*arguments, cwd=tmp_path, code=2)
    assert message in output
    assert "Traceback" not in output and "Error executing job" not in output
    assert len(output.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "job", "-m"], "Only one of --run, --multirun, --cfg"),
        (["--resolve"], "--resolve flag can only be used in conjunction with --cfg"),
        (
            ["benchmarks=null", "model=local"],
            "sweep: benchmarks=null: a group is chosen by the name of one of its options",
        ),
        (["benchmarks.tasks.x=1"], "sweep: Hydra cannot read the command: invalid literal"),
        (["~benchmarks", "benchmarks.limit=3"], "sweep: '~benchmarks' takes away benchmarks, which the command needs"),
        (["~benchmarks", "benchmarks.limit=3", "-m"], "sweep: '~benchmarks' takes away benchmarks"),
        (["benchmarks=pydoc", "~benchmarks"], "sweep: '~benchmarks' takes away benchmarks"),
        (["~calibration.source"], "sweep: '~calibration.source' takes away calibration.source"),
        (["data_root=${nosuch}"], "sweep: data_root: Interpolation key 'nosuch' not found"),
        (["hydra.run.dir=/proc/nosuch"], "No such file or directory: '/proc/nosuch'"),
        (["results=a=b"], "sweep: 'results=a=b' cannot be read. A value with other characters"),
        (["results=a=b", "-m"], """the shell: 'results="a=b"'"""),
        (["results=it's"], "needs quotes"),
        (["results=[a"], """'results="[a"'"""),
        (["data_root=a,b"], """A comma within a name needs quotes: 'data_root="a,b"'"""),
        (["sparsity"], "sweep: 'sparsity' gives no value: write sparsity=VALUE"),
        (["benchmarks.tasks[0]=a"], "'benchmarks.tasks[0]' is no key"),
        (["model="], "sweep: model=: there is no such option. Allowed: "),
    ],
)
def test_what_another_library_refuses_is_a_line_too(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = run("+method=weight", *arguments, cwd=tmp_path, code=2)
    assert message in output
    assert "Traceback" not in output and "Error executing job" not in output
    assert len(output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [[], ["-m"]], ids=["alone", "a sweep"])
@pytest.mark.parametrize("folder", ["a=b", "a,b", "it's", 'a "b"', "a(b) [c]", "ä", "#1"])
def test_a_path_of_any_characters_is_read_when_it_is_quoted_as_the_message_says(
    folder: str, more: list[str], tmp_path: Path, tiny_checkpoint: Path, tiny: list[str]
) -> None:
    (tmp_path / folder).symlink_to(tiny_checkpoint)
    word = shlex.split(command_line._quoted(f"model.path={folder}"))
    settings = [setting for setting in tiny if not setting.startswith("model.path=")]
    assert "2 to run" in run(*more, "+method=weight", *settings, *word, "plan=true", cwd=tmp_path)


@pytest.mark.parametrize("errors", ["", "2>&1"], ids=["output", "output and errors"])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("sweep", ["+method=weight", "plan=true"]),
        ("sweep", ["+method=weight", "plan=true", "-m"]),
        ("sweep", ["--help"]),
        ("sweep", ["--cfg", "job"]),
        ("sweep.report", ["--help"]),
        ("sweep.cache", ["list"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_output_that_nobody_reads_ends_the_command_quietly(
    module: str, words: list[str], errors: str, tmp_path: Path
) -> None:
    command = shlex.join([sys.executable, "-m", module, *words])
    done = subprocess.run(
        ["bash", "-c", f"{command} {errors} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"SWEEP_CACHE": str(tmp_path / "cache")},
    )
    assert done.stderr == ""
    assert int(done.stdout) in ((128 + signal.SIGPIPE,) if module == "sweep" else (0, 128 + signal.SIGPIPE))


def test_a_sweep_whose_output_nobody_reads_ends_and_keeps_its_rows(tmp_path: Path, tiny: list[str]) -> None:
    command = shlex.join([sys.executable, "-m", "sweep", "-m", "+method=weight", "sparsity=0.1,0.2,0.3", *tiny])
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1 | head -2; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[-1] == str(128 + signal.SIGPIPE) and done.stderr == ""
    rows = sweep.load(tmp_path / "results")
    assert 1 <= len(rows) < 4 and set(rows.status) == {"ok"}


def test_an_interrupt_during_imports_leaves_no_traceback(tmp_path: Path) -> None:
    """The slow ones are those of Hydra and, once it has composed, of pandas and Arrow."""
    watched = (
        "import sys, os, signal\nclass Watch:\n    def find_spec(self, name, *_):\n        if name == {name!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Watch())\n"
    )
    for name in (
        "sweep.messages",
        "sweep.command_line",
        "sweep.config",
        "hydra",
        "hydra.core.hydra_config",
        "sweep.plan",
        "pandas",
        "pyarrow",
    ):
        (tmp_path / "sitecustomize.py").write_text(watched.format(name=name))
        done = subprocess.run(
            [sys.executable, "-m", "sweep", "+method=weight", "plan=true"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode in (130, -signal.SIGINT) and "Traceback" not in done.stderr, (name, done.stderr)


@pytest.mark.parametrize("more", [[], ["-m"]], ids=["alone", "a sweep"])
@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        (
            {"SWEEP_CACHE": "file"},
            [],
            "sweep: the cache, file, cannot be written to: File exists. Set SWEEP_CACHE=FOLDER",
        ),
        ({"SWEEP_CACHE": "file/below"}, [], "sweep: the cache, file/below, cannot be written to: Not a directory"),
        ({"SWEEP_CACHE": "takes_nothing"}, [], "sweep: the cache, takes_nothing, cannot be written to: "),
        ({"SWEEP_CACHE": "partly"}, [], "sweep: the cache, partly/models, cannot be written to: "),
        (
            {"SWEEP_TURNS": "file"},
            [],
            "sweep: file, where cells wait for their turn to be timed, cannot be written to: ",
        ),
        ({}, ["save_model=file/below"], "sweep: save_model=file/below"),
        ({}, ["save_model=takes_nothing/model"], "sweep: save_model=takes_nothing/model"),
        ({}, ["results=takes_nothing"], "sweep: results=takes_nothing cannot be written to: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value)[:30],
)
def test_a_place_that_takes_nothing_is_refused_before_the_first_cell(
    environment: dict[str, str], words: list[str], message: str, more: list[str], tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "partly").mkdir()
    for folder in ("takes_nothing", "partly/models"):
        (tmp_path / folder).symlink_to("/proc/self/fdinfo")  # takes no files, not even from root
    done = subprocess.run(
        [sys.executable, "-m", "sweep", *more, "+method=weight", *tiny, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 2 and "[1/" not in done.stdout, done.stdout + done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_report_says_what_is_missing(tmp_path: Path) -> None:
    assert "is no results folder" in run("results", cwd=tmp_path, code=2, module="sweep.report")


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_configuration_composes_through_the_real_door(path: Path, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sweep import config

    group, option = path.parent.name, path.stem
    words = {"method": [f"+method={option}"], "experiment": ["+method=weight", f"+experiment={option}"]}
    overrides = words.get(group, ["+method=weight", f"{group}={option}"])
    needed = {
        "hub": ["calibration.source=a/b" if group == "calibration" else "model.name=a/b"],
        "local": ["model.path=a"],
        "gguf": ["model.path=a"],
        "file": ["calibration.source=a"],
        "csr": ["dtype=float32"],
        "semi_structured": ["method.pattern=2:4"],
    } | {form.name: ["quantize=int4"] for form in FORMATS.values() if form.bits}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", [*overrides, *needed.get(option, [])])
    cell, _ = config.parse(OmegaConf.to_container(composed, resolve=True))
    assert cell.label()


def test_help_is_short_to_wait_for_and_lists_the_groups() -> None:
    output = run("--help", cwd=ROOT)
    methods = next(line for line in output.splitlines() if line.startswith("method: "))  # the group, before the key
    assert {"dense", "weight", "neuron"} <= set(methods.removeprefix("method: ").split(", "))
    assert "sparsity: 0.5" in output


def test_shell_completion_of_the_console_script(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("sweep")
    bash = f'eval "$({script} -sc install=bash)"; complete -p {script.name}'
    assert "hydra_bash_completion" in subprocess.run(["bash", "-c", bash], capture_output=True, text=True).stdout
    query = subprocess.run(
        [script, "-sc", "query=bash"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COMP_LINE": "sweep +method=w", "COMP_POINT": "15"},
    )
    assert "+method=weight" in query.stdout


@pytest.mark.slow
def test_the_first_sweep_on_the_embedded_model_makes_sense(tmp_path: Path) -> None:
    run(
        "+method=weight,neuron",
        "sparsity=0.5",
        "benchmarks=pydoc",
        "benchmarks.limit=6",
        "efficiency.repeats=6",
        "-m",
        cwd=tmp_path,
    )
    rows = sweep.load(tmp_path / "results").set_index("method")
    perplexity = rows["pydoc/token_perplexity"]
    assert 11 < perplexity["dense"] < 20 < perplexity["neuron"] < 50 < perplexity["weight"]
    assert rows.nonzero_parameters["weight"] < 0.65 * rows.nonzero_parameters["dense"]
    assert dict(rows.execution) == {"dense": "dense", "neuron": "shrunk", "weight": "bitmap"}
    assert rows.weights_bytes["neuron"] < 0.75 * rows.weights_bytes["dense"]
    assert rows.weights_bytes["weight"] < 0.75 * rows.weights_bytes["dense"]
    assert rows.sparsity_achieved["neuron"] == pytest.approx(0.5, abs=1e-4)
