"""The bitmap format: one bit a weight says whether it is there, and the non-zeros follow each other.

    mask     (out, words) int64; bit j of word w of a row is column 64 w + j, words = ceil(in / 64)
    offsets  (out + 1,) int32; the non-zeros of row r are values[offsets[r] : offsets[r + 1]]
    values   (nonzeros + padding,) bfloat16 or float32; the last 64 bytes are padding that a wide load may touch

At sparsity s it takes (1 - s) + 1/16 of dense bfloat16, and so it shrinks from 7 % on; float32 takes 1/32 more.
The kernels are C++ in sweep/formats/kernels, built when first used into the cache folder and chosen by the processor at run
time. `expand` here is plain torch: what runs without a compiler, and what the kernels are tested against.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sweep import cache, machine
from sweep.formats import declared
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing

WORD = 64  # columns a word of the mask
PADDING = 64  # bytes after the values
DTYPES = (torch.bfloat16, torch.float32)
VERSIONS = ("portable", "avx2", "avx512", "avx512_bf16")  # of the kernel, in the order of kernels/bitmap.h
FEW_TOKENS = 8  # up to so many inputs the compressed matrix is read; for more it is expanded, which then costs less
PANEL_BYTES = 4 << 20  # of a matrix that are expanded at a time: stays in the last-level cache until it is multiplied
_SOURCES = Path(__file__).parent / "kernels"
# Without OpenMP, PyTorch's headers make every parallel loop a serial one. Its runtime is torch's own, already loaded, and
# so it is not linked: a second one would bring a second pool of threads.
_FLAGS = ["-O3", "-Wall", "-Wextra", *(["-fopenmp"] if sys.platform == "linux" else [])]


class KernelError(RuntimeError):
    """The kernel cannot be built here."""


def compress(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, values, offsets) of a matrix (out, in). Raises ValueError for what the format cannot hold."""
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(
            f"bitmap holds matrices of bfloat16 or float32, got {weight.dim()} dimensions of {weight.dtype}"
        )
    rows, columns = weight.shape
    if rows * columns >= 2**31:
        raise ValueError(f"bitmap counts up to 2**31 weights in a matrix, got {rows} x {columns}")
    weight = weight.detach().contiguous()
    there = weight != 0
    padded = np.zeros((rows, -(-columns // WORD) * WORD), dtype=bool)
    padded[:, :columns] = there.numpy()
    mask = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i8").reshape(rows, -1))
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = there.sum(1).cumsum(0)
    values = torch.cat([weight[there], torch.zeros(PADDING // weight.element_size(), dtype=weight.dtype)])
    return mask, values, offsets


def expand(mask: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """The matrix (out, in) again."""
    bits = np.unpackbits(mask.numpy().view(np.uint8), axis=1, bitorder="little")[:, :columns]
    dense = torch.zeros(bits.shape, dtype=values.dtype)
    dense[torch.from_numpy(bits).bool()] = values[: int(offsets[-1])]
    return dense


def check(mask: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """Refuse arrays that do not belong together, such as those of a damaged file: the kernels trust them.

    Raises ValueError.
    """
    rows = len(offsets) - 1
    shapes = mask.shape == (rows, -(-columns // WORD)) and values.dim() == 1 and values.dtype in DTYPES
    if not shapes or mask.dtype != torch.int64 or offsets.dtype != torch.int32:
        raise ValueError(
            f"no bitmap of {columns} columns: mask {tuple(mask.shape)} {mask.dtype}, values "
            f"{tuple(values.shape)} {values.dtype}, offsets {tuple(offsets.shape)} {offsets.dtype}"
        )
    bits = np.unpackbits(np.ascontiguousarray(mask.numpy()).view(np.uint8), axis=1, bitorder="little")
    counts = torch.from_numpy(bits.sum(1, dtype=np.int64))
    padded = int(offsets[-1]) + PADDING // values.element_size()
    if (
        offsets[0] != 0
        or not torch.equal(offsets.diff().long(), counts)
        or bits[:, columns:].any()
        or len(values) != padded
    ):
        raise ValueError(
            f"damaged bitmap: its mask has {int(counts.sum())} weights, its offsets end at "
            f"{int(offsets[-1])}, and {len(values)} values are there"
        )


class BitmapLinear(PackedLinear):
    """A linear layer that holds its matrix in the bitmap format alone.

    kernel  one of `kernels()`, or "torch": expand the matrix for every call, which is slow and runs anywhere
    """

    format = declared.BITMAP
    mask: Tensor
    values: Tensor
    offsets: Tensor

    def __init__(self, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None, kernel: str):
        check(mask, values, offsets, columns)
        super().__init__((len(offsets) - 1, columns), bias, values.dtype)
        for name, tensor in (("mask", mask), ("values", values), ("offsets", offsets)):
            self.register_buffer(name, tensor)
        self.kernel = kernel
        self._version = VERSIONS.index(kernel) if kernel != "torch" else -1

    def dense(self) -> Tensor:
        return expand(self.mask, self.values, self.offsets, self.in_features)

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.values[: int(self.offsets[-1])]))

    def facts(self) -> int:
        return self.in_features

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("no gradient flows through a bitmap layer: use execution=dense, or torch.no_grad()")
        if self._version < 0:
            return nn.functional.linear(x, self.dense(), bias)
        return extension().linear(
            x, self.mask, self.values, self.offsets, bias, self.in_features, self._version, FEW_TOKENS, PANEL_BYTES
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"


def packing(kernel: str, dtype: torch.dtype) -> Packing:
    """How matrices are packed for this kernel, `auto` for the fastest here; where it cannot run, for "torch"."""
    kernel, lacks = _runs(kernel, dtype)

    def make(weight: Tensor, bias: Tensor | None, grid: Grid | None = None) -> BitmapLinear:
        return BitmapLinear(*compress(weight), weight.shape[1], bias, kernel)

    def read(tensors: Mapping[str, Tensor], columns: int) -> BitmapLinear:
        mask, values, offsets = (tensors[name] for name in ("mask", "values", "offsets"))
        bias = tensors["bias"].to(dtype) if "bias" in tensors else None
        return BitmapLinear(mask, values.to(dtype), offsets, columns, bias, kernel)

    return Packing(f"bitmap {kernel}", make, lacks=lacks, read=read)


def _runs(kernel: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """(the kernel that runs, why it is not the one that was asked for)."""
    if kernel == "torch":
        return kernel, None
    try:
        if kernel == "auto":
            return fastest(dtype), None
        if kernel in kernels():
            return kernel, None
        return "torch", f"this processor runs {', '.join(kernels())}"
    except KernelError as error:
        return "torch", str(error)


def kernels() -> tuple[str, ...]:
    """The kernel versions that this processor can run, slowest first. Raises KernelError."""
    return tuple(extension().versions())


def fastest(dtype: torch.dtype) -> str:
    """The version to use for weights of this dtype. Raises KernelError when none can be built."""
    names = [name for name in kernels() if dtype == torch.bfloat16 or name != "avx512_bf16"]
    return names[-1]


@functools.lru_cache(maxsize=1)
def extension() -> Any:
    """The compiled kernels; built when no process of this machine has built them before.

    Raises KernelError, with the compiler's last words, when they cannot be built.
    """
    compiled = cache.entry("kernels", _key(), _build) / "sweep_bitmap.so"
    spec = importlib.util.spec_from_file_location("sweep_bitmap", compiled)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _key() -> str:
    """Changes with everything that the compiled file depends on; the processor's abilities are asked at run time."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    found = machine.compiler()[1]
    words = subprocess.run([found, "--version"], capture_output=True, text=True).stdout if found else ""
    digest.update(
        "\0".join(
            [
                torch.__version__,
                sysconfig.get_config_var("SOABI") or "",
                platform.machine(),
                words.partition("\n")[0],
                *_FLAGS,
            ]
        ).encode()
    )
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    from torch.utils import cpp_extension

    name, found = machine.compiler()
    if found is None:
        raise KernelError(f"there is no C++ compiler ({name}) on this machine")
    try:
        with _scripts_on_path():
            cpp_extension.load(
                "sweep_bitmap",
                [str(_SOURCES / "binding.cpp")],
                extra_cflags=_FLAGS,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"the bitmap kernel cannot be built: {str(error).strip()[-2000:]}") from error


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """ninja, which PyTorch calls by name, lies beside the interpreter, also where no environment is activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before
