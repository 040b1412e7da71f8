"""What pruning did, for the row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    targets: int  # weights that could have been removed
    removed: int  # weights that were
    calibration_tokens: int = 0

    @property
    def sparsity(self) -> float:
        """The fraction removed of the targets."""
        return self.removed / self.targets if self.targets else 0.0
