"""The forms that weights can be quantised to, what a user can set of it, and what contradicts itself. No torch.

A form is whole numbers, the codes, times a scale that some weights of a row have in common. Every form has zero among its
values, so that a pruned weight stays pruned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from sweep.pruning.families import Method, Vocab, Weight
from sweep.settings import Named, RequestError, setting


@dataclass(frozen=True)
class Form:
    name: str
    what: str  # words for the table of forms
    bits: int  # of a code
    groups: tuple[int, ...] = ()  # columns that may share a scale, its default first; none where a row does
    lowest: int | None = None  # the smallest code, where it is not minus the largest
    gguf: str = ""  # what gguf-py calls it, which then rounds
    scale_bits: int = 16  # of a scale

    @property
    def columns(self) -> int | None:
        """That share a scale by default; None where a row does."""
        return self.groups[0] if self.groups else None


_GGUF = "GGUF's {}: blocks of 32, exactly the bytes that gguf-py makes"
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("int8", "codes of -127 to 127, a scale a row", 8),
        Form("int4", "codes of -7 to 7, a scale for `quantize.group` columns of a row", 4, (32, 64, 128, 256)),
        Form("q8_0", _GGUF.format("Q8_0"), 8, (32,), gguf="Q8_0"),
        Form("q5_0", _GGUF.format("Q5_0"), 5, (32,), -16, gguf="Q5_0"),
        Form("q4_0", _GGUF.format("Q4_0"), 4, (32,), -8, gguf="Q4_0"),
    )
}
NONE = "none"
_OFFSET = (
    "q4_1, q5_1 and the K-quants add an offset to each group, so that zero is none of their values and what was pruned "
    "would come back"
)


class Names(Collection[str]):
    """What `quantize` may name."""

    def __contains__(self, name: object) -> bool:
        return name in (NONE, *FORMS)

    def __iter__(self) -> Iterator[str]:
        return iter((NONE, *FORMS))

    def __len__(self) -> int:
        return 1 + len(FORMS)

    def __str__(self) -> str:
        return f"{', '.join(self)} ({_OFFSET})"


@dataclass(frozen=True)
class Quantize(Named):
    """What is asked of the stage that quantises; its default does nothing."""

    name: str = setting(NONE, names=Names())
    method: Literal["rtn", "gptq"] = "rtn"  # to the nearest; or what rounding loses is made good on calibration text
    group: int | None = None  # columns that share a scale; None = as the form has it
    joint: bool | None = None  # gptq in the pass that prunes; None = with sparsegpt, as in its paper
    damping: float = setting(0.01, minimum=0)  # of a Hessian, share of the mean of its diagonal
    embeddings: bool = False
    head: bool = False
    exclude: tuple[str, ...] = ()  # names of matrices; * stands for any characters

    def __str__(self) -> str:
        form = FORMS.get(self.name)
        grouped = f"g{self.group}" if form is not None and self.group not in (None, form.columns) else None
        return " ".join(word for word in (self.name, grouped, self.method if self.method != "rtn" else None) if word)

    @property
    def form(self) -> Form:
        """Of one that does something."""
        return FORMS[self.name]

    @property
    def columns(self) -> int | None:
        """That share a scale; None where a row does."""
        return self.group if self.name != NONE and self.form.groups else None


def jointly(asked: Quantize, method: Method) -> bool:
    """Whether the pass that prunes quantises too."""
    return reads_text(asked) and _prunes_by_column(method) and asked.joint is not False


def _prunes_by_column(method: Method) -> bool:
    return isinstance(method, Weight) and method.criterion == "sparsegpt" and not method.replay


def reads_text(asked: Quantize) -> bool:
    """Whether the numbers depend on the calibration text."""
    return asked.name != NONE and asked.method == "gptq"


def scale_bits(asked: Quantize) -> int:
    """Of each scale; 0 where nothing is quantised."""
    return 0 if asked.name == NONE else asked.form.scale_bits


def draws(asked: Quantize) -> bool:
    """Whether numbers are drawn, text or not."""
    return False


def normalised(asked: Quantize, method: Method, *, recovers: bool = False) -> Quantize:
    """The settings with what the form and the papers say where they leave that open, and what is not read set to one value.

    method    that has pruned before
    recovers  whether its weights change between pruning and here
    Raises RequestError for settings that contradict each other.
    """
    if asked.name == NONE:
        return Quantize()
    form = asked.form
    group = asked.group if len(form.groups) > 1 and asked.group is not None else form.columns
    if form.groups and group not in form.groups:
        raise RequestError(f"quantize.group must be one of {', '.join(map(str, form.groups))}; got {group}")
    if asked.method == "rtn":
        return replace(asked, group=group, joint=None, damping=Quantize.damping)
    if isinstance(method, Vocab):
        raise RequestError(
            "quantize.method=gptq cannot follow method=vocab, which has cut tokens that the calibration text is written "
            "in: use quantize.method=rtn"
        )
    if asked.joint and not _prunes_by_column(method):
        named = getattr(method, "criterion", method.family)
        raise RequestError(
            "quantize.joint=true quantises in the pass in which method.criterion=sparsegpt prunes, column by column, and "
            f"{named} makes none: leave it out, and what is left is quantised after it, its zeros kept"
        )
    if recovers and _prunes_by_column(method):
        if asked.joint:
            raise RequestError(
                "quantize.joint=true quantises in the pass that prunes, and recovery between the two would leave no value "
                "on its grid: leave quantize.joint out, or use recover=none"
            )
        asked = replace(asked, joint=False)
    return replace(asked, group=group, joint=None if jointly(asked, method) or not _prunes_by_column(method) else False)


def table() -> str:
    """The forms as a table in Markdown."""
    lines = ["| quantize | what it is | bits a weight |", "|---|---|---|"]
    for form in FORMS.values():
        bits = f"{form.bits + form.scale_bits / form.columns:g}" if form.columns else f"{form.bits} and a scale a row"
        lines.append(f"| `{form.name}` | {form.what} | {bits} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
