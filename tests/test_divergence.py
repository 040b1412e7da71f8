"""Divergence from the dense model: the formula over the whole vocabulary, its bound, and the cache."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweep.config import Benchmarks, Cell, Efficiency, Execution, Model
from sweep.measuring import divergence, quality, scorer
from sweep.models import cut_tokenizer, surgery
from sweep.pruning.families import Dense
from sweep.texts import embedded


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def test_over_all_tokens_it_is_the_formula_and_over_some_a_lower_bound() -> None:
    draw = np.random.default_rng(0)
    p, q = (log_softmax(draw.normal(0, 2, (50, 40))) for _ in range(2))
    whole = (np.exp(p) * (p - q)).sum(1)
    top = np.argsort(-p, axis=1)[:, :8]
    rows = np.arange(50)[:, None]
    some = divergence.kl(p[rows, top], scorer.Alternatives(top, q[rows, top]))
    assert (some <= whole + 1e-9).all() and (some >= -1e-9).all() and some.mean() > 0.5 * whole.mean()
    every = np.tile(np.arange(40), (50, 1))
    assert divergence.kl(p, scorer.Alternatives(every, q)) == pytest.approx(whole, abs=1e-6)
    assert divergence.kl(p, scorer.Alternatives(every, p)) == pytest.approx(np.zeros(50), abs=1e-9)


def test_the_dense_model_is_at_no_distance_and_another_at_that_of_the_formula(
    tiny_checkpoint: Path, cache_folder: Path
) -> None:
    cell = Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Dense(),
        0.0,
        Benchmarks(("pydoc",), limit=2, max_length=4000),
        None,
        Efficiency(),
        Execution(),
        dtype="float32",
        device="cpu",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dense = divergence.of_dense(cell)
    assert dense is not None
    settings = cell.benchmarks
    found, _ = quality.evaluate(model, tokenizer, settings, None, dense)
    assert found["pydoc/kl_from_dense"] == pytest.approx(0, abs=1e-6)

    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.3)
    found, samples = quality.evaluate(other, tokenizer, settings, None, dense)
    for document, page in enumerate(d["page"] for d in embedded.pydoc_documents()[:2]):
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(page)["input_ids"]]])[:, :-1]
        with torch.no_grad():
            p, q = (m(tokens).logits[0].double().log_softmax(-1).numpy() for m in (model, other))
        top, rows = dense.ids[page], np.arange(tokens.shape[1])[:, None]
        assert dense.log_probs[page] == pytest.approx(p[rows, top], abs=1e-4)
        assert np.sort(p, axis=1)[:, -divergence.TOP :].sum(1) == pytest.approx(p[rows, top].sum(1), abs=1e-3)
        expected = divergence.kl(p[rows, top], scorer.Alternatives(top, q[rows, top])).sum()
        one = samples[(samples.metric == "kl_from_dense") & (samples.document == str(document))].value.item()
        assert one == pytest.approx(expected, rel=1e-3) and one > 1
    assert found["pydoc/kl_from_dense_stderr"] >= 0


def test_a_smaller_vocabulary_keeps_its_probabilities(tiny_checkpoint: Path, cache_folder: Path) -> None:
    cell = Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Dense(),
        0.0,
        Benchmarks(("pydoc",), limit=1, max_length=100),
        None,
        Efficiency(),
        Execution(),
        dtype="float32",
        device="cpu",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    unused = [i for i in range(len(tokenizer)) if i > 250]
    kept = [i for i in range(len(tokenizer)) if i not in unused]
    surgery.remove_tokens(model, torch.tensor(kept))
    found, _ = quality.evaluate(
        model, cut_tokenizer.remapped(tokenizer, kept), cell.benchmarks, None, divergence.of_dense(cell)
    )
    assert np.isfinite(found["pydoc/kl_from_dense"]) and 0 <= found["pydoc/kl_from_dense"] < 0.5


def test_a_cell_that_does_not_read_the_pages_has_none(tiny_checkpoint: Path) -> None:
    cell = Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Dense(),
        0.0,
        Benchmarks(("capitals",)),
        None,
        Efficiency(),
        Execution(),
    )
    assert divergence.of_dense(cell) is None
