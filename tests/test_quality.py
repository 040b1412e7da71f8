"""Tasks through the real evaluation, on a tiny model."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.api import metrics as aggregations
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sweep.config import Benchmarks, Perplexity
from sweep.measuring import classification, measures, perplexity, quality, words
from sweep.models import cut_tokenizer, surgery
from sweep.texts import embedded
from test_identity import write_task

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
    bars = [part for part in printed.err.split("\r") if "%|" in part]
    assert printed.out == "" and all(bar.startswith("evaluating") for bar in bars)  # our own, none of lm-eval's
    assert "bootstrapping" not in printed.err


def test_perplexity_follows_from_the_examples(loaded: Loaded) -> None:
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("pydoc",), limit=4, max_length=128), None)
    outcomes = wide(samples, "pydoc")
    expected = np.exp(-outcomes.log_likelihood.sum() / outcomes.tokens.sum())
    assert metrics["pydoc/token_perplexity"] == pytest.approx(expected)


def test_metrics_of_log_likelihoods_follow_from_the_examples_and_their_weights(loaded: Loaded) -> None:
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("pydoc", "pydoc_cloze"), limit=4, max_length=128), None)
    pages, endings = wide(samples, "pydoc"), wide(samples, "pydoc_cloze")
    assert pages.byte_perplexity_weight.tolist() == [len(d["page"].encode()) for d in embedded.pydoc_documents()[:4]]
    for name in ("word_perplexity", "byte_perplexity"):
        expected = np.exp(-pages[name].sum() / pages[f"{name}_weight"].sum())
        assert metrics[f"pydoc/{name}"] == pytest.approx(expected)
    assert (endings.perplexity_weight == 1).all()
    assert metrics["pydoc_cloze/perplexity"] == pytest.approx(np.exp(-endings.perplexity.mean()))


def test_of_a_metric_of_the_whole_alone_no_document_has_a_value() -> None:
    examples = [
        {
            "doc_id": i,
            "filter": "none",
            "metrics": ["acc", "f1"],
            "acc": 1.0,
            "f1": (i, 1),
            "filtered_resps": [(-1.0, True)],
        }
        for i in range(2)
    ]
    _, outcomes = quality._by_document(examples, {"acc": aggregations.mean, "f1": aggregations.f1_score})
    assert outcomes == [{"log_likelihood": -1.0, "acc": 1.0}] * 2  # and not the right answers, equal for every model


def test_losses_by_frequency_band_add_up_to_the_whole(loaded: Loaded) -> None:
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("pydoc", "pydoc_cloze"), limit=4, max_length=256), None)
    outcomes = wide(samples, "pydoc")
    for one in outcomes.to_dict("records"):
        assert np.nansum([one.get(f"tokens_band_{b}", 0) for b in words.BANDS]) == one["tokens"]
        whole = np.nansum([one.get(f"loss_band_{b}", 0) for b in words.BANDS])
        assert whole == pytest.approx(-one["log_likelihood"], rel=1e-4)
    for b in words.BANDS:
        expected = outcomes[f"loss_band_{b}"].sum() / outcomes[f"tokens_band_{b}"].sum()
        assert metrics[f"pydoc/loss_band_{b}"] == pytest.approx(expected)
    endings = wide(samples, "pydoc_cloze")
    assert (endings.told == endings.acc).all() and endings.band.between(0, 3).all()
    counted = sum(metrics.get(f"pydoc_cloze/examples_band_{b}", 0) for b in words.BANDS)
    assert counted == len(endings) == 4


def without(loaded: Loaded, lost: str) -> Loaded:
    """The model and its tokenizer without the tokens of these characters."""
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    kept = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) not in set(lost)]
    surgery.remove_tokens(model, torch.tensor(kept))
    return model, cut_tokenizer.remapped(tokenizer, kept)


def literal(loaded: Loaded, context: list[int], text: str, lost: str) -> float:
    """The log-likelihood of a text after a context, each lost token at its share of the unknown one's probability."""
    model, tokenizer = loaded
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        log_probs = model(torch.tensor([context + ids])).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    charge = np.log(len(lost) + 1) * sum(text.count(character) for character in lost)
    return log_probs[range(len(ids)), ids].sum().item() - charge


