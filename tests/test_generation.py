"""Answers against transformers' own `generate` and lm-eval's own HFLM, one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import tiny_models
from sweep.config import Benchmarks
from sweep.measuring import catalogue, generation, measures, quality, scorer
from sweep.measuring.generation import Question
from sweep.settings import RequestError
from test_scorer import loud_model


def prompts(shared: int, count: int = 7, vocabulary: int = 64) -> list[list[int]]:
    draw = np.random.default_rng(3)
    beginning = draw.integers(3, vocabulary, shared).tolist()
    return [[*beginning, *draw.integers(3, vocabulary, draw.integers(1, 9)).tolist()] for _ in range(count)]


def literal(model: Any, tokens: list[int], limit: int, eos: int | None) -> list[int]:
    """Greedy decoding with everything read anew for each token."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < limit and (eos is None or eos not in answer):
            answer.append(int(model(torch.tensor([tokens + answer])).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("shared", [0, 10])
def test_every_family_answers_as_it_does_alone(family: str, shared: int) -> None:
    model = loud_model(family)
    assert generation.Way.of(model).together, "else `generate` writes every answer, and nothing of this is tried"
    model.generation_config.eos_token_id = 5
    asked = prompts(shared)
    questions = [Question(tokens, 4 + 3 * (i % 4), ()) for i, tokens in enumerate(asked)]
    found = generation.write(model, tiny_models.tokenizer(), questions, rows=3)
    for question, answer in zip(questions, found, strict=True):
        expected = literal(model, [*question.tokens], question.limit, eos=5)
        assert answer.tokens == expected
        assert answer.truncated == (5 not in expected)


def test_answers_of_unequal_length_leave_and_others_take_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud_model("llama")
    seen: list[int] = []
    read = generation._Rows.read

    def counted(rows: Any, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        return read(rows, tokens)

    monkeypatch.setattr(generation._Rows, "read", counted)
    monkeypatch.setattr(generation.Way, "of", lambda _: generation.Way(together=True, shares=True, numbered=True))
    limits = [2, 12, 3, 4, 5, 6]
    questions = [Question(tokens, limit, ()) for tokens, limit in zip(prompts(0, 6), limits, strict=True)]
    answers = generation.write(model, tiny_models.tokenizer(), questions, rows=2)
    assert [len(answer.tokens) for answer in answers] == limits
    assert sum(seen) == sum(limit - 1 for limit in limits), "no row is computed that nobody reads"
    assert max(seen) == 2


def instances(asked: list[tuple[str, dict[str, Any]]]) -> list[Instance]:
    return [Instance("generate_until", {}, arguments, i) for i, arguments in enumerate(asked)]


def byte_model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from conftest import GATED

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **{**GATED, "vocab_size": 259}, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["e", "\u00e9x"], "do_sample": False, "temperature": 0.0},
        {"until": "no such string", "max_gen_toks": 30},
        {"until": ["a"], "max_length": 180, "max_gen_toks": 9},
        {"until": ["</s>"], "max_gen_toks": 20, "repetition_penalty": 1.5},
        {"until": [], "max_new_tokens": 12, "num_beams": 2},
    ],
)
def test_answers_are_those_of_hflm(settings: dict[str, Any]) -> None:
    model, tokenizer = byte_model(), tiny_models.tokenizer()
    asked = [(f"Question: {'why ' * n}?", {**settings}) for n in (0, 1, 9, 40)]
    asked += [("<s>begun", {**settings}), asked[0]]
    ours = scorer.Scorer(model, tokenizer, 4, 300)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=300)
    found = ours.generate_until(instances(asked))
    assert found == theirs.generate_until(instances(asked), disable_tqdm=True)
    assert any(found), "a model that says nothing proves nothing"
    assert [len(ours.answers[ours.as_key(one)]) for one in asked] == [2, 1, 1, 1, 1, 2]


def test_sampled_answers_follow_the_seed() -> None:
    ours = scorer.Scorer(byte_model(), tiny_models.tokenizer(), 4, 300)
    asked = instances(
        [("Say ", {"until": ["no such string"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})]
    )
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found += ours.generate_until(asked)
    assert found[0] == found[1] != found[2]


def test_an_answer_that_leaves_the_prompt_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="an answer may take 300 tokens, and max_length=300 leaves no prompt"):
        scorer.Scorer(byte_model(), tiny_models.tokenizer(), 4, 300).question("Say ", {"max_gen_toks": 300})
    with pytest.raises(ValueError, match="its task's max_length leaves no answer"):
        scorer.Scorer(byte_model(), tiny_models.tokenizer(), 4, 300).question("Say ", {"max_length": 4})


TASK = """
task: copied
custom_dataset: !function helpers.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: KWARGS
metric_list:
  - metric: exact_match
"""
HELPERS = """
import datasets
def documents(**_):
    rows = [{"question": f"Copy {n}:", "answer": f" {n}"} for n in range(10)]
    return {"test": datasets.Dataset.from_list(rows)}
"""


def write_task(folder: Path, kwargs: str) -> Benchmarks:
    (folder / "copied.yaml").write_text(TASK.replace("KWARGS", kwargs))
    (folder / "helpers.py").write_text(HELPERS)
    return Benchmarks((str(folder / "copied.yaml"),), limit=6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("{until: []}", "nothing ends an answer of copied: .* neither a stop string nor max_gen_toks"),
        ('{until: [""]}', "nothing ends an answer of copied: .* an empty stop string"),
        ("{until: [x], max_gen_toks: 4096}", "an answer of copied may take 4096 tokens .* the model's 4096 positions"),
    ],
)
def test_answers_that_cannot_end_or_fit_are_refused(kwargs: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        catalogue.check(write_task(tmp_path, kwargs), None, positions=4096)


def test_a_limit_of_256_tokens_is_refused_where_max_length_is_no_more(tmp_path: Path) -> None:
    asked = replace(write_task(tmp_path, "{until: [x]}"), max_length=256)
    with pytest.raises(RequestError, match="may take 256 tokens .* benchmarks.max_length=256"):
        catalogue.check(asked, None, positions=4096)
    catalogue.check(replace(asked, max_length=257), None)


def test_what_is_measured_of_answers(tmp_path: Path) -> None:
    asked = write_task(tmp_path, "{until: [e], max_gen_toks: 16}")
    columns, samples = quality.evaluate(byte_model(), tiny_models.tokenizer(), replace(asked, max_length=300), None)
    by_metric = samples.pivot(index="document", columns="metric", values="value")
    assert len(by_metric) == 6 and by_metric.generated_tokens.between(1, 16).all()
    for column, number in (("generated_tokens_mean", "generated_tokens"), ("truncated_share", "truncated")):
        assert columns[f"copied/{column}"] == pytest.approx(by_metric[number].mean())
        assert columns[f"copied/{column}_stderr"] == pytest.approx(by_metric[number].std() / 6**0.5)
    assert ((by_metric.generated_tokens == 16) >= (by_metric.truncated == 1)).all()
    assert "exact_match" in by_metric and columns["copied/repetition"] >= 0


def test_repetition_is_the_share_of_fourgrams_that_stood_before() -> None:
    assert measures.repetition([1, 2, 3]) == 0
    assert measures.repetition([1, 2, 3, 4, 5]) == 0
    assert measures.repetition([7] * 8) == pytest.approx(4 / 5)  # one of five is new
    assert measures.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
