"""What a sweep survives, and what its bookkeeping costs, on a tiny random model: python benchmarks/reliability.py

    kills      kill -9 of the whole process tree at random moments of a 20-cell sweep, resumed each time
    writers    50 processes that finish at once beside a reader that loops 1,000 times
    disk_full  a row that does not fit on a small tmpfs (needs root), then space again
    overhead   seconds a cell beyond the work itself
    load       10,000 rows: load compacted, and a sweep that finds its cells among them

Each line of the table is a figure and the bar that it is to meet. Name parts to run those alone; --kills sets the
number of kills, and --seed their moments, so that a hundred can be run in several goes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

import sweep
from sweep import store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
QUICK = ["benchmarks=pydoc", "benchmarks.limit=1", "benchmarks.max_length=128", "efficiency.prompt_tokens=4",
         "efficiency.output_tokens=2", "efficiency.repeats=6", "efficiency.warmup=0", "dtype=float32", "threads=1"]  # fmt: skip
Line = tuple[str, Any, Any]  # what, measured, bar


def tiny_model(folder: Path) -> list[str]:
    """The words that choose a tiny random model, which is written to `folder`."""
    import conftest  # of the tests: the same model

    class Factory:
        def mktemp(self, name: str) -> Path:
            folder.mkdir()
            return folder

    conftest.tiny_checkpoint.__wrapped__(Factory())
    return ["model=local", f"model.path={folder}", *QUICK]


def command(model: list[str], cells: int, *more: str) -> list[str]:
    """A sweep of so many cells, the dense baseline among them."""
    sparsities = ",".join(f"{i / 100:g}" for i in range(1, cells))
    return [sys.executable, "-m", "sweep", "-m", "+method=weight", f"sparsity={sparsities}", *model, *more]


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


def rows_on_disk(results: Path) -> dict[str, int]:
    """Each cell's file and when it was written."""
    return {file.stem: file.stat().st_mtime_ns for file in (results / "cells").glob("[!.0]*.parquet")} | {
        file.stem: file.stat().st_mtime_ns for file in (results / "cells").glob("0*.parquet") if len(file.stem) == 16
    }


def kills(folder: Path, model: list[str], number: int, seed: int, seconds: float) -> list[Line]:
    """Kill at random moments, resume, and look at what is there after every kill; no more kills after `seconds`."""
    draw, deadline = random.Random(seed), time.monotonic() + seconds
    done_kills = sweeps = lost = repeated = unreadable = wrong = 0
    while done_kills < number and time.monotonic() < deadline:
        results = folder / f"kills-{sweeps}"
        words, known, finished = command(model, 20, f"results={results}"), {}, False
        sweeps += 1
        while not finished:
            running = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                # of a start of some seconds, and cells of about one: most moments are in the midst of a cell
                more = done_kills < number and time.monotonic() < deadline
                running.wait(timeout=draw.uniform(1.0, 12.0) if more else None)
                finished = True
            except subprocess.TimeoutExpired:
                for pid in tree(running.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                running.wait()
                done_kills += 1
            now = rows_on_disk(results) if (results / "cells").is_dir() else {}
            lost += len(set(known) - set(now))
            repeated += sum(now[cell] != known[cell] for cell in set(known) & set(now))
            try:
                unreadable += len(pd.read_parquet(results / "cells")) != len(now) if now else 0
            except Exception:
                unreadable += 1
            known = now
        rows = sweep.load(results)
        wrong += len(rows) != 20 or rows.cell.duplicated().any() or set(rows.status) != {"ok"}
    return [
        ("kill -9 of the tree", f"{done_kills} in {sweeps} sweeps", number),
        ("sweeps that did not end with exactly 20 rows", wrong, 0),
        ("rows lost", lost, 0),
        ("finished cells that were run again", repeated, 0),
        ("unreadable files or wrong counts after a kill", unreadable, 0),
    ]


def _finish(results: Path, number: int) -> None:
    described = {"cell": f"{number:016x}", "status": "ok", "sparsity": 0.5, f"task{number % 7}/acc": 0.5}
    samples = pd.DataFrame(
        {"task": ["t"] * 100, "document": [str(i) for i in range(100)], "metric": "acc", "value": 1.0}
    )
    store.write(results, described, {"samples": samples})


def _write_at_once(results: Path, number: int, start: Any, rounds: int) -> None:
    start.wait()
    for i in range(rounds):
        _finish(results, 1000 * number + i)


def writers(folder: Path) -> list[Line]:
    results, context = folder / "writers", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sweep.store"])
    _finish(results, 10**9)
    start, rounds = context.Event(), 20
    processes = [context.Process(target=_write_at_once, args=(results, n, start, rounds)) for n in range(50)]
    for process in processes:
        process.start()
    start.set()
    failed = wrong = loops = 0
    last = 1
    beside, writing = 0, True
    while loops < 1000:
        writing = any(process.is_alive() for process in processes) if loops % 10 == 0 else writing
        try:
            count = len(sweep.load(results))
            wrong += count < last or count > 50 * rounds + 1
            last = count
        except Exception:
            failed += 1
        loops += 1
        beside += writing
        if not writing and last > 200:
            store.compact(results)  # so that the remaining loops are quick
    for process in processes:
        process.join()
    wrong += len(sweep.load(results)) != 50 * rounds + 1
    return [(f"50 writers of {rounds} rows: reads, {beside} of them beside writers", loops, 1000),
            ("failed reads", failed, 0), ("wrong counts", wrong, 0)]  # fmt: skip


def disk_full(folder: Path, model: list[str]) -> list[Line]:
    if os.getuid() != 0:
        return [("disk full", "skipped: a tmpfs needs root", "")]
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        first = subprocess.run(command(model, 3, f"results={disk}/r"), capture_output=True, text=True)
        before = sweep.load(disk / "r")
        ballast = disk / "ballast"
        room = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(room - 128 * 1024))  # the probe fits, and a few small files
        second = subprocess.run(command(model, 12, f"results={disk}/r"), capture_output=True, text=True)
        after = sweep.load(disk / "r").set_index("cell")
        kept = before.set_index("cell").cell_seconds.equals(after.cell_seconds.loc[before.cell])
        said = "No space left on device" in second.stdout + second.stderr
        ballast.unlink()
        third = subprocess.run(command(model, 12, f"results={disk}/r"), capture_output=True, text=True)
        rows = sweep.load(disk / "r")
        return [
            ("disk full: exit code before, while full, with space again",
             (first.returncode, second.returncode, third.returncode), "(0, 1 or 2, 0)"),
            ("disk full: it is said", said, True),
            ("disk full: earlier rows intact", kept, True),
            ("disk full: rows at the end, all ok", (len(rows), set(rows.status) == {"ok"}), (12, True)),
        ]  # fmt: skip
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def overhead(folder: Path, model: list[str]) -> list[Line]:
    """Of sweeps of 3 and of 23 cells: what each further cell takes, less the cell's own measured work."""
    seconds = {}
    for cells in (3, 23):
        results = folder / f"overhead-{cells}"
        started = time.perf_counter()
        subprocess.run(command(model, cells, f"results={results}"), check=True, capture_output=True)
        seconds[cells] = time.perf_counter() - started - sweep.load(results).cell_seconds.sum()
    return [("seconds a cell beyond its work", round((seconds[23] - seconds[3]) / 20, 3), 0.5),
            ("seconds a sweep beyond its cells, once", round(seconds[3] - 3 * (seconds[23] - seconds[3]) / 20, 2), "")]  # fmt: skip


