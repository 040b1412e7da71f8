"""What calibration text tells of the unpruned model, measured once for all cells that read the same text with it.

The sparsities of a method have it in common. It lies in the cache together with what it cost, so that the row of a cell
that has only read it says what that cell costs alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sweep import cache, identity, sources, text
from sweep.calibrate import exact_device
from sweep.config import Cell
from sweep.efficiency import ForwardPasses, PeakMemory
from sweep.locks import working_seconds

Tensors = dict[str, Tensor]
Share = Callable[[str, Callable[[], Tensors]], Tensors]  # (what, how to measure it) -> it


def alone(what: str, measure: Callable[[], Tensors]) -> Tensors:
    """For those who share with nobody."""
    return measure()


def once(share: Share) -> Share:
    """The same, and asked once at most for each thing."""
    known: dict[str, Tensors] = {}

    def ask(what: str, measure: Callable[[], Tensors]) -> Tensors:
        if what not in known:
            known[what] = share(what, measure)
        return known[what]

    return ask


class Shared:
    """A `Share` through the cache, for one cell.

    tokens  (sequences, length) calibration text
    passes  counts those of the cell's model, while it is pruned
    """

    def __init__(self, cell: Cell, tokens: Tensor, passes: ForwardPasses) -> None:
        digest = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
        self._key = [sources.fingerprint(cell.model), list(tokens.shape), digest, *identity.arithmetic(cell)]
        self._device, self._tokens, self._passes = cell.device, tokens.numel(), passes
        # spent by the cells that measured what was read
        self.seconds, self.forward_passes, self.peak_bytes = 0.0, 0.0, 0

    def __call__(self, what: str, measure: Callable[[], Tensors]) -> Tensors:
        """What `measure` gives, by name; measured by this cell, or by another before it.

        what  tells it from everything else that is measured on the same text with the same model
        """
        here: list[Tensors] = []

        def make(half: Path) -> None:
            before, started = self._passes.of(self._tokens) or 0.0, working_seconds()
            here.append(measure())
            cost = {"seconds": working_seconds() - started, "peak_bytes": PeakMemory.resident() or 0,
                    "forward_passes": (self._passes.of(self._tokens) or 0.0) - before}  # fmt: skip
            save_file({name: t.cpu().contiguous() for name, t in here[0].items()}, half / "statistics.safetensors")
            (half / "cost.json").write_text(json.dumps(cost))

        folder = cache.entry("statistics", text.fingerprint([*self._key, what]), make)
        if here:
            return here[0]
        cost = json.loads((folder / "cost.json").read_text())
        self.seconds += cost["seconds"]
        self.forward_passes += cost["forward_passes"]
        self.peak_bytes = max(self.peak_bytes, cost["peak_bytes"])
        return load_file(folder / "statistics.safetensors", device=str(exact_device(self._device)))

    def add_to(self, row: dict[str, Any]) -> None:
        """Count what was read as if the cell had measured it."""
        row["prune_seconds"] += self.seconds
        if row["prune_forward_passes"] is not None:
            row["prune_forward_passes"] += self.forward_passes
        if row["prune_peak_memory_bytes"] is not None:
            row["prune_peak_memory_bytes"] = max(row["prune_peak_memory_bytes"], self.peak_bytes)
