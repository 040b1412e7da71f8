"""What a sweep will do, told before it does any of it."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from sweep import identity, isolate, machine, plan, provenance, runner, store
from sweep.config import Benchmarks, Cell, Efficiency, Execution, Model, Options, memory_bytes
from sweep.pruning.families import Dense, Weight
from sweep.recovery.kinds import Recover
from sweep.settings import RequestError
from test_cli import ROOT


@pytest.fixture
def cell(tiny_checkpoint: Path) -> Cell:
    model = Model("tiny", "local", path=str(tiny_checkpoint))
    return Cell(
        model, Weight("weight"), 0.5, Benchmarks(("pydoc",)), None, Efficiency(), Execution(), device="cpu", threads=1
    )


def stored(results: Path, cell: Cell, **columns: Any) -> str:
    described = provenance.columns(cell, "command") | {
        "status": "ok",
        "cell_seconds": 10.0,
        "peak_memory_bytes": 2**30,
    }
    store.write(results, described | columns, {})
    return described["cell"]


def test_done_failed_and_missing_cells_are_told_apart(cell: Cell, tmp_path: Path) -> None:
    cells = [replace(cell, sparsity=s) for s in (0.1, 0.2, 0.3, 0.4)]
    stored(tmp_path, cells[0])
    stored(tmp_path, cells[1], status="failed")
    stored(tmp_path, cells[2], status="out_of_memory")
    asked = [(c, ()) for c in (*cells, cells[3])]

    def to_run(**options: Any) -> tuple[list[float], int, int]:
        made = plan.make(asked, Options(results=str(tmp_path), **options))
        assert made.repeated == 1
        return [step.cell.sparsity for step in made.todo], len(made.done), len(made.left)

    assert to_run() == ([0.0, 0.2, 0.3, 0.4], 1, 0)  # the dense baseline, at sparsity 0, first
    assert to_run(retry="failed") == ([0.0, 0.2, 0.4], 1, 1)
    assert to_run(retry="out_of_memory") == ([0.0, 0.3, 0.4], 1, 1)
    assert to_run(retry="none") == ([0.0, 0.4], 1, 2)
    assert to_run(resume=False) == ([0.0, 0.1, 0.2, 0.3, 0.4], 0, 0)


def test_expectations_come_from_rows_of_like_cells(cell: Cell, tmp_path: Path) -> None:
    def expected(asked: Cell) -> plan.Expectation | None:
        step = plan.Step(identity.cell_name(asked), asked, ())
        return plan.expectation([step], str(tmp_path))

    assert expected(cell) is None
    stored(tmp_path, cell.dense(), cell_seconds=100.0, peak_memory_bytes=2**30)
    stored(tmp_path, replace(cell, sparsity=0.9), cell_seconds=40.0, peak_memory_bytes=2**31)
    stored(tmp_path, replace(cell, sparsity=0.8), cell_seconds=60.0, peak_memory_bytes=2**31)
    stored(tmp_path, replace(cell, sparsity=0.7), status="failed", cell_seconds=None)
    found = expected(cell)
    assert found is not None and (found.seconds, found.known, found.peak_memory) == (50.0, 1, 2**31)
    assert str(found) == "about 50 s of work and up to 2.0 GiB a cell"
    assert expected(replace(cell, model=replace(cell.model, name="another name"))) == found
    assert expected(replace(cell, benchmarks=Benchmarks(("capitals",)))) is None  # other work
    assert expected(replace(cell, threads=2)) is None  # another machine
    mended = replace(cell, recover=Recover("local"))
    assert expected(mended) is None  # what is not recovered says nothing of what recovery takes
    stored(tmp_path, mended, cell_seconds=600.0, peak_memory_bytes=2**31)
    assert expected(cell) == found
    of_another = expected(replace(mended, method=Weight("weight", criterion="wanda")))
    assert of_another is not None and of_another.seconds == 600
    store.compact(tmp_path)
    assert expected(cell) == found


def test_options_cannot_be_swept_over() -> None:
    with pytest.raises(
        RequestError, match="timeout says how the whole sweep is run and cannot be swept over; got 10.0, 20.0"
    ):
        plan.same_options([Options(timeout=10.0), Options(timeout=20.0)])


@pytest.mark.parametrize(
    ("launcher", "placement"),
    [
        ({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}, machine.Placement()),
        ({"_target_": "a.joblib_launcher.JoblibLauncher", "n_jobs": 4}, machine.Placement(workers=4)),
        (
            {"_target_": "a.submitit_launcher.SlurmLauncher", "cpus_per_task": 8, "gpus_per_node": 1},
            machine.Placement(threads=8, elsewhere=True, has_gpu=True),
        ),
        ({"_target_": "a.submitit_launcher.LocalLauncher", "cpus_per_task": None}, machine.Placement(threads=1)),
        (
            {"_target_": "a.ray_launcher.RayLauncher", "ray": {"remote": {"num_cpus": 2}}},
            machine.Placement(threads=2, elsewhere=True),
        ),
    ],
)
def test_what_a_launcher_gives_each_cell(launcher: dict, placement: machine.Placement) -> None:
    assert machine.placement(launcher) == placement


def test_threads_are_divided_among_cells_that_run_side_by_side(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    free = replace(cell, threads=None)
    assert machine.resolve(free).threads == 8
    assert machine.resolve(free, machine.Placement(workers=4)).threads == 2
    assert machine.resolve(free, machine.Placement(workers=100)).threads == 1
    assert machine.resolve(replace(cell, threads=3), machine.Placement(workers=4)).threads == 3
    elsewhere = machine.resolve(
        replace(free, device="auto"), machine.Placement(threads=64, elsewhere=True, has_gpu=True)
    )
    assert (elsewhere.threads, elsewhere.device) == (64, "cuda")  # though this machine has neither


@pytest.mark.parametrize(
    ("has_mps", "has_cuda", "expected"), [(True, False, "cpu"), (True, True, "cuda"), (False, False, "cpu")]
)
def test_a_device_is_chosen_that_has_every_operation(
    cell: Cell, has_mps: bool, has_cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.sys, "platform", "darwin")  # where torch is asked
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: has_mps)
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    assert machine.resolve(replace(cell, device="auto")).device == expected
    if has_mps:
        assert machine.resolve(replace(cell, device="mps")).device == "mps"  # for those who ask


def test_cells_are_spread_over_gpus_and_each_sees_one(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Three devices that are not there: what a child sees is another test's matter."""
    import threading

    from sweep import isolate, runner

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5")
    monkeypatch.setattr(machine, "_device", lambda asked: "cuda")
    used: list[tuple[float, str]] = []
    together = threading.Barrier(3, timeout=20)

    def run(cell: Cell, described: dict, results: str, limits: Any, gpu: str, *_: Any) -> isolate.Ending:
        if not isinstance(cell.method, Dense):
            together.wait()  # passes only when three cells run at once
        used.append((cell.sparsity, gpu))
        assert described["cuda_visible_devices"] == gpu
        row = described | {"status": "failed", "error": "no such device", "sparsity": cell.sparsity}
        store.write(results, row, {})
        return isolate.Ending(row, None)

    monkeypatch.setattr(isolate, "run", run)
    options = Options(results=str(tmp_path))
    cells = [machine.resolve(replace(cell, device="cuda", threads=None, sparsity=s / 10)) for s in range(1, 7)]
    assert cells[0].threads == max(1, machine.cores() // 3)
    assert runner.run_plan(plan.make([(c, ()) for c in cells], options), options) == 1
    assert used[0][0] == 0.0 and len(used) == 7  # the dense baseline first
    assert {gpu for _, gpu in used[1:4]} == {gpu for _, gpu in used[4:]} == {"0", "2", "5"}
    assert "on GPU 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limit", "size"),
    [("12GiB", 12 * 2**30), ("1500MB", 1_500_000_000), ("2147483648", 2**31), ("1.5 gib", 3 * 2**29), (None, None)],
)
def test_memory_limits_are_read(limit: str | None, size: int | None) -> None:
    assert memory_bytes(limit) == size


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("much", "must be a size such as 12GiB"),
        ("-1GiB", "must be a size"),
        ("12GiBs", "must be a size"),
        ("500MB", "must be at least 1GiB"),
    ],
)
def test_wrong_memory_limits_are_refused(limit: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"memory_limit {message}.*got '{limit}'"):
        memory_bytes(limit)