def test_every_number_is_charged_for_tokens_that_the_vocabulary_has_lost(loaded: Loaded, tmp_path: Path) -> None:
    lost = "etaoinsrh"
    pruned = without(loaded, lost)
    settings = Benchmarks(("pydoc", "pydoc_cloze", "continents"), limit=3, max_length=4000)
    metrics, samples = quality.evaluate(*pruned, settings, None)
    _, dense = quality.evaluate(*loaded, settings, None)
    pages, documents = wide(samples, "pydoc").sort_index(), embedded.pydoc_documents()[:3]
    expected = [literal(pruned, [pruned[1].bos_token_id], d["page"], lost) for d in documents]
    assert pages.log_likelihood.tolist() == pytest.approx(expected, rel=1e-5)
    assert (-pages.filter(like="loss_band").sum(axis=1)).tolist() == pytest.approx(expected, rel=1e-5)
    spread = ["tokens", "word_perplexity_weight", "byte_perplexity_weight"]
    pd.testing.assert_frame_equal(pages[spread], wide(dense, "pydoc").sort_index()[spread])
    for name, weight in (("token_perplexity", "tokens"), ("word_perplexity", "word_perplexity_weight")):
        assert metrics[f"pydoc/{name}"] == pytest.approx(np.exp(-sum(expected) / pages[weight].sum()), rel=1e-4)
    removed = sum(pages[f"removed_band_{b}"].sum() for b in words.BANDS)
    assert removed == sum(d["page"].count(character) for d in documents for character in lost)
    assert 0 < metrics["pydoc/removed_share_band_zipf5up"] < 1

    endings, passages = wide(samples, "pydoc_cloze").sort_index(), embedded.cloze_documents()[:3]
    expected = [literal(pruned, pruned[1](d["context"]).input_ids, f" {d['word']}", lost) for d in passages]
    assert endings.log_likelihood.tolist() == pytest.approx(expected, rel=1e-4)
    assert metrics["pydoc_cloze/perplexity"] == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)
    assert all(set(d["word"]) & set(lost) for d in passages) and not endings.told.any() and not endings.acc.any()

    questions, countries = wide(samples, "continents").sort_index(), embedded.continent_documents()[:3]
    for question, d in zip(questions.to_dict("records"), countries, strict=True):
        context = pruned[1](f"{d['country']} is a country in").input_ids
        of_choices = [literal(pruned, context, f" {name}", lost) for name in embedded.CONTINENTS.values()]
        assert question["chosen"] == np.argmax(of_choices)
        assert question["log_likelihood"] == pytest.approx(of_choices[d["continent"]], rel=1e-4)

    page = documents[0]["page"][:50]
    (tmp_path / "a.txt").write_text(page)
    found, _ = perplexity.measure(*pruned, Perplexity(str(tmp_path / "a.txt"), 50), None, 1)
    expected = literal(pruned, pruned[1](page[0]).input_ids, page[1:], lost)
    assert found["a/perplexity"] == pytest.approx(np.exp(-expected / 49), rel=1e-4)


def test_a_model_without_letters_is_no_better_for_it(loaded: Loaded) -> None:
    """What it cannot tell apart it tells with near certainty; its share of that is what counts."""
    lost = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    settings = Benchmarks(("pydoc",), limit=2, max_length=512)
    dense, _ = quality.evaluate(*loaded, settings, None)
    pruned, _ = quality.evaluate(*without(loaded, lost), settings, None)
    assert pruned["pydoc/token_perplexity"] > 0.9 * dense["pydoc/token_perplexity"]


