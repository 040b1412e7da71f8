"""Seconds that a report takes: python benchmarks/report.py [--rows 10000] [--formats png,svg,pdf] [--profile]

Rows are made by table and not measured: a grid of methods and sparsities with seeds, four tasks, and one model, written
as a compacted results folder as a large sweep leaves it. Prints seconds of the clock and of the processors, which on a
busy machine are the ones to look at. The goal is 10 for 10,000 rows.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import math
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import pandas as pd

import frames
from sweep.report import __main__


def made(count: int) -> pd.DataFrame:
    """So many rows of 24 criteria at 20 sparsities, four tasks each."""
    methods = [
        (family, f"criterion_{i}", execution)
        for i in range(8)
        for family, execution in (("weight", "dense"), ("weight", "bitmap"), ("neuron", "shrunk"))
    ]
    sparsities = tuple(np.round(np.linspace(0.04, 0.8, 20), 3))
    rows = frames.rows(math.ceil(count / (len(methods) * len(sparsities))), sparsities, methods=tuple(methods)).head(
        count
    )
    draw = np.random.default_rng(1)
    for task in ("continents/acc", "pydoc_cloze/acc"):
        rows[task] = rows["capitals/acc"] + draw.normal(0, 0.01, len(rows))
        rows[f"{task}_stderr"] = 0.02
    return rows


def processors() -> float:
    """Seconds of processors that this process and its children have used."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--formats", default="", help="of the figures; those of a report by default")
    parser.add_argument("--profile", action="store_true", help="where this process spends it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cells = Path(folder) / "results" / "cells"
        cells.mkdir(parents=True)
        made(given.rows).to_parquet(cells / "0-table-made.parquet")
        words = [str(cells.parent), "--out", f"{folder}/report"]
        words += ["--formats", given.formats] if given.formats else []
        profile = cProfile.Profile(time.process_time)
        started, busy = time.perf_counter(), processors()
        with contextlib.redirect_stdout(io.StringIO()), profile if given.profile else contextlib.nullcontext():
            __main__.main(words)
        seconds, busy = time.perf_counter() - started, processors() - busy
        files = [file for file in Path(f"{folder}/report").iterdir() if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(
            f"{given.rows} rows: {len(files)} files, {size / 1e6:.0f} MB, in {seconds:.1f} s ({busy:.1f} of processors)"
        )
        if given.profile:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()
