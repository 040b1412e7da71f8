"""The language model inside a model of more than text is pruned by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import sweep
import tiny_models
from conftest import tiny_model
from sweep.models import requirements
from sweep.settings import RequestError


def tiny_wrapper(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(tiny_models.shrunk(AutoConfig.for_model(kind))).eval()


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_the_language_model_inside_is_pruned_and_saved(kind: str, tmp_path: Path) -> None:
    whole, tokenizer = tiny_wrapper(kind), tiny_models.tokenizer()
    ids = torch.arange(3, 20)[None]
    inside = sweep.language_model(whole)
    with torch.no_grad():
        torch.testing.assert_close(inside(ids).logits, whole(input_ids=ids).logits)
    sweep.prune(inside, tokenizer, method="magnitude", sparsity=0.5)
    sweep.save(inside, tokenizer, tmp_path / "saved")
    loaded, _ = sweep.load_model(tmp_path / "saved")
    with torch.no_grad():
        said = loaded(ids).logits
        torch.testing.assert_close(said, inside(ids).logits)
        torch.testing.assert_close(said, whole(input_ids=ids).logits)  # which shares its tensors


def test_a_model_of_more_than_text_is_refused_with_what_to_pass() -> None:
    for kind, text in (("gemma3", "gemma3_text"), ("llava", "llama")):
        with pytest.raises(RequestError, match=rf"{kind}.* inside, of type {text}, .*sweep.language_model\(whole\)"):
            requirements.check_decoder(AutoConfig.for_model(kind), "models/m")


def test_a_model_without_one_inside_is_refused() -> None:
    with pytest.raises(
        RequestError, match="LlamaForCausalLM holds no language model that transformers builds by itself"
    ):
        sweep.language_model(tiny_model("llama"))
