"""Cells as runs of an experiment tracker: Weights & Biases, MLflow, Trackio. A cell that is there already is left as it is.

Each works offline, on this machine, unless its own settings name a server or an account.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sweep.export import runs
from sweep.export.runs import Run
from sweep.settings import RequestError

_LONGEST = 500  # characters of a value; MLflow takes no more


def _to_wandb(wandb: Any, project: str, found: Iterable[Run]) -> tuple[int, str]:
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    folder = Path(os.environ.get("WANDB_DIR", "."))
    new = 0
    for run in found:
        if mode == "offline" and any(folder.glob(f"wandb/offline-run-*-{run.cell}")):
            continue
        sent = wandb.init(
            project=project,
            id=run.cell,
            name=run.name,
            group=run.model,
            tags=list(run.tags),
            config=run.settings,
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
        )
        sent.summary.update(run.metrics)
        sent.finish()
        new += 1
    return new, "your account" if mode == "online" else f"{folder / 'wandb'}; `wandb sync` uploads it"


def _to_mlflow(mlflow: Any, project: str, found: Iterable[Run]) -> tuple[int, str]:
    place = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=place)
    experiment = client.get_experiment_by_name(project)
    name = client.create_experiment(project) if experiment is None else experiment.experiment_id
    entities, new = mlflow.entities, 0
    for run in found:
        if client.search_runs([name], filter_string=f"tags.cell = '{run.cell}'", max_results=1):
            continue
        tags = {"cell": run.cell, "model": run.model, **{f"sweep.{tag}": "yes" for tag in run.tags}}
        made = client.create_run(name, tags=tags, run_name=run.name).info
        known = [entities.Param(key, str(value)[:_LONGEST]) for key, value in run.settings.items()]
        metrics = [entities.Metric(key, value, made.start_time, 0) for key, value in run.metrics.items()]
        client.log_batch(made.run_id, metrics=metrics, params=known)
        client.set_terminated(made.run_id)
        new += 1
    return new, f"{place}; `mlflow ui --backend-store-uri {place}`, of mlflow itself, shows it"


def _to_trackio(trackio: Any, project: str, found: Iterable[Run]) -> tuple[int, str]:
    try:
        there = {run.name for run in trackio.Api().runs(project)}
    except ValueError:  # no such project yet
        there = set()
    new = 0
    for run in found:
        if run.name in there:
            continue
        trackio.init(
            project=project,
            name=run.name,
            group=run.model,
            config={**run.settings, "cell": run.cell},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        trackio.log(run.metrics)
        trackio.finish()
        new += 1
    return new, f"{trackio.TRACKIO_DIR}; `trackio show --project {project}` shows it"


Send = Callable[
    [Any, str, Iterable[Run]], tuple[int, str]
]  # (package, project, runs) to (how many are new, where they lie)
TRACKERS: dict[str, Send] = {"wandb": _to_wandb, "mlflow": _to_mlflow, "trackio": _to_trackio}  # by name of the package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="results folders")
    parser.add_argument("--project", default="sweep", help="what the runs are filed under (default: sweep)")


def run(arguments: argparse.Namespace) -> None:
    """Send each cell that is not there yet. Raises RequestError where the tracker's package is missing."""
    name = arguments.command
    rows = runs.read(arguments.results)
    found = list(runs.of(rows))
    if not found:
        raise RequestError(
            f"{', '.join(arguments.results)}: no row of {len(rows)} is ok, and the others have no numbers to send"
        )
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise RequestError(f"{name} is not installed ({error}): pip install 'sweep-pruning[{name}]'") from error
    new, where = TRACKERS[name](package, arguments.project, found)
    print(f"{new} runs sent, {len(found) - new} were there already: {where}")
