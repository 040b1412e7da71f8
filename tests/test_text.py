"""The embedded texts: deterministic, disjoint from calibration, and refused when they cannot give what is asked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sweep.config import Benchmarks, Calibration
from sweep.measuring import catalogue
from sweep.settings import RequestError
from sweep.texts import embedded, text


def test_no_paragraph_is_in_two_parts_of_the_language_reference() -> None:
    from pydoc_data.topics import topics

    split = embedded.pydoc_split()
    assert len(split.test) >= 20 and len(split.development) >= 17 and len(split.calibration) >= 500
    assert not set(split.test) & set(split.development)
    tested, developed = (
        {paragraph.strip() for page in part.values() for paragraph in page.split("\n\n")}
        for part in (split.test, split.development)
    )
    assert not tested & developed - {""}
    whole = "\n\n".join(topics[name] for name in [*split.test, *split.development])
    assert not [p for p in split.calibration if f"\n\n{p}\n\n" in f"\n\n{whole}\n\n"]


def test_the_tasks_evaluate_the_test_topics_and_development_is_a_task_of_its_own() -> None:
    split = embedded.pydoc_split()
    tasks = catalogue.load(Benchmarks(("pydoc", "pydoc_cloze", "pydoc_development")))["tasks"]
    pages = {name: {d["topic"]: d.get("page") for d in task.eval_docs} for name, task in tasks.items()}
    assert pages["pydoc"] == split.test and pages["pydoc_development"] == split.development
    assert set(pages["pydoc_cloze"]) <= set(split.test)
    assert all(d["context"] in split.test[d["topic"]] for d in tasks["pydoc_cloze"].eval_docs)


def test_documents_are_the_same_every_time_and_well_formed() -> None:
    for documents in embedded.EMBEDDED.values():
        first = documents()
        assert first == documents() and len(first) >= 15
    for question in embedded.capital_documents():
        assert len(set(question["choices"])) == 4
        assert 0 <= question["answer"] < 4
        assert question["country"].split()[0] not in question["choices"][question["answer"]]
    answers = [question["answer"] for question in embedded.capital_documents()]
    assert max(answers.count(i) for i in range(4)) < 0.4 * len(answers)
    classes = [question["continent"] for question in embedded.continent_documents()]
    assert set(classes) == set(range(6)) and max(map(classes.count, classes)) < 0.35 * len(classes)
    for passage in embedded.cloze_documents():
        assert passage["word"].isalpha() and 400 <= len(passage["context"]) <= 800


def test_written_answers_are_right_and_no_example_is_asked() -> None:
    closing = {"(": ")", "[": "]", "{": "}"}
    right = {
        "copying": lambda d: d["words"],
        "swapping": lambda d: " ".join(reversed(d["words"].split())),
        "brackets": lambda d: " ".join(closing[opened] for opened in reversed(d["opened"].split())),
        "addition": lambda d: str(sum(int(number) for number in d["sum"].split(" + "))),
        "capital_names": {d["country"]: d["choices"][d["answer"]] for d in embedded.capital_documents()}.get,
    }
    assert right.keys() == embedded.GENERATIVE.keys()
    for task, answer in right.items():
        shown, asked = embedded.examples(task), embedded.EMBEDDED[task]()
        assert len(shown) == 6 and len(asked) >= 90
        assert len({json.dumps(document) for document in shown + asked}) == len(shown + asked)
        for document in shown + asked:
            assert document["answer"] == (answer(document["country"]) if task == "capital_names" else answer(document))


def test_prompts_of_written_answers_show_the_examples_and_end_before_the_answer() -> None:
    names = tuple(embedded.GENERATIVE)
    for name, task in catalogue.load(Benchmarks(names))["tasks"].items():
        asked = embedded.EMBEDDED[name]()[0]
        prompt = task.fewshot_context(asked, 6)
        question = task.doc_to_text(asked)
        shown = [f"{task.doc_to_text(document)} {document['answer']}\n\n" for document in embedded.examples(name)]
        assert prompt == "".join(shown) + question
        assert task.process_results(asked, [f" {asked['answer']}"]) == {"exact_match": 1}
        assert task.process_results(asked, [f" {asked['answer']} and"]) == {"exact_match": 0}


def test_calibration_sequences_do_not_overlap_and_follow_the_seed(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    settings = Calibration("pydoc", sequences=8, length=64)
    first = text.calibration_tokens(settings, tokenizer, seed=0)
    assert first.shape == (8, 64)
    assert torch.equal(first, text.calibration_tokens(settings, tokenizer, seed=0))
    assert not torch.equal(first, text.calibration_tokens(settings, tokenizer, seed=1))
    assert len({tuple(sequence.tolist()) for sequence in first}) == 8


def test_a_text_that_is_too_short_or_missing_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    (tmp_path / "short.txt").write_text("a" * 100)
    with pytest.raises(RequestError, match="gives 1 sequences of 64 tokens; 2 are asked. Lower calibration.sequences"):
        text.calibration_tokens(Calibration(str(tmp_path / "short.txt"), 2, 64), tokenizer, 0)
    with pytest.raises(RequestError, match="there is no file 'nowhere.txt'"):
        text.calibration_text(Calibration("nowhere.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="is not UTF-8 text"):
        text.calibration_text(Calibration(str(tmp_path / "binary")))


def data_set(root: Path, name: str, file: str, column: str, rows: list, head: str = "") -> None:
    """A data set of lines of JSON, laid out as the hub names it."""
    place = root / name / file
    place.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({column: row}) + "\n" for row in rows).encode()
    place.write_bytes(gzip.compress(lines) if place.suffix == ".gz" else lines)
    if head:
        (root / name / "README.md").write_text(head)


WIKITEXT = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---
"""


