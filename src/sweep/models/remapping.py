"""The tokenizer of a cut vocabulary: it splits text as before, and speaks in the ids of the rows that are left."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sweep.settings import RequestError


def unknown_id(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """The id that stands for removed tokens: the unknown token, or the end-of-text token where there is none.

    rows  of the embedding, in which it must have one
    Raises RequestError when the tokenizer has neither.
    """
    for found in (tokenizer.unk_token_id, tokenizer.eos_token_id):
        if found is not None and found < rows:
            return int(found)
    raise RequestError(
        "method=vocab: the tokenizer has neither an unknown nor an end-of-text token to stand for "
        "removed ones; add one to it"
    )


def remapped(
    tokenizer: PreTrainedTokenizerBase, kept: Iterable[int], rows: int | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer that splits as `tokenizer` does and speaks in positions of `kept`, the old ids that stay, ascending.

    rows  of the embedding before it was cut; None where an older checkpoint does not say: as many as ids are known of

    It is of a class derived from the tokenizer's own, so that whatever asks for a tokenizer accepts it. Of a tokenizer
    that was remapped before, `kept` are positions, and the ids of the whole vocabulary stay the ones it knows.
    """
    whole, before, kept = original(tokenizer), kept_ids(tokenizer), list(kept)
    if before is not None:
        kept, rows = [before[i] for i in kept], rows_before(tokenizer)
    new = copy.copy(whole)
    new.kept_ids = kept
    new.rows_before = rows or 1 + max(*kept, *whole.get_vocab().values())
    new.unknown_id = unknown_id(whole, new.rows_before)
    cls: Any = type(whole)
    new.__class__ = _remapped_class(cls)
    return new


def kept_ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The old ids of a tokenizer made by `remapped`; None for any other."""
    return getattr(tokenizer, "kept_ids", None)


def rows_before(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The rows of the embedding before it was cut, likewise."""
    return getattr(tokenizer, "rows_before", None)


def original(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that `remapped` was given, with all its ids; any other tokenizer itself."""
    if kept_ids(tokenizer) is None:
        return tokenizer
    old = copy.copy(tokenizer)
    for name in ("kept_ids", "rows_before", "unknown_id", "_table"):
        old.__dict__.pop(name, None)
    old.__class__ = type(tokenizer).__mro__[1]
    return old


@functools.lru_cache
def _remapped_class(cls: Any) -> Any:
    """A tokenizer class whose ids are positions in `self.kept_ids`."""

    class Remapped(cls):
        kept_ids: list[int]
        rows_before: int
        unknown_id: int

        def _new(self, old: int | None) -> int | None:
            if old is None:
                return None
            return self._new_ids.get(old, self._new_ids[self.unknown_id])

        @property
        def _new_ids(self) -> dict[int, int]:
            if "_table" not in self.__dict__:
                self.__dict__["_table"] = {old: new for new, old in enumerate(self.kept_ids)}
            return self.__dict__["_table"]

        def _encode_plus(self, *args: Any, **kwargs: Any) -> BatchEncoding:
            encoded = super()._encode_plus(*args, **kwargs)
            encoded["input_ids"] = _mapped(encoded["input_ids"], self._new)
            return encoded

        def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
            ids = token_ids if isinstance(token_ids, list) else [token_ids]
            return super()._decode([self.kept_ids[i] for i in ids], *args, **kwargs)

        def convert_ids_to_tokens(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
            return super().convert_ids_to_tokens(_mapped(ids, lambda i: self.kept_ids[i]), *args, **kwargs)

        def convert_tokens_to_ids(self, tokens: Any) -> Any:
            return _mapped(super().convert_tokens_to_ids(tokens), self._new)

        def get_vocab(self) -> dict[str, int]:
            return {t: self._new_ids[i] for t, i in super().get_vocab().items() if i in self._new_ids}

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            raise RequestError(
                "transformers' format cannot say which tokens a cut vocabulary keeps: write model and "
                "tokenizer with sweep.save(model, tokenizer, folder)"
            )

        @property
        def vocab_size(self) -> int:
            return len(self.kept_ids)

        def __len__(self) -> int:
            return len(self.kept_ids)

    Remapped.__name__ = f"Remapped{cls.__name__}"
    return Remapped


def _mapped(ids: Any, function: Any) -> Any:
    """`function` of every id in a number, a tensor, or lists of lists."""
    if isinstance(ids, Tensor):
        return torch.tensor(_mapped(ids.tolist(), function), dtype=ids.dtype)
    if isinstance(ids, list):
        return [_mapped(i, function) for i in ids]
    return function(ids) if isinstance(ids, int) else ids
