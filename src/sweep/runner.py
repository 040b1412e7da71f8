"""Run cells of a plan, and tell the person who watches what happens."""

from __future__ import annotations

import functools
import math
import os
import shlex
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from tabulate import tabulate

from sweep import cache, config, isolate, machine, needs, provenance, store, turns
from sweep.config import Cell, Options, memory_bytes
from sweep.isolate import Ending
from sweep.metrics import main_metrics
from sweep.plan import Plan, Step, check_models, in_words

WIDTH = 100  # characters of a line of a terminal
_RECIPE_WIDTH = 36  # of the first column of the list at the end
_STOPPED = "a cell failed (on_failure=stop)"
Launch = Callable[[list[Step]], list[Ending | Exception]]  # hands cells to an engine; returns what became of each


def run_plan(plan: Plan, options: Options, launch: Launch | None = None) -> int:
    """Run what is to be done, print what became of it, and return the exit code: 1 when a cell has no row of status ok, or was
    run again and failed.

    launch  by default cells run in children of this process, one after the other, or one to each GPU
    """
    print(plan, flush=True)
    for word, steps in (("done", plan.done), ("left", plan.left), ("run ", plan.todo if options.plan else [])):
        for step in steps:
            print(f"  {word} {step.name}  {step.cell.label()}")
    asked = [step.cell for step in plan.todo]
    fits = _fits(options, elsewhere=launch is not None)
    if options.plan:
        print("\n".join(fits(asked)), flush=True)
        return 0
    if plan.todo:
        store.check_writable(options.results)
        cache.check_writable()
        turns.check()
        isolate.ask(functools.partial(check_models, convert=launch is None), asked)
        isolate.ask(fits, asked)
    for name in store.set_aside(options.results, plan.unreadable):
        print(f"{name} was no row of sweep: moved to {options.results}/set_aside")
    endings: dict[str, Ending] = {}  # of this run, by cell
    progress = _Progress(len(plan.todo))
    for batch in _batches(plan.todo):
        run, problem = _run_there(batch, options, launch) if launch else _run_here(batch, options, progress)
        endings |= run
        if problem:
            print(f"stopped: {problem}; the same command goes on from here")
            break
    names = [step.name for step in (*plan.done, *plan.left, *plan.todo)]
    rows = store.read_rows(options.results, names)
    store.mend_schema(options.results)
    print("\n" + listing(rows.values()) + f"\nrows: {options.results}/cells")
    print(_comes_to(rows.values()), end="")
    not_ok = [step for step in plan.todo if step.name not in rows or rows[step.name]["status"] != "ok"]
    outdone = [step for step in plan.todo if step.name in endings and endings[step.name].outdone]
    if not_ok:
        print(f"{len(not_ok)} of {len(names)} cells are not ok; the same command runs them again")
    if outdone:
        print(
            f"{len(outdone)} of {len(names)} cells were run again and are not ok; the rows above are of their earlier runs: "
            + ", ".join(step.cell.label() for step in outdone)
        )
    return 1 if not_ok or outdone or plan.left else 0


def check_node(cell: Cell, options: Options) -> None:
    """Refuse a cell that a launcher has brought to a machine which it does not fit on. Raises RequestError."""
    isolate.ask(_fits(options), [cell])


def _fits(options: Options, *, elsewhere: bool = False) -> Callable[[list[Cell]], list[str]]:
    """What says of cells what they need, and raises RequestError for one that cannot fit."""
    limit, saves = memory_bytes(options.memory_limit), options.save_model is not None
    return functools.partial(needs.told, memory_limit=limit, saves=saves, elsewhere=elsewhere)


def _batches(steps: list[Step]) -> list[list[tuple[str, Step]]]:
    """The steps with their numbers `3/20`, dense baselines apart and first."""
    numbered = [(f"{number}/{len(steps)}", step) for number, step in enumerate(steps, 1)]
    baselines = [(number, step) for number, step in numbered if not step.cell.stages()]
    rest = [(number, step) for number, step in numbered if step.cell.stages()]
    return [batch for batch in (baselines, rest) if batch]


