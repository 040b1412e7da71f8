"""Vocabulary pruning: the embedding and head rows of rare tokens are removed, and the tokenizer follows.

The tokenizer splits text as before; then old ids become new ones, and those of removed tokens become the unknown
token's. Splitting by the smaller vocabulary instead would give other tokens than the model was trained on.

Where the text has a removed token the pruned model tells the unknown one. Its probability is shared equally by the tokens
it stands for wherever a text is scored (scorer.py), so that losses can be compared with the dense model's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError  # of a configuration that must name a token which is gone
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.models import cut_tokenizer, surgery, trial
from sweep.pruning import checks, criteria, scoring, select
from sweep.pruning.families import Vocab
from sweep.pruning.pruned import Pruned
from sweep.settings import RequestError


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Vocab,
    sparsity: float,
    tokens: Tensor | None,
    seed: int = 0,
) -> Pruned:
    """Remove the rows of the least important tokens in place; what is returned carries the new tokenizer.

    tokens  token ids of text, of any shape, for a criterion that reads one
    Raises RequestError when the tokenizer has no token to stand for the removed ones, when the request would remove
    special tokens, and for a model that does something else than before with the tokens that stay.
    """
    size = model.get_input_embeddings().weight.shape[0]
    protected = _protected(tokenizer, size)
    gone = select.count(size, sparsity)
    if gone > size - len(protected):
        raise RequestError(
            f"sparsity={sparsity:g} removes {gone} of {size} tokens, special ones among them: "
            f"{checks.at_most(1 - len(protected) / size)}"
        )
    criterion = criteria.find(method.criterion, method.of)
    given: dict[str, Any] = {"units": size, "generator": torch.Generator().manual_seed(seed)}
    if criterion.reads_text:
        assert tokens is not None
        given["counts"] = torch.bincount(tokens.flatten(), minlength=size)
    if "zipf" in criterion.reads:
        given["zipf"] = _zipf(tokenizer, size)
    scores = scoring.scored(criterion, given, (size,), "the tokens").double()
    scores[sorted(protected)] = torch.inf
    pruned = _cut(model, tokenizer, select.lowest(scores, gone).nonzero().squeeze(1), seed)
    return replace(pruned, calibration_tokens=0 if tokens is None else tokens.numel())


def replay(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gone: np.ndarray, seed: int) -> Pruned:
    """Remove the rows of these tokens, (n,), in place.

    Raises RequestError where this tokenizer has special ones among them, and as `prune` does for what a model cannot lose.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if special := sorted(_protected(tokenizer, size) & set(gone.tolist())):
        raise RequestError(
            f"method.replay removes the tokens {special[:5]}, which are special ones of this tokenizer: use a recipe of a "
            "model with the same tokenizer"
        )
    return _cut(model, tokenizer, torch.from_numpy(np.setdiff1d(np.arange(size), gone)), seed)


def _protected(tokenizer: PreTrainedTokenizerBase, size: int) -> set[int]:
    """The tokens that stay: what stands for the removed ones, and special ones."""
    return {i for i in (cut_tokenizer.unknown_id(tokenizer, size), *tokenizer.all_special_ids) if i < size}


def _cut(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Tensor, seed: int) -> Pruned:
    """Remove all tokens but these."""
    size = model.get_input_embeddings().weight.shape[0]
    gone = size - len(kept)
    parameters = sum(p.numel() for p in model.parameters())
    _remove(model, kept, seed)
    removed = parameters - sum(p.numel() for p in model.parameters())
    return Pruned(
        targets=removed * size // gone if gone else size * model.get_input_embeddings().weight.shape[1],
        removed=removed,
        units=size,
        gone=np.setdiff1d(np.arange(size), kept.numpy()),
        tokenizer=cut_tokenizer.remapped(tokenizer, kept.tolist(), size),
    )


def _remove(model: PreTrainedModel, kept: Tensor, seed: int) -> None:
    """Remove all other tokens, and prove it: texts of tokens that stay get the logits of these that they had.

    Raises RequestError, and leaves the model as it was, where they do not.
    """
    drawn = torch.randint(len(kept), (2, 12), generator=torch.Generator().manual_seed(seed))
    restore, why = (lambda: None), ""
    try:
        before = _logits(model, kept[drawn])[..., kept]
        restore = surgery.remove_tokens(model, kept)
        after = _logits(model, drawn)
        apart = (before - after).abs().max().item() if after.shape == before.shape else float("inf")
        if apart > 32 * torch.finfo(model.dtype).eps * max(1.0, before.abs().max().item()):
            why = f"the logits of the tokens that stay are up to {apart:.3g} apart"
    except (ValueError, RuntimeError, IndexError, TypeError, StrictDataclassError) as error:
        why = str(error)
    if why:
        restore()
        raise RequestError(
            f"method=vocab: {type(model).__name__} cannot lose tokens ({why}): what it does with their ids is not known. "
            "Its weights can be pruned: +method=weight"
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(sequences, tokens, rows) float32, on the CPU."""
    with trial.evaluated(model):
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def _zipf(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Of each row: many models have more rows than their tokenizer has tokens."""
    from wordfreq import zipf_frequency  # loads its word list on first use

    found = torch.full((size,), -1.0, dtype=torch.float64)
    for i in tokenizer.get_vocab().values():
        if i < size:
            word = tokenizer.decode([i]).strip()
            found[i] = zipf_frequency(word, "en") if word.isalpha() else 0.0
    return found
