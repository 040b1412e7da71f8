"""What a model costs: counted (parameters, bytes, multiplications) and measured (milliseconds, peak memory).

The two are never mixed. Latency is measured for the dense and the pruned model in turn, because the speed of a shared
machine drifts by more than pruning gains; the ratio within a pair survives the drift.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import execution, models
from sweep.config import Efficiency


def counted(model: PreTrainedModel) -> dict[str, int]:
    """Parameters, bytes and multiply-accumulates of one token.

    Tied weights count once as parameters and bytes, and where they multiply: an embedding is a lookup, the head a
    product. A compressed matrix counts as the parameters and products that it stands for, and with the bytes that it
    takes. Attention scores, whose cost depends on the context and not on the weights, are left out.
    """
    parameters = list(model.parameters())  # each tensor once
    layers = [*models.linears(model).values(), model.get_output_embeddings()]
    weights = [models.weight(layer) for layer in layers if layer is not None]
    state = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.layout == torch.strided}
    sparse = execution.compressed(model)
    places = sum(layer.out_features * layer.in_features for layer in sparse)  # zeros included: the model's size
    nonzeros, held = sum(layer.nonzeros for layer in sparse), sum(layer.held_bytes for layer in sparse)
    stored_apart = sum(layer.held_bytes for layer in sparse if isinstance(layer, execution.CsrLinear))
    return {
        "parameters": sum(p.numel() for p in parameters) + places,
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in parameters) + nonzeros,
        "weights_bytes": sum(p.numel() * p.element_size() for p in parameters) + held,
        "stored_bytes": sum(t.numel() * t.element_size() for t in state.values()) + stored_apart,
        "macs_per_token": sum(w.numel() for w in weights) + places,
        "nonzero_macs_per_token": sum(int(torch.count_nonzero(w)) for w in weights) + nonzeros,
    }


class PeakMemory:
    """Peak memory of a stretch of work in bytes: of this process, and of the CUDA device when there is one.

    The process's own high-water mark is reset first. `ru_maxrss` will not do: a child starts at its parent's value.
    Where the system offers no such mark (macOS), the resident columns are null, never guessed.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        _return_freed_memory()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.base = self._resident(reset=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self._resident(reset=False)
        self.device_peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    @staticmethod
    def _resident(*, reset: bool) -> int | None:
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024


def _return_freed_memory() -> None:
    """Have the C library give freed memory back, so that it is not counted as in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def latency(
    pruned: PreTrainedModel, dense: PreTrainedModel, settings: Efficiency, vocabulary: int
) -> tuple[dict[str, float], pd.DataFrame]:
    """Prefill and decode latency of both models, measured in turn.

    pruned, dense  may be one object: then the speed-up is the noise floor of the machine
    returns        columns of the row, and every timed repeat: model, phase, repeat, milliseconds (decode: per token)
    """
    prompt = torch.randint(vocabulary, (settings.batch_size, settings.prompt_tokens),
                           generator=torch.Generator().manual_seed(0)).to(pruned.device)  # fmt: skip
    repeats = []
    for repeat in tqdm(range(-settings.warmup, settings.repeats), desc="timing", unit="pair", leave=False):
        order = [("dense", dense), ("pruned", pruned)]
        for name, model in order if repeat % 2 == 0 else order[::-1]:
            prefill, decode = _time_once(model, prompt, settings.output_tokens)
            if repeat >= 0:
                repeats += [(name, "prefill", repeat, prefill), (name, "decode", repeat, decode)]
    frame = pd.DataFrame(repeats, columns=["model", "phase", "repeat", "milliseconds"])
    return summary(frame, settings), frame


def summary(frame: pd.DataFrame, settings: Efficiency) -> dict[str, float]:
    """The row's latency columns from the timed repeats."""
    columns = {}
    for phase, name in (("prefill", "prefill_ms_p50"), ("decode", "decode_ms_per_token_p50")):
        times = frame[frame.phase == phase].pivot(index="repeat", columns="model", values="milliseconds")
        columns[name] = float(times.pruned.median())
        columns[f"dense_{name}"] = float(times.dense.median())
        low, median, high = median_interval(times.dense / times.pruned)
        columns |= {f"{phase}_speedup": median, f"{phase}_speedup_low": low, f"{phase}_speedup_high": high}
    columns["tokens_per_second"] = 1000 * settings.batch_size / columns["decode_ms_per_token_p50"]
    return columns


def median_interval(values: pd.Series, confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, median, high): the median with its distribution-free interval from order statistics (needs 6 values)."""
    ordered = np.sort(values.to_numpy())
    n = len(ordered)
    outside = int(binom.ppf((1 - confidence) / 2, n, 0.5))  # values cut off at each end
    if outside == 0:
        raise ValueError(f"{n} values give no {confidence:.0%} interval of a median")
    return float(ordered[outside - 1]), float(np.median(ordered)), float(ordered[n - outside])


@torch.inference_mode()
def _time_once(model: PreTrainedModel, prompt: Tensor, output_tokens: int) -> tuple[float, float]:
    """(milliseconds of the prefill, milliseconds of one decoded token), greedy, with a key-value cache."""
    synchronise = _synchroniser(prompt.device)
    synchronise()
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    synchronise()
    prefilled = time.perf_counter()
    for _ in range(output_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    synchronise()
    decoded = time.perf_counter()
    return 1000 * (prefilled - start), 1000 * (decoded - prefilled) / output_tokens


def _synchroniser(device: torch.device) -> Callable[[], Any]:
    """Waits for the device's queue: without it, a clock reads when work was asked for, not when it was done."""
    backend = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    return backend.synchronize if backend else lambda: None


def generate_once(model: PreTrainedModel, settings: Efficiency) -> None:
    """One prefill and decode: the work during which memory is measured."""
    prompt = torch.zeros((settings.batch_size, settings.prompt_tokens), dtype=torch.long, device=model.device)
    _time_once(model, prompt, settings.output_tokens)
