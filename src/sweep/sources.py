"""What calibration text there is beside texts that exist: the model's own, random tokens, and mixes. No torch.

`calibration` and `recover.text` say where a text comes from in the same words, `Source` among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from sweep.settings import RequestError, setting

SELF = "self"  # the dense model writes it
RANDOM = "random"  # tokens of the vocabulary, each as likely as the others
MIX = "mix"  # sequences of several sources
MADE = (SELF, RANDOM)  # without a text that exists


@dataclass(frozen=True)
class Source:
    """One of those that a mix is made of."""

    source: str  # as calibration.source, but mix
    share: float = setting(1.0, minimum=0.0)  # of the sequences, relative to the shares of the others
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    temperature: float = setting(1.0, minimum=0.01)


PLACE = tuple(f.name for f in fields(Source) if f.name != "share")  # what says where a text comes from
_OF_HUB = ("subset", "split", "column")
Asked = TypeVar("Asked")


def normalised(asked: Asked, key: str) -> Asked:
    """Settings of a text with what its source does not read set to one value.

    asked  with the fields of PLACE, and `packed` and `sources` where it may be a mix
    key    by which they are set, for messages
    Raises RequestError for what contradicts the source.
    """
    now: Any = asked
    found: dict[str, Any] = {}
    if now.source != SELF:
        found["temperature"] = Source.temperature
    if now.split is not None and now.column is None:
        found["column"] = "text"
    if now.source in (*MADE, MIX):
        for name in _OF_HUB:
            if (value := getattr(now, name)) is not None:
                raise RequestError(
                    f"{key}.{name}={value} is of a data set of the hub, and {key}.source={now.source} is none: leave it out"
                )
    if now.source in MADE and hasattr(now, "packed"):
        found["packed"] = True
    if hasattr(now, "sources"):
        found["sources"] = _mixed(now, key)
    return replace(now, **found)


def _mixed(asked: Any, key: str) -> tuple[Source, ...]:
    """The sources of a mix, with shares whose sum is 1."""
    if asked.source != MIX:
        if asked.sources:
            raise RequestError(
                f"{key}.sources are those of {key}.source={MIX}, and it is {asked.source}: leave the one or the other out"
            )
        return ()
    if not asked.sources:
        raise RequestError(
            f"{key}.source={MIX} needs {key}.sources, such as [{{source:pydoc,share:0.5}},{{source:{SELF},share:0.5}}]"
        )
    total = sum(each.share for each in asked.sources)
    for number, each in enumerate(asked.sources):
        if each.source == MIX:
            raise RequestError(f"{key}.sources: a mix is made of no other mix: name its sources themselves")
        if each.share <= 0:
            raise RequestError(f"{key}.sources.{number}.share must be more than 0; got {each.share:g}")
    own = (normalised(each, f"{key}.sources.{number}") for number, each in enumerate(asked.sources))
    return tuple(replace(each, share=round(each.share / total, 6)) for each in own)


def order(shares: Sequence[float], count: int) -> list[int]:
    """Which source each of `count` sequences comes from: always the one that is furthest behind its share.

    So the first sequences of a longer mix are those of a shorter one.
    """
    given = [0] * len(shares)
    found = []
    for number in range(1, count + 1):
        next_ = max(range(len(shares)), key=lambda i: (round(shares[i] * number - given[i], 9), -i))
        given[next_] += 1
        found.append(next_)
    return found
