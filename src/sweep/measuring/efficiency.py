"""What a model costs, measured: milliseconds, peak memory, joules. What can be counted is in counting.py.

Latency is measured for the dense and the pruned model alternately, because the speed of a shared machine drifts by more than
pruning gains; the ratio within a pair survives the drift.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.stats import binom
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import config
from sweep.config import Efficiency
from sweep.measuring import energy, engine
from sweep.measuring.engine import Engine

# How often timing looks, at most, at what it has found so far.
_LOOKS = 8
# How many times the repeats of one look there are by the next.
_GROWTH = 1.5
_ENERGY_SECONDS = 2.0  # of decoding, over which energy is counted


def latency(
    pruned: PreTrainedModel, dense: PreTrainedModel, settings: Efficiency
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Prefill and decode latency of both models, measured alternately, and the dense model's once more as a control.

    pruned, dense  may be one object: then the speed-up is the noise floor of the machine, and so is the control's always
    returns        columns of the row, and every timed repeat: model, phase, repeat, milliseconds (decode: per token)

    `settings.repeats` triples are timed; with `settings.precision`, up to 18 times as many, until the decode speed-up
    is known to that fraction or `settings.seconds` are spent. What ended it is the column `timing_ended_by`.
    """
    readable = min(model.get_input_embeddings().weight.shape[0] for model in (pruned, dense))
    prompt = torch.randint(
        readable, (settings.batch_size, settings.prompt_tokens), generator=torch.Generator().manual_seed(0)
    ).to(pruned.device)
    runs, runs_dense, ran = engine.engines(pruned, dense, settings, prompt)
    timed = [("dense", runs_dense), ("pruned", runs), ("control", runs_dense)]
    repeats: list[tuple[str, str, int, float]] = []
    for _ in range(settings.warmup):
        for _, one in timed[:2]:
            _time_once(one, prompt, settings.output_tokens)
    speedups: list[float] = []  # of decoding
    started, ended_by = time.perf_counter(), None
    with tqdm(total=settings.repeats, desc="timing", unit="repeat", leave=False) as progress:
        while ended_by is None:
            repeat, decode = len(speedups), {}
            for name, one in timed[repeat % 3 :] + timed[: repeat % 3]:
                prefill, decode[name] = _time_once(one, prompt, settings.output_tokens)
                repeats += [(name, "prefill", repeat, prefill), (name, "decode", repeat, decode[name])]
            speedups.append(decode["dense"] / decode["pruned"])
            ended_by = _ended_by(speedups, time.perf_counter() - started, settings)
            progress.update()  # between repeats: nothing is drawn while something is timed
    frame = pd.DataFrame(repeats, columns=["model", "phase", "repeat", "milliseconds"])
    return summary(frame, settings) | ran | {"timing_ended_by": ended_by}, frame


def _ended_by(speedups: Sequence[float], seconds: float, settings: Efficiency) -> str | None:
    """Why timing ends after these repeats, or None when it goes on.

    Timing that stops as soon as an interval looks narrow stops on the luckiest of many. So few are looked at: after the
    repeats, after half as many again, and so on, eight times at most, the last time where the seconds are spent. Each
    misses in one of a hundred, and any of them in one of twenty at most, whatever the times' distribution: an interval
    of a median misses by the number of values below it, and how a count of fair coins wanders can be computed.
    """
    done, confidence = len(speedups), _confidence(settings)
    first = max(settings.repeats, _fewest(confidence))
    if settings.precision is None:
        return "repeats" if done >= first else None
    looks = [math.ceil(first * _GROWTH**i) for i in range(_LOOKS)]
    spent = seconds >= settings.seconds and done >= first
    if done not in looks and not spent:
        return None
    low, median, high = median_interval(np.asarray(speedups), confidence)
    if (high - low) / 2 <= settings.precision * median:
        return "precision"
    return "seconds" if spent else "repeats" if done == looks[-1] else None


