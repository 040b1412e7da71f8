"""Run cells of a plan, and tell the person who watches what happens."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from tabulate import tabulate

from sweep import isolate, row, store
from sweep.config import Cell, Options
from sweep.plan import Plan, Step, is_done

Launch = Callable[[list[Step]], None]  # runs cells, each of which leaves its row


def run_plan(plan: Plan, options: Options, launch: Launch | None = None, *, together: bool = False) -> int:
    """Run what is to be done, print the outcome, and return the exit code: 1 when a cell has no row of status ok.

    launch    runs a list of steps; by default in this process, one after the other
    together  hand all cells over at once, baselines first, instead of one by one
    """

    def launch_here(steps: list[Step]) -> None:
        for step in steps:
            run_one(step.cell, options, step.overrides)

    print(plan, flush=True)
    for step in plan.done:
        print(f"  done {step.name}  {step.cell.label()}")
    if options.plan:
        for step in plan.todo:
            print(f"  run  {step.name}  {step.cell.label()}")
        return 0
    if plan.todo:
        store.check_writable(options.results)
    baselines = [step for step in plan.todo if step.cell.method.family == "dense"]
    rest = [step for step in plan.todo if step.cell.method.family != "dense"]
    batches = [batch for batch in (baselines, rest) if batch] if together else [[step] for step in plan.todo]
    started = 0
    for batch in batches:
        for step in batch:
            started += 1
            print(f"[{started}/{len(plan.todo)}] {step.cell.label()}", flush=True)
        (launch or launch_here)(batch)
        if options.on_failure == "stop" and not all(is_done(options.results, step.name) for step in batch):
            print("stopped after the first failure (on_failure=stop); the same command goes on from here")
            break
    names = [step.name for step in (*plan.done, *plan.todo)]
    print("\n" + table(options.results, names))
    not_ok = [step for step in plan.todo if not is_done(options.results, step.name)]
    if not_ok:
        print(f"{len(not_ok)} of {len(names)} cells are not ok; the same command runs them again")
    return 1 if not_ok else 0


def run_one(cell: Cell, options: Options, overrides: Iterable[str]) -> dict[str, Any]:
    """Run a cell in a child process, print one line of its outcome, and return its row."""
    described = row.describe(cell, command=shlex.join(["python", "-m", "sweep", *overrides]))
    outcome = isolate.run(cell, described, options.results, options.timeout,
                          options.checkpoint(cell.method, described["cell"]))  # fmt: skip
    print(f"      {headline(outcome)}", flush=True)
    return outcome


def headline(outcome: dict[str, Any]) -> str:
    """One line of a row: its first metrics, or why there are none."""
    if outcome["status"] != "ok":
        return f"{outcome['status']}: {(outcome['error'] or 'no reason known').strip().splitlines()[-1]}"
    metrics = [f"{name} {value:.4g}" for name, value in _metrics(outcome).items()][:3]
    speed = f"decode {outcome['decode_ms_per_token_p50']:.1f} ms a token ({outcome['decode_speedup']:.2f}x dense)"
    return ", ".join([*metrics, speed, f"{outcome['cell_seconds']:.0f} s"])


def table(results: str, cells: Iterable[str]) -> str:
    """The rows of these cells as a table of a few columns, and where all columns are."""
    lines = []
    for cell in cells:
        found = store.read_row(results, cell)
        if found is None:
            continue
        line = {"method": found["method"], "criterion": found["criterion"], "sparsity": found["sparsity"],
                "seed": found["seed"], "status": found["status"]}  # fmt: skip
        if found["status"] == "ok":
            line |= {"MB": found["weights_bytes"] / 1e6, "decode ms": found["decode_ms_per_token_p50"],
                     "speed-up": found["decode_speedup"], **_metrics(found)}  # fmt: skip
        lines.append(line)
    lines.sort(key=lambda line: (line["method"] != "dense", line["method"], line["criterion"] or "", line["sparsity"]))
    return tabulate(lines, headers="keys", floatfmt=".4g", missingval="-") + f"\nrows: {results}/cells"


def _metrics(outcome: dict[str, Any]) -> dict[str, float]:
    """The task metrics of a row that a person reads first: accuracies and perplexities a token."""
    return {name: value for name, value in outcome.items()
            if "/" in name and value is not None and not math.isnan(value)
            and name.rpartition("/")[2] in ("acc", "token_perplexity", "f1", "exact_match")}  # fmt: skip
