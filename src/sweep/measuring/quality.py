"""Quality: lm-eval tasks on the model in memory, with the outcome of every example.

Tasks are lm-eval's own, unmodified; four more, whose data need no network, are in sweep/measuring/tasks. Perplexity per token is
added where a task gives the log-likelihood of whole texts, because papers report it and lm-eval does not; loss and
accuracy by how rare the words are (sweep/measuring/words.py); and multiple choice as classification (sweep/measuring/classification.py).
lm-eval and torch are imported when something is evaluated.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from sweep.config import Benchmarks
from sweep.measuring import catalogue, classification, lm_eval_private, words
from sweep.metrics import pooled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sweep.measuring.divergence import Distributions
    from sweep.measuring.scorer import Scorer, Text

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
) -> tuple[dict[str, Any], Samples]:
    """(columns of the row, the outcome of every example).

    Columns are `task/metric` and `task/metric_stderr`, with `,FILTER` behind where a task filters answers by a named
    filter, and `higher_is_better`, what lm-eval says of its metrics. NaN and infinite metrics are kept, with a warning.
    Raises RequestError when a task's data cannot be found.
    """
    if not settings.tasks:
        return {}, _frame([])
    import lm_eval
    import torch

    from sweep.measuring.scorer import Scorer

    tasks = catalogue.load(settings, data_root)
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=catalogue.shots(task, settings))
        task.set_fewshot_seed(settings.fewshot_seed)
    torch.manual_seed(1234)  # of answers that are drawn; lm-eval's own
    lm = Scorer(model, tokenizer, settings.batch_size, settings.max_length)
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
    rows: list[tuple[str, str, str, float]] = []
    for task, examples in results["samples"].items():
        kind = tasks["tasks"][task].OUTPUT_TYPE
        examples, outcomes = _by_document(examples, tasks["tasks"][task].aggregation())
        if kind == "loglikelihood_rolling":
            for example, outcome in zip(examples, outcomes, strict=True):
                (page,) = example["arguments"][0]
                outcome |= _told(lm.texts[(page,)]) | _page_by_band(lm, page)
                if dense is not None and page in dense.ids:
                    outcome["kl_from_dense"] = _divergence(lm, page, dense)
            log_likelihood, tokens = (
                sum(outcome[name] for outcome in outcomes) for name in ("log_likelihood", "tokens")
            )
            metrics[f"{task}/token_perplexity"] = words.exp(-log_likelihood / tokens)
            metrics |= {f"{task}/{name}": value for name, value in words.pooled(outcomes).items()}
            metrics |= {f"{task}/{name}": value for name, value in pooled(outcomes).items()}
        elif kind == "loglikelihood":
            for example, outcome in zip(examples, outcomes, strict=True):
                outcome |= _ending_by_band(lm, *example["arguments"][0])
            by_band = words.pooled(outcomes)
            by_band |= words.accuracy_by_band([int(o["band"]) for o in outcomes], [o["told"] for o in outcomes])
            metrics |= {f"{task}/{name}": value for name, value in by_band.items()}
        elif kind == "multiple_choice":
            found = _classified(tasks["tasks"][task], examples, outcomes)
            metrics |= {f"{task}/{name}": value for name, value in found.items()}
        for example, outcome in zip(examples, outcomes, strict=True):
            rows += [(task, str(example["doc_id"]), name, value) for name, value in outcome.items()]
    strange = [
        f"{column} is {number}"
        for column, number in metrics.items()
        if number is not None and not math.isfinite(number) and not re.search("_stderr$|_band_", column)
    ]
    if strange:
        warnings.warn(", ".join(strange), stacklevel=2)
    return metrics | {"higher_is_better": json.dumps(better, sort_keys=True)}, _frame(rows)


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
            outcomes[document] = {"log_likelihood": _number(example["filtered_resps"][0])}
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


def _told(text: Text) -> dict[str, float]:
    """The log-likelihood of a text and how many tokens it is spread over, special ones left out."""
    return {
        "log_likelihood": float(text.scores.log_probs[text.told].sum(dtype=np.float64)),
        "tokens": float(text.told.sum()),
    }


def _page_by_band(lm: Scorer, page: str) -> dict[str, float]:
    """Sums of a page's losses by how rare its words are; empty where the tokenizer does not say where tokens stand."""
    offsets, text = lm.offsets(page), lm.texts[(page,)]
    if offsets is None:
        return {}
    bands, places = words.of_tokens(page, offsets)
    return _by_band(lm, text, bands, places)


def _ending_by_band(lm: Scorer, context: str, ending: str) -> dict[str, float]:
    """The log-likelihood, band and Zipf value of the word to be told, its loss by band, and whether the model tells it."""
    text, band = lm.texts[(context, ending)], words.band(ending)
    found = {
        "log_likelihood": _told(text)["log_likelihood"],
        "band": band,
        "zipf": words.zipf(ending.strip()),
        "told": float(text.scores.greedy[text.told].all()),
    }
    return found | _by_band(lm, text, np.full(len(text.ids), band), np.zeros(len(text.ids), dtype=np.int64))


def _by_band(lm: Scorer, text: Text, bands: np.ndarray, places: np.ndarray) -> dict[str, float]:
    told = text.told
    removed = text.removed[told] if lm.rows.removed.any() else None
    return words.by_band(bands[told], places[told], -text.scores.log_probs[told], removed)


def _divergence(lm: Scorer, page: str, dense: Distributions) -> float:
    """KL from the dense model, summed over the page's positions, nats."""
    from sweep.measuring import divergence

    return float(divergence.kl(dense.log_probs[page], lm.alternatives[page])[lm.texts[(page,)].told].sum())


def _classified(task: Any, examples: Sequence[dict[str, Any]], outcomes: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a multiple-choice task as a classifier; adds `target`, `chosen` and `confidence` to each outcome.

    The choice is the likeliest one, without normalisation by length, as in lm-eval's `acc`. Empty for a task whose
    right answer is not one of its choices.
    """
    labels = set()
    for example, outcome in zip(examples, outcomes, strict=True):
        choices, target = task.doc_to_choice(example["doc"]), example["target"]
        labels.add(tuple(choices))
        if isinstance(target, str):
            target = choices.index(target) if target in choices else None
        if not isinstance(target, int) or not 0 <= target < len(choices):
            return {}
        log_likelihoods = [_number(response) for response in example["filtered_resps"][: len(choices)]]
        chosen, confidence = classification.choice(log_likelihoods)
        outcome |= {"target": target, "chosen": chosen, "confidence": confidence}
        outcome["log_likelihood"] = log_likelihoods[target]
    truth, choices = (np.array([o[name] for o in outcomes], dtype=int) for name in ("target", "chosen"))
    found = classification.metrics(truth, choices, [o["confidence"] for o in outcomes])
    del found["accuracy"]  # which lm-eval calls acc, and has
    if len(labels) > 1:  # each question has choices of its own: the second place is no positive class
        for name in ("precision", "recall", "f1"):
            found.pop(name, None)
    return found | {"f1_macro_stderr": classification.f1_stderr(truth, choices)}


def _keyed(metric: str, filter_name: str) -> str:
    """What a metric is called in columns and samples: `exact_match,strict-match`; lm-eval's plain filter goes unsaid."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _number(value: Any) -> float:
    """The log-likelihood in a response, which may be the first of a pair; NaN for a text."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return float(value) if isinstance(value, int | float) else math.nan


def _frame(rows: list[tuple[str, str, str, float]]) -> Samples:
    return pd.DataFrame(rows, columns=["task", "document", "metric", "value"])
