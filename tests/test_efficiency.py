"""Intervals against their definition; what must be equal is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.signal import lfilter
from scipy.stats import binom

from conftest import random_tokens, tiny_model
from sweep import cost
from sweep.config import Efficiency
from sweep.measuring import efficiency
from sweep.pruning import methods
from sweep.pruning.families import Weight
from sweep.settings import RequestError

SETTINGS = Efficiency(prompt_tokens=8, output_tokens=3, warmup=1, repeats=6)


def test_forward_passes_are_those_of_the_calibration_text(family: str) -> None:
    tokens = random_tokens()
    passes = {}
    for criterion, sequential in (("magnitude", True), ("wanda", False), ("wanda", True)):
        model = tiny_model(family)
        with cost.ForwardPasses(model) as counted:
            methods.prune(model, Weight("weight", criterion=criterion), 0.5, tokens, sequential=sequential)
        passes[criterion, sequential] = counted.of(tokens.numel())
        model(tokens)  # counted no more
        assert counted.of(tokens.numel()) == passes[criterion, sequential] and counted.of(0) is None
    # twice through the first block; through the second, the last, once: nobody reads what its pruned form puts out
    assert passes == {("magnitude", True): 0, ("wanda", False): 1, ("wanda", True): 1.5}
    model = tiny_model(family)
    with cost.ForwardPasses(model) as counted:
        copy.deepcopy(model)(tokens)
    assert counted.of(tokens.numel()) == 1


def test_timing_shows_how_far_it_is(capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("llama")
    efficiency.latency(model, model, SETTINGS)
    drawn = capsys.readouterr().err
    assert "timing:" in drawn and f"/{SETTINGS.repeats} [" in drawn


def test_every_repeat_is_kept_and_the_row_follows_from_them(family: str) -> None:
    model = tiny_model(family)
    columns, repeats = efficiency.latency(model, model, SETTINGS)
    assert len(repeats) == SETTINGS.repeats * 3 * 2
    assert (repeats.milliseconds > 0).all()
    assert columns["timing_ended_by"] == "repeats" and columns["timed_repeats"] == SETTINGS.repeats
    for phase in ("prefill", "decode"):
        times = repeats[repeats.phase == phase].pivot(index="repeat", columns="model", values="milliseconds")
        for name, other in (("speedup", times.pruned), ("control", times.control)):
            ratio = times.dense / other
            ends = [columns[f"{phase}_{name}{end}"] for end in ("_low", "", "_high")]
            assert ends == [ratio.min(), ratio.median(), ratio.max()]  # of six, the extremes
    decode = repeats[(repeats.model == "pruned") & (repeats.phase == "decode")].milliseconds
    assert columns["decode_ms_per_token_p50"] == decode.median()
    assert columns["tokens_per_second"] == pytest.approx(1000 / decode.median())
    assert columns["decode_speedup_low"] <= columns["decode_speedup"] <= columns["decode_speedup_high"]


def test_a_drifting_machine_leaves_the_paired_speedup_alone() -> None:
    drift = np.linspace(1, 3, 20)
    lines = [
        (name, phase, i, base * drift[i])
        for i in range(20)
        for phase in ("prefill", "decode")
        for name, base in (("dense", 20.0), ("pruned", 10.0), ("control", 20.0))
    ]
    frame = pd.DataFrame(lines, columns=["model", "phase", "repeat", "milliseconds"])
    columns = efficiency.summary(frame, SETTINGS)
    assert columns["decode_speedup"] == columns["decode_speedup_low"] == columns["decode_speedup_high"] == 2


def machine(kind: str, turns: int, draw: np.random.Generator) -> np.ndarray:
    """Logarithms of (turns, 3) times measured one after the other on a machine that is not quiet."""
    count = 3 * turns
    noise = draw.normal(0, 0.03, count)
    if kind == "heavy tails":
        noise = 0.03 * np.abs(draw.standard_t(2, count))
    elif kind == "skewed":
        noise = draw.exponential(0.05, count)
    elif kind == "bursts":
        noise += (draw.random(count) < 0.15) * draw.exponential(0.7, count)
    elif kind == "drift":
        noise += np.linspace(0, 1, count)
    elif kind == "autocorrelated":
        noise += lfilter([0.04], [1, -0.9], draw.normal(size=count))
    elif kind == "two speeds":
        noise += 0.6 * (np.cumsum(draw.random(count) < 0.08) % 2)
    elif kind == "coarse clock":
        noise = np.round(noise * 30) / 30
    return noise.reshape(turns, 3)


MACHINES = ("normal", "heavy tails", "skewed", "bursts", "drift", "autocorrelated", "two speeds", "coarse clock")
TRUE = 1.5  # the speed-up that is to be found


def speedups(kind: str, turns: int, draw: np.random.Generator) -> np.ndarray:
    """Of a model TRUE times as fast, timed in latency()'s turns: who comes first changes."""
    times, turn = machine(kind, turns, draw), np.arange(turns)
    dense, pruned = -turn % 3, (1 - turn) % 3  # their places in each turn
    return np.exp(times[turn, dense] - times[turn, pruned]) * TRUE