def _confidence(settings: Efficiency) -> float:
    """Of each interval that is looked at, so that the one at which timing ends covers 95 %."""
    return 0.95 if settings.precision is None else 0.99


def _fewest(confidence: float) -> int:
    """The fewest values that give an interval of a median: all are on one side of it with probability 2^(1 - n)."""
    return math.ceil(1 - math.log2(1 - confidence))


def summary(frame: pd.DataFrame, settings: Efficiency) -> dict[str, Any]:
    """The row's latency columns from the timed repeats."""
    interval = functools.partial(median_interval, confidence=_confidence(settings))
    columns: dict[str, Any] = {"timed_repeats": int(frame.repeat.nunique())}
    gains = []
    for phase, name in (("prefill", "prefill_ms"), ("decode", "decode_ms_per_token")):
        times = frame[frame.phase == phase].pivot(index="repeat", columns="model", values="milliseconds")
        columns |= {
            f"{name}_mean": float(times.pruned.mean()),
            f"{name}_p50": float(times.pruned.median()),
            f"{name}_p90": float(times.pruned.quantile(0.9)),
            f"{name}_p99": float(times.pruned.quantile(0.99)),
            f"dense_{name}_p50": float(times.dense.median()),
        }
        low, median, high = interval(times.dense / times.pruned)
        columns |= {f"{phase}_speedup": median, f"{phase}_speedup_low": low, f"{phase}_speedup_high": high}
        noise_low, noise, noise_high = interval(times.dense / times.control)
        columns |= {f"{phase}_control": noise, f"{phase}_control_low": noise_low, f"{phase}_control_high": noise_high}
        gains.append(low > max(1.0, noise_high))
    columns["no_measurable_gain"] = not any(gains)
    columns["tokens_per_second"] = 1000 * settings.batch_size / columns["decode_ms_per_token_p50"]
    return columns


def median_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, median, high): the median with its distribution-free interval from order statistics.

    Raises ValueError for too few values: 95 % take 6, 99 % take 8.
    """
    ordered = np.sort(np.asarray(values))
    n = len(ordered)
    outside = _cut_off(n, confidence)
    if outside == 0:
        raise ValueError(f"{n} values give no {confidence:.0%} interval of a median")
    return float(ordered[outside - 1]), float(np.median(ordered)), float(ordered[n - outside])


@functools.lru_cache
def _cut_off(n: int, confidence: float) -> int:
    """How many of n values lie outside the interval at each end."""
    return int(binom.ppf((1 - confidence) / 2, n, 0.5))


@torch.inference_mode()
def _time_once(runs: Engine, prompt: Tensor, output_tokens: int) -> tuple[float, float]:
    """(milliseconds to the first token, milliseconds of one decoded token after it), greedy, with a key-value cache."""
    synchronise = _synchroniser(prompt.device)
    runs.reset()
    synchronise()
    start = time.perf_counter()
    token = runs.prefill(prompt).argmax(-1)
    synchronise()
    prefilled = time.perf_counter()
    for _ in range(output_tokens):
        token = runs.decode(token).argmax(-1)
    synchronise()
    decoded = time.perf_counter()
    return 1000 * (prefilled - start), 1000 * (decoded - prefilled) / output_tokens


@torch.inference_mode()
def energy_of_decoding(model: PreTrainedModel, settings: Efficiency, read: list[energy.Counter]) -> dict[str, Any]:
    """Joules of one decoded token, and which counters say so; null without a counter, never estimated.

    Generations of `output_tokens` after the prompt, whose energy is left out, until they have taken `_ENERGY_SECONDS`:
    counters move in steps of milliseconds on a processor and of a tenth of a second on a GPU.
    """
    if not read:
        return {"energy_joules_per_token": None, "energy_source": None}
    prompt = torch.zeros((settings.batch_size, settings.prompt_tokens), dtype=torch.long, device=model.device)
    synchronise = _synchroniser(model.device)
    joules, seconds, tokens = 0.0, 0.0, 0
    while seconds < _ENERGY_SECONDS:
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
        synchronise()
        start = time.perf_counter()

        def decode(cache: Any = cache) -> None:
            for _ in range(settings.output_tokens):
                cache = model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True).past_key_values
            synchronise()

        joules += energy.of(decode, read)
        seconds += time.perf_counter() - start
        tokens += settings.output_tokens * settings.batch_size
    return {"energy_joules_per_token": joules / tokens, "energy_source": ", ".join(counter.name for counter in read)}


def _synchroniser(device: torch.device) -> Callable[[], Any]:
    """Waits for the device's queue: without it, a clock reads when work was asked for, not when it was done."""
    backend = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    return backend.synchronize if backend else lambda: None


