"""What a cell needs of memory, told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import tiny_model
from sweep import machine, needs, runner
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model, Options
from sweep.models import anatomy
from sweep.needs import Machine, Size
from sweep.pruning.families import Dense, Method, Neuron, Weight
from sweep.recovery.kinds import Recover, Text
from sweep.settings import RequestError

GIB = 2**30
# Of 8 billion parameters, as a Llama has them: 32 blocks of 4096, 14336 and 1024 wide keys.
EIGHT = Size(8_030_000_000, 1_050_000_000, 32, 218_000_000, 4096, 4096 * 14336, (4096, 4096, 14336), 43_000)


def cell(path: Path | str = "", method: Method = Dense(), **changes: object) -> Cell:  # noqa: B008
    model = Model("tiny", "local", path=str(path))
    made = Cell(model, method, 0.5, Benchmarks(("pydoc",)), Calibration("pydoc"), Efficiency(), Execution())
    return replace(made, device="cpu", dtype="bfloat16", threads=1, **changes)


def test_headers_and_configuration_tell_the_same(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    asked = Model("tiny", "local", path=str(tmp_path))
    stored, built = needs._stored_shapes(asked), needs._built_shapes(asked)
    assert stored is not None and built is not None
    found = needs.size(asked)
    assert found == needs._of(built)
    blocks = list(anatomy.all_blocks(model).values())
    assert found is not None and found.parameters == model.num_parameters()
    assert (found.blocks, found.block) == (len(blocks), sum(p.numel() for p in blocks[0].parameters()))
    assert found.outside == found.parameters - sum(p.numel() for block in blocks for p in block.parameters())


def test_sizes_of_files_that_are_not_here_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert needs.size(Model("tiny", "local", path=str(tmp_path))) is None


def test_each_stage_holds_the_weights_and_what_it_does() -> None:
    def stages(method: Method, **changes: object) -> dict[str, float]:
        return {need.stage: need.memory / GIB for need in needs.needs(cell(method=method, **changes), EIGHT)}

    dense = stages(Dense())
    weights = 2 * EIGHT.parameters / GIB
    assert list(dense) == ["load", "evaluate", "time"] and weights < dense["load"] < weights + 1
    wanda, sparsegpt = stages(Weight("weight", "wanda")), stages(Weight("weight", "sparsegpt"))
    gradient, neuron = stages(Weight("weight", "gradient")), stages(Neuron("neuron"))
    assert wanda["load"] < wanda["prune"] < sparsegpt["prune"] < gradient["prune"]
    assert neuron["prune"] > wanda["prune"]  # what a backward pass needs
    assert wanda["time"] > 2 * weights > dense["time"]  # beside the dense model
    trained = [
        stages(Weight("weight", "wanda"), recover=Recover(name, text=Text("pydoc")))["recovery"]
        for name in ("local", "lora", "distill")
    ]
    assert trained == sorted(trained) and trained[0] > 2 * weights and trained[2] > 9 * weights
    assert len(needs.needs(cell(method=Neuron("neuron")), EIGHT, saves=True)) == len(neuron) + 1


def test_what_cannot_fit_is_refused_with_the_setting_that_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(needs, "size", lambda model: EIGHT)
    wanda = cell(method=Weight("weight", "wanda"))
    assert needs.check(wanda, Machine(40 * GIB)) and needs.check(wanda, Machine(None))
    said = r"weight wanda 0.5 \(tiny\): 8,030,000,000 parameters as bfloat16 are 14.96 GiB, and time .* set efficiency=none, or offload=disk$"
    with pytest.raises(RequestError, match=said):
        needs.check(wanda, Machine(20 * GIB))
    with pytest.raises(
        RequestError, match="as float32 are 29.91 GiB.*on cpu.*set dtype=bfloat16 efficiency=none, or offload=disk"
    ):
        needs.check(replace(wanda, dtype="float32"), Machine(20 * GIB))
    with pytest.raises(RequestError, match="give it a machine with more memory"):
        needs.check(wanda, Machine(GIB))
    on_disk = replace(wanda, offload="disk")
    assert max(need.memory for need in needs.check(on_disk, Machine(3 * GIB))) < 3 * GIB
    assert needs.on_disk(on_disk, EIGHT) == 2 * 2 * EIGHT.parameters  # beside it the dense one, with which it is timed
    assert needs.on_disk(on_disk, EIGHT, saves=True) == 3 * 2 * EIGHT.parameters and not needs.on_disk(wanda, EIGHT)
    with pytest.raises(RequestError, match="recovery is expected to take .* set recover=none$"):
        needs.check(replace(wanda, recover=Recover("distill", text=Text("pydoc"))), Machine(40 * GIB))
    with pytest.raises(RequestError, match="on cuda, where there are 20.00 GiB: set efficiency=none"):
        needs.check(replace(wanda, device="cuda"), Machine(None, 20 * GIB))


def test_a_node_refuses_what_does_not_fit_before_it_loads(tiny_checkpoint: Path) -> None:
    asked = cell(tiny_checkpoint, Weight("weight", "wanda"))
    runner.check_node(asked, Options())
    with pytest.raises(RequestError, match=r"is expected to take .* on cpu, where there are 0.50 GiB"):
        needs.told([asked], GIB // 2)
    assert needs.told([replace(asked, device="cuda")], None, elsewhere=True)  # whose devices are not known here


def test_a_container_has_less_than_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = machine.memory()
    assert whole is not None and machine.memory(whole - 1) == whole - 1
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000\n")
    monkeypatch.setattr(machine, "_CONTAINER", (str(tmp_path / "max"), str(tmp_path / "none")))
    assert machine.memory(2**62) is not None and machine.memory(2**62) != 2**62
    monkeypatch.setattr(machine, "_CONTAINER", (str(tmp_path / "limit"),))
    assert machine.memory(whole) == 1000
