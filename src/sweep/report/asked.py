"""What a report is asked to show, and what of the rows that is: folders, filters, columns, facets."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sweep import config, store
from sweep.metrics import main_metrics, task_metrics
from sweep.report import frontier, variants
from sweep.report.decision import Limits
from sweep.settings import RequestError, byte_size, did_you_mean
from sweep.store import columns

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_STAGES = [stage.column for stage in config.STAGES]
_RECIPE = (*_STAGES, "criterion", "sparsity", "seed", "execution")  # what was done to a model, by columns
_DEFAULT_COSTS = ("latency", "memory", "stored", "macs", "energy")
AXES = {  # what is typed after --x, and the column it stands for
    column.short: column.name for column in [*columns.MADE.values(), *columns.COLUMNS.values()] if column.short
}


def read(results: Sequence[str]) -> pd.DataFrame:
    """The rows of one or several results folders, each cell once.

    Of a cell that several folders hold, a row that is ok is kept, and of two such the newer one.
    Raises RequestError when a folder has no rows.
    """
    frames = []
    for folder in results:
        try:
            frames.append(store.load(folder))
        except FileNotFoundError as error:
            example = "python -m sweep +method=weight sparsity=0.1,0.3,0.5 -m"
            raise RequestError(f"{error}, or run one first, such as: {example}") from error
    if len(frames) == 1:
        return frames[0]
    rows = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    rows = rows.assign(_ok=rows.status == "ok").sort_values(["_ok", "started_at"], kind="stable")
    return rows.drop_duplicates("cell", keep="last").drop(columns="_ok").reset_index(drop=True)


def select(rows: pd.DataFrame, filters: Iterable[str]) -> pd.DataFrame:
    """The rows that meet every filter: `method=weight,neuron`, `sparsity<=0.5`, `criterion!=random`.

    Dense rows meet every filter on what was pruned and how: without them nothing can be compared.
    Raises RequestError for an unknown column, a filter that is none, or when no row is left.
    """
    for words in filters:
        match = re.fullmatch(r"\s*(.+?)\s*(!=|<=|>=|=|<|>)\s*(.+?)\s*", words)
        if match is None:
            raise RequestError(f"--filter {words!r} must be COLUMN=VALUE[,VALUE], or use !=, <, <=, > or >=")
        name, sign, value = match.groups()
        column = _column(rows, name, "--filter")
        meets = pd.Series(sign == "!=", index=rows.index)
        for choice in value.split(","):
            wanted = _typed(rows[column], choice, words)
            one = _OPERATORS[sign](rows[column], wanted)
            if column == "model" and sign in ("=", "!="):  # it may go by another name elsewhere
                one = variants.is_called(rows, choice) == (sign == "=")
            meets = meets & one if sign == "!=" else meets | one
        if column in (*_RECIPE, "sparsity_achieved"):
            meets |= variants.is_baseline(rows)
        rows = rows[meets]
        if variants.is_baseline(rows).all():
            raise RequestError(f"--filter {words!r} leaves no pruned row")
    return rows


def quality_metrics(rows: pd.DataFrame) -> list[str]:
    """The task metrics worth a figure, of those that any row has."""
    return main_metrics(c for c in rows.columns if "/" in c and rows[c].notna().any())


def metrics(rows: pd.DataFrame, asked: Sequence[str]) -> list[str]:
    """The columns of --y, by default the main metric of each task. Raises RequestError."""
    return [_column(rows, name, "--y") for name in _split(asked, rows)] or quality_metrics(rows)


def facets(rows: pd.DataFrame, by: str | None) -> list[tuple[str, pd.DataFrame]]:
    """(title, rows) of each facet; without one, a facet for each model when there are several.

    Where rows come from several machines each is a part of its own, since what was timed on two cannot be compared.
    """
    column = _column(rows, by, "--facet") if by else "model"
    values = rows[column].dropna().unique()
    keeps_dense = column in (*_RECIPE, "variant")
    parts = [(f"{column}={value}", rows[(rows[column] == value) | (rows.baseline & keeps_dense)]) for value in values]
    if by is None and len(values) == 1:
        parts = [("", rows)]
    return [
        (", ".join(filter(None, (title, machine))), mine) for title, part in parts for machine, mine in by_machine(part)
    ]


def by_machine(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(machine, its rows) where there are several, else all rows under no name.

    A dense cell is measured once, on one of the machines. For the others its row lends what is no measurement of the
    machine, and the dense model's time is that of the repeats in which it was timed there with the pruned ones.
    """
    machines = rows.machine.unique()
    if len(machines) == 1:
        return [("", rows)]
    foreign = rows[rows.baseline].copy()
    foreign[[c for c in rows.columns if columns.is_measured(c)]] = np.nan
    parts = []
    for machine in machines:
        mine = rows[rows.machine == machine]
        lent = foreign[(foreign.machine != machine) & ~foreign.setting.isin(mine.setting[mine.baseline])]
        lent = lent.assign(**{name: mine[name].iloc[0] for name in ("machine", "cpu", "gpu") if name in mine})
        parts.append((machine, frontier.with_paired_latency(pd.concat([mine, lent]).sort_index())))
    return parts


def costs(rows: pd.DataFrame, asked: Sequence[str]) -> list[str]:
    """The columns of --x, by default those that the rows hold of the usual ones. Raises RequestError."""
    if asked:
        found = []
        for name in _split(asked, [*AXES, *rows]):
            column = AXES[name] if name in AXES else _column(rows, name, "--x")
            if column not in rows or not rows[column].notna().any():
                raise RequestError(f"--x {name}: no row has a value of {column}")
            found.append(column)
        return found
    known = [AXES[name] for name in _DEFAULT_COSTS]
    return [column for column in known if column in rows and rows[column].notna().any()]


def _split(texts: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names that are separated by commas; a name that is known may have commas of its own (`gsm8k/acc,strict-match`)."""
    names, known = [], set(known)
    for text in texts:
        words = text.split(",")
        while words:
            taken = next((n for n in range(len(words), 1, -1) if ",".join(words[:n]) in known), 1)
            names.append(",".join(words[:taken]))
            words = words[taken:]
    return [name for name in names if name]


def _column(rows: pd.DataFrame, name: str, flag: str) -> str:
    if name not in rows:
        filtered = [c for c in rows.columns if c.startswith(f"{name},")]
        shown = ", ".join(filtered or task_metrics(rows.columns) or rows.columns[:15])
        near = " It is there under each of its answer filters." if filtered else did_you_mean(name, [*AXES, *rows])
        raise RequestError(f"{flag} {name}: the rows have no such column.{near} Among them: {shown}")
    return name


def _typed(column: pd.Series, text: str, words: str) -> Any:
    if not pd.api.types.is_numeric_dtype(column):
        return text
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"--filter {words!r}: {column.name} is a number, got {text!r}") from None


def limits(drop: str | None, ms: float | None, memory: str | None) -> Limits:
    """What --max-drop, --max-ms and --max-bytes say; a loss is `2%` or `0.02`. Raises RequestError."""
    share = None
    if drop is not None:
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", drop)
        if match is None:
            raise RequestError(f"--max-drop must be a share such as 2% or 0.02; got {drop!r}")
        share = float(match[1]) / (100 if match[2] else 1)
    return Limits(share, ms, None if memory is None else byte_size("--max-bytes", memory))


def file_name(text: object) -> str:
    """A name for a file, of letters that every system takes."""
    return re.sub(r"[^\w.]+", "-", str(text)).strip("-")
