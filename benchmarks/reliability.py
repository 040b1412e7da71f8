"""What a sweep survives, and what its bookkeeping costs, on a tiny random model: python benchmarks/reliability.py

    kills      kill -9 of the whole process tree at random moments of 20-cell sweeps, resumed each time
    writers    rounds of 50 processes that finish at once, beside a reader that loops 1,000 times
    disk_full  a row that does not fit on a small tmpfs (needs root), then space again
    overhead   seconds a cell beyond the work itself
    load       10,000 rows: load compacted, and a sweep that finds its cells among them

Each line is a figure and the bar that it is to meet, printed when it is known. Name parts to run those alone; --kills
sets the number of kills, and --seed their moments, so that a hundred can be run in several goes. `kills --kills 5` took
less than four minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import sweep
from sweep import store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
QUICK = [
    "benchmarks=pydoc",
    "benchmarks.limit=1",
    "benchmarks.max_length=128",
    "efficiency.prompt_tokens=4",
    "efficiency.output_tokens=2",
    "efficiency.repeats=6",
    "efficiency.warmup=0",
    "dtype=float32",
    "threads=1",
]
WRITERS, ROUNDS, LOOPS = 50, 20, 1000
_PR_SET_CHILD_SUBREAPER, _CLONE_NEWNS = 36, 0x20000
Line = tuple[str, Any, Any]  # what, measured, bar


def tiny_model(folder: Path) -> list[str]:
    """The words that choose a tiny random model, which is written to `folder`."""
    import conftest  # of the tests: the same model

    conftest.write_tiny_checkpoint(folder)
    return ["model=local", f"model.path={folder}", *QUICK]


def command(model: list[str], cells: int, *more: str) -> list[str]:
    """A sweep of so many cells, the dense baseline among them."""
    sparsities = ",".join(f"{i / 100:g}" for i in range(1, cells))
    return [sys.executable, "-m", "sweep", "-m", "+method=weight", f"sparsity={sparsities}", *model, *more]


def rows_on_disk(results: Path) -> dict[str, int]:
    """The cells that have a file of their own, and when each was written."""
    return {f.stem: f.stat().st_mtime_ns for f in (results / "cells").glob("*.parquet") if len(f.stem) == 16}


def kills(folder: Path, model: list[str], number: int, seed: int) -> Iterator[Line]:
    """Kill at random moments, resume, and look at what is there after every kill.

    A moment is drawn between 0 and twice the seconds that a sweep takes to its first cell: half of the kills hit the
    start (planning, imports, the dense row's cell), half a cell or the writing of its row.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of a killed sweep come to this process
    draw, start = random.Random(seed), _seconds_to_first_cell(folder, model)
    done = sweeps = hung = lost = repeated = unreadable = wrong = started = most = 0
    begun = time.monotonic()
    while done < number and not hung:
        results, finished, known = folder / f"kills-{sweeps}", False, dict[str, int]()
        sweeps += 1
        while not finished and not hung:
            log, last = folder / "log", done == number
            after = 100 * start if last else draw.uniform(0, 2 * start)
            finished = _killed_after(after, command(model, 20, f"results={results}"), log)
            done += not finished and not last
            hung += not finished and last
            now = rows_on_disk(results)
            starts = sum(line.startswith("[") for line in log.read_text().splitlines())
            started += starts
            most = max(most, starts - len(set(now) - set(known)))
            lost += len(set(known) - set(now))
            repeated += sum(now[cell] != known[cell] for cell in set(known) & set(now))
            unreadable += bool(now) and not _readable(results, len(now))
            known = now
        rows = sweep.load(results)
        wrong += len(rows) != 20 or rows.cell.duplicated().any() or set(rows.status) != {"ok"}
    minutes = (time.monotonic() - begun) / 60
    yield f"kill -9 of the tree ({sweeps} sweeps, {minutes:.1f} minutes)", done, number
    yield "resumed sweeps that hung", hung, 0
    yield "sweeps that did not end with exactly 20 rows, all ok", wrong, 0
    yield "rows lost", lost, 0
    yield "finished cells that were run again", repeated, 0
    yield f"cells begun in vain by one kill, at most ({started} were begun for {20 * sweeps} rows)", most, "1"
    yield "unreadable files or wrong counts after a kill", unreadable, 0


def _seconds_to_first_cell(folder: Path, model: list[str]) -> float:
    begun = time.monotonic()
    words = command(model, 20, f"results={folder}/first")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stdout is not None
        while not (line := running.stdout.readline()).startswith("[2/"):
            assert line, "the sweep ended before its second cell"
        os.killpg(running.pid, signal.SIGKILL)
    return time.monotonic() - begun


def _killed_after(seconds: float, words: list[str], log: Path) -> bool:
    """Run a command and kill all its processes after so many seconds. Returns whether it had ended by itself.

    All of them, and those that they have left to this process, are gone when this returns.
    """
    with log.open("w") as output:
        running = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
    try:
        running.wait(timeout=seconds)
        finished = True
    except subprocess.TimeoutExpired:
        finished = False
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    with contextlib.suppress(ChildProcessError):  # none is left
        while True:
            os.waitpid(-running.pid, 0)
    return finished


def _readable(results: Path, rows: int) -> bool:
    """Whether anything that opens parquet sees so many rows."""
    try:
        return len(pd.read_parquet(results / "cells")) == rows
    except Exception:
        return False


def _finish(results: Path, number: int) -> None:
    described = {"cell": f"{number:016x}", "status": "ok", "sparsity": 0.5, f"task{number % 7}/acc": 0.5}
    samples = pd.DataFrame(
        {"task": ["t"] * 100, "document": [str(i) for i in range(100)], "metric": "acc", "value": 1.0}
    )
    store.write(results, described, {"samples": samples})


def _write_at_once(results: Path, writer: int, together: Any, started: Any, finished: Any) -> None:
    for i in range(ROUNDS):
        together.wait()
        started[writer] = i + 1
        _finish(results, 1000 * writer + i)
        finished[writer] = i + 1


def writers(folder: Path) -> Iterator[Line]:
    """In each round all writers finish a cell at once while the reader loops, and then, every other time, compacts.

    A read is right when it has every row whose writing had ended before it, and none whose writing had not begun.
    """
    results, context = folder / "writers", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sweep.store"])
    together = context.Barrier(WRITERS + 1)
    started, finished = context.RawArray("i", WRITERS), context.RawArray("i", WRITERS)
    processes = [
        context.Process(target=_write_at_once, args=(results, n, together, started, finished), daemon=True)
        for n in range(WRITERS)
    ]
    for process in processes:
        process.start()
    failed = wrong = beside = loops = 0
    for number in range(1, ROUNDS + 1):
        together.wait()
        while loops < LOOPS * number // ROUNDS:
            least = sum(finished)
            try:
                count = len(sweep.load(results)) if least else 0
                wrong += not least <= count <= sum(started)
            except Exception:
                failed += 1
            beside += least < WRITERS * number
            loops += 1
        if number % 2:
            store.compact(results)
    for process in processes:
        process.join()
    wrong += len(sweep.load(results)) != WRITERS * ROUNDS
    yield f"{ROUNDS} times {WRITERS} writers: reads ({beside} of them beside writers)", loops, LOOPS
    yield "failed reads", failed, 0
    yield "wrong counts", wrong, 0


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs that nobody else sees and that goes with this process, however that ends: it has its own namespace."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "a namespace for the mount was refused")
    place.mkdir()
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def disk_full(folder: Path, model: list[str]) -> Iterator[Line]:
    if os.getuid() != 0:
        yield "disk full", "skipped: a tmpfs needs root", ""
        return
    with small_disk(folder / "disk", "2m") as disk:
        first = subprocess.run(command(model, 3, f"results={disk}/r"), capture_output=True, text=True)
        before = sweep.load(disk / "r").set_index("cell")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 128 * 1024))  # the probe fits, and a few small files
        second = subprocess.run(command(model, 12, f"results={disk}/r"), capture_output=True, text=True)
        after = sweep.load(disk / "r").set_index("cell")
        ballast.unlink()
        third = subprocess.run(command(model, 12, f"results={disk}/r"), capture_output=True, text=True)
        rows = sweep.load(disk / "r")
    codes = (first.returncode, second.returncode, third.returncode)
    yield "disk full: exit code before, while full, with space again", codes, "(0, 1 or 2, 0)"
    yield "disk full: it is said", "No space left on device" in second.stdout + second.stderr, True
    yield "disk full: earlier rows intact", before.cell_seconds.equals(after.cell_seconds.loc[before.index]), True
    yield "disk full: rows at the end, all ok", (len(rows), set(rows.status) == {"ok"}), (12, True)


