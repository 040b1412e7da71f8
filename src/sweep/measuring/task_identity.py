"""What a task is, as a fingerprint: its documents, its prompt, filters and metrics, and the examples that it shows.

Taken from the configuration as lm-eval has resolved it, with what its YAML includes and what a group overrides. A
function counts by its name and by the whole file that holds it, so that the helpers beside it count too. Where the
data lie does not count: the documents do.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sweep.models import origin
from sweep.texts import embedded, text

TASK_FOLDER = Path(__file__).parent / "tasks"
# Of a task's configuration: what it is called, where its data lie, and what is asked beside it.
_ASIDE = {
    "tag",
    "task_alias",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "custom_dataset",
    "num_fewshot",
    "unsafe_code",
    "metadata",
}


class _Loader(yaml.SafeLoader):
    """Reads a task's YAML without lm-eval, which takes seconds to import; functions stay names."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


@functools.lru_cache
def of_embedded(task: str) -> str:
    """Of one of the tasks in sweep/measuring/tasks, without lm-eval. What lm-eval does for them is tested against its definition."""
    return text.fingerprint([embedded_settings(task), *embedded.examples(task), *embedded.EMBEDDED[task]()])


def embedded_settings(task: str) -> dict[str, Any]:
    """What the YAML file of an embedded task says, with what it includes."""
    return _settings(TASK_FOLDER / f"{task}.yaml")


def _settings(file: Path) -> dict[str, Any]:
    settings = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    included = settings.pop("include", None)
    return settings if included is None else _settings(file.parent / included) | settings


def of_task(task: Any, shots: int, seed: int) -> str:
    """Of a task as lm-eval has built it.

    shots  examples that it shows before a question, drawn by `seed` where there are any
    """
    config, metadata = task.config, getattr(task.config, "metadata", None) or {}
    settings = {f.name: _plain(getattr(config, f.name)) for f in fields(config) if f.name not in _ASIDE}
    settings["metadata"] = {name: _plain(value) for name, value in metadata.items() if name != "config_source"}
    settings["class"] = _plain(type(task))
    settings["prompt"] = _plain(vars(prompt)) if (prompt := getattr(task, "prompt", None)) is not None else None
    examples = [shots, seed, _documents(task.fewshot_docs())] if shots else [0]
    return text.fingerprint([version("lm_eval"), settings, _documents(task.eval_docs), examples])


def of_group(group: Any) -> str:
    """Of how a group's tasks are put together; they themselves have fingerprints of their own."""
    return text.fingerprint([version("lm_eval"), sorted(group.child_names), _plain(group.aggregate_metric_list)])


def _documents(documents: Iterable[Any]) -> str:
    return text.fingerprint(json.dumps(document, sort_keys=True, default=str) for document in documents)


def _plain(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """A value as JSON can hold it, the same in every process: never with an address.

    inside  the functions whose closure this is in: one may hold itself
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), inside) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(inner, inside) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, inside) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(str(inner) for inner in value)
    if isinstance(value, functools.partial):
        return ["partial", *(_plain(part, inside) for part in (value.func, value.args, value.keywords))]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if not callable(value) or id(value) in inside:
        return name
    file = _source(value)
    held = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return [name, origin.file_hash(file) if file else None, *(_plain(one, (*inside, id(value))) for one in held)]


def _source(function: Any) -> Path | None:
    """The file that holds a function, a class, or the class of an object; None for what is compiled."""
    for one in (inspect.unwrap(function), type(function)):
        try:
            file = inspect.getsourcefile(one)
        except TypeError:
            continue
        if file is not None and Path(file).is_file():
            return Path(file)
    return None
