"""How a model reads what is scored: one batch after the other from end to end, or all batches block by block.

A model whose weights do not lie in memory is read from its file for every batch that goes through it from end to end. All
batches together, block by block, it is read once: what they are on their way is kept, and each block takes all of them.
Every batch meets the same products in the same order, and the numbers are the same to the last digit.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import cache, calibrate
from sweep.models import anatomy, token_ids
from sweep.models.logits import Tail
from sweep.settings import RequestError

log = logging.getLogger(__name__)

IN_MEMORY = 2**30  # bytes of batches on their way that are kept in memory; what is beyond goes to the disk
_WORTH_A_FILE = 2**16  # bytes of a tensor; what is smaller stays in memory
_TRIED = 24  # tokens on which it is tried whether batches can go from block to block

Batch: TypeAlias = Callable[[], dict[str, Tensor]]  # makes the arguments of the model's forward pass, (B, L) tokens
Reading: TypeAlias = Callable[
    [Tail, Sequence[Batch]], Iterator[Tensor]
]  # of each batch in order (B, L, d), see `Tail.states`


def whole(tail: Tail, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """One batch after the other, from end to end."""
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False):
        yield tail.states(**batch())


def by_blocks(tail: Tail, batches: Sequence[Batch], *, kinds: Sequence[int | None]) -> Iterator[Tensor]:
    """All batches through the first block, then all through the next.

    kinds  of the blocks, as `calibrate.kinds_of` finds them
    Raises RequestError where the disk has no room for what the batches are on their way.
    """
    model, shelf = tail.model, _Shelf()
    blocks = list(anatomy.blocks(model))
    hidden: list[Tensor | _Place] = []
    calls: list[Any] = []
    for batch in batches:
        text = calibrate.entered(model, kinds, [batch()])
        hidden.append(shelf.put(text.hidden[0]))
        calls.append(shelf.put_all(text.calls[0]))
    for index, block in enumerate(tqdm(blocks, desc="evaluating", unit="block", leave=False)):
        for number, place in enumerate(hidden):
            out = calibrate.put_out(block, shelf.taken(place), shelf.taken(calls[number][index]))
            hidden[number] = shelf.put_back(place, out)
    for batch, place in zip(batches, hidden, strict=True):
        with calibrate.leaving(model, kinds, shelf.taken(place)):
            states = tail.states(**batch())
        yield states


def of(model: PreTrainedModel) -> tuple[Reading, dict[str, Any]]:
    """How the model is to read what is scored, and the columns that say it: by blocks if its weights do not lie in memory."""
    if not _lies_elsewhere(model):
        return whole, {"evaluated_by": "batches", "evaluated_by_fallback": None}
    tokens = torch.arange(_TRIED)[None] % token_ids.embedded(model)
    try:
        read = functools.partial(by_blocks, kinds=calibrate.kinds_of(model, tokens))
    except calibrate.NotStreamed as error:
        log.warning("%s: the whole model is read for each batch", error)
        return whole, {"evaluated_by": "batches", "evaluated_by_fallback": str(error)}
    return read, {"evaluated_by": "blocks", "evaluated_by_fallback": None}


def _lies_elsewhere(model: PreTrainedModel) -> bool:
    """Whether some of the model's weights lie in a file, mapped, or are brought where they run by hooks."""
    return any(p.is_meta or p.untyped_storage().filename is not None for p in model.parameters())


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file."""

    start: int  # bytes
    shape: torch.Size
    dtype: torch.dtype


class _Shelf:
    """Where tensors lie that are read seldom: in memory up to a bound, and beyond it in a file without a name.

    All in the memory of the CPU. Raises RequestError where the disk has no room.
    """

    def __init__(self) -> None:
        self.held = self.written = 0  # bytes in memory, and in the file
        self.file = tempfile.TemporaryFile(dir=cache.folder())  # noqa: SIM115 - it goes with the shelf

    def put(self, tensor: Tensor) -> Tensor | _Place:
        tensor = tensor.cpu()
        if tensor.nbytes < _WORTH_A_FILE or self.held + tensor.nbytes <= IN_MEMORY:
            self.held += tensor.nbytes
            return tensor
        place = _Place(self.written, tensor.shape, tensor.dtype)
        self.written += tensor.nbytes
        self._write(place, tensor)
        return place

    def put_all(self, value: Any) -> Any:
        """What is told to blocks; of that which several are told, one tensor."""
        put: dict[int, tuple[Tensor, Tensor | _Place]] = {}

        def once(tensor: Tensor) -> Tensor | _Place:
            if id(tensor) not in put:
                put[id(tensor)] = tensor, self.put(tensor)
            return put[id(tensor)][1]

        return calibrate.each(value, once)

    def put_back(self, place: Tensor | _Place, tensor: Tensor) -> Tensor | _Place:
        """Where it lies now: in the file at the place of the one that it follows, if it is as large."""
        if not isinstance(place, _Place):
            return tensor
        if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            return self.put(tensor)
        self._write(place, tensor)
        return place

    def _write(self, place: _Place, tensor: Tensor) -> None:
        try:
            self.file.seek(place.start)
            self.file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            self.file.flush()
        except OSError as error:
            raise RequestError(
                f"{cache.folder()} has no room for texts on their way through the model, of which it holds "
                f"{place.start:,} bytes ({error.strerror}): set SWEEP_CACHE to a folder of another disk, or evaluate less"
            ) from error

    def taken(self, value: Any) -> Any:
        """Tensors again, of what was put here."""
        return calibrate.each(value, self._read, _Place)

    def _read(self, place: _Place) -> Tensor:
        self.file.seek(place.start)
        found = bytearray(place.shape.numel() * place.dtype.itemsize)
        self.file.readinto(found)
        return torch.frombuffer(found, dtype=place.dtype).view(place.shape)
