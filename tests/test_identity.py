"""A cell's name: whatever can change its numbers changes it, and nothing else does."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from sweep import config, identity, plan, provenance, settings, versions
from sweep.config import GROUPS, Benchmarks, Calibration, Cell, Efficiency, Execution, Model, Options, Perplexity
from sweep.models import origin
from sweep.pruning import families
from sweep.pruning.families import FAMILIES, Weight
from sweep.pruning.recipe import Recipe
from sweep.recovery.kinds import Recover, Text
from sweep.sources import Source
from sweep.texts import corpora, text
from test_config import asked

YAML = """
task: mine
custom_dataset: !function helpers.documents
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
num_fewshot: {shots}
doc_to_text: "{prompt}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
process_results: !function helpers.score
metric_list:
  - metric: acc
metadata:
  version: {version}
"""
HELPERS = """
import datasets

def documents(**_):
    rows = lambda start: [{{"question": f"Is {{i}} even?", "answer": i % 2}} for i in range(start, start + {count})]
    return {{"train": datasets.Dataset.from_list(rows({start})), "test": datasets.Dataset.from_list(rows(0))}}

def score(document, results):
    return {{"acc": better(results) == document["answer"]}}

def better(results):
    return int(results[1][0] {sign} results[0][0])
"""


def write_task(folder: Path, **changes: Any) -> None:
    """A task of the user's own, whose function uses a helper beside it."""
    asked = {"shots": 2, "prompt": "{{question}}", "version": 1, "count": 6, "start": 100, "sign": ">"} | changes
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(YAML.format(**asked))
    (folder / "helpers.py").write_text(HELPERS.format(**asked))


@pytest.fixture
def cell(tiny_checkpoint: Path, tmp_path: Path) -> Cell:
    """Of a checkpoint and texts of its own, so that a test can change them."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    for name in ("calibration.txt", "evaluation.txt"):
        (tmp_path / name).write_text(f"the text of {name} " * 200)
    return Cell(
        Model("tiny", "local", path=str(tmp_path / "model")),
        Weight("weight", criterion="wanda"),
        0.5,
        Benchmarks(("pydoc", "capitals")),
        Calibration(str(tmp_path / "calibration.txt")),
        Efficiency(),
        Execution(),
        Perplexity(str(tmp_path / "evaluation.txt")),
        device="cpu",
        threads=1,
    )


def another(value: Any, hint: Any) -> Any:
    """A value of the same type that is not this one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return another(
            value,
            next(
                a
                for a in arguments
                if a is not type(None) and (value is None or type(value) is a or typing.get_origin(a) is Literal)
            ),
        )
    if origin is Literal:
        return next(choice for choice in arguments if choice != value)
    if origin is tuple:
        return (*(value or ()), another(None, arguments[0]))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        name = next(name for name, its in hints.items() if its is int)  # of what is not hashed by what it stands for
        return replace(value, **{name: another(getattr(value, name), int)})
    return {
        bool: lambda: not value,
        int: lambda: (value or 0) + 3,
        float: lambda: (value or 0.0) / 2 + 0.125,
        str: lambda: f"{value}2",
    }[hint]()


def fields_of(kind: type) -> list[tuple[str, Any]]:
    """Every setting with its type, those of parts among them."""
    hints = typing.get_type_hints(kind)
    found = []
    for f in dataclasses.fields(kind):
        found += fields_of(hints[f.name]) if f.metadata.get("part") else [(f.name, hints[f.name])]
    return found


PLACES = {"cell": Cell, **GROUPS, **{f"method {name}": kind for name, kind in FAMILIES.items()}}
MOVED = [
    (place, name)
    for place, kind in PLACES.items()
    for name, hint in fields_of(kind)
    if not (place == "cell" and name in {*GROUPS, "method"}) and name != "family"
]


def _full(place: str, name: str) -> str:
    return f"{place.split()[0]}.{name}".removeprefix("cell.")


def value_of(group: object, name: str) -> Any:
    """A setting, of the group or of one of its parts."""
    holder = next(h for h in parts_of(group) if name in {f.name for f in dataclasses.fields(h)})
    return getattr(holder, name)


def changed(group: Any, name: str, value: object) -> Any:
    if name in {f.name for f in dataclasses.fields(group)}:
        return replace(group, **{name: value})
    (part,) = (f.name for f in dataclasses.fields(group) if f.metadata.get("part"))
    return replace(group, **{part: changed(getattr(group, part), name, value)})


def parts_of(group: Any) -> list[Any]:
    return [group, *(getattr(group, f.name) for f in dataclasses.fields(group) if f.metadata.get("part"))]