class _Progress:
    """How far a run is, and when it will be done if its other cells take as long."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()

    def after(self, running: int) -> str:
        """What is said when one more is done, while so many run; empty after the last."""
        self.done += 1
        left = self.total - self.done
        if not left:
            return ""
        seconds = (time.monotonic() - self.began) / self.done * left
        return (
            f"      {self.done} of {self.total} done"
            + f", {running} running" * bool(running)
            + f", about {in_words(seconds)} left"
        )


def _run_here(
    batch: list[tuple[str, Step]], options: Options, progress: _Progress
) -> tuple[dict[str, Ending], str | None]:
    """Run cells in children of this process, one to a GPU where there are several.

    Returns what became of each cell, and why the sweep must stop.
    """
    endings: dict[str, Ending] = {}
    on_cuda = any(step.cell.device == "cuda" for _, step in batch)
    gpus = machine.gpus() if on_cuda else []
    free: list[str | None] = [*gpus] if len(gpus) > 1 else [None]
    stop = threading.Event()  # ends the children
    running: dict[Future[Ending], tuple[str, str | None]] = {}  # which cell, on which GPU
    with ThreadPoolExecutor(len(free)) as pool:
        try:
            while batch or running:
                while batch and free:
                    (number, step), gpu = batch[0], free.pop()
                    batch = batch[1:]
                    print(f"[{number}] {step.cell.label()}" + (f" on GPU {gpu}" if gpu else ""), flush=True)
                    running[pool.submit(run_one, step.cell, options, step.overrides, gpu, stop)] = step.name, gpu
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    name, gpu = running.pop(finished)
                    free.append(gpu)
                    endings[name] = ending = finished.result()
                    if ending.unstored:
                        return endings, ending.unstored
                    if ending.row["status"] != "ok" and options.on_failure == "stop":
                        return endings, _STOPPED
                    if said := progress.after(len(running)):
                        print(said, flush=True)
        finally:  # nothing is running unless the sweep is interrupted or stops
            stop.set()
    return endings, None


def _run_there(batch: list[tuple[str, Step]], options: Options, launch: Launch) -> tuple[dict[str, Ending], str | None]:
    """Hand cells to an engine. Returns what became of each cell, and why the sweep must stop.

    What the engine loses (a worker killed, a job cancelled) is handed over once more, and else becomes a row that says
    so: no cell is waited for in vain, and none goes without a row.
    """
    for number, step in batch:
        print(f"[{number}] {step.cell.label()}", flush=True)
    steps = [step for _, step in batch]
    before = store.read_rows(options.results, [step.name for step in steps])
    endings: dict[str, Ending] = {}
    lost, gave_up = steps, list[Exception]()
    for tries in range(2):
        if tries:
            print(
                f"the launcher gave up ({_words(gave_up[0]).splitlines()[0]}); handing over {len(lost)} cells again",
                flush=True,
            )
        became = dict(zip([step.name for step in lost], _launched(launch, lost), strict=True))
        found = store.read_rows(options.results, list(became))
        for name, ending in became.items():
            if _started(found, name) != _started(before, name):  # also by a job that died afterwards
                endings[name] = Ending(found[name])
            elif isinstance(ending, Ending) and (ending.outdone or ending.unstored):
                endings[name] = ending
        lost = [step for step in lost if step.name not in endings]
        gave_up = [error for step in lost if isinstance(error := became[step.name], Exception)]
        if not gave_up:
            break
    for step in lost:
        ending = became[step.name]
        problem = _words(ending) if isinstance(ending, Exception) else "its job ended without leaving a row here"
        known = _known(step.cell, step.overrides)
        endings[step.name] = isolate.record(known, options.results, "crashed", f"lost by the launcher: {problem}")
    for _, step in batch:
        if endings[step.name].row["status"] != "ok":
            print(f"      {step.cell.label()}: {_told(endings[step.name])}")
    unstored = next((ending.unstored for ending in endings.values() if ending.unstored), None)
    failed = any(ending.row["status"] != "ok" for ending in endings.values())
    return endings, unstored or (_STOPPED if failed and options.on_failure == "stop" else None)


def _launched(launch: Launch, steps: list[Step]) -> Sequence[Ending | Exception]:
    """What became of each step; an engine that gives up as a whole has lost them all."""
    try:
        return launch(steps)
    except Exception as error:
        return [error] * len(steps)


def _started(rows: Mapping[str, Mapping[str, Any]], cell: str) -> str | None:
    return rows[cell]["started_at"] if cell in rows else None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def run_one(
    cell: Cell,
    options: Options,
    overrides: Iterable[str],
    gpu: str | None = None,
    stop: threading.Event | None = None,
    *,
    beside_others: bool = False,
) -> Ending:
    """Run a cell in a child process, print one line of what became of it, and return that.

    gpu            the only CUDA device that the cell shall see
    stop           ends the child when set; this then raises KeyboardInterrupt
    beside_others  the line says which cell it is of
    """
    known = _known(cell, overrides) | {"cuda_visible_devices": gpu or os.environ.get("CUDA_VISIBLE_DEVICES")}
    limits = isolate.Limits(options.timeout, memory_bytes(options.memory_limit))
    checkpoint = options.checkpoint(cell, known["cell"])
    ending = isolate.run(cell, known, options.results, limits, gpu, stop, checkpoint)
    print(f"      {cell.label() + ': ' if gpu or beside_others else ''}{_told(ending)}", flush=True)
    return ending


def _known(cell: Cell, overrides: Iterable[str]) -> dict[str, Any]:
    return provenance.columns(cell, command=shlex.join(["python", "-m", "sweep", *overrides]))


def _told(ending: Ending) -> str:
    """One line, and for a row that no file keeps all of its error."""
    if not ending.outdone:
        return headline(ending.row)
    error = textwrap.indent(ending.row["error"] or "", "      ")
    return f"{headline(ending.row)}. The row of its earlier run, which is ok, stands; the whole error is:\n{error}"


def headline(row: dict[str, Any]) -> str:
    """One line of a row: its first metrics, or why there are none."""
    if row["status"] != "ok":
        return f"{row['status']}: {(row['error'] or 'no reason known').strip().splitlines()[-1]}"
    metrics = [f"{name} {value:.4g}" for name, value in _metrics(row).items()][:3]
    if row.get("decode_speedup") is not None:  # else nothing was timed
        metrics.append(f"decode {row['decode_ms_per_token_p50']:.1f} ms a token ({row['decode_speedup']:.2f}x dense)")
    return ", ".join([*metrics, f"{row['cell_seconds']:.0f} s"])


def listing(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as a table that fits a terminal: a recipe with what tells it from others, its seed, what it takes, its metrics.

    Metrics for which there is no room are named below it.
    """
    lines, metrics = lines_of(rows), list[str]()
    for line in lines:
        metrics += [name for name in line if "/" in name and name not in metrics]
    shown = len(metrics)
    while lines:
        table = _table([{name: value for name, value in line.items() if name not in metrics[shown:]} for line in lines])
        if shown == 0 or max(map(len, table.splitlines())) <= WIDTH:
            left_out = f"\nin the rows: {', '.join(metrics[shown:])}" if metrics[shown:] else ""
            return table + "\n".join(textwrap.wrap(left_out, WIDTH, drop_whitespace=False, replace_whitespace=False))
        shown -= 1
    return ""


