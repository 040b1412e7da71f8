"""The state from which a recovery that was stopped goes on: a file of the cell, written now and then, gone at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sweep import cache, cost
from sweep.locks import working_seconds

SECONDS = 120.0  # of work between two states: one takes as long to write as some steps take


class State:
    """Of one run.

    file  None keeps no state
    """

    def __init__(self, file: Path | None) -> None:
        self._file, self._before = file, 0.0
        self._started = self._written = working_seconds()

    def last(self) -> dict[str, Any] | None:
        """What a run that was stopped has last written, on the CPU; None where there is none.

        The seconds that it had taken are put on the bill, as if it had not been stopped.
        """
        if self._file is None or not self._file.exists():
            return None
        held = torch.load(self._file, map_location="cpu", weights_only=True)
        self._before = held["seconds"]
        cost.charge(cost.Cost(seconds=self._before))
        return held

    def write(self, held: Callable[[], dict[str, Any]]) -> None:
        """Write what is asked for only where the last state is old."""
        if self._file is None or working_seconds() - self._written < SECONDS:
            return
        whole = held() | {"seconds": self._before + working_seconds() - self._started}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        cache.write(self._file, lambda handle: torch.save(whole, handle))
        self._written = working_seconds()

    def forget(self) -> None:
        """There is nothing to go on with any more."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
