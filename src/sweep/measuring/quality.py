"""Quality: lm-eval tasks on the model in memory, with the outcome of every example.

Tasks are lm-eval's own, unmodified; others, whose data need no network, are in sweep/measuring/tasks. What is added to
lm-eval's metrics, such as the perplexity a token, which papers report and lm-eval does not, is in sweep/measuring/measures.py.
lm-eval and torch are imported when something is evaluated.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from sweep.config import Benchmarks
from sweep.measuring import catalogue, lm_eval_private, measures, words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sweep.measuring.divergence import Distributions
    from sweep.measuring.reading import Reading

_SPREAD = ("perplexity", "weighted_perplexity", "bits_per_byte")  # lm-eval's aggregations of log-likelihoods
_ROWS_AT_ONCE = 8192  # of an embedding, in float32
_BOOTSTRAP = 1000  # draws for the standard error of metrics that have no closed form

Samples: TypeAlias = pd.DataFrame  # task, document, metric, value


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Benchmarks,
    data_root: str | None,
    dense: Distributions | None = None,
    asked: dict[str, list[tuple[Any, ...]]] | None = None,
    read: Reading | None = None,
) -> tuple[dict[str, Any], Samples]:
    """(columns of the row, the outcome of every example).

    Columns are `task/metric` and `task/metric_stderr`, with `,FILTER` behind where a task filters answers by a named
    filter, and `higher_is_better`, what lm-eval says of its metrics. NaN and infinite metrics are kept, with a warning.
    asked  receives, of each task whose answers are written, the arguments of its documents' first requests
    read   how the model reads what is scored; None = each batch of it from end to end
    Raises RequestError when a task's data cannot be found.
    """
    if not settings.tasks:
        return {}, _frame([])
    import lm_eval
    import torch

    from sweep.measuring import reading
    from sweep.measuring.scorer import Scorer

    tasks = catalogue.load(settings, data_root)
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=catalogue.shots(task, settings))
        task.set_fewshot_seed(settings.fewshot_seed)
    torch.manual_seed(1234)  # of answers that are drawn; lm-eval's own
    lm = Scorer(model, tokenizer, settings.batch_size, settings.max_length, read or reading.whole)
    if dense is not None:
        lm.ids = dense.ids
    with lm_eval_private.alone_and_silent(), lm_eval_private.overflow_is_infinite():
        results = lm_eval.evaluate(
            lm,
            tasks,
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=True,
            confirm_run_unsafe_code=settings.unsafe_code,
        )
    metrics, better = _as_reported(results)
    rows: list[tuple[str, str, str, float]] = []
    for name, found in results["samples"].items():
        task = tasks["tasks"][name]
        examples, outcomes = _by_document(found, task.aggregation())
        if asked is not None and task.OUTPUT_TYPE == "generate_until":
            asked[name] = [tuple(example["arguments"][0]) for example in examples]
        documents = [measures.Document(task, example, lm, dense) for example in examples]
        measured = measures.columns(documents, outcomes, task.OUTPUT_TYPE)
        metrics |= {f"{name}/{metric}": value for metric, value in measured.items()}
        for example, outcome in zip(examples, outcomes, strict=True):
            rows += [(name, str(example["doc_id"]), metric, value) for metric, value in outcome.items()]
    _warn_of_no_numbers(metrics)
    return metrics | {"higher_is_better": json.dumps(better, sort_keys=True)}, _frame(rows)


def _warn_of_no_numbers(metrics: Mapping[str, float | None]) -> None:
    strange = [
        f"{column} is {number}"
        for column, number in metrics.items()
        if number is not None and not math.isfinite(number) and not re.search("_stderr$|_band_", column)
    ]
    if strange:
        warnings.warn(", ".join(strange), stacklevel=3)


def _as_reported(results: Mapping[str, Any]) -> tuple[dict[str, float | None], dict[str, bool]]:
    """(lm-eval's metrics by column, whether higher is better of those of which it says so)."""
    metrics: dict[str, float | None] = {}
    better: dict[str, bool] = {}
    for task, values in results["results"].items():
        directions = results["higher_is_better"].get(task, {})
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            if not comma:
                continue
            column = f"{task}/{_keyed(metric, filter_name)}"
            metrics[column] = float(value) if isinstance(value, int | float) else None
            if isinstance(directions.get(metric), bool):  # None where the parts of a group disagree
                better[column] = directions[metric]
    return metrics, better


def token_rows(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The L2 norm of every row of the matrices with one row a token: `embedding`, and `head` where it is another."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    matrices = {"embedding": embedding}
    if head is not None and head.weight.data_ptr() != embedding.data_ptr():
        matrices["head"] = head.weight
    return {
        name: np.concatenate([rows.detach().float().norm(dim=1).cpu().numpy() for rows in matrix.split(_ROWS_AT_ONCE)])
        for name, matrix in matrices.items()
    }


def rows_by_band(
    rows: dict[str, np.ndarray], dense: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Columns `embedding/…_band_B`: how large the dense model's rows are by how rare their token is, and the share pruned.

    rows    `token_rows` of the dense model; rows of no token are left out, as are tokens without a row
    pruned  the tokenizer of the pruned model, which knows the ids that it kept
    """
    from sweep.models import cut_tokenizer, token_ids

    ids = token_ids.known(dense)
    bands = words.of_vocabulary(cut_tokenizer.original(dense), ids)
    found: dict[str, float] = {}
    for matrix, norms in rows.items():
        before, after = (token_ids.Rows.of(tokenizer, len(norms)) for tokenizer in (dense, pruned))
        here = (before.table[ids] >= 0) & ~before.removed[ids]
        kept = np.flatnonzero(~after.removed[ids[here]])
        by_band = words.rows_by_band(bands[here], norms[before.table[ids[here]]], kept)
        found |= {f"{matrix}/{name}": value for name, value in by_band.items()}
    return found


def _by_document(
    examples: Iterable[dict[str, Any]], aggregation: Mapping[str, Callable[..., Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """(each document's example under the task's first filter, its metrics under every filter and its log-likelihood).

    The log-likelihood is that of what the example asks for; of its first choice, if it has any.
    aggregation  lm-eval's functions from the documents' values to the metrics
    """
    first: dict[int, dict[str, Any]] = {}
    outcomes: dict[int, dict[str, float]] = {}
    for example in examples:
        document = example["doc_id"]
        if document not in first:
            first[document] = example
            outcomes[document] = {"log_likelihood": measures.number(example["filtered_resps"][0])}
        for name in example["metrics"]:
            kind = getattr(aggregation.get(name), "__name__", "")
            outcomes[document] |= _values(_keyed(name, example["filter"]), example[name], kind)
    return list(first.values()), list(outcomes.values())


def _values(metric: str, value: Any, aggregation: str) -> dict[str, float]:
    """What a document adds to a metric: its number, or a log-likelihood and what it is spread over (`METRIC_weight`).

    Empty where it is no number but, say, the answer with the right one (F1, BLEU): of such the whole alone has a metric.
    """
    if aggregation in _SPREAD:
        log_likelihood, weight = value if isinstance(value, list | tuple) else (value, 1)
        return {metric: float(log_likelihood), f"{metric}_weight": float(weight)}
    return {metric: float(value)} if isinstance(value, int | float) else {}


def _keyed(metric: str, filter_name: str) -> str:
    """What a metric is called in columns and samples: `exact_match,strict-match`; lm-eval's plain filter goes unsaid."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _frame(rows: list[tuple[str, str, str, float]]) -> Samples:
    return pd.DataFrame(rows, columns=["task", "document", "metric", "value"])