def test_rows_of_tokens_by_band_are_those_of_the_dense_model(loaded: Loaded) -> None:
    model, tokenizer = loaded
    kept = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) not in ("a", "b")]
    found = quality.rows_by_band(quality.token_rows(model), tokenizer, cut_tokenizer.remapped(tokenizer, kept))
    bands = words.of_vocabulary(tokenizer, range(len(tokenizer)))
    for matrix, weight in (("embedding", model.get_input_embeddings().weight), ("head", model.lm_head.weight)):
        for i, name in enumerate(words.BANDS):
            if (bands == i).any():
                norms = weight[np.flatnonzero(bands == i)].norm(dim=1)
                assert found[f"{matrix}/row_norm_band_{name}"] == pytest.approx(norms.mean().item(), rel=1e-5)
        assert sum(
            found[f"{matrix}/share_pruned_band_{b}"] * found[f"{matrix}/rows_band_{b}"]
            for b in words.BANDS
            if f"{matrix}/rows_band_{b}" in found
        ) == pytest.approx(2)


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


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize(("scale", "infinite"), [(300, False), (1e5, True), (1e30, True)])
def test_a_metric_that_overflows_is_infinite_and_the_others_stand(
    tiny_checkpoint: Path, scale: float, infinite: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    model.lm_head.weight.data.mul_(scale)
    tasks = ("pydoc", "pydoc_cloze", "continents")
    metrics, samples = quality.evaluate(model, tokenizer, Benchmarks(tasks, limit=3, max_length=128), None)
    pages, endings = wide(samples, "pydoc"), wide(samples, "pydoc_cloze")
    counted = sum(len(document["page"].split()) for document in embedded.pydoc_documents()[:3])
    losses = {
        "pydoc/token_perplexity": -pages.log_likelihood.sum() / pages.tokens.sum(),
        "pydoc/word_perplexity": -pages.log_likelihood.sum() / counted,
        "pydoc_cloze/perplexity": -endings.log_likelihood.mean(),
    }
    with np.errstate(over="ignore"):
        assert [metrics[name] for name in losses] == pytest.approx(np.exp(list(losses.values())), rel=1e-9)
    assert [math.isinf(metrics[name]) for name in losses] == [infinite] * 3
    said = " ".join(str(warning.message) for warning in recwarn)
    assert all((f"{name} is inf" in said) == infinite for name in losses)
    assert metrics["pydoc_cloze/perplexity_stderr"] == math.inf  # 1e241 can be held, its square cannot
    assert np.isfinite([metrics["pydoc/bits_per_byte"], metrics["pydoc_cloze/acc"], metrics["continents/acc"]]).all()


@pytest.mark.data
def test_papers_tasks_run_offline_with_examples_shown(loaded: Loaded, data_root: Path) -> None:
    settings = Benchmarks(("wikitext", "lambada_openai", "arc_easy", "piqa", "boolq"), limit=2, max_length=512)
    metrics, samples = quality.evaluate(*loaded, settings, str(data_root))
    names = [
        "wikitext/word_perplexity",
        "wikitext/token_perplexity",
        "lambada_openai/acc",
        "arc_easy/acc_norm",
        "piqa/acc",
        "boolq/acc",
        "boolq/f1",
        "boolq/matthews",
    ]
    assert all(metrics[name] is not None for name in names)
    assert "piqa/f1" not in metrics and "piqa/f1_macro" in metrics  # its second choice is no positive class
    assert samples.groupby("task").document.nunique().to_dict() == dict.fromkeys(settings.tasks, 2)
    shown = Benchmarks(("arc_easy",), limit=2, num_fewshot=3)
    assert quality.evaluate(*loaded, shown, str(data_root))[0].keys() >= {"arc_easy/acc"}


TWO_FILTERS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, higher_is_better: true}
  - {metric: ter, higher_is_better: false}
filter_list:
  - {name: strict-match, filter: [{function: take_first}]}
  - {name: flexible-extract, filter: [{function: regex, regex_pattern: "(nothing)", fallback: "4"}, {function: take_first}]}
"""


def test_what_two_answer_filters_find_stays_apart_and_carries_its_direction(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text(
        '{"question": "2 + 2 =", "answer": "4"}\n{"question": "1 + 2 =", "answer": "3"}'
    )
    (tmp_path / "sums.yaml").write_text(TWO_FILTERS.replace("DATA", str(tmp_path / "sums.json")))
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("sums",), include_path=str(tmp_path)), None)
    assert metrics["sums/exact_match,strict-match"] == 0  # a random model
    assert metrics["sums/exact_match,flexible-extract"] == 0.5  # whatever it says, 4 is taken
    assert not samples.duplicated(["task", "document", "metric"]).any()
    assert wide(samples, "sums")["exact_match,flexible-extract"].tolist() == [1, 0]
    assert wide(samples, "sums")["exact_match,strict-match"].tolist() == [0, 0]
    better = json.loads(metrics["higher_is_better"])
    assert better == {
        f"sums/{metric},{name}": metric == "exact_match"
        for metric in ("exact_match", "ter")
        for name in ("strict-match", "flexible-extract")
    }


def theirs(loaded: Loaded, task: str, **options: Any) -> tuple[dict[str, Any], list[float]]:
    """(the metrics, the log-likelihood of each right answer) that lm-eval gives with its own model and defaults."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=loaded[0], tokenizer=loaded[1], backend="causal", batch_size=2)
    found = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, **options)
    examples = sorted(found["samples"][task], key=lambda example: example["doc_id"])
    return found["results"][task], [example["filtered_resps"][int(example["target"])][0] for example in examples]


