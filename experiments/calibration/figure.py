"""The figure and table of this study: python experiments/calibration/figure.py [RESULTS]

RESULTS is a results folder of `+experiment=calibration`; by default the recorded rows beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tabulate import tabulate

from sweep import store
from sweep.report import drawing, paired

HERE = Path(__file__).parent
PRUNED = {"wanda": "Wanda 50 %", "sparsegpt": "SparseGPT 50 %", "taylor_sampled": "neurons 20 %"}
TEXTS = {"pydoc": "Python reference", "mix": "half of each", "self": "self-written", "random": "random tokens"}
METRICS = {"pydoc": "loss", "capitals": "acc", "continents": "acc"}
LABELS = {
    "pydoc": "perplexity, Python reference",
    "capitals": "accuracy, capitals",
    "continents": "accuracy, continents",
}


def measured(results: Path) -> pd.DataFrame:
    """One line a method, text and task: the mean over the seeds, and that less the mean after calibration on the reference."""
    rows = store.load(results)
    rows = rows[rows.method != "dense"]
    rows = rows.assign(text=[json.loads(config)["calibration"]["source"] for config in rows.config])
    samples = store.read_table(results, "samples")
    lines = []
    for task, metric in METRICS.items():
        outcomes = paired.by_cell(samples, task)
        for criterion, name in PRUNED.items():
            cells = rows[rows.criterion == criterion].sort_values("seed").groupby("text").cell.apply(list)
            for text in TEXTS:
                values = [paired.estimate(outcomes[cell], metric).value for cell in cells[text]]
                change = paired.mean_difference(outcomes, zip(cells["pydoc"], cells[text], strict=True), metric)
                line = {
                    "task": task,
                    "pruned": name,
                    "text": text,
                    "mean": np.mean(values),
                    "sd": np.std(values, ddof=1),
                }
                lines.append(line | change)
    return pd.DataFrame(lines)


def draw(table: pd.DataFrame, dense: dict[str, float]) -> plt.Figure:
    """A panel a task; a row a method; a mark a text."""
    figure, panels = plt.subplots(1, 3, figsize=(6.9, 2.3), sharey=True, layout="constrained")
    names = list(PRUNED.values())
    for axis, task in zip(panels, METRICS, strict=True):
        for place, (text, label) in enumerate(TEXTS.items()):
            one = table[(table.task == task) & (table.text == text)]
            x = np.exp(one["mean"]) if task == "pydoc" else one["mean"]
            y = one.pruned.map(names.index) + (place - 1.5) * 0.17
            axis.plot(x, y, "os^D"[place], color=drawing.COLOURS[place], markersize=4, label=label)
        axis.axvline(dense[task], color="0.6", linestyle="--", linewidth=0.9)
        axis.set(xlabel=LABELS[task])
        axis.grid(alpha=0.25, linewidth=0.5)
    panels[0].set(xscale="log", yticks=range(len(names)), yticklabels=names)
    panels[0].set_xticks([15, 20, 30, 50], labels=["15", "20", "30", "50"])
    panels[0].minorticks_off()
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(TEXTS), frameon=False)
    return figure


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    table = measured(results)
    row = store.load(results).set_index("method").loc["dense"]
    dense = {task: row[f"{task}/{'token_perplexity' if task == 'pydoc' else 'acc'}"] for task in METRICS}
    with plt.rc_context({"font.size": 8}):
        drawing.save(draw(table, dense), HERE / "by-text")
    shown = table.assign(
        text=table.text.map(TEXTS), task=table.task.map(LABELS).where(table.task != "pydoc", "loss, pydoc")
    )
    shown = shown[["task", "pruned", "text", "mean", "sd", "difference", "low", "high", "p"]]
    text = tabulate(shown, headers="keys", tablefmt="github", showindex=False, floatfmt=".3f", missingval="")
    (HERE / "table.md").write_text(
        "Means over three seeds with their deviation, loss in nats a token; differences are those from calibration on the Python\n"
        "reference, with 95 % intervals over the documents and the p-value of sign flips.\n\n" + text + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
