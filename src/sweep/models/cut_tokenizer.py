"""The tokenizer of a cut vocabulary: it splits text as before, and speaks in the ids of the rows that are left.

It is a tokenizer of a class derived from the whole one's, so that whatever asks for a tokenizer accepts it. Text and ids go
through the whole tokenizer's public methods, and ids alone are exchanged on the way in and out: what transformers does
between them, fast or in Python, is no concern of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sweep.settings import RequestError

_OWN = ("kept_ids", "rows_before", "unknown_id", "new_ids")  # what a remapped tokenizer has beside a whole one's parts


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

    Of a tokenizer that was remapped before, `kept` are positions, and the ids of the whole vocabulary stay the ones it
    knows.
    """
    whole, before, kept = original(tokenizer), kept_ids(tokenizer), list(kept)
    if before is not None:
        kept, rows = [before[i] for i in kept], rows_before(tokenizer)
    rows = rows or 1 + max(*kept, *whole.get_vocab().values())
    cls: Any = type(whole)
    return _sharing(
        whole,
        _remapped_class(cls),
        kept_ids=kept,
        rows_before=rows,
        unknown_id=unknown_id(whole, rows),
        new_ids={old: new for new, old in enumerate(kept)},
    )


def kept_ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The old ids of a tokenizer made by `remapped`; None for any other."""
    return getattr(tokenizer, "kept_ids", None)


def rows_before(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The rows of the embedding before it was cut, likewise."""
    return getattr(tokenizer, "rows_before", None)


def original(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with all its ids, whose settings, such as the side it pads, are those of the remapped one now."""
    if kept_ids(tokenizer) is None:
        return tokenizer
    return _sharing(tokenizer, type(tokenizer).__bases__[0])


def _sharing(tokenizer: PreTrainedTokenizerBase, cls: Any, **beside: Any) -> Any:
    """A tokenizer of a class, of the same parts and settings: made without the files that its constructor reads."""
    new = cls.__new__(cls)
    own = {name: value for name, value in vars(tokenizer).items() if name not in _OWN}
    vars(new).update(own | beside)
    return new


@functools.lru_cache
def _remapped_class(cls: Any) -> Any:
    """A tokenizer class whose ids are positions in `self.kept_ids`."""

    class Remapped(cls):
        kept_ids: list[int]  # ascending
        rows_before: int
        unknown_id: int  # the old id whose row stands for those that went
        new_ids: dict[int, int]

        def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
            encoded = original(self)(*args, **kwargs)
            for name in {"input_ids", "labels"} & encoded.keys():  # labels are the ids of a target text
                encoded[name] = _mapped(encoded[name], self._new)
            return encoded

        def encode(self, *args: Any, **kwargs: Any) -> Any:
            return _mapped(original(self).encode(*args, **kwargs), self._new)

        def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self).decode(_mapped(token_ids, self._old), *args, **kwargs)

        def convert_ids_to_tokens(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self).convert_ids_to_tokens(_mapped(ids, self._old), *args, **kwargs)

        def convert_tokens_to_ids(self, tokens: Any) -> Any:
            return _mapped(original(self).convert_tokens_to_ids(tokens), self._new)

        def get_vocab(self) -> dict[str, int]:
            return {t: self.new_ids[i] for t, i in original(self).get_vocab().items() if i in self.new_ids}

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

        def _new(self, old: int) -> int:
            return self.new_ids.get(old, self.new_ids[self.unknown_id])

        def _old(self, new: int) -> int:
            return self.kept_ids[new]

    Remapped.__name__ = f"Remapped{cls.__name__}"
    return Remapped


def _mapped(ids: Any, function: Callable[[int], int]) -> Any:
    """`function` of every id in a number, a tensor or array, or lists of lists; what is no id, such as None, as it is."""
    if isinstance(ids, Tensor):
        return torch.tensor(_mapped(ids.tolist(), function), dtype=ids.dtype, device=ids.device)
    if isinstance(ids, np.ndarray):
        return np.array(_mapped(ids.tolist(), function), dtype=ids.dtype)
    if isinstance(ids, list | tuple):
        return [_mapped(i, function) for i in ids]
    return function(int(ids)) if isinstance(ids, int | np.integer) else ids
