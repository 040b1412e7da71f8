"""The ids that a tokenizer gives: what it puts around a text, which ids there are, and which rows of the model they are.

Three numbers are easily taken for one: how many tokens a tokenizer has, the largest id it gives (vocabularies have
gaps), and the rows of the embedding, which is often padded to a round number and sometimes short of a token that was
added. What is read here is ids and rows; `vocab_size`, which tokenizers and configurations understand differently, is
read nowhere.

A tokenizer whose vocabulary was pruned splits as before. Ids are therefore those of the whole vocabulary everywhere, and
`Rows` says where they are in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.models import cut_tokenizer
from sweep.settings import RequestError


def known(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Every id of the whole vocabulary, ascending."""
    return np.unique(np.fromiter(cut_tokenizer.original(tokenizer).get_vocab().values(), dtype=np.int64))


def special(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Ids of the tokens that steer and spell nothing.

    The unknown token is not among them where it stands for text, which shows in a character that no vocabulary has:
    tokenizers of bytes name one as well and never give it.
    """
    whole = cut_tokenizer.original(tokenizer)
    ids = {i for i, token in whole.added_tokens_decoder.items() if token.special} | set(whole.all_special_ids)
    spelt = {whole.unk_token_id} & set(whole("\ue000", add_special_tokens=False, verbose=False).input_ids)
    return np.array(sorted(ids - spelt), dtype=np.int64)


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts (before, after) a text: mostly one BOS or none, and none."""
    whole = cut_tokenizer.original(tokenizer)
    full, bare = (whole("a", add_special_tokens=added).input_ids for added in (True, False))
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    return ([], []) if start is None else (full[:start], full[start + len(bare) :])


def own(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], beginning: Sequence[int]) -> list[list[int]]:
    """The tokens of each text itself, without those that the tokenizer puts around it.

    beginning  what the model will read before it, which the text may begin with as well, and does not repeat
    """
    whole = cut_tokenizer.original(tokenizer)
    found = whole(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [ids[begun(ids, beginning) :] for ids in found]


def begun(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """How many of the first ids are the beginning, or the end of it."""
    return next((n for n in range(len(beginning), 0, -1) if list(ids[:n]) == list(beginning[-n:])), 0)


def stream(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A long text that is cut into sequences: what the tokenizer begins a text with, once, and no end.

    So read the scripts of the pruning papers (GPTQ, SparseGPT, Wanda): the joined text is tokenised as one, so that a
    BOS stands before the first sequence alone.
    """
    before, _ = around(tokenizer)
    return before + own(tokenizer, [text], before)[0]


@dataclass(frozen=True)
class Rows:
    """Where the ids of the whole vocabulary are in a model.

    table       (ids,) row of each id; -1 where the model never had one
    ids         (rows,) the other way round
    removed     (ids,) whether the row was pruned; the unknown token's stands for it
    unknown     that row; -1 where nothing was pruned
    candidates  tokens that it stands for, itself included
    """

    tokenizer: PreTrainedTokenizerBase
    table: NDArray[np.int64]
    ids: NDArray[np.int64]
    removed: NDArray[np.bool_]
    unknown: int
    candidates: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> Rows:
        """rows  of the model that this is the tokenizer of; None = one for every id"""
        ids, kept = known(tokenizer), cut_tokenizer.kept_ids(tokenizer)
        before = cut_tokenizer.rows_before(tokenizer) or rows or int(ids.max()) + 1
        table = np.full(max(before, int(ids.max()) + 1), -1)
        removed = np.zeros(len(table), dtype=bool)
        if kept is None:
            table[:before] = np.arange(before)
            return cls(tokenizer, table, np.arange(before), removed, -1, 1)
        unknown = kept.index(tokenizer.unknown_id)
        table[:before], removed[:before] = unknown, True
        table[kept], removed[kept] = np.arange(len(kept)), False
        return cls(tokenizer, table, np.array(kept), removed, unknown, int(removed[ids].sum()) + 1)

    def __call__(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The rows of ids, of any shape. Raises RequestError for a token that the model has no row for."""
        asked = np.asarray(ids, dtype=np.int64)
        found = self.table[asked]
        refuse(asked[found < 0], self.tokenizer)
        return found


def embedded(model: PreTrainedModel) -> int:
    """Rows of the embedding: how many ids the model reads."""
    return model.get_input_embeddings().weight.shape[0]


def refuse(missing: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RequestError that names the first of these ids, for which a model has no row; none are fine."""
    if len(missing):
        first = int(missing[0])
        token = cut_tokenizer.original(tokenizer).convert_ids_to_tokens(first)
        raise RequestError(
            f"the text has the token {token!r} ({first}), for which the model's embedding has no row: it was "
            "added to the tokenizer alone. Take it out of the text, or resize the model's embeddings and "
            "train it"
        )