def load(folder: Path, model: list[str]) -> list[Line]:
    results = folder / "many"
    subprocess.run(command(model, 20, f"results={results}"), check=True, capture_output=True)
    row = {
        name: value
        for name, value in store.read_rows(results, rows_on_disk(results)).popitem()[1].items()
        if value == value
    }
    metrics = [name for name in row if "/" in name]
    started = time.perf_counter()
    for i in range(10_000):
        content = {**row, "cell": f"{i:016x}", "seed": i}
        table = store.pa.Table.from_pylist([content], schema=store.schema(metrics))
        (results / "cells" / f"{i:016x}.parquet").write_bytes(store._bytes(table))
    made = time.perf_counter() - started

    def again() -> float:
        started = time.perf_counter()
        done = subprocess.run(command(model, 20, f"results={results}"), check=True, capture_output=True, text=True)
        assert "20 already done, 0 to run" in done.stdout
        return time.perf_counter() - started

    def small() -> float:
        started = time.perf_counter()
        subprocess.run(command(model, 20, f"results={few}"), check=True, capture_output=True)
        return time.perf_counter() - started

    few = folder / "few"
    subprocess.run(command(model, 20, f"results={few}"), check=True, capture_output=True)
    times = {"few": min(small() for _ in range(3)), "loose": min(again() for _ in range(3))}
    started = time.perf_counter()
    loose = len(sweep.load(results))
    times["load loose"] = time.perf_counter() - started
    started = time.perf_counter()
    store.compact(results)
    times["compact"] = time.perf_counter() - started
    times["load"] = min(_seconds_to_load(results, loose) for _ in range(5))
    times["compacted"] = min(again() for _ in range(3))
    return [
        (f"rows in the folder (written in {made:.0f} s)", loose, 10_020),
        ("sweep.load, compacted: seconds", round(times["load"], 3), 0.5),
        ("a sweep that finds all done adds, compacted: seconds", round(times["compacted"] - times["few"], 2), 1.0),
        ("a sweep that finds all done adds, 10,000 loose files: seconds", round(times["loose"] - times["few"], 2), 1.0),
        ("sweep.load, 10,000 loose files: seconds", round(times["load loose"], 1), ""),
        ("compaction: seconds", round(times["compact"], 1), ""),
    ]


def _seconds_to_load(results: Path, rows: int) -> float:
    started = time.perf_counter()
    assert len(sweep.load(results)) == rows
    return time.perf_counter() - started


def main() -> None:
    parts = ["kills", "writers", "disk_full", "overhead", "load"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *parts], metavar="PART", help=f"of {', '.join(parts)}; default all"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no more kills are begun")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model")
        lines: list[Line] = []
        for part in options.parts or parts:
            match part:
                case "kills":
                    lines += kills(folder, model, options.kills, options.seed, options.seconds)
                case "writers":
                    lines += writers(folder)
                case "disk_full":
                    lines += disk_full(folder, model)
                case "overhead":
                    lines += overhead(folder, model)
                case "load":
                    lines += load(folder, model)
    print(json.dumps({"seed": options.seed}))
    print(tabulate([(a, str(b), str(c)) for a, b, c in lines], headers=["what", "measured", "bar"]))


if __name__ == "__main__":
    main()
