"""What pruning did, for the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Outcome:
    targets: int  # weights that could have been removed
    removed: int  # weights that were
    calibration_tokens: int = 0
    units: int | None = None  # neurons, heads, layers or tokens that could have been removed
    units_removed: int = 0
    removed_parameters: int | None = None  # of the whole model, biases and norms included; None: the same as `removed`
    tokenizer: Any = None  # the model's tokenizer from now on, where the vocabulary has changed
    measured: pd.DataFrame | None = None  # criterion=drop: block, unit, importance, measured
    outside_blocks: bool = False  # what was removed is no part of a block: embeddings and head
    damping: float | None = None  # the largest added to a Hessian, as a share of the mean of its diagonal

    @property
    def sparsity(self) -> float:
        """The fraction removed of the targets."""
        return self.removed / self.targets if self.targets else 0.0

    @property
    def sparsity_units(self) -> float | None:
        """The fraction removed of the units; None for a method that removes no units."""
        return self.units_removed / self.units if self.units else None

    def sparsity_of(self, parameters: int) -> float:
        """The fraction removed of so many parameters."""
        gone = self.removed if self.removed_parameters is None else self.removed_parameters
        return gone / parameters
