"""The pruned model as a draft, against simulated and against real speculative decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sweep.measuring import divergence, drafting
from sweep.measuring.scorer import Alternatives
from test_scorer import loud_model


def test_overlap_is_one_less_the_total_variation() -> None:
    draw = np.random.default_rng(0)
    p, q = (draw.dirichlet(np.ones(8), size=5) for _ in range(2))
    found = divergence.overlap(np.log(p), Alternatives(np.zeros((5, 8)), np.log(q)))
    assert found == pytest.approx(1 - abs(p - q).sum(1) / 2)
    kept = divergence.overlap(np.log(p[:, :3]), Alternatives(np.zeros((5, 3)), np.log(q[:, :3])))
    rest = np.minimum(p[:, 3:].sum(1), q[:, 3:].sum(1))
    assert kept == pytest.approx(np.minimum(p, q)[:, :3].sum(1) + rest)
    assert (kept >= found - 1e-12).all()


@pytest.mark.parametrize("length", [1, 4])
def test_the_speedup_is_what_a_simulation_gives(length: int) -> None:
    draw, acceptance, cost, rounds = np.random.default_rng(0), 0.7, 0.3, 200_000
    kept = np.cumprod(draw.random((rounds, length)) < acceptance, axis=1).sum()
    simulated = (rounds + kept) / (rounds * (1 + length * cost))
    assert drafting.speedup(acceptance, cost, length) == pytest.approx(simulated, rel=0.01)
    assert drafting.speedup(1.0, cost, length) == pytest.approx((length + 1) / (length * cost + 1))


def test_the_best_length_is_taken_and_none_where_no_draft_pays() -> None:
    found = drafting.columns({"pydoc/draft_acceptance": 0.8, "decode_speedup": 4.0})
    tried = {length: drafting.speedup(0.8, 0.25, length) for length in range(20)}
    assert found == {"draft_speedup": max(tried.values()), "draft_length": max(tried, key=lambda g: tried[g])}
    slow = drafting.columns({"pydoc/draft_acceptance": 0.3, "decode_speedup": 1.1})
    assert slow == {"draft_speedup": 1.0, "draft_length": 0}
    assert drafting.columns({"decode_speedup": 2.0}) == {} == drafting.columns({"pydoc/draft_acceptance": 0.5})


def test_acceptance_is_that_of_transformers_assisted_generation() -> None:
    """One token is drafted a round, so that a round gives one token and, where the draft is kept, another."""
    dense, draft = loud_model("llama"), loud_model("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # flat enough that both are unsure, and near enough that drafts are often kept
        for model in (dense, draft):
            model.lm_head.weight.mul_(0.7)
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
    for model in (dense, draft):
        model.generation_config.eos_token_id = None
    draft.generation_config.top_k = 0
    draft.generation_config.num_assistant_tokens = 1
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    rounds = 0

    def count(*_: object) -> None:
        nonlocal rounds
        rounds += 1

    torch.manual_seed(0)
    prompt, new = torch.tensor([[3, 4, 5]]), 240
    asked = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "assistant_model": draft}
    with dense.register_forward_pre_hook(count):
        texts = [dense.generate(prompt, **asked)[0] for _ in range(6)]
    assert {len(text) for text in texts} == {3 + new}
    measured = len(texts) * new / rounds - 1
    with torch.no_grad():
        p, q = (
            model(torch.stack(texts)).logits[:, 2:-1].log_softmax(-1).reshape(-1, 64).numpy()
            for model in (dense, draft)
        )
    expected = divergence.overlap(p, Alternatives(np.zeros(q.shape), q)).mean()
    assert 0.2 < expected < 0.95, "else nothing is told apart"
    assert measured == pytest.approx(expected, abs=0.04)