@torch.inference_mode()
def generate_once(model: PreTrainedModel, settings: Efficiency) -> int | None:
    """One prefill and decode, the work during which memory is measured; returns the bytes of its key-value cache.

    None where the model keeps another kind of state.
    """
    tokens = torch.zeros((settings.batch_size, settings.prompt_tokens), dtype=torch.long, device=model.device)
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    for _ in range(settings.output_tokens):
        cache = model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True).past_key_values
    parts = [getattr(layer, part, None) for layer in getattr(cache, "layers", []) for part in ("keys", "values")]
    held = [tensor for tensor in parts if isinstance(tensor, Tensor)]
    if not held or len(held) < len(parts):
        return None
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def fits(model: PreTrainedModel, settings: Efficiency) -> bool:
    """Whether the model can generate what is asked for; False only where it would not be timed. Raises RequestError."""
    return config.fits(settings, getattr(model.config, "max_position_embeddings", None))


@functools.lru_cache
def roofline(device: str, dtype: str, threads: int) -> tuple[float, float]:
    """(bytes a second read from memory, multiply-accumulates a second of a large product), the best of a second's tries.

    Once a process and setting. `threads` is the count that torch is set to; it is part of what was measured.
    """
    assert device != "cpu" or threads == torch.get_num_threads()
    memory = torch.ones(2**26, dtype=torch.float32, device=device)  # 256 MiB: beyond any cache
    side = 1024 if device == "cpu" else 4096
    matrix = torch.ones((side, side), dtype=getattr(torch, dtype), device=device)
    synchronise = _synchroniser(torch.device(device))

    def best(work: Callable[[], Any]) -> float:
        seconds: list[float] = []
        end = time.perf_counter() + 0.5
        while len(seconds) < 3 or time.perf_counter() < end:
            synchronise()
            start = time.perf_counter()
            work()
            synchronise()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    with torch.inference_mode():
        return memory.numel() * 4 / best(memory.sum), side**3 / best(lambda: matrix @ matrix)


def bounds(row: Mapping[str, Any], cell_bytes: float, batch_size: int, rates: tuple[float, float]) -> dict[str, Any]:
    """How near a decoded token is to what memory and arithmetic allow, as columns.

    row         with `nonzero_macs_per_token` and `decode_ms_per_token_p50`
    cell_bytes  read for one step: weights that multiply, as held, and the key-value cache
    rates       of `roofline`

    The bound is the larger of the time to read these bytes and the time of the multiplications by weights that are not
    zero. A model that fits in the processor's caches can be faster than it.
    """
    bandwidth, matrix = rates
    macs = row["nonzero_macs_per_token"] * batch_size
    reading, multiplying = 1000 * cell_bytes / bandwidth, 1000 * macs / matrix
    return {
        "memory_bytes_per_second": bandwidth,
        "matrix_macs_per_second": matrix,
        "decode_macs_per_byte": macs / cell_bytes,
        "decode_bound": "memory" if reading >= multiplying else "compute",
        "decode_bound_ms": max(reading, multiplying),
        "decode_bound_reached": max(reading, multiplying) / row["decode_ms_per_token_p50"],
    }
