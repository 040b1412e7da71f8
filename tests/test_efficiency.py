"""Counts against hand counts; intervals against their definition; what must be equal is."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import random_tokens, tiny_model
from sweep import efficiency, methods, models
from sweep.config import Efficiency, RequestError, Weight

SETTINGS = Efficiency(prompt_tokens=8, output_tokens=3, warmup=1, repeats=6)


def test_counts_of_a_tiny_llama_by_hand() -> None:
    hidden, inner, vocabulary, blocks = 16, 24, 64, 2
    attention = hidden * (16 + 8 + 8) + 16 * hidden
    ffn = 3 * hidden * inner
    linear = blocks * (attention + ffn)
    norms = (2 * blocks + 1) * hidden
    counted = efficiency.counted(tiny_model("llama"))
    assert counted["parameters"] == linear + norms + 2 * vocabulary * hidden
    assert counted["macs_per_token"] == linear + vocabulary * hidden
    assert counted["weights_bytes"] == 4 * counted["parameters"] == counted["stored_bytes"]


def test_forward_passes_are_those_of_the_calibration_text(family: str) -> None:
    tokens = random_tokens()
    passes = {}
    for criterion, sequential in (("magnitude", True), ("wanda", False), ("wanda", True)):
        model = tiny_model(family)
        with efficiency.ForwardPasses(model) as counted:
            methods.prune(model, Weight("weight", criterion=criterion), 0.5, tokens, sequential=sequential)
        passes[criterion, sequential] = counted.of(tokens.numel())
        model(tokens)  # counted no more
        assert counted.of(tokens.numel()) == passes[criterion, sequential] and counted.of(0) is None
    # twice through the first block; through the second, the last, once: nobody reads what its pruned form puts out
    assert passes == {("magnitude", True): 0, ("wanda", False): 1, ("wanda", True): 1.5}
    model = tiny_model(family)
    with efficiency.ForwardPasses(model) as counted:
        copy.deepcopy(model)(tokens)
    assert counted.of(tokens.numel()) == 1


def test_zeros_in_a_dense_matrix_change_the_nonzero_counts_alone(family: str) -> None:
    model = tiny_model(family)
    before = efficiency.counted(model)
    removed = methods.prune(model, Weight("weight"), 0.5, None).removed
    after = efficiency.counted(model)
    assert {name for name in before if before[name] != after[name]} == {"nonzero_parameters", "nonzero_macs_per_token"}
    assert before["nonzero_macs_per_token"] - after["nonzero_macs_per_token"] == removed


def test_tied_weights_count_once_and_multiply_in_the_head() -> None:
    model = tiny_model("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    counted = efficiency.counted(model)
    assert counted["parameters"] == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    assert counted["macs_per_token"] == head + sum(models.weight(m).numel() for m in models.linears(model).values())


def test_timing_shows_how_far_it_is(capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("llama")
    efficiency.latency(model, model, SETTINGS, vocabulary=64)
    drawn = capsys.readouterr().err
    assert "timing:" in drawn and f"/{SETTINGS.repeats} [" in drawn


def test_every_repeat_is_kept_and_the_row_follows_from_them(family: str) -> None:
    model = tiny_model(family)
    columns, repeats = efficiency.latency(model, model, SETTINGS, vocabulary=64)
    assert len(repeats) == SETTINGS.repeats * 3 * 2
    assert (repeats.milliseconds > 0).all()
    assert columns == efficiency.summary(repeats, SETTINGS) | {"timing_ended_by": "repeats"}
    decode = repeats[(repeats.model == "pruned") & (repeats.phase == "decode")].milliseconds
    assert columns["decode_ms_per_token_p50"] == decode.median()
    assert columns["tokens_per_second"] == pytest.approx(1000 / decode.median())
    assert columns["decode_speedup_low"] <= columns["decode_speedup"] <= columns["decode_speedup_high"]


def test_a_drifting_machine_leaves_the_paired_speedup_alone() -> None:
    drift = np.linspace(1, 3, 20)
    lines = [(name, phase, i, base * drift[i]) for i in range(20) for phase in ("prefill", "decode")
             for name, base in (("dense", 20.0), ("pruned", 10.0), ("control", 20.0))]  # fmt: skip
    frame = pd.DataFrame(lines, columns=["model", "phase", "repeat", "milliseconds"])
    columns = efficiency.summary(frame, SETTINGS)
    assert columns["decode_speedup"] == columns["decode_speedup_low"] == columns["decode_speedup_high"] == 2


def test_the_interval_of_a_median_covers_it() -> None:
    draw = np.random.default_rng(0)
    covered = [low <= 1.0 <= high for low, _, high in
               (efficiency.median_interval(pd.Series(draw.normal(1, 1, 11))) for _ in range(2000))]  # fmt: skip
    assert np.mean(covered) >= 0.95
    with pytest.raises(ValueError, match="5 values give no 95% interval of a median"):
        efficiency.median_interval(pd.Series(range(5)))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_sees_what_was_held_during_the_work_and_forgets_what_came_before() -> None:
    size = 200 << 20
    torch.ones(size * 2, dtype=torch.uint8)  # freed before: not to be counted
    with efficiency.PeakMemory("cpu") as memory:
        torch.ones(size, dtype=torch.uint8)
    assert memory.base is not None and memory.peak is not None
    assert 0.95 * size < memory.peak - memory.base < 1.3 * size
    assert memory.device_peak is None


def timed(dense: float, pruned: float, control: float, spread: float = 0.0) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    lines = [(name, phase, i, base * (1 + spread * draw.normal())) for i in range(20) for phase in ("prefill", "decode")
             for name, base in (("dense", dense), ("pruned", pruned), ("control", control))]  # fmt: skip
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
    columns, _ = efficiency.latency(model, model, settings, vocabulary=64)
    assert columns["timing_ended_by"] == "seconds" and columns["timed_repeats"] == 30  # one reading of the clock each
    monkeypatch.setattr(efficiency, "_time_once", lambda *_: (1.0, 2.0))
    columns, _ = efficiency.latency(model, model, settings, vocabulary=64)
    assert columns["timing_ended_by"] == "precision" and columns["timed_repeats"] == settings.repeats


def test_the_cache_of_a_generation_by_hand() -> None:
    blocks, heads, width = 2, 2, 4
    length = SETTINGS.prompt_tokens + SETTINGS.output_tokens
    assert efficiency.generate_once(tiny_model("llama"), SETTINGS) == blocks * 2 * heads * width * length * 4


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(RequestError, match=r"efficiency.prompt_tokens=63 .* are 66 tokens together, .* 64 positions"):
        efficiency.check_fits(tiny_model("llama"), replace(SETTINGS, prompt_tokens=63))
    efficiency.check_fits(tiny_model("llama"), replace(SETTINGS, prompt_tokens=61))


def test_the_bound_is_the_slower_of_reading_and_multiplying() -> None:
    row = {"nonzero_macs_per_token": 1000, "decode_ms_per_token_p50": 10.0}
    reading = efficiency.bounds(row, 2000, 1, (1e6, 1e6))
    assert reading["decode_bound"] == "memory" and reading["decode_bound_ms"] == 2.0
    assert reading["decode_bound_reached"] == 0.2 and reading["decode_macs_per_byte"] == 0.5
    multiplying = efficiency.bounds(row, 2000, 4, (1e6, 1e6))
    assert multiplying["decode_bound"] == "compute" and multiplying["decode_bound_ms"] == 4.0


def test_the_probe_measures_rates_and_the_head_is_read_with_or_without_the_embedding() -> None:
    bandwidth, matrix = efficiency.roofline("cpu", "float32", torch.get_num_threads())
    assert 1e8 < bandwidth < 1e14 and 1e7 < matrix < 1e16
    tied, untied = tiny_model("gpt2"), tiny_model("llama")
    assert efficiency.read_bytes(tied) == efficiency.counted(tied)["weights_bytes"]
    assert efficiency.counted(untied)["weights_bytes"] - efficiency.read_bytes(untied) == 64 * 16 * 4
