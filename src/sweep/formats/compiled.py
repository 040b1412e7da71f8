"""The C++ kernels of sweep/formats/kernels: built when first used into the cache folder, chosen by the processor at run time."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sweep import cache, machine
from sweep.formats.declared import Format
from sweep.formats.packing import PackedLinear

VERSIONS = (
    "portable",
    "avx2",
    "avx512",
    "avx512_bf16",
    "avx512_vnni",
)  # of the kernels, in the order of kernels/bitmap.h
FEW_TOKENS = 8  # up to so many inputs the packed matrix is read; for more it is expanded, which then costs less
PANEL_BYTES = 4 << 20  # of a matrix that are expanded at a time: stays in the last-level cache until it is multiplied
_SOURCES = Path(__file__).parent / "kernels"
# Without OpenMP, PyTorch's headers make every parallel loop a serial one. Its runtime is torch's own, already loaded, and
# so it is not linked: a second one would bring a second pool of threads.
_FLAGS = ["-O3", "-Wall", "-Wextra", *(["-fopenmp"] if sys.platform == "linux" else [])]


_operators: torch.library.Library | None = None  # which are there as long as this is held


class KernelError(RuntimeError):
    """The kernels cannot be built here."""


def chosen(form: Format, kernel: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """(the kernel that multiplies matrices of this format and dtype, why it is not the one that was asked for).

    kernel  of the format's, or `auto` for the fastest here; "torch" where it cannot run, which expands the matrix
    """
    if kernel == "torch":
        return kernel, None
    try:
        able = [name for name in runs(form) if str(dtype).removeprefix("torch.") in form.kernels[name].dtypes]
    except KernelError as error:
        return "torch", str(error)
    if kernel == "auto":
        return (able[0] if able else "torch"), None
    return (kernel, None) if kernel in able else ("torch", f"this processor runs {', '.join(able)}")


def runs(form: Format) -> tuple[str, ...]:
    """The compiled kernels of a format that this processor can run, fastest first. Raises KernelError."""
    here = available()
    return tuple(name for name, kernel in form.kernels.items() if kernel.compiled and name in here)


def available() -> tuple[str, ...]:
    """The versions that this processor can run, slowest first. Raises KernelError."""
    return tuple(extension().versions())


def version(kernel: str) -> int | None:
    """The number of a kernel for the compiled functions; None for "torch"."""
    return None if kernel == "torch" else VERSIONS.index(kernel)


def refuse_gradients(layer: PackedLinear, x: Tensor) -> None:
    """Raises RuntimeError where a gradient is asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            f"no gradient flows through a layer of execution={layer.format.name}: use execution=dense, or torch.no_grad()"
        )


@functools.lru_cache(maxsize=1)
def extension() -> Any:
    """The compiled kernels; built when no process of this machine has built them before.

    Raises KernelError, with the compiler's last words, when they cannot be built.
    """
    compiled = cache.entry("kernels", _key(), _build) / "sweep_kernels.so"
    spec = importlib.util.spec_from_file_location("sweep_kernels", compiled)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _as_operators(module)
    return module


def _as_operators(module: ModuleType) -> None:
    """Make the products known to torch.compile, which cannot look into C++: it is told of which shape the result is."""
    global _operators
    if _operators is not None:  # kernels of the same sources, from another cache folder
        return
    library = torch.library.Library("sweep", "DEF")
    for name, arguments in {
        "bitmap_linear": "Tensor x, Tensor mask, Tensor values, Tensor offsets, Tensor? bias, int columns",
        "codes_linear": "Tensor x, Tensor codes, Tensor scales, Tensor? mask, Tensor? offsets, Tensor? bias, int columns",
    }.items():
        library.define(f"{name}({arguments}, int rows, int version, int few, int panel) -> Tensor")
        function = getattr(module, name)

        def run(*given: Any, function: Callable[..., Tensor] = function) -> Tensor:
            return function(*given[:-4], *given[-3:])

        library.impl(name, run, "CPU")
        torch.library.register_fake(f"sweep::{name}", _shape, lib=library)
    _operators = library


def _shape(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], given[-4]))


def linear(name: str, x: Tensor, *matrix: Any, rows: int, version: int) -> Tensor:
    """A product by a compiled kernel, `bitmap_linear` or `codes_linear`, as a function or, within torch.compile, as an operator.

    matrix  the tensors that hold it, the bias and the number of columns, as the kernel takes them
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.sweep, name)(x, *matrix, rows, version, FEW_TOKENS, PANEL_BYTES)
    return getattr(extension(), name)(x, *matrix, version, FEW_TOKENS, PANEL_BYTES)


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
                "sweep_kernels",
                [str(_SOURCES / "binding.cpp")],
                extra_cflags=_FLAGS,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"the kernels cannot be built: {str(error).strip()[-2000:]}") from error


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """ninja, which PyTorch calls by name, lies beside the interpreter, also where no environment is activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before
