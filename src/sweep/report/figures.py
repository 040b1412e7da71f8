"""Which figures a report has: what each shows, from what it is drawn, and which are drawn unasked. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from sweep.metrics import title
from sweep.report import asked, paired, plot
from sweep.report.evidence import Evidence
from sweep.report.overview import Overview
from sweep.store.columns import is_loss, label


@dataclass(frozen=True)
class Material:
    """What the figures of one part of a report are drawn from."""

    rows: pd.DataFrame
    metrics: Sequence[str]
    costs: Sequence[str]
    overview: Overview | None
    evidence: Evidence
    samples: pd.DataFrame | None = None
    layers: pd.DataFrame | None = None
    width: str | None = None  # None: that of a column, and of a page for what has two panels

    @property
    def column(self) -> str:
        return self.width or "column"

    def measured(self) -> list[str]:
        """The metrics that any row has."""
        return [metric for metric in self.metrics if self.rows[metric].notna().any()]

    def tasks(self, part: str) -> list[str]:
        """The tasks with a column of which this is a part."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.rows if part in name))


class Drawn(NamedTuple):
    """A figure with the name of its file and what its caption says."""

    stem: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Kind:
    """What --figures names."""

    name: str
    meaning: str
    draw: Callable[[Material], Iterator[Drawn]]
    unasked: bool = False


def _overview(of: Material) -> Iterator[Drawn]:
    if of.overview is not None:
        against = " and ".join(gain.label for gain in plot.shown_gains(of.overview)) or label("sparsity")
        caption = (
            f"Quality kept against {against}. {of.overview.meaning} Beside a mark its sparsity; at the edge, with its "
            "numbers, what is beyond the axes; the grey stairs are what nothing outdoes in both."
        )
        yield Drawn("overview", caption, plot.overview_figure(of.overview, of.width or "page"))


def _benchmark(of: Material) -> Iterator[Drawn]:
    for metric in of.measured():
        better = "lower" if is_loss(metric, of.rows) else "higher"
        caption = f"{_capital(label(metric))}, against sparsity ({better} is better). Hollow: within noise of dense."
        figure = plot.sparsity_figure(of.rows, metric, of.column, of.evidence)
        yield Drawn(f"{asked.file_name(metric)}-against-sparsity", caption, figure)


def _cost(of: Material) -> Iterator[Drawn]:
    short = {column: name for name, column in asked.AXES.items()}
    for metric in of.measured():
        for cost in of.costs:
            if (of.rows[cost].notna() & of.rows[metric].notna()).any():
                stem = f"{asked.file_name(metric)}-against-{short.get(cost, asked.file_name(cost))}"
                caption = (
                    f"{_capital(label(metric))}, against {label(cost)}, with the frontier. Hollow: within noise of it."
                )
                yield Drawn(stem, caption, plot.cost_figure(of.rows, cost, metric, of.column, of.evidence))


def _speedup(phase: str, words: str) -> Callable[[Material], Iterator[Drawn]]:
    def draw(of: Material) -> Iterator[Drawn]:
        if of.rows[f"{phase}_speedup"].notna().any():
            caption = (
                f"Speed-up of {words} against sparsity: measured, and, dotted, what counting multiplications promises."
            )
            yield Drawn(f"{phase}-speedup-against-sparsity", caption, plot.speedup_figure(of.rows, phase, of.column))

    return draw


def _drop(of: Material) -> Iterator[Drawn]:
    drops = plot.drop_table(of.rows, of.metrics)
    if drops.notna().any(axis=None):
        caption = "Change of each benchmark against the dense model in per cent; positive is worse."
        yield Drawn("drop-by-benchmark", caption, plot.heat_figure(drops, of.column))


def _kinds(of: Material) -> Iterator[Drawn]:
    if (figure := plot.kinds_figure(of.rows, of.metrics, of.column)) is not None:
        caption = (
            "Quality lost in per cent of the dense model's: of choices, of perplexity, of answers that are written."
        )
        yield Drawn("lost-by-kind", caption, figure)


def _answers(of: Material) -> Iterator[Drawn]:
    for task in of.tasks("/answer_speedup"):
        if (figure := plot.answer_figure(of.rows, task, of.column)) is not None:
            caption = f"Speed-up of a whole answer, {title(task)}, against that of a token: below the diagonal, answers are longer."
            yield Drawn(f"{asked.file_name(task)}-answer-against-token", caption, figure)


def _words(of: Material) -> Iterator[Drawn]:
    for task in of.tasks("/loss_band_"):
        if (figure := plot.band_figure(of.rows, task, of.column)) is not None:
            caption = f"Loss added by how rare a word is, {title(task)}, in nats a token."
            yield Drawn(f"{asked.file_name(task)}-loss-by-word-frequency", caption, figure)


def _positions(of: Material) -> Iterator[Drawn]:
    for task in of.tasks("/loss_at_"):
        if (figure := plot.position_figure(of.rows, task, of.column)) is not None:
            caption = f"Loss added by where in a text a token stands, {title(task)}, in nats a token."
            yield Drawn(f"{asked.file_name(task)}-loss-by-position", caption, figure)


def _flips(of: Material) -> Iterator[Drawn]:
    tasks = Counter(metric.partition("/")[0] for metric in of.metrics)
    for metric in of.metrics if of.samples is not None else ():
        assert of.samples is not None
        turned = paired.flips(of.rows, of.samples, metric)
        if len(turned):
            task, _, name = metric.partition("/")
            shown = task if tasks[task] == 1 else f"{task} ({name})"  # each of several metrics of a task has a figure
            caption = f"Answers that turned, {title(task)}: right to wrong, and, dashed, wrong to right."
            yield Drawn(f"{asked.file_name(shown)}-flips", caption, plot.flips_figure(turned, shown, of.column))


def _blocks(of: Material) -> Iterator[Drawn]:
    if of.layers is not None and (figure := plot.layer_figure(of.rows, of.layers, of.column)) is not None:
        yield Drawn("sparsity-by-block", "Share of the weights of each block that is zero or gone.", figure)


KINDS = (
    Kind("overview", "quality kept against what is gained", _overview, unasked=True),
    Kind("benchmark", "each benchmark against sparsity", _benchmark, unasked=True),
    Kind("decode", "speed-up of decoding, measured beside counted", _speedup("decode", "decoding"), unasked=True),
    Kind("kinds", "what is lost of choices, perplexity and answers", _kinds, unasked=True),
    Kind("answers", "speed-up of whole answers against that of tokens", _answers, unasked=True),
    Kind("prefill", "speed-up of reading a prompt", _speedup("prefill", "reading a prompt")),
    Kind("cost", "each benchmark against each cost, with its frontier", _cost),
    Kind("drop", "change of every benchmark, as a table in colours", _drop),
    Kind("words", "loss by how rare a word is", _words),
    Kind("positions", "loss by where a token stands", _positions),
    Kind("flips", "answers that turned, both ways", _flips),
    Kind("blocks", "sparsity of each block", _blocks),
)


def drawn(of: Material, names: Sequence[str]) -> Iterator[Drawn]:
    """The figures that every report has, and those of these kinds; `all` names every kind."""
    for kind in KINDS:
        if kind.unasked or kind.name in names or "all" in names:
            yield from kind.draw(of)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
