"""What calibration text tells of the unpruned model, measured once for all cells that read the same text with it.

The sparsities of a method have it in common. It lies in the cache together with what it cost, so that the row of a cell
that has only read it says what that cell costs alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sweep import cache, cost, versions
from sweep.calibrate import exact_device
from sweep.config import Cell
from sweep.models import origin
from sweep.pruning.sharing import Tensors
from sweep.texts import text

_FORMAT = 3  # raise when what lies in an entry changes


class SharedStatistics:
    """A `Memo` through the cache, for one cell.

    tokens  (sequences, length) calibration text
    meter   of the cell's model, while it is pruned
    """

    def __init__(self, cell: Cell, tokens: Tensor, meter: cost.Meter) -> None:
        digest = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
        self._key = [_FORMAT, origin.fingerprint(cell.model), list(tokens.shape), digest, *versions.arithmetic(cell)]
        self._device, self._meter = cell.device, meter

    def __call__(self, what: str, measure: Callable[[], Tensors]) -> Tensors:
        """What `measure` gives, by name; measured by this cell, or by another before it.

        what  tells it from everything else that is measured on the same text with the same model
        """
        here: list[Tensors] = []

        def make(half: Path) -> None:
            before = self._meter.spent()
            here.append(measure())
            spent = self._meter.since(before)
            save_file({name: t.cpu().contiguous() for name, t in here[0].items()}, half / "statistics.safetensors")
            (half / "cost.json").write_text(json.dumps(asdict(spent)))

        folder = cache.entry("statistics", text.fingerprint([*self._key, what]), make)
        if here:
            return here[0]
        cost.charge(cost.Cost(**json.loads((folder / "cost.json").read_text())))
        return load_file(folder / "statistics.safetensors", device=str(exact_device(self._device)))
