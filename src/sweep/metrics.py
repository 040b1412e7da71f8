"""The metrics of a row's tasks: one record each, of which their direction, label, pairing and page in the docs are made.

The column of a metric is `task/metric`, that of its standard error `task/metric_stderr`; where a task filters answers by
a named filter, `,FILTER` stands behind either. What lm-eval says of its own metrics stands in each row; here stands what it
does not say, and what is ours. How documents are joined to a metric, in a row and in a comparison, is its `means`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LOW, HIGH = "low", "high"  # which way is better
BANDS = {  # how rare a word is, from common to rare: the lowest Zipf value of the band, and what it is called
    "zipf5up": "5 up",
    "zipf4to5": "4 to 5",
    "zipf3to4": "3 to 4",
    "zipf0to3": "below 3",
    "no_word": "none",
}


@dataclass(frozen=True)
class Mean:
    """A metric from its documents: the sum of one of their numbers over the sum of another.

    In names, `{}` is the metric's own, and `{band}` its band.
    """

    of: str
    over: str | None = None  # None: over the documents
    unit: float = 1.0  # by which the sum is divided

    def named(self, metric: str) -> Mean:
        """This mean with the names of one metric."""
        band = bare(metric).partition("_band_")[2]
        of, over = (name and name.format(metric, band=band) for name in (self.of, self.over))
        return Mean(str(of), over, self.unit)


_SPREAD = Mean("{}", "{}_weight", -1)  # as lm-eval spreads log-likelihoods over words or bytes
_BY_NUMBER = (_SPREAD, Mean("{}"))  # each document has the metric
_LOSSES = (Mean("log_likelihood", "tokens", -1), Mean("loss"))  # of texts; of windows of one length


@dataclass(frozen=True)
class Metric:
    """A metric of a task. `{band}` in the name stands for each of BANDS, `{range}` for places in a text."""

    name: str
    better: str | None  # LOW, HIGH, or None for what only describes
    meaning: str
    unit: str = ""
    label: str | None = None  # on an axis; else the name
    means: tuple[Mean, ...] = _BY_NUMBER  # of documents: the first whose numbers they have
    pooled: bool = False  # the column is that mean, with its standard error: `pooled` makes both
    is_exp: bool = False  # of a mean: its logarithm scatters evenly, as a loss does
    classes: str | None = None  # made of all choices together: its name in confusion.macro
    by_lm_eval: bool = False
    measured: bool = False  # timed: it belongs to the machine in the row


METRICS = (
    Metric("loss", LOW, "mean loss of a token, in `samples`", "nats", means=_LOSSES),
    Metric(
        "token_perplexity",
        LOW,
        "exp of the mean negative log-likelihood a token, of tasks that score whole texts",
        label="perplexity",
        means=_LOSSES,
        is_exp=True,
    ),
    Metric(
        "perplexity",
        LOW,
        "the papers': exp of the mean loss of windows of one text",
        means=(_SPREAD, *_LOSSES, Mean("{}", unit=-1)),  # the last as lm-eval makes its own
        is_exp=True,
    ),
    Metric("word_perplexity", LOW, "", means=(_SPREAD,), is_exp=True, by_lm_eval=True),
    Metric("byte_perplexity", LOW, "", means=(_SPREAD,), is_exp=True, by_lm_eval=True),
    Metric("bits_per_byte", LOW, "", means=(Mean("{}", "{}_weight", -math.log(2)),), by_lm_eval=True),
    Metric(
        "kl_from_dense",
        LOW,
        "Kullback-Leibler divergence of the model's next-token distributions from the dense model's, a mean over tokens",
        "nats",
        label="KL divergence from dense (nats per token)",
        means=(Mean("{}", "tokens"),),
        pooled=True,
    ),
    Metric(
        "draft_acceptance",
        HIGH,
        "sum of the smaller of its own and the dense model's next-token probabilities, a mean over tokens: the chance that a "
        "token that it drafts is kept in speculative decoding (arXiv:2211.17192)",
        "fraction",
        label="drafted tokens kept by dense",
        means=(Mean("{}", "tokens"),),
        pooled=True,
    ),
    Metric(
        "generated_tokens_mean",
        None,
        "of tasks whose answers are written: mean tokens of an answer, that which ended it included",
        "tokens",
        label="tokens an answer",
        means=(Mean("generated_tokens"),),
        pooled=True,
    ),
    Metric(
        "truncated_share",
        LOW,
        "likewise: answers that the limit of tokens has ended, no stop string",
        "fraction",
        label="share of answers cut off",
        means=(Mean("truncated"),),
        pooled=True,
    ),
    Metric(
        "repetition",
        LOW,
        "likewise: mean share of the 4-grams of an answer's tokens that stood in it before (seq-rep-4, arXiv:1908.04319)",
        "fraction",
        label="repeated 4-grams",
        means=(Mean("repetition"),),
        pooled=True,
    ),
    Metric(
        "ms_per_answer",
        LOW,
        "likewise: mean time of a whole answer, one after the other, over a fixed sample of prompts; compare between cells "
        "through `answer_speedup` only",
        "milliseconds",
        label="time per answer (ms)",
        means=(),
        measured=True,
    ),
    Metric(
        "dense_ms_per_answer",
        LOW,
        "the same for the dense model, timed alternately with this one, each until its own answer is done",
        "milliseconds",
        label="dense time per answer (ms)",
        means=(),
        measured=True,
    ),
    Metric(
        "answer_speedup",
        HIGH,
        "the second over the first: below 1, the model takes longer for an answer, however fast its tokens are",
        "ratio",
        label="speed-up of an answer",
        means=(),
        measured=True,
    ),
    Metric(
        "correct_answers_per_second",
        HIGH,
        "likewise: the share of right answers over the seconds that one takes",
        "answers/second",
        label="correct answers a second",
        means=(),
        measured=True,
    ),
    Metric("chance", None, "of multiple choice: the share of right answers that guessing gives", "fraction", means=()),
    Metric("told", HIGH, "whether the model's own choice is the word to be told, in `samples`"),
    Metric("log_likelihood", HIGH, "of a text, or of the right answer, in `samples`", "nats"),
    Metric("precision", HIGH, "of two classes, of class 1"),
    Metric("recall", HIGH, "likewise"),
    Metric("f1", HIGH, "likewise", label="F1"),
    Metric("precision_macro", HIGH, "mean over the classes that occur or are chosen", label="macro precision"),
    Metric("recall_macro", HIGH, "likewise", label="macro recall"),
    Metric(
        "f1_macro",
        HIGH,
        "likewise; its standard error is a bootstrap's over documents",
        label="macro F1",
        classes="f1",
    ),
    Metric("precision_weighted", HIGH, "mean over the documents' classes", label="weighted precision"),
    Metric("recall_weighted", HIGH, "likewise", label="weighted recall"),
    Metric("f1_weighted", HIGH, "likewise", label="weighted F1"),
    Metric("matthews", HIGH, "Matthews correlation of choices and right answers", label="Matthews correlation"),
    Metric("calibration_error", LOW, "mean gap between confidence and accuracy over 15 bins of confidence"),
    Metric(
        "loss_band_{band}", LOW, "mean loss of a token of the band", "nats", means=(Mean("{}", "tokens_band_{band}"),)
    ),
    Metric("perplexity_band_{band}", LOW, "its exp", is_exp=True),
    Metric("word_loss_band_{band}", LOW, "mean loss of a word of the band: a rare word is made of more tokens", "nats"),
    Metric("acc_band_{band}", HIGH, "share of the words of the band that the model tells"),
    Metric(
        "loss_at_{range}",
        LOW,
        "mean loss of the tokens at these places of a text or window, from how many tokens stand before: `0to128`, `128to256` "
        "and so on",
        "nats",
        means=(),
    ),
    Metric("perplexity_at_{range}", LOW, "its exp", is_exp=True, means=()),
    Metric("tokens_band_{band}", None, "tokens in the band", "tokens"),
    Metric("examples_band_{band}", None, "words to be told in the band"),
    Metric("removed_share_band_{band}", LOW, "of its tokens, those that the model's vocabulary has lost", "fraction"),
    Metric("row_norm_band_{band}", None, "of `embedding` and `head`: mean L2 norm of the dense model's rows"),
    Metric("share_pruned_band_{band}", None, "likewise: rows that were removed", "fraction"),
    Metric("rows_band_{band}", None, "likewise: rows of the dense model"),
)
_RECORDS = {metric.name: metric for metric in METRICS}

# Of rows from before lm-eval's word was kept: its metrics of which lower is better, by their exact names.
LM_EVAL_LOSSES = {
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "brier_score",
    "ter",
    "wer",
    "likelihood_diff",
    "difference_male_female",
    "pct_female_preferred",
    "pct_male_preferred",
    "pct_stereotype",
    "pct_invalid",
    "perspective_api_toxicity_score",
    "bias_score_ambig",
    "bias_score_disambig",
    "age_bias",
    "asian_bias",
    "black_bias",
    "female_bias",
    "hispanic_bias",
    "native_american_bias",
    "non_binary_bias",
    *(
        f"{which}_bias_score{of}"
        for which in ("amb", "disamb")
        for of in (
            "",
            "_Age",
            "_Disability_status",
            "_Gender_identity",
            "_Nationality",
            "_Physical_appearance",
            "_Race_ethnicity",
            "_Race_x_SES",
            "_Race_x_gender",
            "_Religion",
            "_SES",
            "_Sexual_orientation",
        )
    ),
}

# The share of right answers that guessing gives, of rows from before it was kept: of the tasks of pruning papers, and ours.
CHANCE = {
    "capitals": 1 / 4,
    "continents": 1 / 6,
    **dict.fromkeys(("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "mmlu"), 1 / 4),
    **dict.fromkeys(("piqa", "winogrande", "boolq", "rte", "wic", "copa"), 1 / 2),
}
_OF_CHOICES = ("acc", "acc_norm", "acc_bytes")  # lm-eval's shares of right answers, in which guessing has its own
TITLES = {  # of tasks whose name is no word
    "pydoc": "Python reference",
    "pydoc_cloze": "Python reference, last words",
    "wikitext": "WikiText-2",
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "boolq": "BoolQ",
    "gsm8k": "GSM8K",
    "hellaswag": "HellaSwag",
    "lambada_openai": "LAMBADA",
    "mmlu": "MMLU",
    "openbookqa": "OpenBookQA",
    "piqa": "PIQA",
    "rte": "RTE",
    "winogrande": "WinoGrande",
}
_LABELS = {"acc": "accuracy", "acc_norm": "accuracy (normalised by length)", "exact_match": "exact match"}  # lm-eval's

_FIRST = ("acc", "f1", "exact_match", "token_perplexity", "word_perplexity", "perplexity")


def bare(column: str) -> str:
    """The metric in a task's column, without the answer filter: `exact_match` of `gsm8k/exact_match,strict-match`."""
    return column.rpartition("/")[2].partition(",")[0]


