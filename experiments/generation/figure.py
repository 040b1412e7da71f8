"""The figures and tables of this study: python experiments/generation/figure.py [RESULTS]

RESULTS is a results folder of `+experiment=generation`; by default the recorded rows beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tabulate import tabulate

from sweep import store
from sweep.report import drawing, overview, paired

HERE = Path(__file__).parent
NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "taylor_sampled": "neurons", "block_influence": "layers"}
RECIPE = ["criterion", "sparsity"]
WRITTEN = {
    "copying": "copying",
    "swapping": "swapping",
    "brackets": "closing brackets",
    "addition": "addition",
    "capital_names": "capitals, written",
}
OF_ANSWERS = (
    "answer_speedup",
    "answer_speedup_stderr",
    "generated_tokens_mean",
    "truncated_share",
    "repetition",
    "correct_answers_per_second",
)
TASKS = {"pydoc": "perplexity, Python reference", "continents": "continents, chosen"} | WRITTEN
MARKERS = "os^D<>v"  # of the tasks, in their order


def recipe(criterion: str, sparsity: float) -> str:
    return f"{NAMES[criterion]} {100 * sparsity:.0f} %"


def measured(results: Path) -> pd.DataFrame:
    """One line a recipe and task: the mean over the seeds, what it keeps of dense, and the difference with its interval.

    A share that is kept lies between chance, which only choices have, and dense; of the perplexity it is dense over pruned.
    """
    rows = store.load(results)
    samples = store.read_table(results, "samples")
    dense = rows[rows.method == "dense"].iloc[0]
    lines = []
    for task in TASKS:
        metric = "loss" if task == "pydoc" else "acc" if task == "continents" else "exact_match"
        outcomes = paired.by_cell(samples, task)
        whole = paired.estimate(outcomes[dense.cell], metric).value
        floor = overview.chance(rows, f"{task}/{metric}").iloc[0]
        for (criterion, sparsity), found in rows[rows.method != "dense"].groupby(RECIPE):
            values = [paired.estimate(outcomes[cell], metric).value for cell in found.cell]
            mean = float(np.mean(values))
            kept = np.exp(whole - mean) if metric == "loss" else (mean - floor) / (whole - floor)
            change = paired.mean_difference(outcomes, [(dense.cell, cell) for cell in found.cell], metric)
            line = {"task": task, "recipe": recipe(criterion, sparsity), "seeds": len(values), "dense": whole}
            line |= {"mean": mean, "least": min(values), "most": max(values), "kept": kept}
            lines.append(line | change)
    return pd.DataFrame(lines)


def timed(results: Path) -> pd.DataFrame:
    """One line a recipe and written task, of the cell that was timed: an answer's speed-up beside a token's, and its length."""
    rows = store.load(results)
    lines = []
    of_time = rows[(rows.method != "dense") & rows.decode_speedup.notna()].sort_values(RECIPE)
    for _, row in of_time.iterrows():
        for task in WRITTEN:
            line = {"recipe": recipe(row.criterion, row.sparsity), "task": task}
            line |= {name: row[name] for name in ("decode_speedup", "decode_speedup_low", "decode_speedup_high")}
            lines.append(line | {name: row[f"{task}/{name}"] for name in OF_ANSWERS})
    return pd.DataFrame(lines)


def _rows(names: list[str], label: str) -> tuple[plt.Figure, plt.Axes]:
    """An axis with a row a recipe, and a line at 100 %, where the dense model is."""
    figure, axis = plt.subplots(figsize=(6.9, 3.0), layout="constrained")
    axis.axvline(100, color="0.6", linestyle="--", linewidth=0.9)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel=label)
    axis.grid(alpha=0.25, linewidth=0.5, axis="x")
    axis.invert_yaxis()
    return figure, axis


def draw_kept(table: pd.DataFrame) -> plt.Figure:
    """A mark each for what a recipe keeps of text, of choices and of each kind of answers, and a bar for the answers' mean."""
    names = list(dict.fromkeys(table.recipe))
    figure, axis = _rows(names, "kept of the dense model's (%)")
    for place, (task, label) in enumerate(TASKS.items()):
        one = table[table.task == task]
        y = one.recipe.map(names.index) + (place - 3) * 0.09
        axis.plot(100 * one.kept, y, MARKERS[place], color=drawing.COLOURS[place], markersize=4, label=label)
    for place, name in enumerate(names):
        mean = 100 * table[(table.recipe == name) & table.task.isin(WRITTEN)].kept.mean()
        axis.vlines(mean, place - 0.38, place + 0.38, color="0.5", linewidth=1.6, zorder=0)
    axis.axvline(0, color="0.6", linewidth=0.9)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_time(table: pd.DataFrame) -> plt.Figure:
    """A mark each for the time of a recipe's answers, dense being 100 %, beside that of a token, a bar; both with intervals."""
    names = list(dict.fromkeys(table.recipe))
    figure, axis = _rows(names, "time, the dense model's being 100 (%)")
    for place, (task, label) in enumerate(TASKS.items()):
        one = table[table.task == task]
        if one.empty:
            continue
        speedups = [one.answer_speedup + sign * 1.96 * one.answer_speedup_stderr for sign in (0, 1, -1)]
        value, low, high = (100 / speedup for speedup in speedups)
        y = one.recipe.map(names.index) + (place - 4) * 0.12
        axis.hlines(y, low, high, color=drawing.COLOURS[place], linewidth=0.7)
        axis.plot(value, y, MARKERS[place], color=drawing.COLOURS[place], markersize=4, label=label)
    for place, name in enumerate(names):
        token = table[table.recipe == name].iloc[0]
        span = [100 / token.decode_speedup_high, 100 / token.decode_speedup_low]
        axis.fill_betweenx(
            [place - 0.38, place + 0.38], *span, color="0.9", zorder=0, label=None if place else "a token"
        )
        axis.vlines(100 / token.decode_speedup, place - 0.38, place + 0.38, color="0.5", linewidth=1.6, zorder=1)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    kept, times = measured(results), timed(results)
    with plt.rc_context({"font.size": 8}):
        drawing.save(draw_kept(kept), HERE / "kept")
        drawing.save(draw_time(times), HERE / "time")
    tables = [
        (
            "Means over the seeds, loss of `pydoc` in nats a token; differences from dense with 95 % intervals over the documents\n"
            "and the p-value of sign flips. `kept`: between chance and dense, of `pydoc` dense over pruned perplexity.",
            kept.sort_values(["recipe", "task"], key=lambda c: c.map(list(TASKS).index) if c.name == "task" else c),
        ),
        (
            "Of the seed that was timed: the speed-up of a token with its 95 % interval, and of whole answers; tokens an answer,\n"
            "share of answers that the limit ended, repeated 4-grams, and right answers a second. Times are of six prompts a task,\nand their standard error is over these; lengths are of all answers.",
            times,
        ),
    ]
    written = [
        f"{head}\n\n{tabulate(table, headers='keys', tablefmt='github', showindex=False, floatfmt='.3f')}\n"
        for head, table in tables
    ]
    (HERE / "table.md").write_text("\n".join(written))
    print("\n".join(written))


if __name__ == "__main__":
    main()
