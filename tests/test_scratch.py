"""Weights that lie on the disk: the same numbers, bounded memory, and clear words where it cannot be."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import sweep
import tiny_models
from conftest import packed_request
from sweep import config, machine, needs, run
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model, Perplexity
from sweep.models import scratch
from sweep.pruning.families import Dense, Expert, Head, Layer, Method, Neuron, Weight
from sweep.quantization.forms import Quantize
from sweep.recovery.kinds import Recover, Text
from sweep.settings import RequestError

LOCAL = Recover("local", steps=2, text=Text("pydoc", sequences=10, length=16))
CASES: dict[str, tuple[str, Method, dict[str, Any]]] = {
    "magnitude": ("llama", Weight("weight"), {}),
    "wanda": ("llama", Weight("weight", "wanda"), {}),
    "sparsegpt": ("llama", Weight("weight", "sparsegpt"), {}),
    "neurons": ("llama", Neuron("neuron"), {}),
    "heads": ("llama", Head("head"), {}),
    "layers": ("llama", Layer("layer"), {}),
    "experts": ("mixtral", Expert("expert"), {}),
    "recovered": ("llama", Weight("weight", "wanda"), {"recover": LOCAL}),
    "neurons, recovered": ("llama", Neuron("neuron"), {"recover": LOCAL}),
    "int8": ("llama", Weight("weight", "wanda"), {"quantize": Quantize("int8")}),
    "packed": ("llama", Weight("weight", "wanda"), {"execution": Execution("bitmap")}),
    "dense": ("llama", Dense(), {}),
}


@pytest.fixture(autouse=True)
def everything_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a tensor is; and as soon as a page is read it is dropped again."""
    monkeypatch.setattr(scratch, "SMALLEST", 1)
    monkeypatch.setattr(scratch, "RESIDENT", -(2**40))
    monkeypatch.setattr(scratch, "_LOOK", 2e-3)


def cell(folder: Path, method: Method, **changes: Any) -> Cell:
    made = Cell(
        Model("tiny", "local", str(folder)),
        method,
        0.0 if isinstance(method, Dense) else 0.5,
        Benchmarks(()),
        Calibration("pydoc", 4, 16),
        Efficiency(repeats=0),
        Execution(),
        dtype="float32",
        device="cpu",
    )
    return replace(made, **changes)


