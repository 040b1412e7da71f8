"""Questions that are answered by writing, made of common words, numbers and brackets: drawn by a fixed seed, none twice.

Each function gives the examples that its task shows before every question, and then the questions.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, TypeAlias

Document: TypeAlias = dict[str, Any]  # what is asked, and `answer`

_QUESTIONS = 100  # of a task
SHOWN = 6  # examples before a question
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_COMMONEST = 3000  # words of English that words are taken from: fewer would leave too few of their length


@functools.lru_cache
def _words() -> list[str]:
    """Common English words of four to seven letters, most common first."""
    from wordfreq import top_n_list

    return [word for word in top_n_list("en", _COMMONEST) if word.isascii() and word.isalpha() and 4 <= len(word) <= 7]


def _drawn(question: Callable[[random.Random], Document]) -> list[Document]:
    """Documents that differ; there must be as many."""
    draw = random.Random(0)
    found: dict[str, Document] = {}
    while len(found) < SHOWN + _QUESTIONS:
        document = question(draw)
        found.setdefault(str(document), document)
    return list(found.values())


def copying() -> list[Document]:
    """{words, answer}: twelve words, to be written once more."""

    def question(draw: random.Random) -> Document:
        words = " ".join(draw.sample(_words(), 12))
        return {"words": words, "answer": words}

    return _drawn(question)


def swapping() -> list[Document]:
    """{words, answer}: two words, to be written the other way round."""

    def question(draw: random.Random) -> Document:
        first, second = draw.sample(_words(), 2)
        return {"words": f"{first} {second}", "answer": f"{second} {first}"}

    return _drawn(question)


def brackets() -> list[Document]:
    """{opened, answer}: two to four brackets of three kinds, to be closed in the right order."""

    def question(draw: random.Random) -> Document:
        opened = [draw.choice(list(_CLOSING)) for _ in range(draw.randint(2, 4))]
        return {"opened": " ".join(opened), "answer": " ".join(_CLOSING[bracket] for bracket in reversed(opened))}

    return _drawn(question)


def addition() -> list[Document]:
    """{sum, answer}: a number up to 30 and one of one digit."""

    def question(draw: random.Random) -> Document:
        first, second = draw.randint(2, 30), draw.randint(2, 9)
        return {"sum": f"{first} + {second}", "answer": str(first + second)}

    return _drawn(question)
