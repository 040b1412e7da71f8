"""Three lines of Python prune a model: the same as the command line does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from sweep import models, text, weights
from sweep.config import Calibration, RequestError, Weight


def test_three_lines_prune_as_a_cell_does(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    outcome = sweep.prune(model, tokenizer, method="wanda", sparsity=0.5, sequences=4, length=32, pattern="2:4")
    assert outcome.sparsity == 0.5 and outcome.calibration_tokens == 128
    other = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokens = text.calibration_tokens(Calibration("pydoc", 4, 32), tokenizer, 0)
    weights.prune(other, Weight("weight", criterion="wanda", pattern="2:4"), 0.5, tokens)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_families_of_units_are_pruned_too(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    sweep.prune(model, tokenizer, method="neuron", sparsity=0.5, scope="layer", sequences=4, length=32)
    assert [ffn.width for ffn in models.ffns(model)] == [12, 12]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "wonda"}, "method must be one of magnitude, .*; got 'wonda'. Did you mean 'wanda'"),
        ({"method": "wanda", "sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"method": "wanda", "patern": "2:4"}, "unknown key 'method.patern'. Did you mean 'pattern'"),
        ({"method": "neuron", "device": "cpu"}, "device is read by weight methods only"),
        ({"method": "wanda", "length": 10**7}, "gives 0 sequences of 10000000 tokens; 16 are asked"),
    ],
)
def test_a_wrong_request_is_refused(tiny_checkpoint: Path, asked: dict, message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(RequestError, match=message):
        sweep.prune(model, tokenizer, **{"sparsity": 0.5, **asked})
