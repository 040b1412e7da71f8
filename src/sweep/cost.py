"""What work costs, kept beside what it gave: whoever reads the result from the cache counts it as if it had done the work.

So a row says what its cell costs alone, whatever lay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sweep.efficiency import ForwardPasses, PeakMemory
from sweep.locks import working_seconds


@dataclass(frozen=True)
class Cost:
    seconds: float = 0.0  # of work: waiting is none
    block_tokens: int = 0  # tokens that went through a block, over all blocks
    peak_bytes: int = 0  # resident

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.block_tokens + other.block_tokens,
            max(self.peak_bytes, other.peak_bytes),
        )


class Meter:
    """What this process spends on a model from entering on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.passes = ForwardPasses(model)

    def __enter__(self) -> Meter:
        self.passes.__enter__()
        self._started = working_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.__exit__()

    def spent(self) -> Cost:
        return Cost(working_seconds() - self._started, self.passes.block_tokens, PeakMemory.resident() or 0)

    def since(self, before: Cost) -> Cost:
        """What was spent after an earlier reading."""
        now = self.spent()
        return Cost(now.seconds - before.seconds, now.block_tokens - before.block_tokens, now.peak_bytes)


class Bill(Meter):
    """The same, and what others have spent on what was read meanwhile, as the columns of a row."""

    def __init__(self, model: PreTrainedModel, device: str) -> None:
        super().__init__(model)
        self._memory, self._read = PeakMemory(device), Cost()

    def __enter__(self) -> Bill:
        self._memory.__enter__()
        super().__enter__()
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        self._own = self.spent()
        super().__exit__()
        self._memory.__exit__()

    def add(self, read: Cost) -> None:
        self._read += read

    def columns(self, tokens: int) -> dict[str, Any]:
        """Of a row whose calibration text has so many tokens, after leaving."""
        total, peak = self._own + self._read, self._memory.peak
        return {
            "prune_seconds": total.seconds,
            "prune_forward_passes": self.passes.of(tokens, total.block_tokens),
            "prune_peak_memory_bytes": None if peak is None else max(peak, self._read.peak_bytes),
        }


_open: list[Bill] = []


def charge(read: Cost) -> None:
    """Put what was spent on what has just been read on the bill of whoever is being measured, if anyone is."""
    for bill in _open:
        bill.add(read)
