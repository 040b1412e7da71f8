"""Tasks through the real evaluation, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sweep import classification, quality
from sweep.config import Benchmarks

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Loaded:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), AutoTokenizer.from_pretrained(tiny_checkpoint)


def wide(samples: pd.DataFrame, task: str) -> pd.DataFrame:
    return samples[samples.task == task].pivot(index="document", columns="metric", values="value")


def test_a_multiple_choice_task_is_a_classifier(loaded: Loaded) -> None:
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("continents",), limit=40), None)
    outcomes = wide(samples, "continents")
    assert len(outcomes) == 40
    assert metrics["continents/acc"] == pytest.approx((outcomes.chosen == outcomes.target).mean())
    expected = classification.metrics(outcomes.target.astype(int), outcomes.chosen.astype(int), outcomes.confidence)
    for name in ("f1_macro", "f1_weighted", "precision_macro", "recall_macro", "matthews", "calibration_error"):
        assert metrics[f"continents/{name}"] == pytest.approx(expected[name])
    assert metrics["continents/f1_macro_stderr"] >= 0


def test_the_same_cell_twice_gives_the_same_numbers_and_says_nothing(
    loaded: Loaded, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Benchmarks(("pydoc", "pydoc_cloze", "continents"), limit=3, max_length=128)
    first, first_samples = quality.evaluate(*loaded, settings, None)
    second, second_samples = quality.evaluate(*loaded, settings, None)
    assert first == second
    pd.testing.assert_frame_equal(first_samples, second_samples)
    printed = capfd.readouterr()
    assert printed.out == "" and "%|" not in printed.err and "bootstrapping" not in printed.err


def test_perplexity_follows_from_the_examples(loaded: Loaded) -> None:
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("pydoc",), limit=4, max_length=128), None)
    outcomes = wide(samples, "pydoc")
    expected = np.exp(-outcomes.log_likelihood.sum() / outcomes.tokens.sum())
    assert metrics["pydoc/token_perplexity"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:overflow")
def test_losses_that_are_no_numbers_are_recorded_with_a_warning(tiny_checkpoint: Path) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="pydoc/token_perplexity is nan"):
        metrics, samples = quality.evaluate(model, tokenizer, Benchmarks(("pydoc", "continents"), limit=2), None)
    assert np.isnan(metrics["pydoc/token_perplexity"])
    assert metrics["continents/matthews"] == 0
    outcomes = wide(samples, "continents")
    assert (outcomes.chosen == -1).all() and outcomes.confidence.isna().all()
    assert wide(samples, "pydoc").log_likelihood.isna().all()


@pytest.mark.data
def test_papers_tasks_run_offline_with_examples_shown(loaded: Loaded, data_root: Path) -> None:
    settings = Benchmarks(("wikitext", "lambada_openai", "arc_easy", "piqa", "boolq"), limit=2, max_length=512)
    metrics, samples = quality.evaluate(*loaded, settings, str(data_root))
    names = ["wikitext/word_perplexity", "wikitext/token_perplexity", "lambada_openai/acc", "arc_easy/acc_norm",
             "piqa/acc", "boolq/acc", "boolq/f1", "boolq/matthews"]  # fmt: skip
    assert all(metrics[name] is not None for name in names)
    assert samples.groupby("task").document.nunique().to_dict() == dict.fromkeys(settings.tasks, 2)
    shown = Benchmarks(("arc_easy",), limit=2, num_fewshot=3)
    assert quality.evaluate(*loaded, shown, str(data_root))[0].keys() >= {"arc_easy/acc"}