def covers(interval: tuple[float, float, float]) -> bool:
    low, _, high = interval
    return low * (1 - 1e-12) <= TRUE <= high * (1 + 1e-12)


@pytest.mark.parametrize("kind", MACHINES)
def test_the_interval_of_a_median_covers_it(kind: str) -> None:
    draw = np.random.default_rng(0)
    for turns in (6, 10, 15, 40):
        covered = [covers(efficiency.median_interval(speedups(kind, turns, draw))) for _ in range(500)]
        assert np.mean(covered) >= 0.94  # 0.95 less twice the standard error of 500 tries
    for confidence, needed in ((0.95, 6), (0.99, 8)):
        efficiency.median_interval(range(needed), confidence)
        with pytest.raises(ValueError, match=f"{needed - 1} values give no {confidence:.0%} interval of a median"):
            efficiency.median_interval(range(needed - 1), confidence)


@pytest.mark.parametrize("kind", MACHINES)
def test_the_interval_at_which_timing_ends_covers_the_speedup(kind: str) -> None:
    draw, settings = np.random.default_rng(1), replace(SETTINGS, repeats=8, precision=0.02)
    covered, ended, turns = [], [], []
    for _ in range(500):
        found = speedups(kind, 137, draw)
        done = next(n for n in range(1, 138) if efficiency._ended_by(found[:n], 0.0, settings))
        ended.append(efficiency._ended_by(found[:done], 0.0, settings))
        turns.append(done)
        covered.append(covers(efficiency.median_interval(found[:done], efficiency._confidence(settings))))
    assert np.mean(covered) >= 0.95
    assert len(set(turns)) > 1  # it did choose
    assert all(why == "precision" or n == 137 for why, n in zip(ended, turns, strict=True))


