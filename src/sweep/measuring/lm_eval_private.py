"""What is used of lm-eval beyond what it offers: its index of tasks, and functions in its modules that are replaced.

All of it is in this file, each with what it is needed for; tests/test_private.py says which of it a new release has
changed. lm-eval takes seconds to import, and is imported where something is asked of it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from sweep.measuring import words
from sweep.texts import corpora

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Known: TypeAlias = dict[str, dict[str, Any]]  # tasks, groups and tags by name: kind, path and tags


def installed() -> Known:
    """Every task, group and tag of lm-eval. What it offers are their names: not where they are, nor of which kind."""
    from lm_eval.tasks import TaskManager

    return _known(TaskManager().task_index)


def declared(config: dict[str, Any], path: Path) -> Known:
    """The task or group that a YAML file declares, and its tags. lm-eval itself reads whole folders only, and drops files
    that it cannot read without a word."""
    from lm_eval.tasks._index import Entry, TaskIndex

    entries: dict[str, Entry] = {}
    TaskIndex.process_cfg(config, path, entries)
    return _known(entries)


def _known(entries: dict[str, Any]) -> Known:
    return {
        name: {"kind": entry.kind.name, "path": entry.yaml_path and str(entry.yaml_path), "tags": sorted(entry.tags)}
        for name, entry in entries.items()
    }


def yaml_files(folder: Path) -> Iterator[Path]:
    """The files of a folder in which lm-eval looks for tasks."""
    from lm_eval.tasks._index import TaskIndex

    return TaskIndex._iter_yaml_files(folder)


def read_yaml(path: Path, *, includes: bool = True) -> dict[str, Any]:
    """A task's YAML, with what it includes; its functions stay names, and no code of the task is run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False, recursive=includes)


def manager(folder: Path, known: Known) -> TaskManager:
    """A manager of the tasks in a folder and of those that are known: so it reads no other of its 14,000 files."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    made = TaskManager(include_path=str(folder), include_defaults=False)
    for name, entry in known.items():
        path = Path(entry["path"]) if entry["path"] else None
        made.task_index.setdefault(name, Entry(name, Kind[entry["kind"]], path, None, set(entry["tags"])))
    return made


@contextlib.contextmanager
def data_found_in(folder: str | None) -> Iterator[None]:
    """While open, tasks that are built find `org/name` in a folder before they ask the hub.

    A task names its data set relative to the working directory, in its YAML or in code of its own, and neither lm-eval
    nor datasets has another way to say where data sets lie. The directory is that of all threads. Tasks are built where
    no other runs, while a sweep is planned and in a cell's own process; they are evaluated when all is as it was.
    """
    if folder is None:
        yield
        return
    import datasets

    kept = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = corpora.copies()
    try:
        with corpora.without_bars(), contextlib.chdir(Path(folder).expanduser()):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = kept


@contextlib.contextmanager
def alone_and_silent() -> Iterator[None]:
    """While open, lm-eval starts no processes and prints no lines and progress bars, even into a log file, of its own.

    It would start a pool of processes for each standard error, which a variable of the environment prevents.
    """
    import lm_eval.api.task
    import tqdm

    def bare(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
        return iterable

    os.environ["DISABLE_MULTIPROC"] = "1"
    places = [(tqdm, tqdm.tqdm), (lm_eval.api.task, lm_eval.api.task.tqdm)]
    try:
        for module, _ in places:
            module.tqdm = bare
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for module, bar in places:
            module.tqdm = bar


@contextlib.contextmanager
def overflow_is_infinite() -> Iterator[None]:
    """A perplexity or standard error beyond what a float holds is infinite, where lm-eval raises and all is lost."""
    from lm_eval.api import metrics

    deviation = metrics.sample_stddev

    def unbounded(values: Sequence[float]) -> float:
        try:
            return math.inf if any(map(math.isinf, values)) else deviation(values)
        except OverflowError:  # Python's floats raise it when they are squared
            return math.inf

    try:
        metrics.math = SimpleNamespace(**vars(math) | {"exp": words.exp})
        metrics.sample_stddev = unbounded
        yield
    finally:
        metrics.math, metrics.sample_stddev = math, deviation
