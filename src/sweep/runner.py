"""Run cells of a plan, and tell the person who watches what happens."""

from __future__ import annotations

import functools
import math
import os
import shlex
import textwrap
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from tabulate import tabulate

from sweep import cache, config, isolate, machine, needs, provenance, store, turns
from sweep.config import Cell, Options, memory_bytes
from sweep.isolate import Ending
from sweep.metrics import main_metrics
from sweep.plan import Plan, Step, check_models

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
    for batch in _batches(plan.todo):
        run, problem = _run_there(batch, options, launch) if launch else _run_here(batch, options)
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


def _run_here(batch: list[tuple[str, Step]], options: Options) -> tuple[dict[str, Ending], str | None]:
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
    """Rows as a table of a few columns, among them what else tells rows of one method and sparsity apart."""
    import pandas as pd  # with what a report needs, which a plan does not

    from sweep.report import variants

    rows = [*rows]
    if not rows:
        return ""
    told = ["method", "criterion", "sparsity"]
    later = config.STAGES[1:]
    told += [s.column for s in later if any(found.get(s.column) not in (None, s.nothing) for found in rows)]
    named = variants.with_variant(pd.DataFrame(rows))
    words = [name for name in ("variant", "setting") if named[name].any()]
    lines = []
    for at, found in enumerate(rows):
        line = {name: found.get(name) for name in told} | {name: named[name].iloc[at] for name in words}
        line |= {name: found.get(name) for name in ("seed", "status")}
        if found["status"] == "ok":
            line |= {
                "MB": found["weights_bytes"] / 1e6,
                "decode ms": found.get("decode_ms_per_token_p50"),
                "speed-up": found.get("decode_speedup"),
                **_metrics(found),
            }
        lines.append(line)
    lines.sort(key=_place)
    return tabulate(lines, headers="keys", floatfmt=".4g", missingval="-")


def _place(line: dict[str, Any]) -> tuple[Any, ...]:
    """Dense first, then by recipe, seeds of one recipe beside each other."""
    later = [str(line.get(name, "")) for name in (*(stage.column for stage in config.STAGES[1:]), "variant", "setting")]
    return line["method"] != "dense", line["method"], line["criterion"] or "", line["sparsity"], *later, line["seed"]


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
