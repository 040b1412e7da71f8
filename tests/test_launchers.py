"""The engines that share a sweep out, for real: joblib's processes, a Slurm of one machine, a local Ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sweep
from test_cli import ROOT, run

NEEDED = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}
QUICK = [
    "benchmarks=pydoc",
    "benchmarks.limit=2",
    "benchmarks.max_length=256",
    "efficiency.prompt_tokens=8",
    "efficiency.output_tokens=2",
    "efficiency.repeats=6",
    "efficiency.warmup=0",
    "dtype=float32",
]


def needs(extra: str) -> None:
    if importlib.util.find_spec(NEEDED[extra]) is None:
        pytest.skip(f"the launcher's package is not installed: pip install 'sweep-pruning[{extra}]'")


@pytest.fixture
def command(tiny_checkpoint: Path) -> list[str]:
    return ["-m", "+method=weight", "sparsity=0.25,0.5", "model=local", f"model.path={tiny_checkpoint}", *QUICK]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    needs("slurm")
    started = subprocess.run([ROOT / ".ci" / "slurm", "start"], capture_output=True, text=True)
    if started.returncode == 77:
        pytest.skip(started.stdout.strip())
    assert started.returncode == 0, started.stdout + started.stderr
    monkeypatch.setenv("SLURM_CONF", started.stdout.strip().splitlines()[-1])
    yield
    subprocess.run([ROOT / ".ci" / "slurm", "stop"], check=True)


def check(folder: Path, threads: int = 1) -> None:
    rows = sweep.load(folder / "results")
    assert (rows.status == "ok").all()
    assert sorted(rows.sparsity) == [0.0, 0.25, 0.5]
    assert set(rows.threads) == {threads}
    assert (rows["pydoc/token_perplexity"] > 1).all()


def test_joblib_runs_cells_in_several_processes(tmp_path: Path, command: list[str]) -> None:
    needs("joblib")
    output = run(*command, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "threads=1", cwd=tmp_path)
    assert "[3/3]" in output and "weight magnitude 0.5" in output
    check(tmp_path)
    again = run(*command, "threads=1", cwd=tmp_path)  # by another engine, the same cells
    assert "3 already done, 0 to run" in again


def test_slurm_runs_cells_and_a_killed_job_hangs_nothing(tmp_path: Path, command: list[str], slurm: None) -> None:
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]
    with (tmp_path / "output").open("w") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", "sweep", *command, *words], cwd=tmp_path, stdout=output, stderr=output
        )
        killed = None
        while killed is None and running.poll() is None:
            time.sleep(0.2)
            queue = subprocess.run(
                ["squeue", "--noheader", "--array", "--states=R", "--format=%i"], capture_output=True, text=True
            )
            killed = next(
                (job for job in queue.stdout.split() if "_" in job), None
            )  # one of the array, not the baseline
        assert killed is not None
        subprocess.run(["scancel", "--signal=KILL", killed], check=True)
        assert running.wait(timeout=200) == 0, (tmp_path / "output").read_text()
    assert "the launcher gave up (UncompletedJobError" in (tmp_path / "output").read_text()
    check(tmp_path)


def test_ray_runs_cells(tmp_path: Path, command: list[str]) -> None:
    needs("ray")
    run(
        *command,
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
        cwd=tmp_path,
    )
    check(tmp_path)


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "joblib"), ("submitit_slurm", "slurm"), ("ray", "ray")])
def test_a_launcher_whose_package_is_missing_names_the_extra(launcher: str, extra: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDED[extra]) is not None:  # hide it, as it would be where it is not installed
        hide = tmp_path / "sitecustomize.py"
        package = NEEDED[extra].rpartition(".")[2]
        hide.write_text(
            "import pkgutil\nwalk = pkgutil.walk_packages\n"
            "pkgutil.walk_packages = lambda *a, **k: (m for m in walk(*a, **k) "
            f"if {package!r} not in m.name)\n"
        )
    done = subprocess.run(
        [sys.executable, "-m", "sweep", "+method=weight", f"hydra/launcher={launcher}", "-m"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert f"pip install 'sweep-pruning[{extra}]'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()
