"""The figure and table of this study: python experiments/prune_or_quantise/figure.py [RESULTS]

RESULTS is a results folder of `+experiment=prune_or_quantise`; by default the recorded rows beside this file.
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
KINDS = ("prune", "quantise", "both")
COLOURS = dict(zip(KINDS, drawing.COLOURS, strict=False))
MARKS = dict(zip(KINDS, "os^", strict=True))
PRUNED = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "taylor_sampled": "neurons"}
RECIPE = ["criterion", "sparsity", "quantize", "quantize_method"]
WORST = 30  # perplexity: beyond it a model is of no use to anybody, and is left out of the figure


def measured(results: Path) -> pd.DataFrame:
    """One line a recipe: means over its seeds, speed-ups by the mean of their logarithms, and the loss added to dense.

    Intervals of a speed-up hold those of all its seeds; those of the loss are over the documents.
    """
    rows = store.load(results)
    rows["quantize"] = rows.quantize.fillna("none")
    outcomes = paired.by_cell(store.read_table(results, "samples"), "pydoc")
    dense = rows[(rows.method == "dense") & (rows.quantize == "none")].cell.iloc[0]
    lines = []
    for (criterion, sparsity, quantize, fitted), found in rows.groupby(RECIPE, dropna=False):
        if not sparsity and quantize == "none":
            continue
        pruned = "" if not sparsity else f"{PRUNED[criterion]} {sparsity:.0%}".replace("%", " %")
        gptq = " gptq" if fitted == "gptq" else ""
        coded = "" if quantize == "none" else f"{quantize}{gptq}"
        added = paired.mean_difference(outcomes, [(dense, cell) for cell in found.cell], "loss")
        line = {
            "recipe": " + ".join(filter(None, [pruned, coded])),
            "kind": "both" if pruned and coded else "prune" if pruned else "quantise",
            "seeds": len(found),
            "runs as": found.execution.iloc[0],
            "MB": found.weights_bytes.mean() / 1e6,
            "coded MB": found.coded_bytes.mean() / 1e6,
            "perplexity": np.exp(np.log(found["pydoc/token_perplexity"]).mean()),
            "capitals": found["capitals/acc"].mean(),
            "continents": found["continents/acc"].mean(),
            "added": added["difference"],
            "added low": added["low"],
            "added high": added["high"],
            "busy": found.other_cores_busy.max(),
        }
        for phase in ("decode", "prefill"):
            line[phase] = np.exp(np.log(found[f"{phase}_speedup"]).mean())
            line[f"{phase} low"] = found[f"{phase}_speedup_low"].min()
            line[f"{phase} high"] = found[f"{phase}_speedup_high"].max()
        lines.append(line)
    return pd.DataFrame(lines).sort_values(["kind", "MB"], key=lambda c: c.map(KINDS.index) if c.name == "kind" else -c)


def draw(table: pd.DataFrame, dense: pd.Series) -> plt.Figure:
    """Above: perplexity against the bytes that the weights are held in. Below: against the measured speed-up of decoding."""
    figure, panels = plt.subplots(2, 1, figsize=(6.9, 7.6), layout="constrained")
    shown = table[table.perplexity < WORST]
    own = (dense.weights_bytes / 1e6, 1.0)
    panels[0].set(xlabel="bytes of the weights as held (MB)", xlim=(own[0] + 8, shown.MB.min() - 40))  # room for words
    panels[1].set(xlabel="decode speed-up over dense bfloat16 (measured in turns)")
    for axis, along, x in zip(panels, ("MB", "decode"), own, strict=True):
        for kind, line in shown.groupby("kind"):
            bars = None
            if along == "decode":
                bars = np.stack([line.decode - line["decode low"], line["decode high"] - line.decode])
            axis.errorbar(
                line[along],
                line.perplexity,
                xerr=bars,
                fmt=MARKS[kind],
                color=COLOURS[kind],
                markersize=5,
                linewidth=0.6,
                label={"prune": "prune", "quantise": "quantise", "both": "prune and quantise"}[str(kind)],
            )
        axis.plot(x, dense["pydoc/token_perplexity"], "*", color="black", markersize=9)
        axis.set(yscale="log", ylabel="perplexity, Python reference")
        axis.set_yticks([13, 14, 15, 16, 18, 20, 25], labels=["13", "14", "15", "16", "18", "20", "25"])
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.5)
        ordered = shown.sort_values("MB") if along == "MB" else shown  # in which there is room for all words
        words = [
            drawing.Beside(row[along], row.perplexity, row.recipe, COLOURS[row.kind]) for _, row in ordered.iterrows()
        ]
        drawing.write_beside(axis, words, np.column_stack([shown[along], shown.perplexity]))
    panels[0].legend(frameon=False, loc="upper left")
    return figure


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    table = measured(results)
    rows = store.load(results)
    dense = rows[(rows.method == "dense") & (rows.execution == "dense")].iloc[0]
    with plt.rc_context({"font.size": 8}):
        drawing.save(draw(table, dense), HERE / "prune-or-quantise")
    shown = pd.DataFrame(
        {
            "recipe": table.recipe,
            "runs as": table["runs as"],
            "MB": table.MB.map("{:.0f}".format),
            "coded MB": table["coded MB"].map("{:.0f}".format),
            "decode": _with_interval(table, "decode", "{:.2f}"),
            "prefill": _with_interval(table, "prefill", "{:.2f}"),
            "perplexity": table.perplexity.map("{:.2f}".format),
            "loss added": _with_interval(table, "added", "{:+.3f}"),
            "capitals": table.capitals.map("{:.3f}".format),
            "continents": table.continents.map("{:.3f}".format),
            "seeds": table.seeds,
            "other cores": table.busy.map("{:.2f}".format),
        }
    )
    text = tabulate(shown, headers="keys", tablefmt="github", showindex=False, disable_numparse=True)
    (HERE / "table.md").write_text(
        f"Dense: {dense.weights_bytes / 1e6:.0f} MB, perplexity {dense['pydoc/token_perplexity']:.2f}, capitals "
        f"{dense['capitals/acc']:.3f}, continents {dense['continents/acc']:.3f}. `MB` is what the weights are held in, `coded MB` what\n"
        "they come to in the bits of their form. Speed-ups over dense bfloat16, in turns, with the widest of their 95 % intervals;\n"
        "loss in nats a token, with 95 % intervals over the pages. `other cores`: busy with other programs while timed.\n\n"
        + text
        + "\n"
    )
    print(text)


def _with_interval(table: pd.DataFrame, name: str, form: str) -> list[str]:
    ends = zip(table[name], table[f"{name} low"], table[f"{name} high"], strict=True)
    return [f"{form} ({form} to {form})".format(*values) for values in ends]


if __name__ == "__main__":
    main()