def test_data_sets_of_the_hub_are_calibrated_on_by_name(tmp_path: Path, cache_folder: Path) -> None:
    data_set(tmp_path, "Salesforce/wikitext", "train.jsonl", "text", ["one", "", "two"], WIKITEXT)
    data_set(tmp_path, "Salesforce/wikitext", "test.jsonl", "text", ["not this"])
    data_set(tmp_path, "allenai/c4", "en/c4-train.00000-of-01024.json.gz", "text", [f"{i}" for i in range(8001)])
    data_set(tmp_path, "some/stories", "train.jsonl", "story", ["a", "b"])
    assert text.calibration_text(Calibration("wikitext2"), str(tmp_path)) == "one  two"
    opening = text.calibration_text(Calibration("c4"), str(tmp_path)).split("\n\n")
    assert opening == [f"{i}" for i in range(8000)]
    stories = Calibration("some/stories", split="train", column="story")
    assert text.calibration_text(stories, str(tmp_path)) == "a\n\nb"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Calibration("some/stories", split="train"), "calibration.source=some/stories: .* no column 'text', but story"),
        (
            Calibration("some/stories", split="nights", column="story"),
            "calibration.source=some/stories: no data. Looked",
        ),
        (Calibration("some/numbers", split="train", column="n"), "the column 'n' of some/numbers holds no text"),
        (
            Calibration("no/such", split="train"),
            "calibration.source=no/such: no data. .* data_root=FOLDER names a folder",
        ),
        (Calibration("wikitext2"), "calibration.source=wikitext2: no data. Looked in data_root="),
        (
            Calibration("pydoc", split="train"),
            "calibration.split=train is of a data set of the hub, and .*=pydoc is none",
        ),
        (Calibration("some/stories", column="story"), "calibration.column=story is of .* add calibration.split"),
        (Calibration("some/stories"), "or with calibration.split a data set of the hub; there is no file"),
    ],
)
def test_data_sets_that_cannot_be_read_are_refused(
    settings: Calibration, message: str, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data_set(tmp_path, "some/stories", "train.jsonl", "story", ["a"])
    data_set(tmp_path, "some/numbers", "train.jsonl", "n", [1])
    with pytest.raises(RequestError, match=message):
        text.calibration_text(settings, str(tmp_path))


def test_a_column_that_is_spelt_out_is_the_usual_one() -> None:
    from sweep import config

    asked = {
        "model": {"name": "m", "source": "hub"},
        "sparsity": 0.5,
        "benchmarks": {"tasks": []},
        "efficiency": {},
        "execution": {},
        "method": {"family": "weight", "criterion": "wanda"},
    }
    pydoc, hub, spelt_out = (
        config.parse(asked | {"calibration": {"source": "s"} | more})[0].calibration
        for more in ({}, {"split": "train"}, {"split": "train", "column": "text", "subset": None})
    )
    assert hub == spelt_out and (pydoc.column, hub.column) == (None, "text")
