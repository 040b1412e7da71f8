"""What a kind of recovery is given, and what it says that it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from sweep.pruning import sharing
from sweep.pruning.masks import Masks
from sweep.recovery.kinds import Recover


@dataclass(frozen=True)
class Given:
    """What a kind of recovery may read."""

    model: PreTrainedModel  # pruned; changed in place
    dense: Callable[[], PreTrainedModel]  # the unpruned model, loaded when it is asked for
    tokens: Tensor  # (sequences, length) int64, to train on
    masks: Masks  # of weights that were removed, by the names of `anatomy.matrices`
    asked: Recover
    seed: int
    memo: sharing.Memo = sharing.unshared  # where what is told of the dense model comes from
    state: Path | None = (
        None  # the file from which a stopped run goes on, for a kind that takes long; it is gone at the end
    )

    @property
    def steps(self) -> int:
        """That are asked for, of settings that are normalised."""
        assert self.asked.steps is not None
        return self.asked.steps


@dataclass(frozen=True)
class Trained:
    tokens: int  # read, each as often as it was
    steps: int  # of the optimiser or the solver
    what: str  # was trained, such as `matrices`
