"""What work costs, kept beside what it gave: whoever reads the result from the cache counts it as if it had done the work.

So a row says what its cell costs alone, whatever lay in the cache.
"""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sweep.locks import working_seconds
from sweep.models import anatomy, watching


class PeakMemory:
    """Peak memory of a stretch of work in bytes: of this process, and of the CUDA device when there is one.

    The process's own high-water mark is reset first. `ru_maxrss` will not do: a child starts at its parent's value.
    Where the system offers no such mark (macOS), the resident columns are null, never guessed.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        _return_freed_memory()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.base = self.resident(reset=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self.resident()
        self.device_peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    @staticmethod
    def resident(*, reset: bool = False) -> int | None:
        """The high-water mark of this process, or where it stands once it is reset; None where the system has none."""
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024


class ForwardPasses:
    """Tokens that go through the blocks of a model while something is done with it, in whichever order and form.

    Copies of the model that are made meanwhile count too, and a pass that starts in the middle counts as its share.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = list(anatomy.blocks(model))
        self.block_tokens = 0  # summed over the blocks

    def __enter__(self) -> ForwardPasses:
        own = {type(block): block.__dict__.get("forward") for block in self._blocks}

        def count(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            its_own = block.__dict__.get("forward") is own[type(block)]  # else it only notes how it is called
            if its_own and not watching.is_aside():
                hidden = args[0] if args else kwargs["hidden_states"]
                self.block_tokens += hidden.numel() // hidden.shape[-1]

        self._handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in self._blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, tokens: int, block_tokens: int | None = None) -> float | None:
        """How often `tokens` tokens went through all blocks; None where there are none.

        block_tokens  instead of those that were counted
        """
        through = self.block_tokens if block_tokens is None else block_tokens
        return through / (tokens * len(self._blocks)) if tokens else None


def _return_freed_memory() -> None:
    """Have the C library give freed memory back, so that it is not counted as in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Cost:
    seconds: float = 0.0  # of work: waiting is none
    block_tokens: int = 0  # tokens that went through a block, over all blocks
    peak_bytes: int = 0  # resident
    cpu_seconds: float = 0.0  # of all threads of this process

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.block_tokens + other.block_tokens,
            max(self.peak_bytes, other.peak_bytes),
            self.cpu_seconds + other.cpu_seconds,
        )


class Meter:
    """What this process spends on a model from entering on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.passes = ForwardPasses(model)

    def __enter__(self) -> Meter:
        self.passes.__enter__()
        self._started, self._cpu_started = working_seconds(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.__exit__()

    def spent(self) -> Cost:
        return Cost(
            working_seconds() - self._started,
            self.passes.block_tokens,
            PeakMemory.resident() or 0,
            time.process_time() - self._cpu_started,
        )

    def since(self, before: Cost) -> Cost:
        """What was spent after an earlier reading."""
        now = self.spent()
        return Cost(
            now.seconds - before.seconds,
            now.block_tokens - before.block_tokens,
            now.peak_bytes,
            now.cpu_seconds - before.cpu_seconds,
        )


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

    def columns(self, stage: str, tokens: int) -> dict[str, Any]:
        """Of the row, of a stage that has read so many tokens of calibration text, after leaving."""
        total, peak = self._own + self._read, self._memory.peak
        return {
            f"{stage}_seconds": total.seconds,
            f"{stage}_cpu_seconds": total.cpu_seconds,
            f"{stage}_forward_passes": self.passes.of(tokens, total.block_tokens),
            f"{stage}_peak_memory_bytes": None if peak is None else max(peak, self._read.peak_bytes),
        }


_open: list[Bill] = []


def charge(read: Cost) -> None:
    """Put what was spent on what has just been read on the bill of whoever is being measured, if anyone is."""
    for bill in _open:
        bill.add(read)