def moved(cell: Cell, place: str, name: str) -> tuple[Cell, Cell, str]:
    """(a cell, the same with one setting moved, the setting's full name)."""
    hint = dict(fields_of(PLACES[place]))[name]
    if place == "cell":
        return cell, replace(cell, **{name: another(getattr(cell, name), hint)}), name
    if place.startswith("method"):
        before = replace(cell, method=FAMILIES[place.removeprefix("method ")]())
        value = moved_value(before.method, name, hint)
        value = "continents" if name == "task" else value
        return before, replace(before, method=changed(before.method, name, value)), f"method.{name}"
    group = getattr(cell, place)
    value = moved_value(group, name, hint)
    return cell, replace(cell, **{place: replace(group, **{name: value})}), f"{place}.{name}"


def moved_value(group: Any, name: str, hint: Any) -> Any:
    """Another value of a setting, one of its legal names where it has some."""
    now, allowed = value_of(group, name), settings.choices(type(group)).get(name)
    return next(choice for choice in allowed if choice != now) if allowed else another(now, hint)


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, name in MOVED if _full(place, name) not in identity.FINGERPRINTED]
)
def test_every_setting_that_is_moved_alone_gives_a_new_name(cell: Cell, place: str, name: str) -> None:
    before, after, _ = moved(cell, place, name)
    assert before != after
    assert identity.cell_name(before) != identity.cell_name(after)


def test_families_at_their_defaults_are_not_the_same(cell: Cell) -> None:
    names = {identity.cell_name(replace(cell, method=kind(family=family))) for family, kind in FAMILIES.items()}
    assert len(names) == len(FAMILIES)


def _with(group: Any, path: list[str], value: Any) -> Any:
    name, *inside = path
    return replace(group, **{name: _with(getattr(group, name), inside, value) if inside else value})


