"""Energy by the machine's own counters: RAPL for the processor, NVML for a GPU. Where neither is to be read, None.

Nothing is estimated from power ratings or utilisation. A counter counts all that its chip does, idling and other
programs included, and only its chip: of a model on a GPU the GPU alone, else the processor's packages and their memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
_COUNTED = ("package", "dram")  # zones of RAPL; core and uncore are parts of a package, psys is more than both


@dataclass(frozen=True)
class Counter:
    """A counter of joules that only grows, but for starting again at zero after `turns_at`."""

    name: str
    read: Callable[[], float]  # joules
    turns_at: float = float("inf")  # joules

    def between(self, before: float, after: float) -> float:
        """Joules between two readings that lie less than one turn apart."""
        return after - before if after >= before else after - before + self.turns_at


def counters(device: str, powercap: Path = POWERCAP) -> list[Counter]:
    """The counters of what a model on `device` runs on; none where the machine has none, or lets nobody read them."""
    if device.startswith("cuda"):
        import torch

        return of_gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return of_processor(powercap) if device == "cpu" else []


def of_processor(powercap: Path) -> list[Counter]:
    """RAPL's zones by way of Linux' powercap: each package, and its memory where that is counted apart.

    All or none: a sum that lacks a zone which may not be read (most systems let root alone) would be too low.
    """
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # the name of AMD's zones too
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith(_COUNTED):
                _microjoules(zone / "energy_uj")
                turns_at = _microjoules(zone / "max_energy_range_uj")
                found.append(Counter(name, lambda file=zone / "energy_uj": _microjoules(file), turns_at))  # type: ignore[misc]
        except OSError:
            return []
    return found


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def of_gpu(uuid: str, library: Any = None) -> list[Counter]:
    """The GPU's own counter by NVML (Volta and newer), found by its UUID: NVML numbers GPUs otherwise than CUDA."""
    try:
        nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    handle = ctypes.c_void_p()
    millijoules = ctypes.c_ulonglong()

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return []
    if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
        return []
    return [Counter("gpu", read)]


def of(work: Callable[[], None], read: list[Counter]) -> float:
    """Joules that the counters count while `work` runs."""
    before = [counter.read() for counter in read]
    work()
    return sum(counter.between(start, counter.read()) for counter, start in zip(read, before, strict=True))
