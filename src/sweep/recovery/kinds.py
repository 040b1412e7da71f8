"""What the stage that recovers may be asked for, without torch.

Recovery changes the weights that pruning has left, so that the model comes nearer to the dense one again; what pruning
has removed stays away. A new kind is a record here, its keys in `Recover`, and its function in `recover.WORK`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from sweep.pruning.families import Dense, Method, Vocab
from sweep.settings import Named, RequestError, setting
from sweep.sources import Source

NONE = "none"
HELD_OUT = 8  # sequences on which the loss before and after is told, which are not trained on


@dataclass(frozen=True)
class Kind:
    name: str
    what: str
    reads: frozenset[str]  # the settings that its numbers depend on, beside the text
    steps: int  # by default
    sequences: int | None = None  # of text, by default; None = as many as its steps take
    learning_rate: float | None = None  # by default, of those that descend

    @property
    def descends(self) -> bool:
        """Whether the whole model is trained at once, along gradients."""
        return self.learning_rate is not None


_DESCENT = {"steps", "batch", "passes", "learning_rate", "temperature"}
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "local",
            "matrix by matrix, the kept weights that give most nearly what the dense model gives there: least squares",
            frozenset({"steps", "ridge"}),
            steps=20,
            sequences=64,
        ),
        Kind(
            "lora",
            "low-rank adapters of all linear layers are trained, and merged under the mask or kept beside them",
            frozenset({*_DESCENT, "objective", "rank", "merge"}),
            steps=96,
            learning_rate=1e-3,
        ),
        Kind(
            "distill",
            "all kept weights are trained towards what the dense model says next",
            frozenset({*_DESCENT, "embeddings", "norms", "biases"}),
            steps=96,
            learning_rate=2e-4,
        ),
    )
}


class Names(Collection[str]):
    """What `recover` may name."""

    def __contains__(self, name: object) -> bool:
        return name in (NONE, *KINDS)

    def __iter__(self) -> Iterator[str]:
        return iter((NONE, *KINDS))

    def __len__(self) -> int:
        return 1 + len(KINDS)

    def __str__(self) -> str:
        return ", ".join(self)


@dataclass(frozen=True)
class Text:
    """The text that recovery reads: as `calibration`, but another draw of it."""

    source: str | None = None  # as calibration.source; None = the same text
    sequences: int | None = setting(None, minimum=1)  # None = as the kind says
    length: int = setting(256, minimum=2)  # tokens a sequence
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    packed: bool = True
    temperature: float = setting(1.0, minimum=0.01)
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Recover(Named):
    """What is asked of the stage that recovers; its default does nothing."""

    name: str = setting(NONE, names=Names())
    text: Text = field(default=Text())
    steps: int | None = setting(
        None, minimum=1
    )  # local: of conjugate gradients, a matrix; else of AdamW; None = as the kind says
    ridge: float = setting(
        0.01, minimum=0
    )  # local: pull toward the pruned weights, share of the mean of X^T X's diagonal
    batch: int = setting(1, minimum=1)  # sequences a step
    passes: int = setting(1, minimum=1)  # how often a sequence may be read
    learning_rate: float | None = setting(
        None, minimum=0
    )  # the highest, which a cosine leads down to 0; None = as the kind says
    objective: Literal["distill", "next_token"] = (
        "distill"  # lora: nearer to the dense model's distributions, or to the text
    )
    temperature: float = setting(1.0, minimum=0.1)  # of both models' distributions while one is distilled
    rank: int = setting(16, minimum=1)  # lora
    merge: bool = True  # lora: under the mask; false leaves adapters beside the matrices
    embeddings: bool = False  # distill: train them too, and the head
    norms: bool = False
    biases: bool = False

    def __str__(self) -> str:
        return self.name


def reads_text(asked: Recover) -> bool:
    """Whether the numbers depend on the calibration text: recovery has a text of its own."""
    return False


def draws(asked: Recover) -> bool:
    """Whether numbers are drawn, text or not."""
    return asked.name != NONE


def normalised(asked: Recover, method: Method) -> Recover:
    """The settings with what the kind says where they leave that open, and what is not read set to one value.

    method  that has pruned before
    Raises RequestError where nothing is left to recover.
    """
    if asked.name == NONE:
        return Recover()
    if isinstance(method, Dense):
        raise RequestError(
            f"recover={asked.name} mends what pruning has done, and method=dense removes nothing: choose another method, "
            "or recover=none"
        )
    if isinstance(method, Vocab):
        raise RequestError(
            f"recover={asked.name} cannot follow method=vocab, which has cut tokens that the text is written in and "
            "leaves the blocks as they are: use recover=none"
        )
    kind = KINDS[asked.name]
    unread: dict[str, Any] = {f.name: f.default for f in fields(Recover) if f.name not in {"name", "text", *kind.reads}}
    steps = asked.steps or kind.steps
    asked = replace(asked, **{**unread, "steps": steps})
    if asked.objective == "next_token":
        asked = replace(asked, temperature=Recover.temperature)
    if kind.learning_rate is not None and asked.learning_rate is None:
        asked = replace(asked, learning_rate=kind.learning_rate)
    needed = math.ceil(steps * asked.batch / asked.passes)
    sequences = asked.text.sequences or kind.sequences or needed
    if "batch" in kind.reads and sequences < needed:
        raise RequestError(
            f"recover.text.sequences={sequences} is too little text: recover.steps={steps} of recover.batch={asked.batch} "
            f"sequences take {needed}, each read at most recover.passes={asked.passes} times. Leave the sequences out, lower "
            "the steps, or raise recover.passes"
        )
    return replace(asked, text=replace(asked.text, sequences=sequences))
