"""Benchmarks are checked before a model loads, and lm-eval's tasks found without reading all of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sweep.config import Benchmarks
from sweep.measuring import catalogue, task_identity
from sweep.settings import RequestError
from test_identity import write_task

HUB = ("wikitext", "lambada_openai", "arc_easy", "piqa", "boolq")


def test_embedded_tasks_are_known_without_lm_eval() -> None:
    code = (
        "import sys\nfrom sweep.measuring import catalogue\nfrom sweep.config import Benchmarks\n"
        "print(*catalogue.check(Benchmarks(('pydoc', 'continents')), None).values(), 'lm_eval' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == [*map(task_identity.of_embedded, ("pydoc", "continents")), "False"]


@pytest.mark.parametrize(
    ("settings", "data_root", "message"),
    [
        (Benchmarks(("capitols",)), None, "'capitols' is no task of sweep or lm-eval. Did you mean 'capitals'?"),
        (Benchmarks(("arc_eazy",)), None, "Did you mean 'arc_easy'?"),
        (Benchmarks(("pydoc",)), "nowhere", "data_root: there is no folder nowhere"),
        (Benchmarks(("capitals",), num_fewshot=2), None, "num_fewshot=2: the task capitals has no examples to show"),
        (
            Benchmarks(("copying",), num_fewshot=0),
            None,
            "num_fewshot=0: the task copying always shows its own 6 examples",
        ),
        (Benchmarks(("humaneval",)), None, "humaneval runs code that the model wrote.* benchmarks.unsafe_code=true"),
        (Benchmarks(("mbpp",)), None, "mbpp runs code that the model wrote"),
        (Benchmarks(("pydoc",), include_path="nowhere"), None, "benchmarks.include_path: there is no folder nowhere"),
        (Benchmarks(("mine.yaml",)), None, "benchmarks.tasks: there is no file mine.yaml"),
        (Benchmarks(("mine.yaml",), include_path="/"), None, "there is no file mine.yaml nor /mine.yaml"),
    ],
)
def test_benchmarks_that_cannot_run_are_refused(settings: Benchmarks, data_root: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        catalogue.check(settings, data_root)


def test_the_index_is_lm_evals_own() -> None:
    known = catalogue.index()
    assert known["mmlu"]["kind"] == "GROUP" and known["ai2_arc"]["kind"] == "TAG"
    assert {"arc_easy", "arc_challenge"} <= set(known["ai2_arc"]["tags"])
    assert Path(known["arc_easy"]["path"]).name == "arc_easy.yaml"
    leaves = list(catalogue._leaves("mmlu", known))
    assert len(leaves) == 57 and all(Path(path).is_file() for path in leaves)


def test_data_that_cannot_be_found_say_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RequestError, match=r"hellaswag: no data. Looked in data_root=.*, in the cache .* FOLDER/org/name"
    ):
        catalogue.check(Benchmarks(("hellaswag",)), str(tmp_path))
    assert Path.cwd() != tmp_path


@pytest.mark.data
def test_tasks_find_their_data_offline(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = catalogue.check(Benchmarks(HUB), str(data_root))
    assert set(found) == set(HUB) and len(set(found.values())) == 5
    monkeypatch.chdir(data_root.parent)
    assert catalogue.check(Benchmarks(HUB), data_root.name) == found
    shown = [catalogue.check(Benchmarks(("arc_easy",), num_fewshot=shots), str(data_root)) for shots in (3, 4, 0)]
    assert len({f["arc_easy"] for f in shown}) == 3 and shown[2] == {"arc_easy": found["arc_easy"]}
    with pytest.raises(RequestError, match="num_fewshot=1: the task boolq is to show 1 and has 1 examples"):
        catalogue.check(Benchmarks(("boolq",), num_fewshot=1), str(data_root))


def test_a_task_of_the_users_own_is_found_by_name_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "tasks")
    (tmp_path / "tasks" / "broken.yaml").write_text("task: [")  # of no matter to those that are asked for
    by_name = catalogue.check(Benchmarks(("mine",), include_path=str(tmp_path / "tasks")), None)
    assert set(by_name) == {"mine"}
    asked = [
        Benchmarks(("mine.yaml",), include_path=str(tmp_path / "tasks")),
        Benchmarks(("tasks/mine.yaml",)),
        Benchmarks((str(tmp_path / "tasks" / "mine.yaml"),)),
    ]
    monkeypatch.chdir(tmp_path)
    assert [catalogue.check(one, None) for one in asked] == [by_name] * 3
    assert catalogue.check(replace(asked[1], tasks=("tasks/mine.yaml", "pydoc")), None).keys() == {"mine", "pydoc"}
    assert catalogue.check(asked[1], str(tmp_path / "tasks")) == by_name  # data lie elsewhere, the file where it was


@pytest.mark.parametrize(
    ("file", "content", "asked", "message"),
    [
        ("mine.yaml", "task: [", "mine.yaml", "mine.yaml is no task: while parsing"),
        (
            "mine.yaml",
            "task: [",
            "mine",
            "'mine' is no task of sweep or lm-eval or of .* Not read there: mine.yaml: while",
        ),
        ("mine.yaml", "- a list", "mine.yaml", "mine.yaml is no task: Expected YAML dict"),
        ("mine.yaml", "dataset_path: x", "mine.yaml", "mine.yaml is no task: it names no task"),
        (
            "mine.yaml",
            "task: mine\ninclude: other.yaml",
            "mine.yaml",
            "mine.yaml is no task: .*No such file.*other.yaml",
        ),
        ("mine.yaml", "task: mine\nflavour: 3", "mine", "mine.yaml cannot be built: TypeError: .*'flavour'"),
        ("mine.yaml", "task: mine\ndoc_to_text: !function nowhere.f", "mine", "cannot be built: .*'nowhere'"),
        ("mine.yaml", "task: mine\ndoc_to_text: !function helpers.f", "mine", "cannot be built: .*has no function 'f'"),
        ("a.yaml", "task: a/b", "a.yaml", "a.yaml is no task: a task cannot be called 'a/b': no / or comma"),
        ("a.yaml", "task: calibration", "a.yaml", "a.yaml is no task: a task cannot be called 'calibration': no / or"),
        (
            "a.yaml",
            "task: arc_easy",
            "arc_easy",
            "a.yaml calls its task 'arc_easy', as does .*arc_easy.yaml: give it a name",
        ),
        (
            "a.yaml",
            "task: capitals",
            "capitals",
            "a.yaml calls its task 'capitals', as does .*capitals.yaml: give it a name",
        ),
        ("a.yaml", "task: mine", "mine", "mine.yaml calls its task 'mine', as does .*a.yaml: give it a name"),
        (
            "a.yaml",
            "task: ai2_arc",
            "ai2_arc",
            "a.yaml calls its task 'ai2_arc', as does a tag of lm-eval: give it a name",
        ),
    ],
)
def test_a_task_of_the_users_own_that_is_none_is_refused(
    tmp_path: Path, file: str, content: str, asked: str, message: str
) -> None:
    write_task(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(RequestError, match=message):
        catalogue.check(Benchmarks((asked, "pydoc"), include_path=str(tmp_path)), None)


def test_a_task_that_is_asked_for_twice_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [mine]")
    assert set(catalogue.check(Benchmarks(("both",), include_path=str(tmp_path)), None)) == {"mine", "group both"}
    catalogue.check(Benchmarks(("mine", "pydoc", "mine.yaml", "pydoc"), include_path=str(tmp_path)), None)  # is one
    (tmp_path / "link.yaml").symlink_to(tmp_path / "mine.yaml")
    with pytest.raises(RequestError, match="benchmarks.tasks=mine,both asks for mine twice: leave one out"):
        catalogue.check(Benchmarks(("mine", "both"), include_path=str(tmp_path)), None)


def test_examples_are_those_that_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_task(tmp_path, count=3)
    mine = Benchmarks(("mine",), include_path=str(tmp_path))
    assert catalogue.check(mine, None) == catalogue.check(replace(mine, num_fewshot=2), None)
    catalogue.check(replace(mine, num_fewshot=3), None)  # all that there are, as MMLU does
    with pytest.raises(RequestError, match="num_fewshot=4: the task mine is to show 4 and has 3 examples to show"):
        catalogue.check(replace(mine, num_fewshot=4), None)
    write_task(tmp_path, count=3, shots=7)
    with pytest.raises(RequestError, match="num_fewshot=null: the task mine is to show 7 and has 3 examples to show"):
        catalogue.check(mine, None)
    (tmp_path / "mine.yaml").write_text(
        (tmp_path / "mine.yaml").read_text().replace("fewshot_split: train", "fewshot_split: test")
    )
    with pytest.raises(RequestError, match="is to show 3 and has 3"):  # one of them may be the question itself
        catalogue.check(replace(mine, num_fewshot=3), None)
    write_task(tmp_path, shots=0)
    catalogue.check(replace(mine, num_fewshot=3), None)
    assert "mine shows no examples, whatever benchmarks.num_fewshot is" in caplog.text
