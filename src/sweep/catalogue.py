"""lm-eval's tasks by name: which there are, building the few that are asked for, and refusing what cannot run.

lm-eval reads its fourteen thousand YAML files each time it is asked for a task, which takes seconds. Their names, kinds
and places are kept in the cache, so that a cell reads the files of its own tasks and no more.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweep import cache, hub, text
from sweep.config import Benchmarks, RequestError, did_you_mean

TASK_FOLDER = Path(__file__).parent / "tasks"
_INDEX = 1  # raise when what is kept of a task changes


def check(settings: Benchmarks, data_root: str | None) -> dict[str, str]:
    """Refuse benchmarks that cannot run, and return a fingerprint of each task's documents.

    Raises RequestError for an unknown name, data that cannot be found, examples asked of a task that has none, and a
    task that runs code written by the model without `benchmarks.unsafe_code=true`.
    """
    if data_root is not None and not Path(data_root).expanduser().is_dir():
        raise RequestError(f"data_root: there is no folder {data_root}")
    ours = [task for task in settings.tasks if task in text.EMBEDDED]
    if ours and settings.num_fewshot:
        raise RequestError(f"benchmarks.num_fewshot={settings.num_fewshot}: the task {ours[0]} has no examples to show; "
                           "use 0, or leave it out of benchmarks.tasks")  # fmt: skip
    found = {task: text.task_fingerprint(task) for task in ours}
    rest = tuple(task for task in settings.tasks if task not in text.EMBEDDED)
    return found | (_check_lm_eval(rest, settings.num_fewshot, settings.unsafe_code, data_root) if rest else {})


@functools.lru_cache
def _check_lm_eval(
    names: tuple[str, ...], num_fewshot: int, unsafe_code: bool, data_root: str | None
) -> dict[str, str]:
    known = index()
    for name in names:
        if name not in known:
            near = did_you_mean(name, [*text.EMBEDDED, *known])
            raise RequestError(f"benchmarks.tasks: '{name}' is no task of sweep or lm-eval.{near}")
        if not unsafe_code and any(_declared(leaf, "unsafe_code") for leaf in _leaves(name, known)):
            raise RequestError(f"benchmarks.tasks: {name} runs code that the model wrote, on this machine. If that is "
                               "what you want, add benchmarks.unsafe_code=true")  # fmt: skip
    with hub.data_folder(data_root):
        tasks = load(names, data_root)["tasks"]
        fingerprints = {name: _fingerprint(task) for name, task in tasks.items()}
    for name, task in tasks.items():
        if num_fewshot and not _has_examples(task):
            raise RequestError(f"benchmarks.num_fewshot={num_fewshot}: the task {name} has no examples to show "
                               "(no training or validation documents); use 0")  # fmt: skip
    return fingerprints


def _leaves(name: str, known: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The YAML files of a task, or of all tasks of a group or tag."""
    entry = known.get(name)
    if entry is None:  # defined within its group
        return
    if entry["kind"] == "TAG":
        members = entry["tags"]
    elif entry["kind"] == "GROUP":
        members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in _declared(entry["path"], "task")]
    else:
        yield entry["path"]
        return
    for member in members:
        if isinstance(member, str):
            yield from _leaves(member, known)


def _declared(path: str, key: str) -> Any:
    """What a task's YAML says under a key; none of its functions is imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(path), resolve_func=False, recursive=True).get(key) or []


def _fingerprint(task: Any) -> str:
    return text.fingerprint(json.dumps(document, sort_keys=True, default=str) for document in task.eval_docs)


def _has_examples(task: Any) -> bool:
    """Whether few-shot examples can be drawn; a split that holds a single row is a placeholder."""
    documents = task.fewshot_docs()
    return documents is not None and len(documents) > 1


def index() -> dict[str, dict[str, Any]]:
    """Every task, group and tag of the installed lm-eval: {name: {kind, path, tags}}."""

    def search(folder: Path) -> None:
        from lm_eval.tasks import TaskManager

        entries = {name: {"kind": entry.kind.name, "path": entry.yaml_path and str(entry.yaml_path),
                          "tags": sorted(entry.tags)} for name, entry in TaskManager().task_index.items()}  # fmt: skip
        (folder / "index.json").write_text(json.dumps(entries))

    import lm_eval

    place = text.fingerprint([version("lm_eval"), str(Path(lm_eval.__file__).parent), _INDEX])
    return json.loads((cache.entry("tasks", place, search) / "index.json").read_text())


def load(names: tuple[str, ...], data_root: str | None = None) -> dict[str, Any]:
    """lm-eval's task objects by name, with their groups, as `lm_eval.evaluate` takes them; run inside `hub.data_folder`.

    data_root  for the message when data are missing
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    if not set(names) <= set(text.EMBEDDED):
        for name, entry in index().items():
            path = Path(entry["path"]) if entry["path"] else None
            manager.task_index.setdefault(name, Entry(name, Kind[entry["kind"]], path, None, set(entry["tags"])))
    try:
        return manager.load(list(names))
    except (OSError, ValueError, ImportError) as error:  # ConnectionError is an OSError
        raise RequestError(hub.missing(f"benchmarks.tasks={','.join(names)}", data_root, error)) from error
