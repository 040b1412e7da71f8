"""Which recipe to use: a table of what each budget of loss buys, and the commands that would make it surer. No torch."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tabulate import tabulate

from sweep.report import frontier, names
from sweep.report.overview import Gain, Overview

BUDGETS = (0.01, 0.02, 0.05, 0.10)  # of quality that may be lost, of the dense model's above chance
_MORE_SEEDS = 3
_COMMANDS = 6  # at most
_FURTHER_TASKS = ("wikitext", "lambada_openai", "arc_easy", "piqa", "boolq")  # of conf/benchmarks/zero_shot


@dataclass(frozen=True)
class Limits:
    """What a recipe may lose and cost."""

    drop: float | None = None  # share of the dense model's quality above chance
    ms: float | None = None  # a token, decoding
    memory: int | None = None  # bytes, at the peak

    def __str__(self) -> str:
        words = [
            f"{100 * self.drop:g} % lost" if self.drop is not None else None,
            f"{self.ms:g} ms a token" if self.ms is not None else None,
            f"{self.memory / 1e6:g} MB" if self.memory is not None else None,
        ]
        return ", ".join(word for word in words if word)

    def any(self) -> bool:
        return (self.drop, self.ms, self.memory) != (None, None, None)


@dataclass(frozen=True)
class Choice:
    """A cell of the table: the point that it names, or why there is none."""

    text: str
    point: int | None = None
    sure: bool = True  # of its quality: the whole interval is within the budget


@dataclass(frozen=True)
class Decision:
    """The table: by limits, a choice for each gain; and what to run to be surer, as (why, command)."""

    gains: tuple[Gain, ...]
    lines: tuple[tuple[Limits, tuple[Choice, ...]], ...]
    further: tuple[tuple[str, str], ...]

    def table(self) -> list[list[str]]:
        """Header and lines."""
        lines = [[str(limits), *(choice.text for choice in choices)] for limits, choices in self.lines]
        return [["at most", *(gain.name for gain in self.gains)], *lines]

    def markdown(self) -> str:
        """The table and the commands."""
        header, *lines = self.table()
        rows = [header, ["---"] * len(header), *lines]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows) + "\n"
        text += f"\n{_READING}\n"
        if self.further:
            said = [f"# {why}\n{command}" for why, command in self.further]
            text += "\nTo be surer:\n\n```sh\n" + "\n".join(said) + "\n```\n"
        return text

    def words(self) -> str:
        """The same for a terminal of 100 columns."""
        header, *lines = [[cell.replace(" %", "\u00a0%") for cell in line] for line in self.table()]  # kept together
        text = tabulate(lines, headers=header, maxcolwidths=[10, *[20] * len(self.gains)], disable_numparse=True)
        text = text.replace("\u00a0", " ")
        said = [f"  {command}\n      {why}" for why, command in self.further]
        return text + ("\n\nTo be surer:\n" + "\n".join(said) if said else "")


_READING = (
    "Named is what gains most of what keeps enough for certain, with the gain over dense and its 95 % interval, where it has "
    "one; `perhaps`: it keeps enough, but its interval reaches past the budget. Times are beside dense, in turns."
)


def decide(found: Overview, rows: pd.DataFrame, asked: Limits = Limits()) -> Decision:
    """The table of BUDGETS, and a line of what was asked for.

    rows  from which the overview was made, with paired latencies
    """
    limits = [Limits(drop) for drop in BUDGETS if Limits(drop) != asked] + ([asked] if asked.any() else [])
    costs = _costs(found.points, rows)
    lines = tuple((each, tuple(_choice(found.points, costs, gain, each) for gain in found.gains)) for each in limits)
    return Decision(found.gains, lines, tuple(_further(found, rows, lines)))


def _costs(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a token and bytes at the peak of each point, means over seeds."""
    names_ = {"ms": "decode_ms_paired", "memory": "peak_memory_bytes"}
    columns = {short: rows.get(name, pd.Series(np.nan, index=rows.index)) for short, name in names_.items()}
    return pd.DataFrame(columns).astype(float).groupby(rows.point).mean().reindex(points.point).set_axis(points.index)


def _choice(points: pd.DataFrame, costs: pd.DataFrame, gain: Gain, limits: Limits) -> Choice:
    """The point that gains most within the limits; where a cost is limited and no loss, the one that keeps most."""
    within = ~points.baseline
    for cost in ("ms", "memory"):
        if (limit := getattr(limits, cost)) is not None:
            within &= costs[cost] <= limit
    if not within.any():
        return Choice("nothing: no pruned cell is within it")
    least = -math.inf if limits.drop is None else 1 - limits.drop
    enough = points[within & (points.kept >= least)]
    if enough.empty:
        return Choice(f"nothing: no pruned cell keeps {100 * least:g} %")
    gaining = enough[enough[f"{gain.name}_sure"]]
    if gaining.empty:
        return Choice("nothing: no pruned cell gains beyond noise")
    surely = gaining[gaining.kept_low.fillna(-math.inf) >= least] if limits.drop is not None else gaining
    by = gain.name if limits.drop is not None else "kept"
    best = (surely if len(surely) else gaining).sort_values(by, ascending=False, kind="stable").iloc[0]
    value = names.times(*(best[gain.name + end] for end in ("", "_low", "_high")))
    keeps = "" if limits.drop is not None else f", keeps {names.percent(best.kept, best.kept_low, best.kept_high)}"
    perhaps = "" if len(surely) else "perhaps "
    return Choice(
        f"{perhaps}{names.recipe(best['name'], best.sparsity)}: {value}{keeps}", int(best.point), len(surely) > 0
    )


