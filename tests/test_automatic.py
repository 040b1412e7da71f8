"""`execution=auto`: which form is run, by what the declarations say, before a cell has its name."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import packed_request
from sweep import config, identity, machine, run
from sweep.config import Cell, Execution
from sweep.formats import declared
from sweep.formats.declared import FORMATS, Format, Left
from sweep.formats.grid import Grid
from sweep.formats.packing import packed
from sweep.pruning.families import FAMILIES
from sweep.settings import RequestError

DTYPES = typing.get_args(declared.Dtype)
DEVICES = ("cpu", "cuda", "cuda:1", "mps")
LEFT = [  # every family, whatever it leaves
    Left(dtype, 0.0 if cut else zeros, pattern, cut, codes, 32 if codes else None)
    for dtype, (pattern, zeros), cut, codes in itertools.product(
        DTYPES,
        [(None, s) for s in (0.0, 0.05, 0.1, 0.5, 0.95)] + [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)],
        (False, True),
        (None, 4, 8),
    )
]


def asked(**changes: object) -> Cell:
    return config.parse(packed_request(execution={"name": "auto"}, threads=1) | changes)[0]


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for cached in (machine.cannot_build, machine._tell):
        cached.cache_clear()
    yield
    machine.cannot_build.cache_clear()


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_chosen_can_run_and_nothing_that_can_is_smaller(device: str, compiler: bool) -> None:
    for left in LEFT:
        form = declared.automatic(left, device, compiler=compiler)
        able = [each for each in FORMATS.values() if each.weighs is not None and each.takes(left, device)]
        able = [each for each in able if compiler or not each.compiles("auto")]
        assert form in able
        assert form.weighs is not None and all(form.weighs(left) <= each.weighs(left) for each in able if each.weighs)
        assert left.dtype in form.dtypes and device.partition(":")[0] in form.devices
        assert not form.patterns or left.pattern in form.patterns
        assert form.bits is None or (left.codes or 99) <= form.bits
        if not compiler:
            assert not form.compiles("auto")


@pytest.mark.parametrize(
    ("left", "device", "expected"),
    [
        (Left("bfloat16", 0.5), "cpu", "bitmap"),
        (Left("float32", 0.5), "cpu", "bitmap"),
        (Left("bfloat16", 0.1), "cpu", "bitmap"),
        (Left("bfloat16", 0.06), "cpu", "dense"),  # a bit a weight is more than 6 % of 16
        (Left("float32", 0.06), "cpu", "bitmap"),
        (Left("bfloat16"), "cpu", "dense"),
        (Left("float16", 0.5), "cpu", "dense"),  # no kernel multiplies it
        (Left("bfloat16", 0.5), "cuda", "dense"),
        (Left("bfloat16", 0.5, "2:4"), "cuda", "dense"),  # torch's product of it takes longer
        (Left("float32", 0.5, "2:4"), "cuda", "dense"),
        (Left("bfloat16", 0.5, "4:8"), "cuda", "dense"),
        (Left("bfloat16", 0.5, "2:4"), "cpu", "bitmap"),
        (Left("bfloat16", 0.5), "mps", "dense"),
        (Left("bfloat16", cut=True), "cpu", "shrunk"),
        (Left("float16", cut=True), "cuda:1", "shrunk"),
        (Left("bfloat16", codes=8), "cpu", "int8"),
        (Left("bfloat16", 0.1, codes=8), "cpu", "int8"),  # a bit a weight is more than 10 % of 8
        (Left("bfloat16", 0.5, codes=8), "cpu", "bitmap_int8"),
        (Left("float32", codes=5, group=32), "cpu", "int8"),
        (Left("float32", codes=4, group=32), "cpu", "int4"),
        (Left("float32", 0.5, codes=4, group=32), "cpu", "int4"),  # half a byte is less than a bit and half the bytes
        (Left("float32", 0.9, codes=4, group=32), "cpu", "bitmap_int8"),
        (Left("float16", 0.5, codes=8), "cpu", "dense"),
        (Left("bfloat16", codes=8), "cuda", "dense"),
        (Left("bfloat16", cut=True, codes=8), "cpu", "int8"),
    ],
)
def test_the_form_of_each_kind_of_cell(left: Left, device: str, expected: str) -> None:
    assert declared.automatic(left, device).name == expected
    if FORMATS[expected].compiles("auto"):
        assert declared.automatic(left, device, compiler=False).name == ("shrunk" if left.cut else "dense")


@pytest.mark.parametrize(
    "form", [f for f in FORMATS.values() if f.weighs and f.module and "cpu" in f.devices], ids=lambda f: f.name
)
def test_a_format_takes_the_bits_that_it_declares(form: Format) -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype, zeros in itertools.product(form.dtypes, (0.1, 0.5, 0.9)):
        weight = torch.randn(256, 2048, generator=draw)
        weight = weight.masked_fill(torch.rand(256, 2048, generator=draw) < zeros, 0).to(getattr(torch, dtype))
        grid = None
        if form.bits is not None:
            grid = Grid(form.bits, torch.full((256, 2048 // 32), 0.5), 32)
            weight = grid.values(grid.codes(4 * weight), weight.dtype)
        layer = form.packing("auto", weight.dtype).make(weight, None, grid)
        found = Left(dtype, 1 - layer.nonzeros / weight.numel(), codes=form.bits, group=32 if grid else None)
        assert form.weighs is not None
        assert 8 * layer.held_bytes / weight.numel() == pytest.approx(form.weighs(found), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_is_named_by_what_runs(family: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
    wanted = {"model": model, "method": {"family": family}, "calibration": {"source": "pydoc"}, "dtype": "float32"}
    cell = machine.resolve(asked(**wanted))
    assert cell.execution.name == {"dense": "dense", "weight": "bitmap"}.get(family, "shrunk")
    by_name = machine.resolve(asked(**wanted, execution={"name": cell.execution.name}))
    assert identity.cell_name(cell) == identity.cell_name(by_name)
    assert cell.dense().execution == Execution("dense")


def test_without_a_compiler_zeros_run_dense_and_one_line_tells(
    without_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    for sparsity in (0.3, 0.5, 0.7):
        cell = machine.resolve(asked(sparsity=sparsity, dtype="float32"))
        assert cell.execution == Execution("dense")
        machine.check_execution(cell)
    machine.resolve(asked(sparsity=0.01, dtype="bfloat16"))  # for which nobody needs a compiler
    assert [record.getMessage() for record in caplog.records] == [
        "execution=auto runs dense where bitmap would be smaller: there is no C++ compiler (no-such-compiler)"
    ]


def test_whether_kernels_can_be_built_is_tried(without_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cannot_build() == "there is no C++ compiler (no-such-compiler)"
    monkeypatch.setenv("CXX", "false")
    machine.cannot_build.cache_clear()
    assert "(false) builds no extension of Python" in str(machine.cannot_build())
    monkeypatch.delenv("CXX")
    machine.cannot_build.cache_clear()
    assert machine.cannot_build() is None  # the tests of kernels need one


def test_a_cell_that_is_handed_on_is_not_decided_again(without_compiler: None, tmp_path: Path) -> None:
    """Where another machine runs it, it runs what this one has named it by."""
    cell = replace(asked(dtype="float32"), execution=Execution("bitmap", saved="plain"))
    assert machine.resolve(cell).execution == cell.execution


# ---- what is saved ----


@pytest.mark.parametrize(
    ("execution", "plain"), [({"name": "auto"}, True), ({"name": "auto", "saved": "packed"}, False)]
)
def test_a_saved_model_is_one_that_transformers_loads_unless_packed_is_asked_for(
    execution: dict[str, str], plain: bool, tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path
) -> None:
    model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
    cell = machine.resolve(asked(model=model, execution=execution, efficiency={"repeats": 0}, dtype="float32"))
    row, _ = run.run_cell(cell, str(tmp_path / "saved"), "the command")
    assert row["kernel"].startswith("bitmap ")
    loaded, _ = sweep.load_model(tmp_path / "saved")
    assert bool(packed(loaded)) is not plain
    card = (tmp_path / "saved" / "README.md").read_text()
    if plain:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        zeros = [
            int((layer.weight == 0).sum())
            for layer in theirs.model.layers[0].mlp.children()
            if hasattr(layer, "weight")
        ]
        assert zeros and all(zeros) and AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert "measured as `execution=bitmap`, and is stored in plain matrices, which transformers loads" in card
    else:
        assert "load the folder with `sweep.load_model(FOLDER)`" in card
    assert f"| sparsity achieved, of the weights that the method targets | {row['sparsity_achieved']} |" in card


def test_how_a_model_is_saved_renames_no_cell(tiny_checkpoint: Path) -> None:
    model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
    names = {
        identity.cell_name(machine.resolve(asked(model=model, execution=execution, dtype="float32")))
        for execution in ({"name": "auto"}, {"name": "auto", "saved": "packed"}, {"name": "bitmap"})
    }
    assert len(names) == 1


def test_plain_matrices_of_a_form_that_no_checkpoint_holds_are_saved() -> None:
    with pytest.raises(RequestError, match="no csr matrices: use execution=dense or .*, or set execution.saved=plain"):
        config.parse(packed_request(execution={"name": "csr"}, save_model="a"))
    cell, _ = config.parse(packed_request(execution={"name": "csr", "saved": "plain"}, save_model="a"))
    assert cell.execution == Execution("csr", saved="plain")