def test_where_things_lie_and_what_they_are_called_gives_no_new_name(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting that is hashed by what it stands for: another value that stands for the same."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("calibration.txt", "evaluation.txt"):
        shutil.copy(tmp_path / name, tmp_path / "elsewhere")
    shutil.copytree(cell.model.path, tmp_path / "elsewhere" / "moved")
    monkeypatch.setattr(corpora, "documents", lambda corpus, *_: ("the text of a data set " * 100,))
    of_hub = replace(cell, calibration=Calibration("org/name", split="train"))
    mended = replace(cell, recover=Recover("local", text=Text(cell.calibration.source, 4)))
    mended_of_hub = replace(cell, recover=Recover("local", text=Text("org/name", 4, split="train")))
    mix, moved_mix = (
        (Source(str(tmp_path / place / "calibration.txt"), 0.5), Source("pydoc", 0.5)) for place in (".", "elsewhere")
    )
    mixed = replace(cell, calibration=Calibration("mix", sources=mix))
    mended_by_mix = replace(cell, recover=Recover("local", text=Text("mix", 4, sources=mix)))
    for place in (".", "elsewhere"):
        Recipe({"family": "weight", "criterion": "wanda"}, 0.5, 0, {}, ()).write(tmp_path / place / "recipe.sweep")
    replayed = replace(cell, method=Weight(replay=str(tmp_path / "recipe.sweep")))
    others: dict[str, tuple[Cell, Any]] = {
        "model.name": (cell, "another"),
        "model.path": (cell, str(tmp_path / "elsewhere" / "moved")),
        "model.package": (cell, "unread"),
        "model.file": (cell, "unread"),
        "model.revision": (cell, "unread"),
        "data_root": (cell, str(tmp_path)),
        "benchmarks.tasks": (cell, ("capitals", "pydoc")),
        "benchmarks.include_path": (cell, str(tmp_path)),
        "benchmarks.num_fewshot": (cell, 0),
        "benchmarks.fewshot_seed": (cell, 7),
        "benchmarks.unsafe_code": (cell, True),
        "method.replay": (replayed, str(tmp_path / "elsewhere" / "recipe.sweep")),
        "execution.saved": (cell, "plain"),
        "perplexity.source": (cell, str(tmp_path / "elsewhere" / "evaluation.txt")),
        "calibration.source": (cell, str(tmp_path / "elsewhere" / "calibration.txt")),
        "calibration.subset": (of_hub, "other"),
        "calibration.split": (of_hub, "test"),
        "calibration.column": (of_hub, "other"),
        "calibration.sources": (mixed, moved_mix),
        "recover.text.source": (mended, str(tmp_path / "elsewhere" / "calibration.txt")),
        "recover.text.subset": (mended_of_hub, "other"),
        "recover.text.split": (mended_of_hub, "test"),
        "recover.text.column": (mended_of_hub, "other"),
        "recover.text.sources": (mended_by_mix, moved_mix),
    }
    assert others.keys() == identity.FINGERPRINTED.keys() - {"model.source"}  # which says how the others are read
    for setting, (before, value) in others.items():
        after = _with(before, setting.split("."), value)
        assert after != before and identity.cell_name(after) == identity.cell_name(before), setting


def test_texts_that_are_made_and_mixes_have_names_of_their_own(cell: Cell) -> None:
    def mix(*mixed: tuple[str, float, float]) -> Calibration:
        return Calibration("mix", sources=tuple(Source(name, share, temperature=t) for name, share, t in mixed))

    texts = [
        Calibration("pydoc"),
        Calibration("random"),
        Calibration("self"),
        Calibration("self", temperature=0.5),
        Calibration("pydoc", packed=False),
        mix(("pydoc", 0.5, 1.0), ("self", 0.5, 1.0)),
        mix(("pydoc", 0.75, 1.0), ("self", 0.25, 1.0)),
        mix(("pydoc", 0.5, 1.0), ("self", 0.5, 0.5)),
        mix(("pydoc", 0.5, 1.0), ("random", 0.5, 1.0)),
    ]
    assert len({identity.cell_name(replace(cell, calibration=text)) for text in texts}) == len(texts)


def test_no_option_changes_a_name(tmp_path: Path) -> None:
    """But `baseline`, which asks for another cell."""
    hints = typing.get_type_hints(Options)
    plain = config.parse(asked())[0]
    for name, hint in hints.items():
        value = {"memory_limit": "3GiB", "timeout": 9.0}.get(name, another(getattr(Options(), name), hint))
        cell, options = config.parse(asked(**{name: value}))
        assert getattr(options, name) == value
        assert (cell == plain) == (name != "baseline"), name


def test_a_setting_that_is_added_renames_no_recorded_cell(cell: Cell) -> None:
    younger = dataclasses.make_dataclass("Younger", [("angle", float, 1.0)], bases=(Weight,), frozen=True)
    same = younger("weight", criterion="wanda")
    assert identity.cell_name(replace(cell, method=same)) == identity.cell_name(cell)
    assert identity.cell_name(replace(cell, method=replace(same, angle=2.0))) != identity.cell_name(cell)


DEFAULTS = {  # of the present measuring version, which rises when one of these changes: names leave defaults out
    "Weight": (
        "criterion=magnitude scope=None pattern=None allocation=uniform targets=all embeddings=False "
        "head=False exclude=() steps=1 damping=0.01 outlier_ratio=5.0 outlier_range=0.08 among_smallest=1.0 "
        "skip_lowest=0.0"
    ),
    "Neuron": (
        "metric=loss task=None documents=None screen=none screen_margin=0.1 criterion=taylor_sampled "
        "scope=global steps=1 repair=False multiple_of=1 group=1 sparsity_of=parameters blocks=None"
    ),
    "Head": (
        "metric=loss task=None documents=None screen=none screen_margin=0.1 criterion=taylor_abs scope=global "
        "unit=group steps=1 repair=False sparsity_of=parameters blocks=None"
    ),
    "Layer": (
        "metric=loss task=None documents=None screen=none screen_margin=0.1 criterion=block_influence steps=1 "
        "sparsity_of=parameters blocks=None"
    ),
    "Vocab": "criterion=frequency",
    "Benchmarks": (
        "include_path=None limit=None num_fewshot=None fewshot_seed=1234 batch_size=4 max_length=None unsafe_code=False"
    ),
    "Perplexity": "source=None seqlen=2048 windows=None",
    "Calibration": "sequences=16 length=256 sequential=True subset=None split=None column=None",
    "Efficiency": "prompt_tokens=128 output_tokens=16 batch_size=1 warmup=2 repeats=10 precision=None seconds=60.0",
    "Execution": "name=dense kernel=auto fallback=False",
    "Cell": "seed=0 dtype=auto device=auto threads=None data_root=None",
    "Model": "path=None package=None file=None revision=None trust_remote_code=False",
}


def test_recorded_names_leave_out_the_defaults_of_today() -> None:
    """A default that is added is none of the matter."""
    assert versions.MEASURING_VERSION == 6  # else write down the defaults of the new version
    for group, recorded in DEFAULTS.items():
        kind = getattr(config, group, None) or getattr(families, group)
        today = {f.metadata.get("was", f.name): str(f.default) for f in settings.flat_fields(kind)}
        for setting in recorded.split():
            name, _, default = setting.partition("=")
            assert today[name] == default, f"{group}.{name}: raise versions.MEASURING_VERSION"


def test_what_a_checkpoint_weighs_counts_and_what_lies_beside_it_does_not(cell: Cell) -> None:
    folder, before = Path(cell.model.path), origin.fingerprint(cell.model)
    (folder / "README.md").write_text("what it is")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"older")
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    assert origin.fingerprint(cell.model) == before
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"\0")  # the same size
        assert origin.fingerprint(cell.model) != before, name
        (folder / name).write_bytes(whole)
    assert origin.fingerprint(cell.model) == before


