"""Energy is what counters count, and null where there are none to read."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_model
from sweep.config import Efficiency
from sweep.measuring import efficiency, energy

SETTINGS = Efficiency(prompt_tokens=4, output_tokens=3, batch_size=2)


def zone(powercap: Path, number: str, name: str, microjoules: int, turns_at: int = 10**9) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", turns_at)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    meters = [
        zone(tmp_path, number, name, 5_000_000)
        for number, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "package-1"), ("2", "psys"))
    ]

    def work() -> None:
        for meter, joules in zip(meters, (1, 10, 2, 3, 100), strict=True):
            meter.write_text(str(5_000_000 + joules * 10**6))

    read = energy.counters("cpu", tmp_path)
    assert [counter.name for counter in read] == ["package-0", "dram", "package-1"]
    assert energy.of(work, read) == pytest.approx(1 + 2 + 3)


def test_a_counter_that_starts_again_has_lost_nothing(tmp_path: Path) -> None:
    meter = zone(tmp_path, "0", "package-0", 999_000_000, turns_at=10**9)
    read = energy.counters("cpu", tmp_path)
    assert energy.of(lambda: meter.write_text("2000000") and None, read) == pytest.approx(3.0)


def test_without_every_counter_there_is_no_energy(tmp_path: Path) -> None:
    nothing = {"energy_joules_per_token": None, "energy_source": None}
    zone(tmp_path, "0", "package-0", 1)
    zone(tmp_path, "1", "package-1", 1).unlink()  # stands for one that may not be read
    for read in (energy.counters("cpu", tmp_path), energy.counters("cpu", tmp_path / "none"), energy.counters("mps")):
        assert efficiency.energy_of_decoding(tiny_model("llama"), SETTINGS, read) == nothing


def test_a_token_has_its_share_of_what_was_counted_and_none_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of one token for two sequences takes 6 J, one of a prompt 1000 J: 3 J a token."""
    model, spent = tiny_model("llama"), [0.0]

    def spend(_: object, __: tuple, kwargs: dict[str, Any]) -> None:
        spent[0] += 6.0 if kwargs["input_ids"].shape == (2, 1) else 1000.0

    model.register_forward_pre_hook(spend, with_kwargs=True)
    monkeypatch.setattr(efficiency, "_ENERGY_SECONDS", 0.01)
    found = efficiency.energy_of_decoding(model, SETTINGS, [energy.Counter("package-0", lambda: spent[0])])
    assert found == {"energy_joules_per_token": 3.0, "energy_source": "package-0"}


class Nvml:
    """What NVML's library answers, for one GPU."""

    def __init__(self, counts: bool = True) -> None:
        self.millijoules, self.counts = 7_000, counts

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-a" else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_ulonglong)).contents.value = self.millijoules
        return 0 if self.counts else 3


def test_a_gpu_is_found_by_its_name_and_counts_millijoules() -> None:
    library = Nvml()
    read = energy.of_gpu("GPU-a", library)
    assert [counter.name for counter in read] == ["gpu"]
    assert energy.of(lambda: setattr(library, "millijoules", 9_500), read) == 2.5
    assert energy.of_gpu("GPU-b", library) == [] == energy.of_gpu("GPU-a", Nvml(counts=False))
