"""A remapped tokenizer does what the whole one does, in ids of the rows that are left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from sweep.models import cut_tokenizer
from sweep.settings import RequestError

TEXTS = ["some text", "zebras, xylophones and quartz"]


@pytest.fixture(params=["fast", "in Python"])
def whole(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint) if request.param == "fast" else ByT5Tokenizer(extra_ids=0)


@pytest.fixture
def kept(whole: PreTrainedTokenizerBase) -> list[int]:
    """All special tokens, the ids of the first text, and nothing else, so that the second has tokens that went."""
    return sorted({*whole.all_special_ids, *whole(TEXTS[0]).input_ids})


@pytest.fixture
def small(whole: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerBase:
    return cut_tokenizer.remapped(whole, kept)


def expected(whole: PreTrainedTokenizerBase, kept: list[int], ids: Any) -> Any:
    """Positions in `kept`; of what went, the unknown token's, or the end-of-text token's where there is none."""
    if isinstance(ids, list):
        return [expected(whole, kept, i) for i in ids]
    instead = whole.eos_token_id if whole.unk_token_id is None else whole.unk_token_id
    return kept.index(ids if ids in kept else instead)


def test_it_is_a_tokenizer_of_the_wholes_class(whole: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase) -> None:
    assert isinstance(small, type(whole)) and type(small).__name__ == f"Remapped{type(whole).__name__}"
    assert small.is_fast == whole.is_fast and small.tokenize(TEXTS[1]) == whole.tokenize(TEXTS[1])


@pytest.mark.parametrize("text", [*TEXTS, TEXTS])
def test_ids_are_positions_of_what_is_left(whole: Any, small: Any, kept: list[int], text: Any) -> None:
    assert small(text).input_ids == expected(whole, kept, whole(text).input_ids)
    assert small("", text_target=text)["labels"] == expected(whole, kept, whole("", text_target=text)["labels"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["pt", "np", None])
def test_batches_are_padded_as_the_remapped_one_is_set(
    whole: Any, small: Any, kept: list[int], side: str, form: str | None
) -> None:
    small.padding_side = side
    found = small(TEXTS, padding=True, return_tensors=form)
    told = whole(TEXTS, padding=True, padding_side=side)
    assert np.asarray(found.input_ids).tolist() == expected(whole, kept, told.input_ids)
    assert np.asarray(found.attention_mask).tolist() == told.attention_mask
    later = small.pad([{"input_ids": ids} for ids in small(TEXTS).input_ids])
    assert later.input_ids == np.asarray(found.input_ids).tolist()
    assert small.pad_token_id == kept.index(whole.pad_token_id)


def test_text_comes_back_in_every_form_of_ids(whole: Any, small: Any) -> None:
    ids = small.encode(TEXTS[0])
    assert ids == small(TEXTS[0]).input_ids
    told = whole.decode(whole.encode(TEXTS[0]), skip_special_tokens=True)
    for form in (ids, tuple(ids), torch.tensor(ids), np.array(ids)):
        assert small.decode(form, skip_special_tokens=True) == told
    assert small.batch_decode([ids, ids], skip_special_tokens=True) == [told, told]
    assert small.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(whole.encode(TEXTS[0]))
    assert small.convert_tokens_to_ids(small.convert_ids_to_tokens(ids)) == ids
    assert small.decode(ids[0]) == whole.decode(whole.encode(TEXTS[0])[0])


def test_its_vocabulary_is_what_is_left(whole: Any, small: Any, kept: list[int]) -> None:
    assert len(small) == small.vocab_size == len(kept)
    assert sorted(small.get_vocab().values()) == list(range(len(kept)))
    assert {t: kept[i] for t, i in small.get_vocab().items()}.items() <= whole.get_vocab().items()


def test_a_chat_speaks_in_its_ids(whole: Any, small: Any, kept: list[int]) -> None:
    chat, template = [{"role": "user", "content": TEXTS[1]}], "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found, told = (t.apply_chat_template(chat, chat_template=template)["input_ids"] for t in (small, whole))
    assert found == expected(whole, kept, told)


def test_the_whole_one_is_had_back_with_the_settings_of_now(whole: Any, small: Any) -> None:
    small.padding_side = "left"
    back = cut_tokenizer.original(small)
    assert type(back) is type(whole) and cut_tokenizer.kept_ids(back) is None and back.padding_side == "left"
    assert back(TEXTS).input_ids == whole(TEXTS).input_ids and back.get_vocab() == whole.get_vocab()
    assert cut_tokenizer.original(whole) is whole


def test_a_copy_speaks_as_it_does(small: Any) -> None:
    for copied in (copy.copy(small), copy.deepcopy(small)):
        assert copied(TEXTS).input_ids == small(TEXTS).input_ids and len(copied) == len(small)


def test_it_is_not_saved_without_its_model(small: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"write model and tokenizer with sweep.save\(model, tokenizer, folder\)"):
        small.save_pretrained(tmp_path)