def test_how_threads_wait_is_the_users_where_the_user_has_said_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    assert machine.provenance()["openmp_wait"] == "GOMP_SPINCOUNT=10000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert machine.thread_settings() == {} and machine.provenance()["openmp_wait"] == "OMP_WAIT_POLICY=active"


def test_the_dtype_is_what_the_machine_multiplies(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    free, asked = replace(cell, dtype="auto"), replace(cell, dtype="float16")
    for able, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda able=able: able)
        for placement in (machine.Placement(), machine.Placement(elsewhere=True)):
            assert machine.resolve(free, placement).dtype == expected
            assert machine.resolve(asked, placement).dtype == "float16"
        on_gpu = machine.resolve(replace(free, device="auto"), machine.Placement(elsewhere=True, has_gpu=True))
        assert on_gpu.dtype == "bfloat16"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch tells the instructions of x86 alone")
def test_instructions_for_bfloat16_are_those_that_torch_finds() -> None:
    import torch

    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert machine.multiplies_bfloat16() == has


def composed(*words: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", list(words)), resolve=True)
    assert isinstance(found, dict)
    return found


JOBS = [
    ["+method=weight"],
    ["+method=wanda", "sparsity=0.5", "method.pattern=2:4", "method.exclude=[*.0.*]", "execution=bitmap"],
    ["+method=neuron", "method.blocks=[0,1]", "calibration.sequences=2", "calibration.length=8", "baseline=true"],
    ["+method=owl", "method.allocation=[0.25,0.75]", "seed=3", "efficiency=none", "perplexity.seqlen=64"],
]


@pytest.mark.parametrize("words", JOBS, ids=" ".join)
def test_a_job_runs_the_cell_that_was_planned_whatever_its_machine_would_decide(
    words: list[str], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*words, "model=local", f"model.path={tiny_checkpoint}", "results=elsewhere"]
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)  # the head's processor, and not the job's
    planned, options = plan.prepare(composed(*asked), machine.Placement(threads=1, elsewhere=True))
    step = plan.Step(identity.cell_name(planned), planned, tuple(asked))
    assert planned.dtype == "bfloat16" and planned.threads == 1
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(machine, "cores", lambda: 64)
    words_of_the_job = step.words()
    received, there = plan.received(composed(*words_of_the_job), words_of_the_job)
    assert received.cell == planned and received.name == step.name
    assert replace(there, planned=None) == options
    assert not any("planned" in word for word in received.overrides)
    assert plan.prepare(composed(*received.overrides))[0] == planned  # the row's command


