"""Benchmarks are checked before a model loads, and lm-eval's tasks found without reading all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep import catalogue, text
from sweep.config import Benchmarks, RequestError

HUB = ("wikitext", "lambada_openai", "arc_easy", "piqa", "boolq")


def test_embedded_tasks_are_known_by_their_documents_without_lm_eval() -> None:
    found = catalogue.check(Benchmarks(("pydoc", "continents")), None)
    assert found == {task: text.task_fingerprint(task) for task in ("pydoc", "continents")}


@pytest.mark.parametrize(
    ("settings", "data_root", "message"),
    [
        (Benchmarks(("capitols",)), None, "'capitols' is no task of sweep or lm-eval. Did you mean 'capitals'?"),
        (Benchmarks(("arc_eazy",)), None, "Did you mean 'arc_easy'?"),
        (Benchmarks(("pydoc",)), "nowhere", "data_root: there is no folder nowhere"),
        (Benchmarks(("capitals",), num_fewshot=2), None, "num_fewshot=2: the task capitals has no examples to show"),
        (Benchmarks(("humaneval",)), None, "humaneval runs code that the model wrote.* benchmarks.unsafe_code=true"),
        (Benchmarks(("mbpp",)), None, "mbpp runs code that the model wrote"),
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
    assert catalogue.check(Benchmarks(("arc_easy",), num_fewshot=3), str(data_root)) == {"arc_easy": found["arc_easy"]}
    with pytest.raises(RequestError, match="num_fewshot=1: the task boolq has no examples to show"):
        catalogue.check(Benchmarks(("boolq",), num_fewshot=1), str(data_root))