def stderr(column: str) -> str:
    """The column with the standard error of a metric: `gsm8k/exact_match_stderr,strict-match`."""
    task, slash, name = column.rpartition("/")
    plain, comma, answer_filter = name.partition(",")
    return f"{task}{slash}{plain}_stderr{comma}{answer_filter}"


def task_metrics(names: Iterable[str]) -> list[str]:
    """The task metrics among the names of columns, without their standard errors."""
    return [name for name in names if "/" in name and not bare(name).endswith("_stderr")]


def record(column: str) -> Metric | None:
    """The record of a metric, or of a task's column; None of what is lm-eval's alone."""
    name = re.sub(r"(?<=_band_)\w+$", "{band}", bare(column))
    return _RECORDS.get(re.sub(r"(?<=_at_)\d+to\d+$", "{range}", name))


def main_metrics(names: Iterable[str]) -> list[str]:
    """Of each task, the metric that a person reads first, under each of its answer filters.

    An accuracy or F1 where a task has one, else its perplexity a token, else the first that lm-eval reports of it.
    """
    by_task: dict[str, dict[str, list[str]]] = {}
    for name in task_metrics(names):
        by_task.setdefault(name.partition("/")[0], {}).setdefault(bare(name), []).append(name)
    chosen: list[str] = []
    for found in by_task.values():
        theirs = [name for name in found if (known := record(name)) is None or known.by_lm_eval]
        first = next((name for name in (*_FIRST, *theirs) if name in found), None)
        chosen += found[first] if first else []
    return chosen