def test_the_hash_of_a_large_file_is_kept_for_other_processes(
    cell: Cell, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = origin.fingerprint(cell.model)
    monkeypatch.setattr(origin, "_REMEMBERED", 1)
    origin._file_hash.cache_clear()
    assert origin.fingerprint(cell.model) == before
    origin._file_hash.cache_clear()
    monkeypatch.setattr(origin.hashlib, "file_digest", lambda *_: pytest.fail("it is known"))
    assert origin.fingerprint(cell.model) == before


def test_texts_are_hashed_by_what_they_hold(cell: Cell, tmp_path: Path) -> None:
    before = identity.cell_name(cell)
    for name in ("calibration.txt", "evaluation.txt"):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(kept[:-2] + "x ")
        assert identity.cell_name(cell) != before, name
        (tmp_path / name).write_text(kept)
        assert identity.cell_name(cell) == before


def test_a_text_is_read_once_for_all_cells(cell: Cell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[str] = []
    original = text.read_file

    def counted(source: str, *arguments: str) -> str:
        read.append(source)
        return original(source, *arguments)

    monkeypatch.setattr(text, "read_file", counted)
    cells = [replace(cell, sparsity=s / 100) for s in range(1, 41)]
    plan.make([(c, ()) for c in cells], Options(results=str(tmp_path / "results")))
    for c in cells:
        text.check(c.calibration, None, "calibration")
        provenance.columns(c, "command")
    assert sorted(read) == [str(tmp_path / "calibration.txt"), str(tmp_path / "evaluation.txt")]


def test_a_task_is_hashed_as_lm_eval_resolves_it(cell: Cell, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    write_task(folder)
    mine = replace(cell, benchmarks=Benchmarks(("mine",), include_path=str(folder)))
    before = identity.cell_name(mine)
    for change in (
        {"prompt": "{{question}} Answer:"},
        {"version": 2},
        {"count": 7},
        {"sign": "<"},
        {"shots": 3},
        {"start": 50},
    ):
        write_task(folder, **change)
        assert identity.cell_name(mine) != before, change
    write_task(folder)
    assert identity.cell_name(mine) == before
    (folder / "mine.yaml").write_text("# a remark\n" + (folder / "mine.yaml").read_text())
    assert identity.cell_name(mine) == before
    shown = [
        replace(mine, benchmarks=replace(mine.benchmarks, **change))
        for change in (
            {"num_fewshot": 2},
            {"fewshot_seed": 7},
            {"num_fewshot": 1},
            {"num_fewshot": 0},
            {"num_fewshot": 0, "fewshot_seed": 7},
        )
    ]
    names = [identity.cell_name(c) for c in shown]
    assert names[0] == before and names[3] == names[4] and len({*names}) == 4
    write_task(folder, start=50)  # of the examples alone
    assert identity.cell_name(shown[3]) != names[3]  # the file of its functions counts as a whole


def test_names_are_the_same_in_every_process(cell: Cell, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks")
    mine = replace(cell, benchmarks=Benchmarks(("mine", "pydoc"), include_path=str(tmp_path / "tasks")))
    code = f"from sweep.config import *\nfrom sweep.pruning.families import *\nfrom sweep.recovery.kinds import Text\nfrom sweep import identity\nprint(identity.cell_name({mine!r}))"
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert found.stdout.strip() == identity.cell_name(mine)


def test_an_embedded_task_is_hashed_with_its_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cell: Cell
) -> None:
    from sweep.measuring import task_identity

    before = identity.cell_name(cell)
    shutil.copytree(task_identity.TASK_FOLDER, tmp_path / "tasks")
    monkeypatch.setattr(task_identity, "TASK_FOLDER", tmp_path / "tasks")
    task_identity.of_embedded.cache_clear()
    assert identity.cell_name(cell) == before
    file = tmp_path / "tasks" / "capitals.yaml"
    file.write_text(file.read_text().replace("The capital of", "Capital of"))
    task_identity.of_embedded.cache_clear()
    assert identity.cell_name(cell) != before
    task_identity.of_embedded.cache_clear()
