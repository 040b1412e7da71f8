"""`python -m sweep.report results`: figures and tables from the rows of a results folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from sweep import frontier, messages, plot, store
from sweep.config import RequestError

_TABLE = ["model", "method", "criterion", "execution", "sparsity", "sparsity_all_parameters", "seed",
          "weights_bytes", "peak_memory_bytes", "prefill_speedup", "decode_speedup",
          "decode_ms_per_token_p50"]  # fmt: skip


def report(results: str, out: Path) -> list[Path]:
    """Write every figure and table that the rows allow into `out`; returns the files.

    Raises RequestError when there are no rows to report.
    """
    try:
        rows = store.load(results)
    except FileNotFoundError as error:
        example = "python -m sweep +method=weight sparsity=0.1,0.3,0.5 -m"
        raise RequestError(f"{error}. Run a sweep first, such as: {example}") from error
    ok = frontier.with_paired_latency(rows[rows.status == "ok"])
    if ok.empty:
        raise RequestError(f"{results}: none of the {len(rows)} rows is ok, so there is nothing to plot")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for metric in quality_metrics(ok):
        name = metric.replace("/", "-")
        files += plot.save(plot.sparsity_figure(ok, metric), out / f"{name}-against-sparsity")
        for cost, short in (("decode_ms_paired", "latency"), ("peak_memory_bytes", "memory")):
            if ok[cost].notna().any():
                files += plot.save(plot.cost_figure(ok, cost, metric), out / f"{name}-against-{short}")
    table = out / "table.md"
    table.write_text(markdown(rows))
    return [*files, table]


def quality_metrics(rows: pd.DataFrame) -> list[str]:
    """The task metrics worth a figure: perplexity a token where there is one, else a word; accuracies and F1."""
    found = [c for c in rows.columns if "/" in c and rows[c].notna().any() and not c.endswith("_stderr")]
    tasks = dict.fromkeys(c.partition("/")[0] for c in found)
    chosen = []
    for task in tasks:
        for metric in ("acc", "f1", "token_perplexity", "word_perplexity", "perplexity"):
            if f"{task}/{metric}" in found:
                chosen.append(f"{task}/{metric}")
                break
    return chosen


def markdown(rows: pd.DataFrame) -> str:
    """The rows as a Markdown table, failed cells listed below it with their reason."""
    ok = rows[rows.status == "ok"].sort_values([*frontier.SAME_POINT, "seed"], na_position="first")
    columns = _TABLE + quality_metrics(ok)
    text = tabulate(
        ok[columns].fillna({"criterion": ""}),
        headers="keys",
        tablefmt="github",
        showindex=False,
        floatfmt=".4g",
        missingval="",
    )
    failed = rows[rows.status != "ok"]
    if len(failed):
        reasons = [f"- {r.method} {r.criterion or ''} {r.sparsity:g} seed {r.seed}: {r.status}, "
                   f"{(r.error or '').strip().splitlines()[-1:]}" for r in failed.itertuples()]  # fmt: skip
        text += "\n\nCells that are not ok:\n\n" + "\n".join(reasons)
    return text + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m sweep.report", description="Figures and tables from a sweep.")
    parser.add_argument("results", nargs="?", default="results", help="results folder (default: results)")
    parser.add_argument("--out", type=Path, help="folder for the figures (default: RESULTS/report)")
    options = parser.parse_args(arguments)
    out = options.out or Path(options.results) / "report"
    try:
        files = report(options.results, out)
    except RequestError as error:
        sys.exit(messages.complain(error))
    print(f"{len(files)} files in {out}: " + ", ".join(sorted({file.stem for file in files})))


if __name__ == "__main__":
    main()
