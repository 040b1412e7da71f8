"""The stage that recovers: what is the same for every kind of it.

A kind is a function from `Given` to `Trained`, which changes the weights that are left, in place. Here the loss is told on
text that no kind is given, what was removed is zeroed again, and a model that came out broken is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.formats.grid import Grid
from sweep.pruning import sharing
from sweep.pruning.masks import Masks
from sweep.recovery.adapters import lora
from sweep.recovery.distillation import distill
from sweep.recovery.given import Given, Trained
from sweep.recovery.kinds import Recover
from sweep.recovery.local import local

if TYPE_CHECKING:
    import pandas as pd

WORK: dict[str, Callable[[Given], Trained]] = {  # of each kind
    "local": local,
    "lora": lora,
    "distill": distill,
}


@dataclass(frozen=True)
class Recovered:
    """What the stage says that it did."""

    trained: Trained
    loss_before: float  # nats a token, on text that was held out
    loss_after: float
    calibration_tokens: int = 0  # recovery has a text of its own
    tokenizer: None = None
    masks: None = None
    recipe: None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "recovery_tokens": self.trained.tokens,
            "recovery_steps": self.trained.steps,
            "recovery_trained": self.trained.what,
            "recovery_loss_before": self.loss_before,
            "recovery_loss_after": self.loss_after,
        }


def recover(
    model: PreTrainedModel,
    asked: Recover,
    dense: Callable[[], PreTrainedModel],
    tokens: Tensor,
    held_out: Tensor,
    masks: Masks,
    *,
    seed: int = 0,
    memo: sharing.Memo = sharing.unshared,
    state: Path | None = None,
) -> Recovered:
    """Recover the model in place.

    dense     gives the unpruned model, which is freed afterwards
    tokens    (sequences, length) to train on
    held_out  (sequences, length) on which the loss is told
    masks     of weights that were removed; what else is zero, as in a model that was sparse before, stays so too
    seed      of what a kind draws
    memo      where what is told of the dense model comes from
    state     the file from which a stopped run goes on
    Raises FloatingPointError when the loss afterwards is no number.
    """
    before, masks = loss(model, held_out), masks.with_zeros(model)
    trained = WORK[asked.name](Given(model, dense, tokens, masks, asked, seed, memo, state))
    masks.apply(model)
    after = loss(model, held_out)
    if not math.isfinite(after):
        raise FloatingPointError(
            f"recover={asked.name} left a model whose loss on held-out text is {after}, which was {before:.3f} before it"
        )
    return Recovered(trained, before, after)


@torch.no_grad()
def loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean of -log p of each token given those before it, in nats; tokens (sequences, length)."""
    device, total = model.get_input_embeddings().weight.device, 0.0
    for sequence in tokens.to(device).split(1):
        logits = model(input_ids=sequence, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, sequence[0, 1:], reduction="sum"))
    return total / (len(tokens) * (tokens.shape[1] - 1))
