"""The embedded texts: deterministic, disjoint from calibration, and refused when they cannot give what is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sweep import text
from sweep.config import Calibration, RequestError


def test_calibration_text_stands_nowhere_in_the_evaluated_text() -> None:
    evaluation, calibration = text.pydoc_split()
    assert len(evaluation) >= 10 and len(calibration) >= 500
    evaluated = "\n".join(evaluation.values())
    assert not [p for p in calibration if f"\n{p}\n" in f"\n{evaluated}\n" and len(p) > 80]


def test_documents_are_the_same_every_time_and_well_formed() -> None:
    for documents in text.EMBEDDED.values():
        first = documents()
        assert first == documents() and len(first) >= 15
    for question in text.capital_documents():
        assert len(set(question["choices"])) == 4
        assert 0 <= question["answer"] < 4
        assert question["country"].split()[0] not in question["choices"][question["answer"]]
    answers = [question["answer"] for question in text.capital_documents()]
    assert max(answers.count(i) for i in range(4)) < 0.4 * len(answers)
    classes = [question["continent"] for question in text.continent_documents()]
    assert set(classes) == set(range(6)) and max(map(classes.count, classes)) < 0.35 * len(classes)
    for passage in text.cloze_documents():
        assert passage["word"].isalpha() and 400 <= len(passage["context"]) <= 800


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
        text.calibration_text("nowhere.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="is not UTF-8 text"):
        text.calibration_text(str(tmp_path / "binary"))