def _table(lines: list[dict[str, Any]]) -> str:
    heads = {name: _head(name) for line in lines for name in line}
    return tabulate(
        [{heads[name]: value for name, value in line.items()} for line in lines],
        headers={head: head for head in heads.values()},
        floatfmt=".4g",
        missingval="-",
        maxcolwidths=[_RECIPE_WIDTH],
    )


def _head(name: str) -> str:
    """A column's name in lines as narrow as its numbers, about."""
    task, slash, metric = name.rpartition("/")
    return f"{task}{slash}\n" * bool(slash) + (
        metric.replace("_", "_\n", 1) if len(metric) > 12 else metric.replace(" ", "\n")
    )


def lines_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `listing` says of each row, dense first, then by recipe; seed and status where there are several."""
    import pandas as pd  # with what a report needs, which a plan does not

    from sweep.report import variants

    rows = [*rows]
    if not rows:
        return []
    named = variants.with_variant(pd.DataFrame(rows))
    said = named[["variant", "setting"]].to_dict("records")
    of_many = ["seed"] * (len({found["seed"] for found in rows}) > 1)
    of_many += ["status"] * any(found["status"] != "ok" for found in rows)
    order = sorted(range(len(rows)), key=lambda at: _place(rows[at] | said[at]))
    lines = []
    for found, words in ((rows[at], said[at]) for at in order):
        line: dict[str, Any] = {"recipe": _recipe_of(found, words)} | {name: found[name] for name in of_many}
        if found["status"] == "ok":
            timed = {"decode ms": found.get("decode_ms_per_token_p50"), "x dense": found.get("decode_speedup")}
            line |= {"MB": found["weights_bytes"] / 1e6}
            line |= {name: value for name, value in timed.items() if value is not None}
            line |= _metrics(found)
        lines.append(line)
    return lines


def _recipe_of(found: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Method, criterion and sparsity, what follows them, and what else tells the row from others."""
    stages = [
        found.get(stage.column) for stage in config.STAGES[1:] if found.get(stage.column) not in (None, stage.nothing)
    ]
    criterion = found.get("criterion")
    parts = [
        found["method"],
        criterion,
        f"{found['sparsity']:g}" if criterion else None,
        *(f"+ {name}" for name in stages),
    ]
    parts += [
        f"({words['variant']})" if words["variant"] else None,
        f"[{words['setting']}]" if words["setting"] else None,
    ]
    return " ".join(str(part) for part in parts if part)


def _place(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Dense first, then by recipe, seeds of one recipe beside each other."""
    used = [line.get(stage.column) for stage in config.STAGES[1:]]
    later = [
        "" if word == stage.nothing else str(word or "") for word, stage in zip(used, config.STAGES[1:], strict=True)
    ]
    later += [str(line.get(name, "")) for name in ("variant", "setting")]
    return (
        line["method"] != "dense",
        line["method"],
        line.get("criterion") or "",
        line["sparsity"],
        *later,
        line["seed"],
    )


def _comes_to(rows: Collection[dict[str, Any]]) -> str:
    """What is kept and gained, and what to choose, in words; empty where no pruned cell has a quality."""
    import pandas as pd  # with what a report needs, which a plan does not

    from sweep.report import parts

    told = parts.told(pd.DataFrame([*rows])) if any(row["status"] == "ok" for row in rows) else ""
    return f"\n{told}" if told else ""


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """The task metrics of a row that a person reads first."""
    measured = [name for name, value in row.items() if "/" in name and value is not None and not math.isnan(value)]
    return {name: row[name] for name in main_metrics(measured)}