@pytest.mark.parametrize("repeats", [6, 8, 10, 15, 20, 30])
def test_all_looks_together_miss_the_median_of_any_distribution_in_one_of_twenty_at_most(
    repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interval misses by how many values lie below the median, and these come and go as fair coins fall."""
    settings = replace(SETTINGS, repeats=repeats, precision=0.02)
    rough = np.random.default_rng(0).uniform(1, 100, 30 * repeats)
    looks, honest = [], efficiency.median_interval
    monkeypatch.setattr(efficiency, "median_interval", lambda v, c: looks.append(len(v)) or honest(v, c))
    end = next(n for n in range(1, len(rough)) if efficiency._ended_by(rough[:n], 0.0, settings))
    assert looks[0] == max(repeats, 8) and looks[-1] == end and len(looks) == 8
    for spent in (
        *looks[1:],
        looks[0] + 1,
        3 * repeats,
        11 * repeats,
    ):  # the look when the seconds are spent comes anywhere
        inside, before = np.array([1.0]), 0  # probability of each number below the median, where no look has missed
        for n in (*(look for look in looks if look < spent), spent):
            inside = np.convolve(inside, binom.pmf(np.arange(n - before + 1), n - before, 0.5))
            low, _, high = honest(np.arange(1, n + 1), efficiency._confidence(settings))
            below, before = np.arange(n + 1), n
            inside[(below < low) | (below >= high)] = 0
        assert inside.sum() >= 0.95


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_sees_what_was_held_during_the_work_and_forgets_what_came_before() -> None:
    size = 200 << 20
    torch.ones(size * 2, dtype=torch.uint8)  # freed before: not to be counted
    with cost.PeakMemory("cpu") as memory:
        torch.ones(size, dtype=torch.uint8)
    assert memory.base is not None and memory.peak is not None
    assert 0.95 * size < memory.peak - memory.base < 1.3 * size
    assert memory.device_peak is None


def timed(dense: float, pruned: float, control: float, spread: float = 0.0) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    lines = [
        (name, phase, i, base * (1 + spread * draw.normal()))
        for i in range(20)
        for phase in ("prefill", "decode")
        for name, base in (("dense", dense), ("pruned", pruned), ("control", control))
    ]
    return pd.DataFrame(lines, columns=["model", "phase", "repeat", "milliseconds"])


def test_a_gain_within_the_noise_is_none() -> None:
    assert not efficiency.summary(timed(20, 10, 20, 0.02), SETTINGS)["no_measurable_gain"]
    assert efficiency.summary(timed(20, 20, 20, 0.02), SETTINGS)["no_measurable_gain"]
    assert efficiency.summary(timed(20, 19.8, 18), SETTINGS)["no_measurable_gain"]  # the control gains more
    assert efficiency.summary(timed(20, 25, 20), SETTINGS)["no_measurable_gain"]  # slower


def test_percentiles_and_mean_are_those_of_the_repeats() -> None:
    frame = timed(20, 10, 20, 0.1)
    columns, times = efficiency.summary(frame, SETTINGS), frame[(frame.model == "pruned") & (frame.phase == "prefill")]
    values = np.sort(times.milliseconds)
    assert columns["prefill_ms_mean"] == pytest.approx(values.mean())
    assert columns["prefill_ms_p90"] == pytest.approx(np.percentile(values, 90))
    assert columns["prefill_ms_p50"] <= columns["prefill_ms_p90"] <= columns["prefill_ms_p99"] <= values[-1]
    assert columns["timed_repeats"] == 20


def test_timing_ends_when_it_is_precise_or_the_seconds_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: float(next(clock)))
    rough = iter(np.random.default_rng(0).uniform(1, 100, 10**5))
    monkeypatch.setattr(efficiency, "_time_once", lambda *_: (1.0, float(next(rough))))
    model, settings = tiny_model("llama"), replace(SETTINGS, precision=0.01, seconds=30.0)
    columns, _ = efficiency.latency(model, model, settings)
    assert columns["timing_ended_by"] == "seconds" and columns["timed_repeats"] == 30  # one reading of the clock each
    columns, _ = efficiency.latency(model, model, replace(settings, repeats=10, seconds=1e6))
    assert columns["timing_ended_by"] == "repeats" and columns["timed_repeats"] == 171
    monkeypatch.setattr(efficiency, "_time_once", lambda *_: (1.0, 2.0))
    columns, _ = efficiency.latency(model, model, replace(settings, repeats=10))
    assert columns["timing_ended_by"] == "precision" and columns["timed_repeats"] == 10
    columns, _ = efficiency.latency(model, model, settings)
    assert columns["timed_repeats"] == 8  # fewer give no interval of 99 %


def test_the_cache_of_a_generation_by_hand() -> None:
    blocks, heads, width = 2, 2, 4
    length = SETTINGS.prompt_tokens + SETTINGS.output_tokens
    assert efficiency.generate_once(tiny_model("llama"), SETTINGS) == blocks * 2 * heads * width * length * 4


def test_more_tokens_than_positions_are_refused_where_they_would_be_timed() -> None:
    with pytest.raises(RequestError, match=r"efficiency.prompt_tokens=63 .* are 66 tokens together, .* 64 positions"):
        efficiency.fits(tiny_model("llama"), replace(SETTINGS, prompt_tokens=63))
    assert efficiency.fits(tiny_model("llama"), replace(SETTINGS, prompt_tokens=61))
    assert not efficiency.fits(tiny_model("llama"), replace(SETTINGS, prompt_tokens=63, repeats=0))


def test_the_bound_is_the_slower_of_reading_and_multiplying() -> None:
    row = {"nonzero_macs_per_token": 1000, "decode_ms_per_token_p50": 10.0}
    reading = efficiency.bounds(row, 2000, 1, (1e6, 1e6))
    assert reading["decode_bound"] == "memory" and reading["decode_bound_ms"] == 2.0
    assert reading["decode_bound_reached"] == 0.2 and reading["decode_macs_per_byte"] == 0.5
    multiplying = efficiency.bounds(row, 2000, 4, (1e6, 1e6))
    assert multiplying["decode_bound"] == "compute" and multiplying["decode_bound_ms"] == 4.0


def test_the_probe_divides_what_it_did_by_the_time_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(clock) / 8)  # between two readings, an eighth
    bandwidth, matrix = efficiency.roofline.__wrapped__("cpu", "float32", torch.get_num_threads())
    assert bandwidth == 8 * 256 * 2**20 and matrix == 8 * 1024**3


def test_the_probe_is_near_the_rate_of_work_of_its_kind() -> None:
    bandwidth, matrix = efficiency.roofline("cpu", "float32", torch.get_num_threads())
    numbers, square = np.ones(2**25), torch.ones(512, 512)

    def rate(amount: float, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return amount / min(seconds)

    assert 0.02 < bandwidth / rate(numbers.nbytes, numbers.sum) < 50
    assert 0.02 < matrix / rate(512**3, lambda: square @ square) < 50