# ---- what to run next ----


def _further(
    found: Overview, rows: pd.DataFrame, lines: Sequence[tuple[Limits, tuple[Choice, ...]]]
) -> Iterable[tuple[str, str]]:
    """(why, command), the most urgent first, each once."""
    points = found.points.set_index("point")
    said: dict[str, str] = {}
    for _, choices in lines:
        for choice in choices:
            if choice.point is not None and not choice.sure:
                said |= _surer(points.loc[choice.point], rows[rows.point == choice.point])
    said |= _untimed(found, rows) or _other_execution(found, rows)
    said |= _gentler(found, rows)
    return [(why, command) for command, why in said.items()][:_COMMANDS]


def _surer(point: pd.Series, rows: pd.DataFrame) -> dict[str, str]:
    """What narrows the interval of what a point keeps: seeds where it has any, else more documents."""
    name = names.recipe(point["name"], point.sparsity)
    settings = _settings(rows)
    if settings.get("calibration") is not None or (rows.seed > 0).any():
        first = int(rows.seed.max()) + 1
        seeds = ",".join(str(seed) for seed in range(first, first + _MORE_SEEDS))
        return {_command(rows, seed=seeds): f"{name}: more seeds of its calibration text"}
    if (settings.get("benchmarks") or {}).get("limit") is not None:
        return {_command(rows, **{"benchmarks.limit": "null"}): f"{name}: all documents of its benchmarks"}
    tasks = [*(settings.get("benchmarks") or {}).get("tasks", ()), *_FURTHER_TASKS]
    more = f"[{','.join(dict.fromkeys(tasks))}]"  # a group of benchmarks would not count where a study names its tasks
    return {_command(rows, **{"benchmarks.tasks": more}): f"{name}, which no seed changes: more benchmarks"}


def _untimed(found: Overview, rows: pd.DataFrame) -> dict[str, str]:
    """Where nothing was timed: the recipe that keeps most, timed as it runs best."""
    if any(gain.measured for gain in found.gains):
        return {}
    pruned = found.points[~found.points.baseline].sort_values("kept", ascending=False, kind="stable").iloc[0]
    why = f"{names.recipe(pruned['name'], pruned.sparsity)}: nothing was timed"
    return {_command(rows[rows.point == pruned.point], execution="auto", efficiency="quick"): why}


def _other_execution(found: Overview, rows: pd.DataFrame) -> dict[str, str]:
    """Zeros in dense matrices gain nothing: the recipe that keeps most of those, in a form that skips them."""
    points = found.points
    same = [name for name in frontier.SAME_POINT if name not in ("execution", "baseline")]
    lonely = points.groupby(same, dropna=False).execution.transform("nunique") == 1
    zeros = points[(points.method == "weight") & (points.execution == "dense") & lonely & ~points.baseline]
    if zeros.empty:
        return {}
    best = zeros.sort_values("kept", ascending=False, kind="stable").iloc[0]
    mine = rows[rows.point == best.point]
    why = f"{names.recipe(best['name'], best.sparsity)}: its zeros run in dense matrices, which skip none"
    return {_command(mine, execution="auto"): why}


def _gentler(found: Overview, rows: pd.DataFrame) -> dict[str, str]:
    """Where nothing keeps the smallest budget: half of the lowest sparsity of what keeps most."""
    pruned = found.points[~found.points.baseline]
    if (pruned.kept >= 1 - BUDGETS[0]).any():
        return {}
    best = pruned.sort_values("kept", ascending=False, kind="stable").iloc[0]
    mine = rows[rows.point == best.point]
    why = f"no pruned cell keeps {100 * (1 - BUDGETS[0]):g} %: a lower sparsity of {best['name']}"
    return {_command(mine, sparsity=f"{best.sparsity / 2:g}"): why} if best.sparsity else {}


def _settings(rows: pd.DataFrame) -> dict:
    text = rows.config.iloc[0] if "config" in rows else None
    return json.loads(text) if isinstance(text, str) else {}


def _command(rows: pd.DataFrame, **changed: str) -> str:
    """The command of the first of some rows with other values of these keys."""
    text = rows.command.iloc[0] if "command" in rows else None
    words = shlex.split(text) if isinstance(text, str) else ["python", "-m", "sweep"]
    kept = [word for word in words if word.lstrip("+").partition("=")[0] not in {*changed, "baseline"}]
    asked = [f"{key}={value}" for key, value in changed.items()]
    if any("," in value and not value.startswith("[") for value in changed.values()):
        of_study = any(word.startswith("+experiment=") for word in kept)
        asked += ["hydra.sweeper.grids=null"] * of_study + ["-m"]  # this cell's values, and not the study's other cells
    return shlex.join([*kept, *asked])
