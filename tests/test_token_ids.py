"""What tokenizers put around texts, and the ids and rows that their models have or lack."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sweep import run, saving
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model, Perplexity
from sweep.measuring import divergence, perplexity, quality, scorer
from sweep.models import checkpoint, cut_tokenizer, loading, token_ids
from sweep.pruning import vocabulary
from sweep.pruning.families import Dense, Neuron, Vocab, Weight
from sweep.settings import RequestError
from sweep.texts import text
from test_scorer import instances

PAD, BOS, EOS = 0, 1, 2
TEMPLATES = {
    "<s> $A": ([BOS], []),
    "$A </s>": ([], [EOS]),
    "<s> $A </s>": ([BOS], [EOS]),
    "<pad> <s> $A": ([PAD, BOS], []),
}


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), AutoTokenizer.from_pretrained(tiny_checkpoint)


def framing(folder: Path, template: str) -> PreTrainedTokenizerBase:
    """The tiny tokenizer, putting special tokens around a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=named)
    return tokenizer


def log_probs(model: PreTrainedModel, context: list[int], ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return found[range(len(ids)), ids].numpy()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("written", [0, 1, 2])
def test_no_special_token_is_told_and_none_is_doubled(
    loaded: tuple, tiny_checkpoint: Path, template: str, written: int
) -> None:
    """written  how many of the special tokens before a text stand in it already"""
    model, tokenizer = loaded[0], framing(tiny_checkpoint, template)
    before, after = TEMPLATES[template]
    assert token_ids.around(tokenizer) == (before, after)
    lm = scorer.Scorer(model, tokenizer, batch_size=1, max_length=64)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=64)
    page, bare = "A page, longer than one window of the model. " * 3, loaded[1]
    ids, beginning = bare(page).input_ids, before or [BOS]
    written = min(written, len(beginning))
    texts = [("".join(bare.convert_ids_to_tokens(beginning[len(beginning) - written :])) + page,)]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)  # what lm-eval makes of it stays
    read = lm.texts[texts[0]]
    assert read.ids.tolist() == ids and read.told.all()
    first = 64 - len(beginning) + 1
    assert read.scores.log_probs[:first] == pytest.approx(log_probs(model, beginning, ids[:first]), abs=1e-4)
    spans = lm.offsets(texts[0][0])
    assert spans is not None and [texts[0][0][a:b] for a, b in spans] == list(page)

    pairs = [(f"{'<s>' if written else ''}The end", " is near"), ("", "is near")]
    found = lm.loglikelihood(instances("loglikelihood", pairs))
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-3)
    context = ([BOS] if written else before) + bare("The end").input_ids
    ending = lm.texts[pairs[0]]
    assert ending.ids.tolist() == bare(" is near").input_ids
    assert ending.scores.log_probs == pytest.approx(log_probs(model, context, ending.ids.tolist()), abs=1e-4)
    assert lm.texts[pairs[1]].ids.tolist() == bare("is near").input_ids


def test_columns_do_not_depend_on_what_the_tokenizer_puts_around_a_text(
    loaded: tuple, tiny_checkpoint: Path, cache_folder: Path
) -> None:
    model, bare = loaded
    settings = Benchmarks(("pydoc", "pydoc_cloze"), limit=2, max_length=512)
    cell = Cell(
        Model("tiny", "local", str(tiny_checkpoint)),
        Dense(),
        0.0,
        settings,
        None,
        Efficiency(),
        Execution(),
        dtype="float32",
        device="cpu",
    )
    dense = divergence.of_dense(cell)
    first, samples = quality.evaluate(model, bare, settings, None, dense)
    ours = [
        name
        for name in first
        if name.startswith("pydoc/") and "_perplexity" not in name.replace("token_", "") and "bits" not in name
    ]
    assert "pydoc/token_perplexity" in ours and "pydoc/kl_from_dense" in ours and len(ours) > 15
    for template in ("<s> $A", "$A </s>", "<s> $A </s>"):
        metrics, other = quality.evaluate(model, framing(tiny_checkpoint, template), settings, None, dense)
        assert {name: metrics[name] for name in ours} == pytest.approx({name: first[name] for name in ours}, rel=1e-5)
        pages = [s[(s.task == "pydoc") & s.metric.isin(["log_likelihood", "tokens"])].value for s in (samples, other)]
        assert pages[0].tolist() == pytest.approx(pages[1].tolist(), rel=1e-5)
    words_differ = metrics["pydoc/word_perplexity"] / first["pydoc/word_perplexity"]
    assert words_differ != pytest.approx(1, rel=1e-5)  # lm-eval's own, of a text with its special tokens