def is_loss(metric: str) -> bool:
    """Whether lower is better, where no row holds lm-eval's word: by the metric's exact name."""
    known = record(metric)
    return bare(metric) in LM_EVAL_LOSSES if known is None else known.better == LOW


def is_exp(column: str) -> bool:
    """Whether its logarithm is what scatters evenly about its mean, as a loss does: of perplexities."""
    known = record(column)
    return known is not None and known.is_exp


def label(metric: str) -> str:
    """What an axis calls a metric, its answer filter in brackets."""
    known, (name, comma, answer_filter) = record(metric), metric.partition(",")
    words = (known.label if known else None) or _LABELS.get(name) or name.replace("_", " ")
    return words + (f" ({answer_filter.replace('_', ' ')})" if comma else "")


def title(task: str) -> str:
    """What a reader calls a task."""
    return TITLES.get(task) or task.replace("_", " ")


def guesses(column: str) -> bool:
    """Whether guessing has a share in a metric: in accuracies of multiple choice."""
    return bare(column) in _OF_CHOICES


def mean_of(metric: str, found: Iterable[str]) -> Mean | None:
    """The mean of the documents' numbers that a metric is; None where `found`, their names, are not enough."""
    known, names = record(metric), {None, *found}
    means = [way.named(metric) for way in (_BY_NUMBER if known is None else known.means)]
    return next((way for way in means if {way.of, way.over} <= names), None)


def pooled(outcomes: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """The columns of a task that are means of what its documents have, with their standard errors."""
    found: dict[str, float | None] = {}
    for known in METRICS:
        made = mean_of(known.name, outcomes[0]) if known.pooled and outcomes else None
        if made is not None:
            sums = [outcome[made.of] / made.unit for outcome in outcomes]
            counts = np.ones(len(outcomes)) if made.over is None else [outcome[made.over] for outcome in outcomes]
            found[known.name], found[stderr(known.name)] = ratio(sums, counts)
    return found


def ratio(sums: ArrayLike, counts: ArrayLike) -> tuple[float, float | None]:
    """(mean, its standard error) of documents' sums over their counts, such as nats over tokens; None for a single one.

    Documents are the sampling unit, since the tokens of one depend on each other: the linearised variance of a ratio.
    """
    values, over = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    value, n = float(values.sum() / over.sum()), len(values)
    if n < 2:
        return value, None
    variance = ((values - value * over) ** 2).sum() * n / (n - 1)
    return value, float(math.sqrt(variance) / over.sum())
