"""A dozen types of models by every operation, and all others by a weight method, with the checks of benchmarks/families.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tiny_models
from sweep.models import anatomy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import families

# Llama's like, fused projections, experts of several kinds, blocks of several classes, states, shared and bare matrices
DOZEN = (
    "llama",
    "gpt2",
    "phi3",
    "qwen3_moe",
    "gpt_oss",
    "dbrx",
    "jamba",
    "zamba2",
    "qwen3_next",
    "deepseek_v3",
    "mamba",
    "xlnet",
)
WEIGHTS = ("magnitude", "wanda", "sparsegpt")


@pytest.mark.parametrize("operation", families.OPERATIONS)
@pytest.mark.parametrize("kind", DOZEN)
def test_an_operation_is_right_or_refused(kind: str, operation: str) -> None:
    line = families.try_one(kind, operation)
    assert line.outcome in (("right",) if operation in WEIGHTS else ("right", "refused")), line.why


@pytest.mark.parametrize("kind", [kind for kind in tiny_models.types() if kind not in DOZEN])
def test_weights_of_every_type_are_pruned(kind: str) -> None:
    line = families.try_one(kind, "magnitude")
    assert line.outcome == "right", line.why


def test_what_is_left_is_told_with_the_reason() -> None:
    left = anatomy.left(tiny_models.make("jamba"))
    reasons = {name.partition("layers.")[2].partition(".")[2]: reason for name, reason in left.items()}
    assert reasons["feed_forward.router.weight"] == "router"
    assert reasons["mamba.conv1d.weight"] == "convolution"
    assert reasons["mamba.A_log"] == "multiplies no activations as a matrix"
    shared = anatomy.left(tiny_models.make("zamba2"))
    assert any(reason.startswith("the same tensor as model.layers.1.shared_transformer") for reason in shared.values())


def test_a_check_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that misses a matrix, or prunes a router, is not right."""
    monkeypatch.setattr(anatomy, "ROUTERS", set())
    monkeypatch.setattr(anatomy, "_why_left", lambda *_: None)
    assert families.try_one("qwen3_moe", "magnitude").outcome == "WRONG"
    monkeypatch.undo()
    monkeypatch.setattr(anatomy, "_layout", lambda *_: None)
    line = families.try_one("qwen3_moe", "magnitude")
    assert line.outcome == "WRONG" and "experts" in line.why
