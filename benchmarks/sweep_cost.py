"""CPU time of the reference sweep against a plain script a cell: python benchmarks/sweep_cost.py

The reference sweep: magnitude and Wanda, five sparsities, three seeds, `pydoc` and 100 `capitals` questions: 30 cells.
A sample of both is run, the same two cells: what a cell of each criterion costs is then known, and so is the whole.
CPU seconds of every process are counted. The sweep also measures memory and latency, which the script does not.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from embedded import EMBEDDED
from tabulate import tabulate

import sweep
from sweep import sources

_PR_SET_CHILD_SUBREAPER = 36
SWEEP = [
    sys.executable,
    "-m",
    "sweep",
    "-m",
    "benchmarks.tasks=[pydoc,capitals]",
    "benchmarks.limit=100",
    "sparsity=0.5",
]


def cpu_seconds(command: list[str], folder: str) -> tuple[float, str]:
    """CPU seconds of a command and of all processes that descend from it, whoever waited for them; and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # orphans, such as a forkserver, come to this process: it is their reaper
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the embedded model's file, when it is found elsewhere")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gguf = options.gguf or sources.gguf_file(EMBEDDED)
    plain, outputs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        # the conversion of the model is made once and for all sweeps; here it may be there already
        one, _ = cpu_seconds([*SWEEP, "+method=weight"], folder)  # the dense cell and one by magnitude
        both, _ = cpu_seconds(
            [*SWEEP, "+method=weight", "method.criterion=magnitude,wanda"], folder
        )  # one more, by Wanda
        rows = sweep.load(f"{folder}/results").set_index("criterion")
        start, _ = cpu_seconds([*SWEEP, "+method=weight", "method.criterion=magnitude,wanda"], folder)  # nothing to do
        for criterion in ("magnitude", "wanda"):
            words = [sys.executable, str(Path(__file__).with_name("plain_cell.py")), str(gguf), criterion, "0.5", "0"]
            plain[criterion], outputs[criterion] = cpu_seconds(words, folder)
    wanda, magnitude_and_dense = both - start, one - start
    # 5 cells by magnitude, which draws nothing and is one for three seeds; 15 by Wanda; the dense one. A cell by
    # magnitude costs half of what it cost with the dense one, to good measure: the dense one scores and times as well.
    whole_sweep = start + magnitude_and_dense + 4 * magnitude_and_dense / 2 + 15 * wanda
    whole_plain = 15 * plain["magnitude"] + 15 * plain["wanda"]
    lines = [("one cell by magnitude", plain["magnitude"], magnitude_and_dense / 2),
             ("one cell by Wanda", plain["wanda"], wanda), ("start of a sweep", None, start),
             ("the reference sweep", whole_plain, whole_sweep)]  # fmt: skip
    print(tabulate(lines, headers=["CPU seconds", "plain script", "sweep"], floatfmt=".1f", missingval="-"))
    print(f"ratio {whole_plain / whole_sweep:.1f}; bar 8")
    metrics = [name for name in rows if name in ("pydoc/word_perplexity", "capitals/acc")]
    print(rows[metrics].to_string(), *outputs.values(), sep="\n")


if __name__ == "__main__":
    main()
