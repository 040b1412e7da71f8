"""Rows in other programs: each against the real package, offline, and the same cell once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForCausalLM

import frames
import tiny_models
from sweep import saving, store
from sweep.export import __main__ as door
from sweep.export import model_card, runs, trackers
from sweep.measuring import catalogue
from sweep.settings import RequestError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    place = tmp_path / "results" / "cells"
    place.mkdir(parents=True)
    frames.rows(seeds=1, sparsities=(0.1, 0.5), failed=1).to_parquet(place / "0-table-made.parquet")
    return place.parent


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs {package}: pip install 'sweep-pruning[{package}]'"
    )


def exported(words: list[str], where: Path) -> str:
    """What the command says, run in a folder of its own."""
    said = subprocess.run(
        [sys.executable, "-m", "sweep.export", *words], capture_output=True, text=True, cwd=where, check=False
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


def test_a_run_has_what_was_asked_and_what_was_found(results: Path) -> None:
    rows = store.load(results)
    found = list(runs.of(rows))
    assert len(found) == (rows.status == "ok").sum() == len(rows) - 1
    assert len({run.name for run in found}) == len(found)
    for run in found:
        row = rows[rows.cell == run.cell].iloc[0]
        assert run.settings["method.family"] == row.method and run.model == row.model and row.method in run.tags
        assert run.metrics["decode_speedup"] == row.decode_speedup and "sparsity" not in run.metrics
        assert all(isinstance(value, float) for value in run.metrics.values())


def test_a_flat_file_has_every_row(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    door.main(["csv", str(results), str(tmp_path / "rows.csv")])
    read, rows = pd.read_csv(tmp_path / "rows.csv"), store.load(results)
    assert f"{len(rows)} rows in" in capsys.readouterr().out
    assert read.cell.tolist() == rows.cell.tolist()
    assert read.decode_speedup.tolist() == pytest.approx(rows.decode_speedup.tolist(), nan_ok=True)
    door.main(["csv", str(results), str(results), str(tmp_path / "rows.csv")])  # a cell once
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(rows)


@needs("wandb")
def test_weights_and_biases(results: Path, tmp_path: Path) -> None:
    count = (store.load(results).status == "ok").sum()
    assert f"{count} runs sent, 0 were there" in exported(["wandb", str(results)], tmp_path)
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    assert {folder.name[-16:] for folder in folders} == {run.cell for run in runs.of(store.load(results))}
    assert all(list(folder.glob("*.wandb")) for folder in folders)
    assert f"0 runs sent, {count} were there already" in exported(["wandb", str(results)], tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == count


@needs("mlflow")
def test_mlflow(results: Path, tmp_path: Path) -> None:
    import mlflow

    rows = store.load(results)
    count = (rows.status == "ok").sum()
    assert f"{count} runs sent" in exported(["mlflow", str(results), "--project", "mine"], tmp_path)
    assert f"0 runs sent, {count} were" in exported(["mlflow", str(results), "--project", "mine"], tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert len(found) == count
    for run in found:
        row = rows[rows.cell == run.data.tags["cell"]].iloc[0]
        assert run.data.metrics["decode_speedup"] == pytest.approx(row.decode_speedup)
        assert run.data.params["method.family"] == row.method and run.info.status == "FINISHED"


@needs("trackio")
def test_trackio(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    count = (store.load(results).status == "ok").sum()
    assert f"{count} runs sent" in exported(["trackio", str(results)], tmp_path)
    assert f"0 runs sent, {count} were there already" in exported(["trackio", str(results)], tmp_path)


@pytest.fixture
def checkpoint(results: Path, tmp_path: Path) -> Path:
    """As the second cell has saved it."""
    config = tiny_models.config("llama")
    cell = store.load(results).cell.iloc[1]
    saving.save(AutoModelForCausalLM.from_config(config), tiny_models.tokenizer(), tmp_path / "saved", {"cell": cell})
    return tmp_path / "saved"


def test_a_card_receives_its_rows_results(results: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "hub_dataset", lambda task: ("owner/data", "default") if task == "pydoc" else None)
    before = (checkpoint / "README.md").read_text()
    row = store.load(results).iloc[1]
    for _ in range(2):  # written again it holds them once
        door.main(["card", str(results), str(checkpoint)])
        card = ModelCard.load(checkpoint / "README.md")
        told = {f"{found.dataset_type}/{found.metric_type}": found.metric_value for found in card.data.eval_results}
        assert told and all(row[name] == value for name, value in told.items())
        assert card.content.partition("\n# ")[2] == before.partition("\n# ")[2]  # the words are as they were
        entries = parse_eval_result_entries(yaml.safe_load((checkpoint / model_card.FILE).read_text()))
        assert [(entry.dataset_id, entry.task_id) for entry in entries] == [("owner/data", "default")]
        assert entries[0].value == next(value for name, value in told.items() if name.startswith("pydoc/"))
    assert saving.check_place(checkpoint, row.cell) == checkpoint.resolve()  # it may still be replaced by its cell


@pytest.mark.slow
def test_a_task_of_the_hub_names_its_data_set() -> None:
    assert catalogue.hub_dataset("gsm8k") == ("openai/gsm8k", "main")
    assert catalogue.hub_dataset("arc_easy") == ("allenai/ai2_arc", "ARC-Easy")
    assert catalogue.hub_dataset("pydoc") is None and catalogue.hub_dataset("no such task") is None


def test_what_cannot_be_sent_is_refused(
    results: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="or run one first, such as: python -m sweep"):
        door.main(["csv", str(tmp_path / "nothing"), "a.csv"])
    (tmp_path / "empty" / "cells").mkdir(parents=True)
    with pytest.raises(RequestError, match="there is no row yet: run a sweep first"):
        door.main(["csv", str(tmp_path / "empty"), "a.csv"])
    with pytest.raises(RequestError, match="is no file in a folder that exists"):
        door.main(["csv", str(results), str(tmp_path / "no" / "a.csv")])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RequestError, match=r"mlflow is not installed .*pip install 'sweep-pruning\[mlflow\]'"):
        door.main(["mlflow", str(results)])
    failed = store.load(results).assign(status="failed")
    failed.to_parquet(results / "cells" / "0-table-made.parquet")
    with pytest.raises(RequestError, match="no row of .* is ok"):
        door.main(["mlflow", str(results)])
    with pytest.raises(RequestError, match="there is no finished row of cell"):
        door.main(["card", str(results), str(checkpoint)])
    with pytest.raises(RequestError, match="is no checkpoint that a cell of a sweep has saved"):
        door.main(["card", str(results), str(tmp_path)])
    (checkpoint / "README.md").write_text("mine")
    frames.rows(seeds=1, sparsities=(0.1, 0.5)).to_parquet(results / "cells" / "0-table-made.parquet")
    with pytest.raises(RequestError, match="was changed after sweep had written it"):
        door.main(["card", str(results), str(checkpoint)])


def test_a_cell_without_benchmarks_has_nothing_for_a_card(results: Path, checkpoint: Path) -> None:
    rows = store.load(results)
    bare = rows.drop(columns=[name for name in rows if "/" in name])
    bare.to_parquet(results / "cells" / "0-table-made.parquet")
    (results / "cells" / "0-schema.parquet").unlink(missing_ok=True)
    with pytest.raises(RequestError, match="has no benchmark whose results could stand in the card"):
        door.main(["card", str(results), str(checkpoint)])


def test_every_tracker_has_its_command_and_its_extra() -> None:
    declared = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    for name in trackers.TRACKERS:
        assert door.COMMANDS[name].module == trackers.__name__ and f'\n{name} = ["{name}' in declared
