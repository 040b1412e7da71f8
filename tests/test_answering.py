"""Time per answer: of both models in turns, on prompts that are the same for all cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import tiny_models
from sweep.config import Benchmarks, Cell, Efficiency, Execution, Model
from sweep.measuring import answering, generation
from sweep.pruning.families import Weight
from sweep.run import run_cell
from sweep.store import columns as store_columns
from test_generation import byte_model, write_task

SETTINGS = Efficiency(prompt_tokens=8, output_tokens=4, warmup=0, repeats=6)


def requests(limit: int, count: int = 20) -> dict[str, list[tuple[object, ...]]]:
    return {"sums": [(f"{n} + {n} =", {"until": ["no such string"], "max_gen_toks": limit}) for n in range(count)]}


def test_each_prompt_is_answered_by_both_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    write = generation.write

    def noted(model, tokenizer, questions, rows, way):
        assert rows == len(questions) == 1, "a user is answered alone"
        done.append((model.name, len(questions[0].tokens)))
        return write(model, tokenizer, questions, rows, way)

    pruned, dense = byte_model(), byte_model()
    pruned.name, dense.name = "pruned", "dense"
    monkeypatch.setattr(generation, "write", noted)
    tokenizers = (tiny_models.tokenizer(), tiny_models.tokenizer())
    columns, repeats = answering.timed((pruned, dense), tokenizers, requests(5), SETTINGS, Benchmarks(()))
    done = done[2:]  # before a clock runs
    assert [name for name, _ in done] == ["dense", "pruned", "pruned", "dense"] * 3
    assert all(a == b for (_, a), (_, b) in zip(done[::2], done[1::2], strict=True))
    times = repeats.pivot(index="repeat", columns="model", values="milliseconds")
    assert set(repeats.phase) == {"sums/answer"} and len(times) == 6
    assert columns["sums/ms_per_answer"] == pytest.approx(times.pruned.mean())
    assert columns["sums/ms_per_answer_stderr"] == pytest.approx(times.pruned.std() / 6**0.5)
    assert columns["sums/answer_speedup"] == pytest.approx(times.dense.mean() / times.pruned.mean())


def test_timing_answers_ends_with_its_seconds_but_after_three_prompts() -> None:
    tokenizer = tiny_models.tokenizer()
    model = byte_model()
    hasty = replace(SETTINGS, seconds=0.0)
    _, repeats = answering.timed((model, model), (tokenizer, tokenizer), requests(3), hasty, Benchmarks(()))
    assert repeats.repeat.nunique() == 3


def test_right_answers_a_second_are_of_metrics_that_say_right_or_wrong() -> None:
    row = {"a/exact_match": 0.25, "a/ms_per_answer": 50.0, "b/bleu": 12.0, "b/ms_per_answer": 50.0}
    samples = pd.DataFrame(
        [("a", str(i), "exact_match", float(i == 0)) for i in range(4)] + [("b", "0", "bleu", 12.0)],
        columns=["task", "document", "metric", "value"],
    )
    assert answering.correct_a_second(row, samples, ["a", "b"]) == {"a/correct_answers_per_second": 0.25 / 0.05}
    assert answering.correct_a_second({"a/exact_match": 0.25}, samples, ["a"]) == {}, "nothing was timed"


def test_a_cell_has_the_columns_of_its_answers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cell = Cell(
        Model("tiny", "local", path=str(tiny_checkpoint)),
        Weight("weight", criterion="magnitude"),
        0.5,
        write_task(tmp_path, "{until: [e], max_gen_toks: 6}"),
        None,
        SETTINGS,
        Execution(),
        dtype="float32",
        device="cpu",
        threads=1,
    )
    row, tables = run_cell(cell)
    of_answers = ("generated_tokens_mean", "truncated_share", "repetition", "ms_per_answer", "answer_speedup")
    for name in (*of_answers, "correct_answers_per_second"):
        assert row[f"copied/{name}"] is not None
    assert {"generated_tokens", "truncated", "repetition"} <= set(tables["samples"].metric)
    assert set(tables["latency"].phase) == {"prefill", "decode", "copied/answer"}
    assert store_columns.is_measured("copied/ms_per_answer") and store_columns.is_measured(
        "copied/ms_per_answer_stderr"
    )
    assert not store_columns.is_measured("copied/exact_match,strict-match")