def saved(asked: Cell, folder: Path) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    """(the row, the tensors that the cell has saved)."""
    row, _ = run.run_cell(asked, save_model=str(folder))
    return row, {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_cell_gives_the_same_model_to_the_bit(case: str, tmp_path: Path, cache_folder: Path) -> None:
    kind, method, changes = CASES[case]
    tiny_models.make(kind).save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    asked = cell(tmp_path / "model", method, **changes)
    in_memory, expected = saved(asked, tmp_path / "memory")
    on_disk, found = saved(replace(asked, offload="disk"), tmp_path / "disk")
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    told = [name for name in in_memory if "sparsity" in name or name.endswith("_loss") or name == "weights_bytes"]
    assert told and {name: on_disk[name] for name in told} == {name: in_memory[name] for name in told}
    assert list(cache_folder.glob("weights-*")) == []  # they have no name
    assert scratch.current() is None


def test_all_of_a_model_lies_in_files_and_is_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    expected, _ = sweep.load_model(tiny_checkpoint)
    with scratch.opened(tmp_path) as held:
        model, _ = sweep.load_model(tiny_checkpoint)
        assert all(tensor.untyped_storage().filename for tensor in (*model.parameters(), *model.buffers()))
        tied = copy.deepcopy(model.config)
        assert tied.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data.mul_(2)
        held.drop()  # what was written is not lost with its pages
        assert torch.equal(weight, 2 * expected.model.layers[0].mlp.up_proj.weight)
        another = scratch.copied(model)
        assert all(p.untyped_storage().filename for p in another.parameters())
        another.model.layers[0].mlp.up_proj.weight.data.zero_()
        assert weight.any() and type(another) is type(model)
    assert list(tmp_path.iterdir()) == [] and weight.any()  # it has what it had, and no name


def test_pruning_from_python_on_the_disk(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def pruned(**asked: Any) -> dict[str, torch.Tensor]:
        model, tokenizer = sweep.load_model(tiny_checkpoint)
        sweep.prune(model, tokenizer, sparsity=0.5, sequences=4, length=16, **asked)
        return model.state_dict()

    expected = pruned(method="wanda", recover={"name": "local", "steps": 1, "text": {"sequences": 10, "length": 16}})
    with sweep.offloaded(tmp_path):
        found = pruned(method="wanda", recover={"name": "local", "steps": 1, "text": {"sequences": 10, "length": 16}})
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        with pytest.raises(
            RequestError, match="offload=disk holds a part .* recover=lora trains all of it.*recover=local"
        ):
            pruned(method="wanda", recover="lora")


def test_what_is_scored_goes_by_blocks(tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A model reads this. " * 20)
    asked = cell(tiny_checkpoint, Weight("weight"), perplexity=Perplexity(str(text), seqlen=32))
    in_memory, on_disk = (run.run_cell(replace(asked, offload=where))[0] for where in ("none", "disk"))
    assert (in_memory["evaluated_by"], on_disk["evaluated_by"]) == ("batches", "blocks")
    perplexities = {name: value for name, value in in_memory.items() if name.endswith("perplexity")}
    assert perplexities and {name: on_disk[name] for name in perplexities} == perplexities


def test_a_paused_scratch_moves_nothing(tmp_path: Path) -> None:
    with scratch.opened(tmp_path), scratch.paused():
        assert nn.Linear(4, 4).weight.untyped_storage().filename is None
    with scratch.paused():  # none is open
        assert nn.Linear(4, 4).weight.untyped_storage().filename is None


MEASURED = """
import sys
from pathlib import Path
import torch
from sweep.models import loading, scratch
from sweep.config import Model
from sweep.pruning import methods
import sweep

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

folder, way = sys.argv[1:]
scratch.RESIDENT = 2**25
torch.set_num_threads(1)
sweep.prune(*sweep.load_model(Path(folder) / "small"), method="wanda", sparsity=0.5, sequences=2, length=16)
before = peak()
if way == "disk":
    with sweep.offloaded(folder):
        sweep.prune(*sweep.load_model(Path(folder) / "large"), method="wanda", sparsity=0.5, sequences=2, length=16)
else:
    sweep.prune(*sweep.load_model(Path(folder) / "large"), method="wanda", sparsity=0.5, sequences=2, length=16)
print(peak() - before)
"""


def test_a_part_of_the_model_is_resident(tmp_path: Path) -> None:
    """Of 500 MB of weights, in blocks of 42."""
    sizes = {"small": (64, 1), "large": (1024, 12)}
    for name, (width, blocks) in sizes.items():
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks, "vocab_size": 300}
        config = AutoConfig.for_model("llama", **shape, num_attention_heads=4, max_position_embeddings=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        tiny_models.tokenizer().save_pretrained(tmp_path / name)
    weights = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    peaks = {}
    for way in ("memory", "disk"):
        code = [sys.executable, "-c", MEASURED, str(tmp_path), way]
        said = subprocess.run(code, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr
        peaks[way] = int(said.stdout)
    assert peaks["memory"] > weights > 4e8
    assert peaks["disk"] < 0.65 * weights  # what is mapped, blocks as they are scored, and what an allocator keeps


def test_what_cannot_lie_on_the_disk_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(cell(tiny_checkpoint, Weight("weight")), offload="disk")
    request = packed_request(execution={}, offload="disk")
    recovering = request | {"recover": {"name": "distill", "text": {"source": "pydoc"}}}
    with pytest.raises(RequestError, match="recover=distill trains all of it at once: use recover=local"):
        config.parse(recovering)
    with pytest.raises(RequestError, match="offload must be one of none, disk; got 'cpu'"):
        config.parse(request | {"offload": "cpu"})
    elsewhere = machine.Placement(elsewhere=True, has_gpu=True)
    with pytest.raises(RequestError, match="offload=disk maps weights .* device is cuda: set device=cpu"):
        machine.resolve(replace(asked, device="cuda"), elsewhere)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "Path", lambda place: tmp_path / "no" / place.strip("/"))
        with pytest.raises(RequestError, match="asks the kernel how much is resident, as Linux alone tells it"):
            machine.resolve(asked, machine.Placement(elsewhere=True))
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_checkpoint, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"pytorch_model.bin does not let it: save the model as safetensors"):
        run.run_cell(replace(asked, model=Model("tiny", "local", str(pickled))))
    cut = tmp_path / "cut"
    shutil.copytree(tiny_checkpoint, cut)
    os.truncate(cut / "model.safetensors", 5000)
    with pytest.raises(RequestError, match=r"is damaged: it has 5000 bytes where its header tells of"):
        run.run_cell(replace(asked, model=Model("tiny", "local", str(cut))))
    assert scratch.current() is None


def test_a_disk_without_room_is_told_with_the_bytes(
    tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(cell(tiny_checkpoint, Weight("weight")), offload="disk", threads=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1000))
    with pytest.raises(
        RequestError, match=r"offload=disk takes 0.00 GiB of the disk of .*cache, which has 0.00 GiB.*SWEEP_CACHE"
    ):
        needs.check(asked, needs.Machine(None))
    assert needs.check(replace(asked, offload="none"), needs.Machine(None))

    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        RequestError, match=r"has no room for another [\d,]+ bytes of weights .No space left on device."
    ):
        run.run_cell(asked)

    def broken(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="Input/output error"):
        scratch.Scratch(tmp_path).another(torch.ones(3))
    assert not list(tmp_path.glob("weights-*"))
