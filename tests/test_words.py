"""Words and their frequency bands: attribution by hand, sums against the formula, errors against a bootstrap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from sweep.measuring import words

COMMON, RARE = words.BANDS.index("zipf5up"), words.BANDS.index("zipf0to3")


def test_bands_go_from_common_to_rare() -> None:
    assert words.band(" the") == words.band("The") == COMMON
    assert words.band("metaclass") == words.band("qzxv") == RARE
    order = [words.zipf(word) for word in ("the", "house", "lizard", "ossuary", "qzxv")]
    assert order == sorted(order, reverse=True) and order[-1] == 0
    for nothing in ("", " ", "42", "==", "_", "<|"):
        assert words.band(nothing) == words.NO_WORD
    for word, name in (("government", "zipf5up"), ("castle", "zipf4to5"), ("lizard", "zipf3to4")):
        assert words.BANDS[words.band(word)] == name


def test_a_token_belongs_to_the_first_word_it_has_a_letter_of() -> None:
    text = "the metaclass, 42 don't"
    offsets = [(0, 3), (3, 8), (8, 13), (13, 14), (14, 17), (17, 21), (21, 23), (0, 0)]
    bands, word = words.of_tokens(text, offsets)
    assert word.tolist() == [0, 1, 1, -1, -1, 2, 2, -1]
    assert bands.tolist() == [COMMON, RARE, RARE, words.NO_WORD, words.NO_WORD, COMMON, COMMON, words.NO_WORD]


def test_sums_and_means_by_band() -> None:
    bands, word = np.array([COMMON, RARE, RARE, words.NO_WORD]), np.array([0, 1, 1, -1])
    one = words.by_band(bands, word, np.array([1.0, 2.0, 4.0, 8.0]))
    assert one["loss_band_zipf0to3"] == 6 and one["tokens_band_zipf0to3"] == 2 and one["words_band_zipf0to3"] == 1
    assert "loss_band_zipf3to4" not in one and "words_band_no_word" not in one
    two = words.by_band(bands[:1], word[:1], np.array([3.0]))
    found = words.pooled([one, two])
    assert found["loss_band_zipf5up"] == 2.0 and found["perplexity_band_zipf5up"] == pytest.approx(np.exp(2))
    assert found["loss_band_zipf0to3"] == 3.0 and found["word_loss_band_zipf0to3"] == 6.0
    assert found["tokens_band_no_word"] == 1
    assert "loss_band_zipf3to4" not in found


def test_tokens_that_the_vocabulary_has_lost_are_counted() -> None:
    bands, word = np.array([COMMON, RARE, RARE]), np.array([0, 1, 2])
    found = words.pooled([words.by_band(bands, word, np.ones(3), np.array([False, False, True]))])
    assert found["tokens_band_zipf0to3"] == 2
    assert found["removed_share_band_zipf0to3"] == 0.5 and found["removed_share_band_zipf5up"] == 0


def test_the_error_of_a_band_is_that_of_drawing_texts() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 150, 40).astype(float)
    losses = tokens * draw.normal(3, 0.5, 40)
    texts = [{"loss_band_zipf5up": a, "tokens_band_zipf5up": n} for a, n in zip(losses, tokens, strict=True)]
    chosen = draw.integers(0, 40, (4000, 40))
    bootstrap = np.std(losses[chosen].sum(1) / tokens[chosen].sum(1))
    assert words.pooled(texts)["loss_band_zipf5up_stderr"] == pytest.approx(bootstrap, rel=0.1)


def test_losses_that_are_no_numbers_stay_so() -> None:
    found = words.pooled(
        [
            {"loss_band_zipf5up": np.nan, "tokens_band_zipf5up": 2.0},
            {"loss_band_zipf5up": 1.0, "tokens_band_zipf5up": 2.0},
        ]
    )
    assert np.isnan(found["loss_band_zipf5up"]) and np.isnan(found["perplexity_band_zipf5up"])


def test_accuracy_by_band() -> None:
    found = words.accuracy_by_band([COMMON, COMMON, RARE], [1.0, 0.0, 1.0])
    assert found["acc_band_zipf5up"] == 0.5 and found["acc_band_zipf0to3"] == 1.0
    assert found["acc_band_zipf5up_stderr"] == 0.5 and "acc_band_zipf0to3_stderr" not in found
    assert found["examples_band_zipf5up"] == 2


def test_rows_by_band() -> None:
    found = words.rows_by_band(np.array([0, 0, 3, 3]), np.array([1.0, 3.0, 5.0, 7.0]), kept=[0, 1, 2])
    assert found["row_norm_band_zipf5up"] == 2 and found["row_norm_band_zipf0to3"] == 6
    assert found["share_pruned_band_zipf5up"] == 0 and found["share_pruned_band_zipf0to3"] == 0.5


def test_every_token_of_a_vocabulary_has_a_band(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    bands = words.of_vocabulary(tokenizer, range(len(tokenizer)))
    assert len(bands) == len(tokenizer) and set(bands) <= set(range(len(words.BANDS)))
    assert (bands[tokenizer.all_special_ids] == words.NO_WORD).all()
    assert words.BANDS[bands[tokenizer.convert_tokens_to_ids("a")]] == "zipf5up"
