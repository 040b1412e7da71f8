"""The state from which a recovery that was stopped goes on: a file of the cell, written now and then, gone at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sweep import cache, cost
from sweep.locks import working_seconds

SECONDS = 120.0  # of work between two states, at least
WRITING = 0.05  # of the time goes into writing them, at most: that of large models takes longer than steps do


class State:
    """Of one run.

    file  None keeps no state
    """

    def __init__(self, file: Path | None) -> None:
        self._file, self._pause = file, SECONDS
        self._started = self._written = working_seconds()
        self._cpu_started = time.process_time()

    def last(self) -> dict[str, Any] | None:
        """What a run that was stopped has last written, on the CPU; None where there is none.

        The time that it had taken is put on the bill, as if it had not been stopped.
        """
        if self._file is None or not self._file.exists():
            return None
        held = torch.load(self._file, map_location="cpu", weights_only=True)
        cost.charge(cost.Cost(seconds=held["seconds"], cpu_seconds=held["cpu_seconds"]))
        self._started -= held["seconds"]
        self._cpu_started -= held["cpu_seconds"]
        return held

    def write(self, held: Callable[[], dict[str, Any]]) -> None:
        """Write what is asked for only where the last state is old."""
        begun = working_seconds()
        if self._file is None or begun - self._written < self._pause:
            return
        spent = {"seconds": begun - self._started, "cpu_seconds": time.process_time() - self._cpu_started}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        cache.write(self._file, lambda handle: torch.save(held() | spent, handle))
        self._written = working_seconds()
        self._pause = max(SECONDS, (self._written - begun) / WRITING)

    def forget(self) -> None:
        """There is nothing to go on with any more."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
