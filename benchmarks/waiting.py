"""What a user waits for, on the embedded model: python benchmarks/waiting.py

Each line is the median of a few runs of the real command, and the bar that it is to meet.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from tabulate import tabulate

import sweep

SWEEP = [sys.executable, "-m", "sweep"]


def seconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    first = [*SWEEP, "+method=weight", "sparsity=0.1,0.3,0.5", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        seconds([*SWEEP, "+method=weight", "sparsity=0.1", "plan=true"], folder)  # warm the disk cache
        lines = [
            ("python -m sweep --help", statistics.median(seconds([*SWEEP, "--help"], folder) for _ in range(5)), 1.0)
        ]
        lines.append(("first sweep: three cells and the dense row", seconds(first, folder), 300.0))
        again = statistics.median(seconds(first, folder) for _ in range(3))
        lines.append(("the same sweep again, all done", again, 5.0))
        rows = sweep.load(f"{folder}/results")
    lines.append(("slowest cell of the default benchmarks", rows.cell_seconds.max(), 60.0))
    at_half = rows[rows.sparsity == 0.5].prune_seconds.item()
    lines.append(("pruning by magnitude at 0.5", at_half, 3.0))
    print(tabulate(lines, headers=["what", "seconds", "bar"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