def test_a_special_token_that_stands_in_a_text_is_read_and_not_told(loaded: tuple) -> None:
    model, tokenizer = loaded
    lm = scorer.Scorer(model, tokenizer, 1, 64)
    page = "one</s>two"
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(page,)]))
    read = lm.texts[(page,)]
    assert read.told.tolist() == [True] * 3 + [False] + [True] * 3
    assert read.scores.log_probs == pytest.approx(log_probs(model, [BOS], tokenizer(page).input_ids), abs=1e-4)


def test_the_unknown_token_is_told_where_it_stands_for_text(tiny_checkpoint: Path) -> None:
    of_bytes = AutoTokenizer.from_pretrained(tiny_checkpoint, unk_token="<pad>")
    assert token_ids.special(of_bytes).tolist() == [PAD, BOS, EOS]  # every character has its bytes
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "one": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    of_words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    assert of_words("one <s> two").input_ids == [2, 1, 0] and token_ids.special(of_words).tolist() == [1]


@pytest.mark.parametrize("template", ["$A", *TEMPLATES])
@pytest.mark.parametrize("begun", [False, True])
def test_a_long_text_begins_once_and_does_not_end(
    loaded: tuple, tiny_checkpoint: Path, tmp_path: Path, template: str, begun: bool
) -> None:
    model, tokenizer = loaded[0], framing(tiny_checkpoint, template)
    before, _ = TEMPLATES.get(template, ([], []))
    written = "".join(loaded[1].convert_ids_to_tokens(before)) if begun else ""
    (tmp_path / "a.txt").write_text(written + "0123456789" * 3)
    ids = before + loaded[1]("0123456789" * 3).input_ids
    assert text.calibration_stream(Calibration(str(tmp_path / "a.txt")), tokenizer).tolist() == ids
    columns, _ = perplexity.measure(model, tokenizer, Perplexity(str(tmp_path / "a.txt"), 10), None, 1)
    assert columns["perplexity_windows"] == 3
    windows = [ids[i : i + 10] for i in (0, 10, 20)]
    skipped = max(1, len(before))
    losses = [
        -log_probs(model, window[:start], window[start:]).mean()
        for window, start in zip(windows, [skipped, 1, 1], strict=True)
    ]
    assert columns["a/perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


EXTRA = 5  # rows that no token has, as in an embedding padded to a round number


@pytest.fixture(params=["padded", "added", "gaps"])
def uneven(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> Model:
    """A checkpoint whose tokenizer and embedding are of different lengths."""
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    if request.param == "padded":
        model.resize_token_embeddings(len(tokenizer) + EXTRA)
    elif request.param == "added":
        tokenizer.add_tokens(["<image>"])
    else:  # the largest id lies beyond the number of tokens
        model.resize_token_embeddings(len(tokenizer) + EXTRA)
        folder = tmp_path / "gaps"
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        last = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        number = tokenizer.get_vocab()[last]
        moved = file.read_text(encoding="utf-8").replace(f": {number}\n", f": {number + 3}\n")
        file.write_text(moved, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab()[last] == number + 3 > len(tokenizer)
    model.save_pretrained(tmp_path / "uneven")
    tokenizer.save_pretrained(tmp_path / "uneven")
    return Model("uneven", "local", str(tmp_path / "uneven"))


FAMILIES = {
    "dense": (Dense(), 0.0, None),
    "weight": (Weight("weight", "wanda"), 0.5, Calibration("pydoc", 2, 16)),
    "neuron": (Neuron(), 0.5, Calibration("pydoc", 2, 16)),
    "rare": (Vocab("vocab", "frequency"), 0.5, Calibration("pydoc", 2, 16)),
    "random": (Vocab("vocab", "random"), 0.5, None),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("dense", "rare") else pytest.mark.slow) for name in FAMILIES]
)
def test_rows_tokens_and_ids_may_be_of_different_numbers(
    uneven: Model, name: str, tmp_path: Path, cache_folder: Path
) -> None:
    method, sparsity, calibration = FAMILIES[name]
    (tmp_path / "a.txt").write_text("some text of one's own " * 10)
    settings = Benchmarks(("pydoc", "pydoc_cloze"), limit=1, max_length=128)
    quick = Efficiency(prompt_tokens=8, output_tokens=2, warmup=0, repeats=6)
    cell = Cell(
        uneven,
        method,
        sparsity,
        settings,
        calibration,
        quick,
        Execution("dense" if name in ("dense", "weight") else "shrunk"),
        perplexity=Perplexity(str(tmp_path / "a.txt"), 32),
        dtype="float32",
        device="cpu",
        threads=1,
    )
    row, _ = run.run_cell(cell, save_model=str(tmp_path / "saved"))
    assert row["status"] == "ok" and row["a/perplexity"] > 1 and np.isfinite(row["pydoc/kl_from_dense"])
    if name == "dense":
        assert row["pydoc/kl_from_dense"] == pytest.approx(0, abs=1e-6)
    if isinstance(method, Dense | Vocab):
        model, tokenizer = loading.load(uneven, "float32", "cpu")
        with_rows = [i for i in tokenizer.get_vocab().values() if i < token_ids.embedded(model)]
        counted = sum(v for name, v in row.items() if name.startswith("embedding/rows_band"))
        assert counted == len(with_rows)
    model, tokenizer = checkpoint.load_model(tmp_path / "saved")
    again, _ = quality.evaluate(model, tokenizer, settings, None, divergence.of_dense(cell))
    for metric in ("pydoc/token_perplexity", "pydoc/kl_from_dense", "pydoc_cloze/perplexity"):
        assert again[metric] == pytest.approx(row[metric], rel=1e-5, abs=1e-6)


def test_rows_of_no_token_go_first(tiny_checkpoint: Path) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    model.resize_token_embeddings(len(tokenizer) + EXTRA)
    ids = torch.tensor(tokenizer("some text").input_ids)
    outcome = vocabulary.prune(model, tokenizer, Vocab("vocab", "frequency"), (EXTRA + 1) / 264, ids)
    assert max(cut_tokenizer.kept_ids(outcome.tokenizer)) < len(tokenizer)
    rows = token_ids.Rows.of(outcome.tokenizer, token_ids.embedded(model))
    assert rows.candidates == 2 and rows.removed.sum() == EXTRA + 1  # the unknown token, and the one that went


def test_a_token_without_a_row_is_refused_where_a_text_has_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = (c.from_pretrained(tiny_checkpoint) for c in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens(["<image>"])
    (tmp_path / "a.txt").write_text("see <image> " * 20)
    refused = pytest.raises(RequestError, match=r"the text has the token '<image>' \(259\), for which .* has no row")
    smaller = copy.deepcopy(model)
    outcome = vocabulary.prune(smaller, tokenizer, Vocab("vocab", "random"), 0.5, None)
    for loaded in ((model, tokenizer), (smaller, outcome.tokenizer)):
        with refused:
            perplexity.measure(*loaded, Perplexity(str(tmp_path / "a.txt"), 32), None, 1)
        lm = scorer.Scorer(*loaded, 1, 64)
        with refused:
            lm.loglikelihood(instances("loglikelihood", [("what is this?", " an <image>")]))
        with refused:
            lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("an <image>",)]))
    from sweep.pruning import methods

    for method in (Weight("weight", "wanda"), Neuron()):
        tokens = text.calibration_tokens(Calibration(str(tmp_path / "a.txt"), 2, 8), tokenizer, 0)
        with refused:
            methods.prune(copy.deepcopy(model), method, 0.5, tokens, tokenizer=tokenizer)


def test_a_vocabulary_that_was_cut_is_cut_again(loaded: tuple, tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    once = vocabulary.prune(model, tokenizer, Vocab("vocab", "random"), 0.3, None, seed=0).tokenizer
    twice = vocabulary.prune(model, once, Vocab("vocab", "random"), 0.3, None, seed=1).tokenizer
    assert set(cut_tokenizer.kept_ids(twice)) < set(cut_tokenizer.kept_ids(once)) and len(twice) == token_ids.embedded(
        model
    )
    page = "some text of one's own"
    rows = token_ids.Rows.of(twice, token_ids.embedded(model))
    assert twice(page).input_ids == rows(tokenizer(page).input_ids).tolist()
    saving.save(model, twice, tmp_path / "twice", {"method": {}})
    assert checkpoint.load_model(tmp_path / "twice")[1](page).input_ids == twice(page).input_ids