def overhead(folder: Path, model: list[str]) -> Iterator[Line]:
    """Of sweeps of 3 and of 23 cells: what each further cell takes, less the cell's own measured work."""
    beyond = {}
    for cells in (3, 23):
        results = folder / f"overhead-{cells}"
        seconds = _seconds(command(model, cells, f"results={results}"))
        beyond[cells] = seconds - sweep.load(results).cell_seconds.sum()
    each = (beyond[23] - beyond[3]) / 20
    yield "seconds a cell beyond its work", round(each, 3), 0.5
    yield "seconds a sweep beyond its cells, once", round(beyond[3] - 3 * each, 2), ""


def load(folder: Path, model: list[str]) -> Iterator[Line]:
    """10,000 rows beside the 20 of a sweep; what they add is told by a sweep of the same cells in a folder of its own."""
    few, many = folder / "few", folder / "many"
    words = {place: command(model, 20, f"results={place}") for place in (few, many)}
    _seconds(words[few])
    shutil.copytree(few, many)
    row = next(iter(store.read_rows(many, [next(iter(rows_on_disk(many)))]).values()))
    row = {name: value for name, value in row.items() if value is not None}
    metrics = [name for name in row if "/" in name]
    for i in range(10_000):
        table = pa.Table.from_pylist([{**row, "cell": f"{i:016x}", "seed": i}], schema=store.schema(metrics))
        pq.write_table(table, many / "cells" / f"{i:016x}.parquet")
    alone = min(_seconds(words[few], "20 already done, 0 to run") for _ in range(3))
    loose = min(_seconds(words[many], "20 already done, 0 to run") for _ in range(3))
    yield "a sweep that finds all done adds, 10,000 loose files: seconds", round(loose - alone, 2), 1.0
    yield "sweep.load, 10,000 loose files: seconds", round(_seconds_to_load(many), 1), ""
    begun = time.perf_counter()
    rows, _ = store.compact(many)
    yield f"compaction of {rows} rows: seconds", round(time.perf_counter() - begun, 1), ""
    compacted = min(_seconds(words[many], "20 already done, 0 to run") for _ in range(3))
    yield "a sweep that finds all done adds, compacted: seconds", round(compacted - alone, 2), 1.0
    yield "sweep.load, compacted: seconds", round(min(_seconds_to_load(many) for _ in range(5)), 3), 0.5


def _seconds(words: list[str], expected: str = "") -> float:
    begun = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert expected in done.stdout, done.stdout
    return time.perf_counter() - begun


def _seconds_to_load(results: Path) -> float:
    begun = time.perf_counter()
    assert len(sweep.load(results)) == 10_020
    return time.perf_counter() - begun


def main() -> None:
    parts = ["kills", "writers", "disk_full", "overhead", "load"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *parts], metavar="PART", help=f"of {', '.join(parts)}; default all"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is temporary is removed
    print(f"{'what':<78} {'measured':<16} bar\n{'-' * 100}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model")
        work: dict[str, Callable[[], Iterator[Line]]] = {
            "kills": lambda: kills(folder, model, options.kills, options.seed),
            "writers": lambda: writers(folder),
            "disk_full": lambda: disk_full(folder, model),
            "overhead": lambda: overhead(folder, model),
            "load": lambda: load(folder, model),
        }
        for part in options.parts or parts:
            for what, measured, bar in work[part]():
                print(f"{what:<78} {measured!s:<16} {bar}", flush=True)


if __name__ == "__main__":
    main()
