"""The figure and table of this study: python experiments/rare_words/figure.py [RESULTS]

RESULTS is a results folder of `+experiment=rare_words`; by default the recorded rows beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from tabulate import tabulate

from sweep import store
from sweep.measuring import words
from sweep.report import paired, plot

HERE = Path(__file__).parent
NAMES = {
    "zipf5up": "Zipf 5 and more (the, house)",
    "zipf4to5": "4 to 5 (castle)",
    "zipf3to4": "3 to 4 (lizard)",
    "zipf0to3": "below 3 (metaclass)",
    "no_word": "no word (digits, signs)",
}
COLOURS = dict(zip(words.BANDS, ["#0072B2", "#009E73", "#E69F00", "#D55E00", "#999999"], strict=True))


def measured(results: Path) -> pd.DataFrame:
    """One line a pruned cell and band: the loss before and after, its increase with interval, and accuracy."""
    metrics = [f"pydoc/loss_band_{band}" for band in words.BANDS]
    return paired.compare(results, metrics)


def gaps(results: Path) -> pd.DataFrame:
    """One line a pruned cell: by how much more the loss of the rarest words grows than that of the most common."""
    rows, samples = store.load(results).set_index("cell"), store.read_table(results, "samples")
    lines = []
    for before, after in paired.against_dense(rows[rows.status == "ok"]):
        a, b = (paired.outcomes(samples, cell, "pydoc") for cell in (before, after))
        lines.append(
            {
                "method": rows.method[after],
                "criterion": rows.criterion[after],
                "sparsity": rows.sparsity[after],
                "seed": rows.seed[after],
                "accuracy, common": rows["pydoc_cloze/acc_band_zipf5up"][after],
                "accuracy, rare": rows["pydoc_cloze/acc_band_zipf0to3"][after],
                "removed of rare": rows.get("pydoc/removed_share_band_zipf0to3", pd.Series(np.nan, rows.index))[after],
                **paired.band_gap(a, b, "zipf0to3", "zipf5up"),
            }
        )
    found = pd.DataFrame(lines).sort_values(["method", "criterion", "sparsity"])
    return found.assign(p_holm=paired.holm(found.p))


def draw(table: pd.DataFrame) -> plt.Figure:
    methods = list(dict.fromkeys(zip(table.method, table.criterion, strict=True)))
    figure, axes = plt.subplots(
        1, len(methods), figsize=(3.1 * len(methods), 3.6), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (method, criterion) in zip(np.atleast_1d(axes), methods, strict=True):
        mine = table[(table.method == method) & (table.criterion == criterion)]
        for i, band in enumerate(words.BANDS):
            of_band = mine[mine.metric == f"pydoc/loss_band_{band}"].groupby("sparsity")
            # the mean of the seeds, in an interval that holds all of theirs
            line = of_band.agg(difference=("difference", "mean"), low=("low", "min"), high=("high", "max"))
            error = np.abs(np.stack([line.difference - line.low, line.high - line.difference]))
            axis.errorbar(
                line.index + 0.006 * (i - 2),
                line.difference,
                yerr=error,
                marker="o",
                markersize=3.5,
                capsize=2,
                color=COLOURS[band],
                label=NAMES[band],
            )
        axis.axhline(0, color="0.6", linewidth=0.8, linestyle="--")
        axis.set_title(f"{method} ({criterion})", fontsize=10)
        axis.set_xlabel("sparsity")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.grid(alpha=0.25, linewidth=0.6)
    np.atleast_1d(axes)[0].set_ylabel("loss increase over dense (nats a token)")
    np.atleast_1d(axes)[0].legend(fontsize=7, frameon=False, title="frequency of the word", title_fontsize=7)
    return figure


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    table, gap = measured(results), gaps(results)
    plot.save(draw(table), HERE / "loss-increase-by-band")
    bands = table.assign(band=table.metric.str.removeprefix("pydoc/loss_band_"))
    wide = bands.pivot_table(index=["method", "criterion", "sparsity"], columns="band", values="difference")
    wide = wide[[band for band in words.BANDS if band in wide]]
    text = "Loss increase over dense, nats a token, by frequency of the word:\n\n"
    text += tabulate(wide.reset_index(), headers="keys", tablefmt="github", showindex=False, floatfmt=".3f")
    text += (
        "\n\nIncrease of the rarest words less that of the most common (95 % interval, Holm's p over this table), and "
    )
    text += "final-word accuracy:\n\n"
    text += tabulate(gap, headers="keys", tablefmt="github", showindex=False, floatfmt=".3f", missingval="")
    (HERE / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
