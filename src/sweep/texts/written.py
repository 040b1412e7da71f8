"""Text that the dense model writes itself, from the token that begins a text: what it was trained on, as it remembers it.

Calibration on it needs no other text (Williams et al. 2024, arXiv:2410.17170). Tokens are drawn from the model's own
distribution at a temperature, and after the token that ends a text the next one begins in the same sequence, as in the
packed text that models are trained on.

Sequences are written some at a time, as many as one length allows. A longer text begins with the sequences of a shorter one,
and whoever shares statistics through a memo shares them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.config import Calibration
from sweep.models import cut_tokenizer, token_ids
from sweep.settings import RequestError

if TYPE_CHECKING:
    from sweep.pruning.sharing import Memo, Tensors

_ROWS = 16  # sequences side by side, at most
_SLOTS = 8192  # tokens of their caches together, at most


def beginning(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(1, 1) the row of the token that begins a text. Raises RequestError where there is none."""
    whole = cut_tokenizer.original(tokenizer)
    token = whole.eos_token_id if whole.bos_token_id is None else whole.bos_token_id
    if token is None:
        raise RequestError(
            "a text that the model writes itself needs a BOS or an EOS token to begin with: name another text"
        )
    return torch.from_numpy(token_ids.Rows.of(tokenizer)([[token]]))


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memo: Memo,
    asked: Calibration,
    seed: int,
) -> Tensor:
    """(sequences, length) tokens, of which the first begins each and the others are drawn by the seed.

    model  as it was loaded
    memo   where earlier writing may lie
    """
    first = beginning(tokenizer)
    rows = max(1, min(_ROWS, _SLOTS // asked.length))
    table = token_ids.Rows.of(tokenizer, token_ids.embedded(model)).table[token_ids.known(tokenizer)]
    allowed = torch.from_numpy(np.unique(table[table >= 0]))
    parts = []
    for number in range(-(-asked.sequences // rows)):
        what = f"written {rows} x {asked.length} at {asked.temperature:g} by {seed}, {number}"
        make = functools.partial(_written, model, first.expand(rows, 1), allowed, asked, (seed, number))
        parts.append(memo(what, make)["tokens"].cpu())
    return torch.cat(parts)[: asked.sequences]


@torch.inference_mode()
def _written(
    model: PreTrainedModel, first: Tensor, allowed: Tensor, asked: Calibration, seeds: tuple[int, int]
) -> Tensors:
    """Some sequences, each drawn on the CPU, so that no device decides how.

    first    (rows, 1)
    allowed  the ids that the tokenizer knows: an embedding may have rows beyond
    """
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    tokens, past = [first], None
    for _ in tqdm(range(asked.length - 1), desc="writing calibration text", unit="token", leave=False):
        out = model(input_ids=tokens[-1].to(model.device), past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        logits = out.logits[:, -1].float().cpu()[:, allowed] / asked.temperature
        tokens.append(allowed[torch.multinomial(logits.softmax(-1), 1, generator=generator)])
    return {"tokens": torch.cat(tokens, 1)}
