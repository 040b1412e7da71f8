"""The figure and table of this study: python experiments/recovery/figure.py [RESULTS]

RESULTS is a results folder of `+experiment=recovery`; by default the recorded rows beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tabulate import tabulate

from sweep import store
from sweep.report import drawing, paired

HERE = Path(__file__).parent
PRUNED = {  # by the name of its criterion
    "random": "random 50 %",
    "magnitude": "magnitude 50 %",
    "wanda": "Wanda 50 %",
    "sparsegpt": "SparseGPT 50 %",
    "alps": "ALPS 50 %",
    "taylor_sampled": "neurons 30 %",
    "block_influence": "layers 20 %",
}
KINDS = ("none", "local", "lora", "distill")
COLOURS = dict(zip(KINDS, ("0.3", *drawing.COLOURS), strict=False))
MARKS = dict(zip(KINDS, "xos^", strict=True))
TASKS = {"pydoc": "loss", "capitals": "acc", "continents": "acc"}


def measured(results: Path) -> pd.DataFrame:
    """One line a method, kind of recovery and budget: means over the seeds, and what recovery changes.

    `TASK` is the mean, `TASK_difference` that less the mean without recovery, with its `_low`, `_high` and `_p`.
    """
    rows = store.load(results)
    samples = store.read_table(results, "samples")
    outcomes = {task: paired.by_cell(samples, task) for task in TASKS}
    tokens = rows.recovery_tokens.fillna(0).astype(int)
    lines = []
    for (criterion, kind, budget), found in rows.groupby([rows.criterion, "recovery", tokens]):
        bare = rows[(rows.criterion == criterion) & (rows.recovery == "none")].set_index("seed").cell
        line = {
            "pruned": PRUNED[criterion],
            "recovery": kind,
            "tokens": budget,
            "seeds": len(found),
            "seconds": found.recovery_seconds.mean(),
        }
        for task, metric in TASKS.items():
            values = [paired.estimate(outcomes[task][cell], metric).value for cell in found.cell]
            line |= {task: np.mean(values), f"{task}_sd": np.std(values, ddof=1) if len(values) > 1 else np.nan}
            # magnitude reads no text: without recovery it is the same with every seed
            pairs = [(bare.get(seed, bare.iloc[0]), cell) for seed, cell in zip(found.seed, found.cell, strict=True)]
            change = paired.mean_difference(outcomes[task], pairs, metric)
            line |= {f"{task}_{name}": value for name, value in change.items()}
        lines.append(line)
    table = pd.DataFrame(lines)
    order = {name: place for place, name in enumerate([*PRUNED.values(), *KINDS])}
    return table.sort_values(["pruned", "recovery", "tokens"], key=lambda c: c.map(order) if c.dtype != int else c)


def draw(table: pd.DataFrame, dense: dict[str, float]) -> plt.Figure:
    """A panel a task; a row a method; a mark a kind of recovery, hollow with the smaller budget."""
    figure, panels = plt.subplots(1, 3, figsize=(6.9, 3.4), sharey=True, layout="constrained")
    names = list(PRUNED.values())
    labels = {
        "pydoc": "perplexity, Python reference",
        "capitals": "accuracy, capitals",
        "continents": "accuracy, continents",
    }
    for axis, task in zip(panels, TASKS, strict=True):
        for kind in KINDS:
            for budget, one in table[table.recovery == kind].groupby("tokens"):
                x = np.exp(one[task]) if task == "pydoc" else one[task]
                y = one.pruned.map(names.index) + (KINDS.index(kind) - 1.5) * 0.17
                full = budget == table[table.recovery == kind].tokens.max()
                axis.plot(
                    x,
                    y,
                    MARKS[kind],
                    color=COLOURS[kind],
                    markersize=4,
                    fillstyle="full" if full else "none",
                    label=kind if full else None,
                )
        axis.axvline(dense[task], color="0.6", linestyle="--", linewidth=0.9)
        axis.set(xlabel=labels[task])
        axis.grid(alpha=0.25, linewidth=0.5)
    panels[0].set(xscale="log", xlim=(12, 600), yticks=range(len(names)), yticklabels=names)
    panels[0].set_xticks([15, 20, 30, 50, 100, 400], labels=["15", "20", "30", "50", "100", "400"])
    panels[0].minorticks_off()
    panels[0].invert_yaxis()
    panels[0].annotate("random: beyond the axis", (590, 0), ha="right", va="center", fontsize=6, color="0.4")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS), frameon=False)
    return figure


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    table = measured(results)
    row = store.load(results).set_index("method").loc["dense"]
    dense = {
        "pydoc": row["pydoc/token_perplexity"],
        "capitals": row["capitals/acc"],
        "continents": row["continents/acc"],
    }
    with plt.rc_context({"font.size": 8}):
        drawing.save(draw(table, dense), HERE / "recovered")
    shown = pd.DataFrame(
        {
            "pruned": table.pruned,
            "recovery": table.recovery,
            "tokens": table.tokens,
            "perplexity": np.exp(table.pydoc).map("{:,.2f}".format),
            "loss": table.pydoc.map("{:.3f}".format)
            + table.pydoc_sd.map(lambda sd: "" if np.isnan(sd) else f" ± {sd:.3f}"),
            "change": [_change(line, "pydoc", "{:+.3f}") for line in table.itertuples()],
        }
        | {
            heading: [text for line in table.itertuples() for text in [made(line)]]
            for task in ("capitals", "continents")
            for heading, made in (
                (task, lambda line, task=task: f"{getattr(line, task):.3f}"),
                (f"change of {task}", lambda line, task=task: _change(line, task, "{:+.3f}")),
            )
        }
        | {"recovery s": table.seconds.map("{:.1f}".format)}
    )
    text = tabulate(shown, headers="keys", tablefmt="github", showindex=False, disable_numparse=True)
    (HERE / "table.md").write_text(
        "Means over the seeds; `loss` in nats a token of `pydoc`, with its deviation over the seeds. Changes are those against no\n"
        "recovery, with 95 % intervals over the documents. Seconds are those of an H100, shared by up to 24 cells.\n\n"
        + text
        + "\n"
    )
    print(text)


def _change(line: object, task: str, form: str) -> str:
    """A change with its interval; nothing where there was no recovery."""
    if getattr(line, "recovery") == "none":  # noqa: B009
        return ""
    value, low, high = (getattr(line, f"{task}_{name}") for name in ("difference", "low", "high"))
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


if __name__ == "__main__":
    main()
