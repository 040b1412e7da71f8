"""What a family of methods is given, and what it says that it did.

What has become of the model is counted: see measuring/counting.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sweep.formats.grid import Grid
from sweep.pruning import sharing
from sweep.pruning.masks import Masks
from sweep.pruning.recipe import Recipe
from sweep.solver import Rounding, no_rounding


@dataclass(frozen=True)
class Given:
    """What a family may read beside the model and what is asked."""

    tokens: Tensor | None = None  # (sequences, length) calibration text, for methods that read one
    seed: int = 0  # of criteria that draw numbers
    tokenizer: PreTrainedTokenizerBase | None = None  # for methods that change the vocabulary or measure on a task
    sequential: bool = True  # weight methods calibrate a block on what the pruned blocks before it put out
    memo: sharing.Memo = sharing.unshared  # where statistics of the unpruned model come from
    device: torch.device | str | None = (
        None  # where a weight method works, one block at a time; None = where the model lies
    )
    rounding: Rounding = no_rounding  # what quantises matrices in the pass that prunes them


@dataclass(frozen=True)
class Pruned:
    targets: int  # weights that could have been removed
    removed: int  # weights that were
    calibration_tokens: int = 0
    units: int | None = None  # neurons, heads, layers, experts or tokens that could have been removed
    # those that were, by their numbers in the unpruned model: blocks or tokens (n,), all else (n, 2) with its block
    gone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    masks: Masks = field(default_factory=Masks)  # of the weights, where single ones were removed
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of the matrices that were quantised in the same pass
    tokenizer: Any = None  # the model's tokenizer from now on, where the vocabulary has changed
    measured: pd.DataFrame | None = None  # criterion=drop: block and unit as numbered before, importance, measured
    unreached: int | None = None  # experts that no calibration token took
    damping: float | None = None  # the largest added to a Hessian, as a share of the mean of its diagonal
    recipe: Recipe | None = None  # with which `method.replay` removes the same again

    @property
    def sparsity(self) -> float:
        """The fraction removed of the targets."""
        return self.removed / self.targets if self.targets else 0.0

    @property
    def units_removed(self) -> int:
        return len(self.gone)

    @property
    def sparsity_units(self) -> float | None:
        """The fraction removed of the units; None for a method that removes no units."""
        return self.units_removed / self.units if self.units else None

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        measured = None if self.measured is None else int(self.measured["measured"].sum())
        return {
            "calibration_tokens": self.calibration_tokens,
            "damping": self.damping,
            "units_measured": measured,
            "experts_unreached": self.unreached,
        }

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """What is stored beside the row."""
        return {} if self.measured is None else {"units": self.measured}