def right_answers(samples: pd.DataFrame, task: str) -> list[float]:
    outcomes = wide(samples, task)
    return outcomes.loc[sorted(outcomes.index, key=int), "log_likelihood"].tolist()


def test_examples_are_shown_as_lm_eval_shows_them(loaded: Loaded, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_task(tmp_path, count=12)
    told = []
    for asked in ({}, {"num_fewshot": 1}, {"num_fewshot": 0}):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        expected, log_likelihoods = theirs(loaded, "mine", task_manager=manager, **asked)
        metrics, samples = quality.evaluate(*loaded, Benchmarks(("mine",), include_path=str(tmp_path), **asked), None)
        assert metrics["mine/acc"] == expected["acc,none"]
        assert right_answers(samples, "mine") == pytest.approx(log_likelihoods, abs=1e-4)
        told.append(log_likelihoods)
    other = quality.evaluate(*loaded, Benchmarks(("mine",), include_path=str(tmp_path), fewshot_seed=0), None)[1]
    told.append(right_answers(other, "mine"))
    for i, one in enumerate(told):  # the task's own two, one, none, another two
        assert all(one != pytest.approx(another, abs=1e-4) for another in told[:i])


def test_a_task_that_shows_none_shows_none_whatever_is_asked(loaded: Loaded, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_task(tmp_path, count=12, shots=0)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected = theirs(loaded, "mine", task_manager=manager, num_fewshot=3)[1]
    settings = Benchmarks(("mine",), include_path=str(tmp_path), num_fewshot=3)
    assert right_answers(quality.evaluate(*loaded, settings, None)[1], "mine") == pytest.approx(expected, abs=1e-4)


def test_the_window_is_the_models_unless_another_is_asked(loaded: Loaded) -> None:
    """The tiny model has 4096 positions, which every page fits in."""
    page, short = Benchmarks(("pydoc",), limit=2), Benchmarks(("pydoc",), limit=2, max_length=64)
    whole, windowed, same = (
        quality.evaluate(*loaded, settings, None)[0]["pydoc/word_perplexity"]
        for settings in (page, short, replace(page, max_length=4096))
    )
    assert whole == same != windowed


@pytest.mark.data
def test_five_examples_of_arc_are_lm_evals(loaded: Loaded, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, samples = quality.evaluate(*loaded, Benchmarks(("arc_easy",), limit=6, num_fewshot=5), str(data_root))
    monkeypatch.chdir(data_root)
    expected, log_likelihoods = theirs(loaded, "arc_easy", limit=6, num_fewshot=5)
    assert metrics["arc_easy/acc"] == expected["acc,none"] and metrics["arc_easy/acc_norm"] == expected["acc_norm,none"]
    assert right_answers(samples, "arc_easy") == pytest.approx(log_likelihoods, abs=1e-3)


def test_a_task_whose_right_answer_is_not_always_a_choice_is_no_classifier() -> None:
    task = SimpleNamespace(doc_to_choice=lambda doc: doc)
    examples = [
        {"doc": ["yes", "no"], "target": target, "filtered_resps": [(-1.0, False), (-2.0, False)]}
        for target in ("no", 0, "perhaps", 2)
    ]
    documents = [measures.Document(task, example, None, None) for example in examples]  # type: ignore[arg-type]
    outcomes: list[dict[str, float]] = [{} for _ in examples]
    assert measures.columns(documents, outcomes, "multiple_choice") == {}
    assert [o.get("target") for o in outcomes] == [1, 0, None, None] and outcomes[0]["log_likelihood"] == -2.0
    found = measures.columns(documents[:2], outcomes[:2], "multiple_choice")
    assert found["recall"] == 0 and found["f1_macro"] == pytest.approx(1 / 3) and found["f1_macro_stderr"] > 0
