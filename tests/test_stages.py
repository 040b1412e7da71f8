"""What changes a model between loading and measuring: declared once, done once, its cost and version where it is used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedModel

from sweep import config, identity, run
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model, Options, Stage
from sweep.models import anatomy
from sweep.pruning import families, sharing
from sweep.pruning.families import Dense, Weight
from sweep.pruning.masks import Masks
from sweep.store import columns


@dataclass
class Scaled:
    """What a toy stage says: that it has done a great deal."""

    calibration_tokens: int = 7
    tokenizer: Any = None
    masks: Masks = field(default_factory=Masks)
    recipe: None = None
    grids: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=lambda: {"damping": 0.5})
    tables: dict[str, pd.DataFrame] = field(default_factory=lambda: {"scales": pd.DataFrame({"scale": [0.0]})})


@pytest.fixture
def cell(tiny_checkpoint: Path) -> Cell:
    return Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Weight("weight", criterion="wanda"),
        sparsity=0.5,
        benchmarks=Benchmarks(()),
        calibration=Calibration("pydoc", 4, 16),
        efficiency=Efficiency(repeats=0),
        execution=Execution(),
        dtype="float32",
        device="cpu",
    )


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> list[run.Known]:
    """A second stage that zeroes a block; what it was told."""
    told = []

    def scale(cell: Cell, model: PreTrainedModel, known: run.Known) -> Scaled:
        told.append(known)
        for matrix in anatomy.matrices(anatomy.blocks(model)[0]).values():
            matrix.zero_()
        return Scaled()

    scaled = Stage("scale", "method", Dense(), families, "scale", "none")
    monkeypatch.setattr(config, "STAGES", (*config.STAGES, scaled))
    monkeypatch.setitem(run.WORK, "scale", scale)
    return told


def test_every_stage_is_declared_and_has_its_work() -> None:
    groups = {f.name: f for f in Cell.__dataclass_fields__.values()}
    assert set(run.WORK) == {stage.name for stage in config.STAGES}
    for stage in config.STAGES:
        assert {
            f"{stage.name}_{cost}" for cost in ("seconds", "cpu_seconds", "forward_passes", "peak_memory_bytes")
        } <= set(columns.COLUMNS)
        assert stage.group == "method" or groups[stage.group].default == stage.unused


def test_a_row_has_what_each_stage_did_and_cost_and_counts_what_became_of_the_model(
    cell: Cell, scaling: list[run.Known], cache_folder: Path
) -> None:
    row, tables = run.run_cell(cell)
    (told,) = scaling
    assert told.memo is sharing.unshared  # the model is no longer the one that others measure
    assert told.masks.count() == 0.5 * sum(keep.numel() for keep in told.masks.values())
    assert told.tokens is not None and told.tokens.shape == (4, 16)
    assert row["prune_forward_passes"] == 1.5 and row["scale_forward_passes"] == 0
    assert row["scale_seconds"] > 0 and row["scale_cpu_seconds"] > 0 and row["damping"] == 0.5
    assert tables["scales"].scale.tolist() == [0.0]
    assert row["sparsity_achieved"] == pytest.approx(0.75, abs=1e-3)  # of two blocks, whatever the stages say


def test_a_stage_that_is_not_used_does_nothing_and_costs_nothing(
    cell: Cell, scaling: list[run.Known], cache_folder: Path
) -> None:
    row, _ = run.run_cell(cell.dense())
    assert not scaling and row["prune_seconds"] == row["scale_seconds"] == row["calibration_tokens"] == 0
    assert "prune_peak_memory_bytes" not in row and row["sparsity_achieved"] == 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_of_a_stage_is_hashed_where_it_is_used(
    version: int, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [identity.cell_name(c) for c in (cell, cell.dense())]
    pruning, *others = config.STAGES
    monkeypatch.setattr(config, "STAGES", (replace(pruning, version=version), *others))
    after = [identity.cell_name(c) for c in (cell, cell.dense())]
    assert (after[0] == before[0]) == (version == 1)  # the first version names no row anew
    assert after[1] == before[1]


def test_the_dense_model_is_the_one_that_no_stage_changes(cell: Cell) -> None:
    assert [stage.name for stage in cell.stages()] == ["prune"] and cell.dense().stages() == []
    options = Options(save_model="folder/{cell}")
    assert options.checkpoint(cell, "abc") == "folder/abc" and options.checkpoint(cell.dense(), "abc") is None
    assert cell.dense().calibration is None and cell.dense().sparsity == 0
