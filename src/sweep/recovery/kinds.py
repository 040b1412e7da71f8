"""What the stage that recovers may be asked for, without torch.

Recovery changes the weights that pruning has left, so that the model comes nearer to the dense one again; what pruning
has removed stays away. A new kind is a record here, its keys in `Recover`, and its function in `recover.WORK`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from sweep.pruning.families import Dense, Method, Vocab
from sweep.settings import Named, RequestError, setting

NONE = "none"
HELD_OUT = 8  # sequences on which the loss before and after is told, which are not trained on


@dataclass(frozen=True)
class Kind:
    name: str
    what: str
    sequences: int  # of text that it reads by default


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "local",
            "matrix by matrix, the kept weights that give most nearly what the dense model gives there: least squares",
            64,
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


@dataclass(frozen=True)
class Recover(Named):
    """What is asked of the stage that recovers; its default does nothing."""

    name: str = setting(NONE, names=Names())
    text: Text = field(default=Text())
    steps: int = setting(20, minimum=1)  # local: of conjugate gradients, a matrix
    ridge: float = setting(
        0.01, minimum=0
    )  # local: pull toward the pruned weights, share of the mean of X^T X's diagonal

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
    sequences = asked.text.sequences or KINDS[asked.name].sequences
    return replace(asked, text=replace(asked.text, sequences=sequences))
