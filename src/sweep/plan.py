"""What a sweep will do, decided before it does any of it: checked cells, each once, without those already done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sweep import catalogue, checkpoint, config, identity, machine, sources, store, text, unit_requests
from sweep.config import Cell, Options, RequestError


@dataclass(frozen=True)
class Step:
    """One cell to run, and the command line words that compose it."""

    name: str
    cell: Cell
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    todo: list[Step]  # baselines first
    done: list[Step]
    repeated: int  # cells asked for that are equal to another

    def __str__(self) -> str:
        total = len(self.todo) + len(self.done)
        words = [f"{total} cell{'s' if total != 1 else ''} (dense baselines included)"]
        words += [f"{self.repeated} equal to another"] if self.repeated else []
        words += [f"{len(self.done)} already done", f"{len(self.todo)} to run"]
        return ", ".join(words)


def prepare(composed: Mapping[str, Any]) -> tuple[Cell, Options]:
    """The composed configuration as a checked cell with its device and threads decided, and the options.

    Raises RequestError for everything that can be told to be wrong before a model is loaded.
    """
    cell, options = config.parse(composed)
    cell = machine.resolve(cell)
    sources.fingerprint(cell.model)  # raises when the model is not there
    catalogue.check(cell.benchmarks, cell.data_root)
    if cell.calibration is not None:
        text.calibration_text(cell.calibration.source)  # raises when it is not there
    unit_requests.check(cell)
    if options.save_model is not None and cell.method.family in config.SHRINKING:
        raise RequestError(f"save_model: a model that lost whole units (method={cell.method.family}) cannot be "
                           "saved; methods that zero weights can")  # fmt: skip
    return cell, options


def make(asked: Iterable[tuple[Cell, Iterable[str]]], options: Options) -> Plan:
    """The plan for the cells asked for: with their dense baselines, without repetition, without what is done."""
    steps: dict[str, Step] = {}
    baselines: dict[str, Step] = {}
    repeated = 0
    for cell, words in asked:
        step = Step(identity.cell_name(cell), cell, tuple(words))
        repeated += step.name in steps
        steps.setdefault(step.name, step)
        dense = cell.dense()
        name = identity.cell_name(dense)
        baselines.setdefault(name, Step(name, dense, (*step.overrides, "baseline=true")))
    ordered = [*baselines.values(), *(step for name, step in steps.items() if name not in baselines)]
    finished = {step.name for step in ordered if options.resume and _is_finished(step, options)}
    for step in ordered:
        if (folder := options.checkpoint(step.cell.method, step.name)) is not None:
            checkpoint.check_place(folder)
    return Plan(
        todo=[step for step in ordered if step.name not in finished],
        done=[step for step in ordered if step.name in finished],
        repeated=repeated,
    )


def _is_finished(step: Step, options: Options) -> bool:
    """Whether the cell has its row and, where one is asked for, its saved model."""
    folder = options.checkpoint(step.cell.method, step.name)
    return is_done(options.results, step.name) and (folder is None or checkpoint.is_checkpoint(folder))


def is_done(results: str, cell: str) -> bool:
    """Whether the cell has a row of status ok; a cell that failed runs again."""
    row = store.read_row(results, cell)
    return row is not None and row["status"] == "ok"
