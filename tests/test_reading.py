"""Batches that go through a model block by block, against each of them from end to end: equal to the last digit."""

from __future__ import annotations

import errno
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tiny_models
from sweep import calibrate, run
from sweep.config import Benchmarks, Cell, Efficiency, Execution, Model, Perplexity
from sweep.measuring import perplexity, reading, scorer
from sweep.models import anatomy, loading
from sweep.pruning.families import Dense
from sweep.settings import RequestError

TREES = ["llama", "gemma3_text", "gpt2", "mixtral"]  # what their requests share they read once
WALKED = [*TREES, "gemma3n_text", "qwen3_5_text"]


def on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with its weights in a file, mapped."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data = (
            torch.from_file(str(folder / str(i)), shared=True, size=parameter.numel(), dtype=parameter.dtype)
            .view(parameter.shape)
            .copy_(parameter.data)
        )
    return model


def noted(ran: list[int], index: int, forward: Any) -> Any:
    """A block's forward pass that notes that it ran."""

    @functools.wraps(forward)
    def run_it(*args: Any, **kwargs: Any) -> Any:
        ran.append(index)
        return forward(*args, **kwargs)

    return run_it


def long_requests() -> list[tuple[list[int], int]]:
    """Of differing length, beyond a tiny model's sliding window, some of which begin alike."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 60, (length,), generator=draw).tolist() for length in (48, 47, 45, 40, 31, 9, 2)]
    return [(text, len(text) - 1) for text in texts] + [(texts[0][:40] + text[:5], 4) for text in texts[3:]]


def equal(some: list[scorer.Scores], others: list[scorer.Scores]) -> bool:
    return all(
        (a.log_probs == b.log_probs).all() and (a.greedy == b.greedy).all() for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("bound", [2**30, 0])
@pytest.mark.parametrize("kind", WALKED)
def test_block_by_block_the_scores_are_the_same_to_the_last_digit(
    kind: str, bound: int, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "IN_MEMORY", bound)
    monkeypatch.setattr(reading, "_WORTH_A_FILE", 1)
    model = tiny_models.make(kind)
    in_memory, said = reading.of(model)
    assert in_memory is reading.whole and said == {"evaluated_by": "batches", "evaluated_by_fallback": None}
    expected = scorer.score(model, long_requests(), 100)
    read, said = reading.of(on_disk(model, tmp_path))
    assert said == {"evaluated_by": "blocks", "evaluated_by_fallback": None}
    blocks = list(anatomy.blocks(model))
    ran: list[int] = []
    for index, block in enumerate(blocks):
        block.forward = noted(ran, index, block.forward)
    trees = scorer.widest_tree(model, read) if kind in TREES else 0
    ran.clear()
    assert equal(scorer.score(model, long_requests(), 100, trees, read=read), expected)
    assert ran == sorted(ran) and len(ran) > len(blocks)  # each block is taken up once, for all batches


def test_what_is_read_of_tasks_and_papers_is_the_same_by_blocks(
    tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path
) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    (tmp_path / "mine.txt").write_text("Some text of one's own, long enough for three windows and a little more. " * 3)

    def found(read: reading.Reading) -> Any:
        lm = scorer.Scorer(model, tokenizer, 1, 64, read)
        lm.top = 3
        pairs = [("a question with choices:", f" {choice}") for choice in ("one", "another", "the third of them")]
        texts = [("short",), ("some text that is longer than a window " * 5,)]
        chosen = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        rolled = lm.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, text, i) for i, text in enumerate(texts)]
        )
        likeliest = {text: others.log_probs.tolist() for text, others in lm.alternatives.items()}
        columns, windows = perplexity.measure(
            model, tokenizer, Perplexity(str(tmp_path / "mine.txt"), 64), None, 1, read
        )
        return chosen, rolled, likeliest, columns, windows.value.tolist()

    expected = found(reading.whole)
    read, said = reading.of(on_disk(model, tmp_path))
    assert said["evaluated_by"] == "blocks" and found(read) == expected


def test_a_model_that_no_text_goes_through_block_by_block_is_read_whole_and_says_why(tmp_path: Path) -> None:
    model = on_disk(tiny_models.make("zaya"), tmp_path)
    read, said = reading.of(model)
    assert read is reading.whole and said["evaluated_by"] == "batches"
    assert said["evaluated_by_fallback"] == (
        "a text cannot be taken through ZayaForCausalLM block by block: "
        "block 2 reads more than what the block before it puts out"
    )


def test_a_disk_without_room_for_texts_on_their_way_is_told(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    monkeypatch.setattr(reading, "_WORTH_A_FILE", 1)
    monkeypatch.setattr(reading.tempfile, "TemporaryFile", lambda **_: Full())
    model = tiny_models.make("llama")
    read = functools.partial(reading.by_blocks, kinds=calibrate.kinds_of(model, torch.arange(8)[None]))
    with pytest.raises(
        RequestError, match=r"no room for texts on their way .*No space left on device.*set SWEEP_CACHE"
    ):
        scorer.score(model, long_requests(), 100, read=read)


def test_a_row_says_that_its_model_was_read_by_blocks_and_has_the_same_numbers(
    tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Dense(),
        sparsity=0,
        benchmarks=Benchmarks(("capitals",), limit=6),
        calibration=None,
        efficiency=Efficiency(repeats=0),
        execution=Execution(),
        dtype="float32",
        device="cpu",
    )
    expected, _ = run.run_cell(cell)
    load = loading.load

    def mapped(*args: Any) -> Any:
        model, tokenizer = load(*args)
        return on_disk(model, tmp_path), tokenizer

    monkeypatch.setattr(loading, "load", mapped)
    row, _ = run.run_cell(cell)
    assert (expected["evaluated_by"], row["evaluated_by"], row["evaluated_by_fallback"]) == ("batches", "blocks", None)
    names = [name for name in expected if name.startswith("capitals/")]
    assert names and all(row[name] == expected[name] for name in names)
