"""Weights that lie in files instead of memory: what is read comes in page by page, and what was read is let go.

While a scratch is open, whatever modules are given as parameters and buffers moves into a file without a name, mapped into
memory. To all code it is a tensor like any other, written in place like any other, and so every method gives the same
numbers to the bit. Its pages are the kernel's to write back and to drop: a thread has them dropped when more of them are
resident than they may be. What code makes beside the model, such as a Hessian, lies in memory as always.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import functools
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from transformers import PreTrainedModel

from sweep.models import headers
from sweep.settings import RequestError

RESIDENT = 2**28  # bytes of mapped files beyond which what is mapped is dropped
SMALLEST = 2**16  # bytes of a tensor that is worth a file
_LOOK = 0.01  # seconds between looks: a core reads some 100 MB meanwhile
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}

_open: list[Scratch] = []


class Scratch:
    """A folder in which tensors lie in files of their own. Made by `opened`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paused = False
        self._mapped: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._before = _resident_files()  # of libraries, for the most part
        self._adding = threading.Lock()  # a set does not grow while it is gone through

    def held(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values that lies in a file; itself where it does already, or is small, or on no CPU.

        Raises RequestError where the disk has no room.
        """
        if self.paused or tensor.device.type != "cpu" or tensor.nbytes < SMALLEST or tensor.layout != torch.strided:
            return tensor
        return tensor if tensor.untyped_storage().filename is not None else self.another(tensor)

    def another(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of the CPU that lies in a file. Raises RequestError where the disk has no room."""
        mapped = _bytes(self._made(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
        mapped.copy_(tensor.detach())
        self.look()  # here too, since a busy machine may leave the thread that looks no time
        return mapped

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file of safetensors where they lie, to be read and never written.

        Raises RequestError for a file that is damaged or cut.
        """
        found = headers.tensors(file)
        whole = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(file), False, file.stat().st_size))
        _advise("mprotect", whole, mmap.PROT_READ)
        self._add(whole)
        return {name: _view(whole, told) for name, told in found.items()}

    def look(self) -> None:
        """Drop what is mapped where more of it is resident than may be."""
        if _resident_files() - self._before > RESIDENT:
            self.drop()

    def drop(self) -> None:
        """Have no page of what is mapped be resident. What was written stays: the kernel has it, and brings it to the disk."""
        with self._adding:
            mapped = list(self._mapped)
        for storage in mapped:
            _advise("madvise", storage, mmap.MADV_DONTNEED)

    def _made(self, nbytes: int) -> torch.UntypedStorage:
        """A file of so many bytes, mapped, which goes with the last tensor in it."""
        handle, name = tempfile.mkstemp(prefix="weights-", dir=self.folder)
        try:
            os.posix_fallocate(handle, 0, nbytes)  # a mapped file that meets a full disk later ends the process
            storage = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(name, True, nbytes))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise RequestError(
                f"offload=disk: {self.folder} has no room for another {nbytes:,} bytes of weights ({error.strerror}): set "
                "SWEEP_CACHE to a folder of another disk"
            ) from error
        finally:
            os.close(handle)
            Path(name).unlink()
        self._add(storage)
        return storage

    def _add(self, storage: torch.UntypedStorage) -> None:
        with self._adding:
            self._mapped.add(storage)

    def _watch(self, ends: threading.Event) -> None:
        while not ends.wait(_LOOK):
            self.look()


def current() -> Scratch | None:
    """The scratch that is open in this process, if one is."""
    return _open[-1] if _open else None


@contextmanager
def opened(folder: Path) -> Iterator[Scratch]:
    """Within it, what modules are given lies in files of this folder, on whose disk there is to be room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch, ends = Scratch(folder), threading.Event()

    def move(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and (held := scratch.held(own := tensor.data)) is not own:
            tensor.data = held

    watcher = threading.Thread(target=scratch._watch, args=(ends,), daemon=True, name="scratch")
    with contextlib.ExitStack() as stack:
        stack.callback(registration.register_module_parameter_registration_hook(move).remove)
        stack.callback(registration.register_module_buffer_registration_hook(move).remove)
        stack.callback(watcher.join)
        stack.callback(ends.set)
        _open.append(scratch)
        stack.callback(_open.remove, scratch)
        watcher.start()
        yield scratch


@contextmanager
def paused() -> Iterator[None]:
    """Within it, tensors stay where they are made: of a model whose weights are only set later."""
    scratch = current()
    before = scratch.paused if scratch else False
    if scratch:
        scratch.paused = True
    try:
        yield
    finally:
        if scratch:
            scratch.paused = before


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, which lies in files where a scratch is open."""
    scratch = current()
    if scratch is None:
        return copy.deepcopy(model)
    others: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        other = scratch.another(tensor.data) if tensor.device.type == "cpu" and tensor.numel() else tensor.data.clone()
        others[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
    return copy.deepcopy(model, others)


def kept(array: np.ndarray) -> np.ndarray:
    """An array with the same values, in a file where a scratch is open."""
    scratch = current()
    return array if scratch is None else scratch.held(torch.from_numpy(array)).numpy()


def _advise(call: str, mapped: torch.UntypedStorage, what: int) -> None:
    """Tell the kernel something of a mapping, by a call of the C library that takes (address, length, what)."""
    function = getattr(_libc(), call)
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if function(mapped.data_ptr(), mapped.nbytes(), what):
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _view(whole: torch.UntypedStorage, of: headers.Tensor) -> Tensor:
    dtype = _DTYPES[of.dtype]
    raw = _bytes(whole)[of.start : of.end]
    if of.start % dtype.itemsize:  # which no writer of today leaves
        raw = raw.clone()
    return raw.view(dtype).view(of.shape)


def _resident_files() -> int:
    """Bytes of files that are mapped into this process and resident."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
