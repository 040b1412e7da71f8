"""The tiny models on which others are tried are none that every change would leave as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tiny_models


def test_every_type_has_a_tiny_model_or_a_reason() -> None:
    assert set(tiny_models.types()) | set(tiny_models.LEFT_OUT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(tiny_models.types()) > 180


@pytest.mark.parametrize("kind", ["llama", "jamba", "dbrx", "rwkv", "qwen3_5", "gemma3n_text"])
def test_what_a_tiny_model_says_depends_on_what_it_reads(kind: str) -> None:
    tokens = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 5] = (tokens[0, 5] + 7) % 259
    with torch.no_grad():
        first, second = (tiny_models.make(kind)(input_ids=ids, use_cache=False).logits for ids in (tokens, other))
    assert torch.isfinite(first).all() and first.std(-1).min() > 0.1
    assert (first[0, 1:] - first[0, :-1]).abs().mean(-1).min() > 0.05  # of each position
    torch.testing.assert_close(first[0, :5], second[0, :5])
    assert (first[0, 5:8] - second[0, 5:8]).abs().amax(-1).min() > 1e-3
