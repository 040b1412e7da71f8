"""CPU time of the reference sweep against a plain script a cell: python benchmarks/sweep_cost.py

The reference sweep: magnitude and Wanda, five sparsities, three seeds, `pydoc` and 100 `capitals` questions: 30 cells.
A sample of both is run: what a cell of each criterion costs is then known, and so is the whole.
CPU seconds of every process are counted. The script does not time the model, so neither does the sweep.

    --dtype bfloat16    of the plain script; by default the library's own choice for this file, which is float32
    --timed             also what timing adds to a cell
    --shared            Wanda on activations of the dense model, which its sparsities share (calibration.sequential=false)
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
from sweep.models import origin

_PR_SET_CHILD_SUBREAPER = 36
SWEEP = [
    sys.executable,
    "-m",
    "sweep",
    "-m",
    "benchmarks.tasks=[pydoc,capitals]",
    "benchmarks.limit=100",
    "sparsity=0.5",
    "+method=weight",
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
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.1f} s: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    return seconds, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the embedded model's file, when it is found elsewhere")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--shared", action="store_true")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gguf = options.gguf or origin.gguf_file(EMBEDDED)
    plain, outputs = {}, {}
    untimed = ["efficiency=none", *(["calibration.sequential=false"] if options.shared else [])]
    magnitude, wanda, both = (f"method.criterion={names}" for names in ("magnitude", "wanda", "magnitude,wanda"))
    with tempfile.TemporaryDirectory() as folder:
        # the conversion of the model is made once and for all sweeps; here it may be there already
        first, _ = cpu_seconds([*SWEEP, *untimed, magnitude], folder)  # the dense cell and one by magnitude
        again, _ = cpu_seconds([*SWEEP, *untimed, magnitude, "sparsity=0.4"], folder)  # one more
        second, _ = cpu_seconds([*SWEEP, *untimed, wanda], folder)
        rows = sweep.load(f"{folder}/results")
        start, _ = cpu_seconds([*SWEEP, *untimed, both], folder)  # nothing to do
        third, _ = cpu_seconds([*SWEEP, *untimed, wanda, "sparsity=0.4"], folder)  # what it shares is there
        for criterion in ("magnitude", "wanda"):
            script = str(Path(__file__).with_name("plain_cell.py"))
            words = [sys.executable, script, str(gguf), criterion, "0.5", "0", options.dtype]
            plain[criterion], outputs[criterion] = cpu_seconds(words, folder)
        text = Path(folder) / "text.txt"
        text.write_text("words of a text that is long enough " * (20_000_000 // 36))
        grid = ["sparsity=0.2,0.4,0.6,0.8", f"seed={','.join(map(str, range(250)))}", "max_cells=2000", "plan=true"]
        planned, _ = cpu_seconds(
            [*SWEEP, *untimed, wanda, *grid, "calibration=file", f"calibration.source={text}"], folder
        )
        timed = cpu_seconds([*SWEEP, magnitude], folder)[0] if options.timed else None  # the first two, and timed
    # By magnitude, which draws nothing, three seeds are one cell. Of Wanda's sparsities one a seed finds nothing to share.
    cells = {"magnitude": again - start, "wanda": second - start, "again": third - start}
    whole_sweep = first + 4 * cells["magnitude"] + 3 * cells["wanda"] + 12 * cells["again"]
    whole_plain = 15 * plain["magnitude"] + 15 * plain["wanda"]
    lines = [
        ("the dense cell and one by magnitude", None, first),
        ("one more by magnitude", plain["magnitude"], cells["magnitude"]),
        ("one by Wanda", plain["wanda"], cells["wanda"]),
        ("one by Wanda of another sparsity", plain["wanda"], cells["again"]),
        ("start of a sweep", None, start),
        ("a plan of 1,000 cells that read a text of 20 MB", None, planned),
        ("what timing adds to a cell", None, timed and (timed - first) / 2),
        ("the reference sweep", whole_plain, whole_sweep),
    ]
    print(
        tabulate(
            lines, headers=["CPU seconds", f"plain script ({options.dtype})", "sweep"], floatfmt=".1f", missingval="-"
        )
    )
    print(f"ratio {whole_plain / whole_sweep:.1f}; bar 8")
    metrics = [name for name in rows if name in ("pydoc/word_perplexity", "capitals/acc")]
    print(rows.set_index(["criterion", "sparsity"])[metrics].to_string(), *outputs.values(), sep="\n")


if __name__ == "__main__":
    main()