def test_a_job_whose_machine_would_measure_another_cell_says_so(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    asked = ("+method=weight", "model=local", f"model.path={there}")
    cell, _ = plan.prepare(composed(*asked))
    words = plan.Step(identity.cell_name(cell), cell, asked).words()
    tensors = load_file(there / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, there / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RequestError, match="cell [0-9a-f]+ would be [0-9a-f]+ on .*are not those of the machine that planned"
    ):
        plan.received(composed(*words), words)
    monkeypatch.setattr(machine, "cores", lambda: 0)
    with pytest.raises(RequestError, match="threads=.* is more than the 0 that this process may use"):
        plan.received(composed(*words), words)


class Engine:
    """Loses what it is told to lose; a class because it remembers what it was handed."""

    def __init__(self, results: Path, **becomes: Any) -> None:
        self.results, self.becomes, self.handed = results, becomes, list[list[float]]()

    def __call__(self, steps: list[plan.Step]) -> list[Any]:
        self.handed.append([step.cell.sparsity for step in steps])
        return [self.one(step) for step in steps]

    def one(self, step: plan.Step) -> Any:
        becomes = self.becomes.get(step.cell.label().split()[0], "ok")
        described = provenance.columns(step.cell, "command") | {
            "started_at": f"2026-01-01T00:00:{len(self.handed):02}+00:00"
        }
        numbers = {"status": "ok", "cell_seconds": 1.0, "weights_bytes": 1}
        if becomes == "ok" or becomes == "stored, then lost":
            store.write(self.results, described | numbers, {})
        if becomes == "outdone":
            return isolate.Ending(described | {"status": "failed", "error": "no luck"}, outdone=True)
        return isolate.Ending(described | numbers) if becomes == "ok" else RuntimeError(becomes)


@pytest.mark.parametrize(
    ("becomes", "status", "handed", "code", "words"),
    [
        ("ok", "ok", 1, 0, "1 to run"),
        ("stored, then lost", "ok", 1, 0, "1 to run"),
        ("killed", "crashed", 2, 1, "lost by the launcher: RuntimeError: killed"),
        ("outdone", "ok", 1, 1, "were run again and are not ok; the rows above are of their earlier runs"),
    ],
)
def test_what_an_engine_loses_is_handed_over_again_and_what_fails_is_told(
    becomes: str,
    status: str,
    handed: int,
    code: int,
    words: str,
    cell: Cell,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    cell = replace(cell, dtype="float32")
    stored(tmp_path, cell.dense(), weights_bytes=1)
    if becomes == "outdone":
        stored(tmp_path, cell, weights_bytes=1)
    options = Options(results=str(tmp_path), resume=becomes != "outdone")
    made = plan.make([(cell, ())], options)
    engine = Engine(tmp_path, weight=becomes)
    assert runner.run_plan(made, options, engine) == code
    assert engine.handed.count([0.5]) == handed
    assert store.read_row(tmp_path, identity.cell_name(cell))["status"] == status
    assert words in capsys.readouterr().out
