"""What is measured of a task beside lm-eval's own metrics, by the kind of its requests.

A measure takes a document as it was scored and returns numbers of it by name, which go to `samples`. Where sweep.metrics
has a metric as the mean of such numbers, the task gets it, with its standard error; what is made of all documents in
another way is in OF_A_TASK. A measure of one's own is a function and its line in OF_A_DOCUMENT, with a record there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sweep import metrics
from sweep.measuring import classification, divergence, positions, words

if TYPE_CHECKING:
    from sweep.measuring.generation import Answer
    from sweep.measuring.scorer import Scorer, Text

_GRAM = 4  # tokens

Outcome: TypeAlias = dict[str, float]  # of one document, by name


@dataclass(frozen=True)
class Document:
    """A document of a task, as it was scored."""

    task: Any  # lm-eval's
    example: Mapping[str, Any]  # lm-eval's sample of it
    lm: Scorer
    dense: divergence.Distributions | None  # the dense model's, where the cell has them

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of its request: a whole text, or a context and its ending."""
        return tuple(self.example["arguments"][0])

    @property
    def text(self) -> Text:
        return self.lm.texts[self.arguments]

    @property
    def answers(self) -> Sequence[Answer]:
        """All that were written to its prompt: more than one where a task repeats it."""
        return self.lm.answers[self.lm.as_key(self.example["arguments"][0])]


def columns(documents: Sequence[Document], outcomes: Sequence[Outcome], kind: str) -> dict[str, float | None]:
    """The metrics of one task, by name; what is measured of each document is added to its outcome.

    kind  lm-eval's `OUTPUT_TYPE`
    """
    for document, outcome in zip(documents, outcomes, strict=True):
        for measure in OF_A_DOCUMENT.get(kind, ()):
            outcome |= measure(document)
    found: dict[str, float | None] = {}
    for made in OF_A_TASK.get(kind, ()):
        found |= made(documents, outcomes)
    return found | metrics.pooled(outcomes)


def number(value: Any) -> float:
    """The log-likelihood in a response, which may be the first of a pair; NaN for a text."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return float(value) if isinstance(value, int | float) else math.nan


# ---- of a document ----


def told(document: Document) -> Outcome:
    """The log-likelihood of a text and how many tokens it is spread over, special ones left out."""
    text = document.text
    return {"log_likelihood": _log_likelihood(text), "tokens": float(text.told.sum())}


def page_by_band(document: Document) -> Outcome:
    """Sums of a page's losses by how rare its words are; empty where the tokenizer does not say where tokens stand."""
    (page,) = document.arguments
    offsets = document.lm.offsets(page)
    return {} if offsets is None else _by_band(document, *words.of_tokens(page, offsets))


def from_dense(document: Document) -> Outcome:
    """KL from the dense model in nats, and overlap with it, summed over the page's positions.

    Empty of a page that the dense model was not asked for.
    """
    (page,) = document.arguments
    if document.dense is None or page not in document.dense.ids:
        return {}
    told = document.text.told
    return {
        name: float(by_position(document.dense.log_probs[page], document.lm.alternatives[page])[told].sum())
        for name, by_position in (("kl_from_dense", divergence.kl), ("draft_acceptance", divergence.overlap))
    }


def ending(document: Document) -> Outcome:
    """The log-likelihood, band and Zipf value of the word to be told, its loss by band, and whether the model tells it."""
    text, (_, word) = document.text, document.arguments
    band = words.band(word)
    found = {
        "log_likelihood": _log_likelihood(text),
        "band": band,
        "zipf": words.zipf(word.strip()),
        "told": float(text.scores.greedy[text.told].all()),
    }
    return found | _by_band(document, np.full(len(text.ids), band), np.zeros(len(text.ids), dtype=np.int64))


