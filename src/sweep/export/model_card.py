"""A cell's benchmarks as evaluation results in the card of the checkpoint that it saved, in the form that the hub reads.

Of any task in the card's metadata (`model-index`); of tasks whose data set the hub has, in `.eval_results` too, from which it
makes the tables of a model's page and the data set's leaderboard (https://huggingface.co/docs/hub/eval-results).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from sweep import metrics, saving
from sweep.export import runs
from sweep.measuring import catalogue
from sweep.settings import RequestError

FILE = Path(".eval_results") / "sweep.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="results folders, one of which has the checkpoint's row")
    parser.add_argument("checkpoint", type=Path, help="the folder that save_model= has written")


def run(arguments: argparse.Namespace) -> None:
    """Write the results into the card. Raises RequestError for a folder that no cell has saved, or whose row is missing."""
    folder = arguments.checkpoint
    cell = saving.cell_of(folder)
    rows = runs.read(arguments.results)
    found = rows[(rows.cell == cell) & (rows.status == "ok")]
    if found.empty:
        raise RequestError(
            f"{', '.join(arguments.results)}: there is no finished row of cell {cell}, which {folder} was saved by"
        )
    row = {name: value for name, value in found.iloc[0].items() if value == value}
    names = metrics.main_metrics(name for name in row if "/" in str(name))
    if not names:
        raise RequestError(f"cell {cell} has no benchmark whose results could stand in the card")
    card = ModelCard.load(folder / "README.md")
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [_result(name, row[name]) for name in names]
    entries = [entry for name in names if (entry := _entry(name, row)) is not None]
    beside = {FILE: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)} if entries else {}
    saving.rewrite(folder, {Path("README.md"): str(card), **beside})
    print(
        f"{len(names)} results in {folder / 'README.md'}" + (f", {len(entries)} in {folder / FILE}" if entries else "")
    )


def _result(name: str, value: Any) -> EvalResult:
    task, _, metric = name.partition("/")
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=task,
        metric_type=metric,
        metric_name=metrics.label(name),
        metric_value=float(value),
    )


def _entry(name: str, row: dict[str, Any]) -> EvalResultEntry | None:
    """For a task whose data set lies on the hub; None for others."""
    task, _, metric = name.partition("/")
    place = catalogue.hub_dataset(task)
    if place is None:
        return None
    when = str(row.get("started_at", ""))[:10] or None
    return EvalResultEntry(*place, value=float(row[name]), date=when, notes=f"{metric}, measured by sweep")
