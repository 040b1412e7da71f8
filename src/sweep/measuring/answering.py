"""How long an answer takes: of the pruned and the dense model in turns, prompt by prompt, each until it has done.

A pruned model may need more tokens for an answer although each is faster. So what is timed is the whole of it, from the
prompt to the string that ends it, one answer after the other, as a user is answered, in Python and not compiled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import metrics
from sweep.config import Benchmarks, Efficiency
from sweep.measuring import generation

if TYPE_CHECKING:
    from sweep.measuring.scorer import Scorer

Requests: TypeAlias = Mapping[str, Sequence[tuple[Any, ...]]]  # the arguments of each task's, one a document
_FEWEST = 3  # prompts that are timed, however long their answers take


def timed(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[Any, Any],
    asked: Requests,
    settings: Efficiency,
    benchmarks: Benchmarks,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(columns `task/ms_per_answer` and so on, every timed answer: model, phase, repeat, milliseconds).

    models, tokenizers  of the pruned model and of the dense one, which may be one

    As many prompts of each task as `settings.repeats`, spread over its documents; fewer where `settings.seconds` are
    spent. Which they are depends on the task alone, so that all cells answer the same ones.
    """
    from sweep.measuring.scorer import Scorer  # and lm-eval, which takes seconds to import

    columns: dict[str, Any] = {}
    repeats: list[tuple[str, str, int, float]] = []
    writers = {
        name: _writer(Scorer(model, tokenizer, benchmarks.batch_size, benchmarks.max_length))
        for name, model, tokenizer in zip(("pruned", "dense"), models, tokenizers, strict=True)
    }
    for task, requests in tqdm(asked.items(), desc="timing answers", unit="task", leave=False):
        taken: dict[str, list[float]] = {name: [] for name in writers}
        started = time.perf_counter()
        for repeat, request in enumerate(_spread(requests, settings.repeats)):
            if repeat >= _FEWEST and time.perf_counter() - started > settings.seconds:
                break
            for name in sorted(writers, reverse=bool(repeat % 2)):
                taken[name].append(writers[name](request))
                repeats.append((name, f"{task}/answer", repeat, taken[name][-1]))
        columns |= {f"{task}/{name}": value for name, value in _columns(taken["pruned"], taken["dense"]).items()}
    return columns, pd.DataFrame(repeats, columns=["model", "phase", "repeat", "milliseconds"])


def _spread(requests: Sequence[tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
    """So many of them at equal distances, in an order in which any beginning is spread as well."""
    places = np.unique(np.linspace(0, len(requests) - 1, min(count, len(requests))).round().astype(int))
    return [requests[i] for i in np.random.default_rng(0).permutation(places)]


def _writer(lm: Scorer) -> Callable[[tuple[Any, ...]], float]:
    """The milliseconds in which a model answers a request."""
    way = generation.Way.of(lm.model)

    def write(request: tuple[Any, ...]) -> float:
        question = lm.question(*request)
        start = time.perf_counter()
        generation.write(lm.model, lm.tokenizer, [question], rows=1, way=way)
        return 1000 * (time.perf_counter() - start)

    write(("Once", {"until": [], "max_gen_toks": 2}))  # what a first call alone does
    return write


def _columns(pruned: Sequence[float], dense: Sequence[float]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, milliseconds in (("ms_per_answer", pruned), ("dense_ms_per_answer", dense)):
        found[name], found[metrics.stderr(name)] = metrics.ratio(milliseconds, np.ones(len(milliseconds)))
    found["answer_speedup"], found[metrics.stderr("answer_speedup")] = metrics.ratio(dense, pruned)
    return found


def correct_a_second(row: Mapping[str, Any], samples: pd.DataFrame, tasks: Sequence[str]) -> dict[str, float]:
    """Columns `task/correct_answers_per_second`: the share of right answers over the seconds that one takes.

    row  with `ms_per_answer` of the tasks and what they were scored by
    Of tasks whose main metric is 0 or 1 of every document; under the first filter of its answers, where it has several.
    """
    found = {}
    for task in tasks:
        own = metrics.main_metrics(name for name in row if name.startswith(f"{task}/"))
        values = samples[(samples.task == task) & (samples.metric == own[0].partition("/")[2])].value if own else ()
        took = row.get(f"{task}/ms_per_answer")
        if len(values) and set(values) <= {0.0, 1.0} and not metrics.is_loss(own[0]) and took and math.isfinite(took):
            found[f"{task}/correct_answers_per_second"] = 1000 * float(np.mean(values)) / took
    return found
