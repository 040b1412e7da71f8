"""The figure and table of this study: python experiments/small_weights/figure.py [RESULTS]

RESULTS is a results folder of `+experiment=small_weights`; by default the recorded rows beside this file.
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
from sweep.report import paired, plot

HERE = Path(__file__).parent
TENTH = 0.05  # of a matrix: a tenth of its smaller half
COLOURS = dict(zip(("wanda", "gradient", "magnitude", "random"), plot.COLOURS, strict=False))
MARKS = dict(zip(COLOURS, "os^D", strict=True))


def measured(results: Path) -> pd.DataFrame:
    """One line a pruned cell: the loss that it adds to the dense model's, with its interval over documents."""
    methods = store.load(results).set_index("cell").config.map(lambda config: json.loads(config)["method"])
    table = paired.compare(results, ["pydoc/loss"])
    skipped = table.after.map(lambda cell: methods[cell].get("skip_lowest", 0.0))
    return table.assign(skipped=skipped).sort_values(["criterion", "sparsity", "skipped", "seed"])


def draw(table: pd.DataFrame) -> plt.Figure:
    """Left: each tenth alone, against its place in the criterion's order. Right: nine tenths, and the whole half."""
    figure, (bands, parts) = plt.subplots(
        1, 2, figsize=(6.9, 3.0), sharey=True, layout="constrained", width_ratios=(2, 1)
    )
    alone = table[np.isclose(table.sparsity, TENTH)]
    for i, criterion in enumerate(COLOURS):
        line = alone[alone.criterion == criterion]
        place = 10 * line.skipped / 0.5 + 1 + 0.08 * (line.seed - 1)
        style = {
            "color": COLOURS[criterion],
            "marker": MARKS[criterion],
            "markersize": 4,
            "capsize": 1.5,
            "linewidth": 0.9,
        }
        if criterion == "random":  # its tenths are alike: any place will do
            bands.axhspan(
                line.low.min(),
                line.high.max(),
                color=COLOURS[criterion],
                alpha=0.25,
                linewidth=0,
                label="random tenths",
            )
        elif len(line):
            bands.errorbar(place, line.difference, yerr=_bars(line), linestyle="none", label=criterion, **style)
            bands.plot(
                place.groupby(line.skipped).mean(),
                line.groupby("skipped").difference.mean(),
                color=COLOURS[criterion],
                linewidth=0.9,
            )
        rest = table[np.isclose(table.sparsity, 0.45) & (table.criterion == criterion)]
        if len(rest):
            parts.errorbar(
                i + 0.12 * (rest.seed - rest.seed.mean()), rest.difference, yerr=_bars(rest), linestyle="none", **style
            )
    whole = table[np.isclose(table.sparsity, 0.5)]
    for axis in (bands, parts):
        for value in whole.difference:
            axis.axhline(value, color="0.4", linestyle="--", linewidth=0.9)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.grid(alpha=0.25, linewidth=0.5)
    bands.axhline(0, color="0.7", linewidth=0.8)
    bands.set(
        xlabel="which tenth of the smaller half, in the criterion's order",
        xticks=range(1, 11),
        ylabel="loss added to dense (nats a token)",
    )
    bands.legend(fontsize=7, frameon=False, loc="lower right")
    parts.set_xticks(range(len(COLOURS)), list(COLOURS), fontsize=7)
    parts.set(xlabel="all but the highest tenth", xlim=(-0.5, len(COLOURS) - 0.5))
    parts.set_title("dashed: the whole half", fontsize=8)
    return figure


def _bars(line: pd.DataFrame) -> np.ndarray:
    return np.abs(np.stack([line.difference - line.low, line.high - line.difference]))


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    table = measured(results)
    with plt.rc_context({"font.size": 8}):
        plot.save(draw(table), HERE / "loss-by-tenth")
    shown = table[["criterion", "sparsity", "skipped", "seed", "difference", "low", "high", "p_holm", "verdict"]]
    text = tabulate(shown, headers="keys", tablefmt="github", showindex=False, floatfmt=".4g", missingval="")
    (HERE / "table.md").write_text(
        "Loss added to the dense model's, nats a token, over the documents of `pydoc`:\n\n" + text + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
