"""A cell beside another program: python benchmarks/beside_load.py [WORDS OF A CELL …]

Runs a cell (by default the one of `python -m sweep +method=weight`, with its dense baseline) alone and beside a program
that keeps two threads busy, in turn, and prints what its seconds are as a multiple of those alone, with the cores that
others kept busy while it was timed. The bar is three: of two cores, two such programs each get half.

--rounds  how often (default 1)
--spin    also with this GOMP_SPINCOUNT, such as 300000, which is libgomp's own
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

import sweep
from sweep import machine

BAR = 3.0
BUSY = """
import hashlib, threading

def work():
    while True:
        hashlib.sha256(bytes(2**20))  # holds no lock of the interpreter

for _ in range(2):
    threading.Thread(target=work).start()
"""


@contextlib.contextmanager
def load() -> Iterator[None]:
    program = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def measure(words: list[str], spin: str | None) -> tuple[float, float]:
    """(seconds of the cells, cores that others kept busy while they were timed, on average)."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({} if spin is None else {"GOMP_SPINCOUNT": spin})
        subprocess.run(
            [sys.executable, "-m", "sweep", *words, f"results={folder}/results"],
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        rows = sweep.load(Path(folder) / "results")
    assert (rows.status == "ok").all()
    seconds, others = float(rows.cell_seconds.sum()), float(rows.other_cores_busy.mean())
    print(f"  {seconds:.0f} s, others kept {others:.2f} cores busy while it was timed", flush=True)
    return seconds, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["+method=weight"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--spin")
    options = parser.parse_args()
    words = options.words or ["+method=weight"]
    print(f"{machine.cpu_name()}, {machine.cores()} cores; {' '.join(words)}", flush=True)
    lines = []
    for spin in [None] if options.spin is None else [None, options.spin]:
        alone, beside = [], []
        for _ in range(options.rounds):
            alone.append(measure(words, spin))
            with load():
                beside.append(measure(words, spin))
        seconds = [statistics.median(s for s, _ in found) for found in (alone, beside)]
        busy = [statistics.median(cores for _, cores in found) for found in (alone, beside)]
        lines.append(
            {
                "GOMP_SPINCOUNT": spin or machine.thread_settings().get("GOMP_SPINCOUNT", "yours"),
                "alone, s": seconds[0],
                "beside, s": seconds[1],
                "ratio": seconds[1] / seconds[0],
                "bar": BAR,
                "others busy alone": busy[0],
                "others busy beside": busy[1],
            }
        )
        print(tabulate(lines, headers="keys", floatfmt=".3g"), flush=True)


if __name__ == "__main__":
    main()