def choice(document: Document) -> Outcome:
    """`target`, `chosen` and `confidence`, and the log-likelihood of the target; empty where that is no choice.

    The choice is the likeliest one, without normalisation by length, as in lm-eval's `acc`.
    """
    choices, target = document.task.doc_to_choice(document.example["doc"]), document.example["target"]
    if isinstance(target, str):
        target = choices.index(target) if target in choices else None
    if not isinstance(target, int) or not 0 <= target < len(choices):
        return {}
    log_likelihoods = [number(response) for response in document.example["filtered_resps"][: len(choices)]]
    chosen, confidence = classification.choice(log_likelihoods)
    return {
        "target": target,
        "chosen": chosen,
        "confidence": confidence,
        "log_likelihood": log_likelihoods[target],
    }


def answer(document: Document) -> Outcome:
    """Tokens of the answer, whether the limit has ended it, and how it repeats itself; means over its answers."""
    found = [
        {
            "generated_tokens": float(len(answer.tokens)),
            "truncated": float(answer.truncated),
            "repetition": repetition(answer.tokens),
        }
        for answer in document.answers
    ]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def repetition(tokens: Sequence[int]) -> float:
    """The share of the 4-grams of tokens that stood before: seq-rep-4 of Welleck et al. 2020, arXiv:1908.04319.

    0 of fewer than four tokens.
    """
    grams = [*zip(*(tokens[start:] for start in range(_GRAM)), strict=False)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _log_likelihood(text: Text) -> float:
    return float(text.scores.log_probs[text.told].sum(dtype=np.float64))


def _by_band(document: Document, bands: np.ndarray, places: np.ndarray) -> Outcome:
    text = document.text
    told = text.told
    removed = text.removed[told] if document.lm.rows.removed.any() else None
    return words.by_band(bands[told], places[told], -text.scores.log_probs[told], removed)


# ---- of a task, from all its documents ----


def token_perplexity(_: Sequence[Document], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """exp of the mean negative log-likelihood a token."""
    log_likelihood, tokens = (sum(outcome[name] for outcome in outcomes) for name in ("log_likelihood", "tokens"))
    return {"token_perplexity": words.exp(-log_likelihood / tokens)}


def by_band(_: Sequence[Document], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Losses by how rare the words are."""
    return words.pooled(outcomes)


def accuracy_by_band(_: Sequence[Document], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How many of the words to be told are, by how rare they are."""
    return words.accuracy_by_band([int(o["band"]) for o in outcomes], [o["told"] for o in outcomes])


def classifier(documents: Sequence[Document], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The metrics of a multiple-choice task as a classifier, and `chance`; none where the right answer is not always a choice."""
    if not all("target" in outcome for outcome in outcomes):
        return {}
    truth, choices = (np.array([o[name] for o in outcomes], dtype=int) for name in ("target", "chosen"))
    found = classification.metrics(truth, choices, [o["confidence"] for o in outcomes])
    del found["accuracy"]  # which lm-eval calls acc, and has
    choices_of = [tuple(document.task.doc_to_choice(document.example["doc"])) for document in documents]
    if len(set(choices_of)) > 1:
        for name in ("precision", "recall", "f1"):  # each question has choices of its own: the second is no class
            found.pop(name, None)
    guessed = float(np.mean([1 / len(each) for each in choices_of]))
    return found | {"f1_macro_stderr": classification.f1_stderr(truth, choices), "chance": guessed}


def by_position(documents: Sequence[Document], _: Sequence[Outcome]) -> dict[str, float | None]:
    """Losses by where in the text a token stands."""
    texts = [document.text for document in documents]
    losses = [-text.scores.log_probs for text in texts]
    return positions.columns(losses, [text.told for text in texts], documents[0].lm.max_length)


OF_A_DOCUMENT: Mapping[str, Sequence[Callable[[Document], Outcome]]] = {
    "loglikelihood_rolling": (told, page_by_band, from_dense),
    "loglikelihood": (ending,),
    "multiple_choice": (choice,),
    "generate_until": (answer,),
}
OF_A_TASK: Mapping[str, Sequence[Callable[[Sequence[Document], Sequence[Outcome]], Mapping[str, float | None]]]] = {
    "loglikelihood_rolling": (token_perplexity, by_band, by_position),
    "loglikelihood": (by_band, accuracy_by_band),
    "multiple_choice": (classifier,),
}
