"""What runs a model while it is timed: Python, operation by operation, or compiled, so that the weights are what is measured.

Decoding a small model in Python takes more time between its products than in them, and hides what pruning gains. The compiled
engine has a key-value cache of fixed size and `torch.compile`, on CUDA with CUDA graphs. Not every model can be compiled:
then both models of a pair run in Python, and the row says why.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from sweep import cache
from sweep.config import Efficiency

_COMPILED = 64  # times that one process may compile, for all its models and shapes
_WARM = 3  # calls of each shape before a clock runs: compiled in the first, CUDA graphs recorded in the next


@dataclass(frozen=True)
class Engine:
    """One model, ready to generate."""

    prefill: Callable[
        [Tensor], Tensor
    ]  # the logits (batch, 1, tokens) after a prompt (batch, length); forgets what was read
    decode: Callable[[Tensor], Tensor]  # those after one more token (batch, 1)
    reset: Callable[[], object] = lambda: None  # what need not be timed of forgetting


def eager(model: PreTrainedModel) -> Engine:
    """As transformers runs it, with a cache that grows."""
    held: list[Any] = [None]

    def read(tokens: Tensor, past: Any) -> Tensor:
        output = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        held[0] = output.past_key_values
        return output.logits[:, -1:]

    return Engine(lambda prompt: read(prompt, None), lambda token: read(token, held[0]))


def compiled(model: PreTrainedModel, prompt: Tensor, output_tokens: int) -> Engine:
    """Compiled for prompts of this shape and so many tokens after them. Raises whatever keeps it from being compiled."""
    # a row of zeros for the position after the last: some masks look one ahead
    past = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + output_tokens + 1)
    # compiled in this process: a pool of others, forked from one that has threads, may wait for ever
    how: dict[str, Any] = {"compile_threads": 1} | ({"triton.cudagraphs": True} if prompt.device.type == "cuda" else {})

    def read(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1:]

    step = torch.compile(read, dynamic=False, options=how)
    # one function, compiled for each shape of each model: beyond a limit torch would go on in Python without a word
    limits = torch._dynamo.config.patch(recompile_limit=_COMPILED, fail_on_recompile_limit_hit=True)
    with torch.inference_mode(), limits:
        plain = read(prompt)  # also makes the cache, whose tensors must not be made while it is compiled
        if not all(getattr(layer, "is_compileable", False) for layer in past.layers):
            raise RuntimeError("it keeps a state that is no cache of fixed size")
        for _ in range(_WARM):
            past.reset()
            found = step(prompt).clone()
            for _ in range(min(2, output_tokens)):
                step(found.argmax(-1)).clone()
    scale = plain.abs().max().float().clamp(min=1e-6)
    error = float((found.float() - plain.float()).abs().max() / scale)
    if not error < (1e-2 if model.dtype == torch.float32 else 2e-1):
        raise RuntimeError(f"compiled, its logits differ from the model's by {error:.2g} of the largest")
    return Engine(step, step, past.reset)


def engines(
    pruned: PreTrainedModel, dense: PreTrainedModel, settings: Efficiency, prompt: Tensor
) -> tuple[Engine, Engine, dict[str, Any]]:
    """(one for each model, both of one kind, the columns that say which and why not another)."""
    columns: dict[str, Any] = {"engine": "eager", "engine_fallback": None}
    for is_again in (False, True) if settings.engine == "compiled" else ():
        try:
            with _limited(settings.compile_seconds):
                first = compiled(pruned, prompt, settings.output_tokens)
                second = first if dense is pruned else compiled(dense, prompt, settings.output_tokens)
            return first, second, {"engine": "compiled", "engine_fallback": None}
        except Exception as error:  # whatever a compiler may raise: the row keeps it
            torch.compiler.reset()
            lines = str(error).strip().splitlines() or [""]
            columns["engine_fallback"] = f"{type(error).__name__}: {lines[0]}"[:500]
            if is_again or "ImportError" not in lines[0]:
                break
            shutil.rmtree(_code(), ignore_errors=True)  # a process that was killed has left half of a library there
    first = eager(pruned)
    return first, first if dense is pruned else eager(dense), columns


def _code() -> Path:
    """Where compiled code is kept, for all cells of the same shapes."""
    return cache.folder() / "inductor" / "code"


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """What is compiled within keeps its code in sweep's cache, and takes at most so many seconds: then TimeoutError.

    The limit needs the main thread, in which cells run.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_code())  # which torch has set by now
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"compiling took longer than efficiency.compile_seconds={seconds:g}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
