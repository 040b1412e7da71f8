"""Tasks by name: lm-eval's, the embedded ones and the user's own; building those that are asked for, and refusing what
cannot run.

lm-eval reads its fourteen thousand YAML files each time it is asked for a task, which takes seconds. Their names, kinds
and places are kept in the cache, so that a cell reads the files of its own tasks and no more. A user's own are read
each time: the folder that `benchmarks.include_path` names, and files that `benchmarks.tasks` names.
"""

from __future__ import annotations

import functools
import json
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sweep import cache
from sweep.config import Benchmarks
from sweep.measuring import lm_eval_private, task_identity
from sweep.measuring.lm_eval_private import Known
from sweep.measuring.task_identity import TASK_FOLDER
from sweep.settings import RequestError, did_you_mean
from sweep.texts import corpora, embedded, text

log = logging.getLogger(__name__)

_INDEX = 1  # raise when what is kept of a task changes
_YAML = (".yaml", ".yml")
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # as lm-eval looks for one
_LIMIT = 256  # tokens of an answer, where a task names no limit: lm-eval's own
_RESERVED = {"calibration", "embedding", "head"}  # columns and fingerprints that are no task's


@dataclass(frozen=True)
class Found:
    """The tasks that settings ask for."""

    names: list[str]
    known: Known  # every task, group and tag that can be named, beside the embedded ones
    mine: Known  # those of them that are the user's own


def check(settings: Benchmarks, data_root: str | None, positions: int | None = None) -> dict[str, str]:
    """Refuse benchmarks that cannot run, and return a fingerprint of each task: see `task_identity`.

    positions  of the model, where they are known
    Raises RequestError for an unknown name, a name that two tasks have, a file that is no task, data that cannot be
    found, examples asked of a task that has none, a task that runs code written by the model without
    `benchmarks.unsafe_code=true`, answers that nothing ends, and answers that leave a prompt no position.
    """
    if data_root is not None and not Path(data_root).expanduser().is_dir():
        raise RequestError(f"data_root: there is no folder {data_root}")
    if settings.include_path is not None and not Path(settings.include_path).expanduser().is_dir():
        raise RequestError(f"benchmarks.include_path: there is no folder {settings.include_path}")
    ours = [task for task in settings.tasks if task in embedded.EMBEDDED]
    if settings.num_fewshot and (bare := [task for task in ours if not embedded.examples(task)]):
        raise RequestError(
            f"benchmarks.num_fewshot={settings.num_fewshot}: the task {bare[0]} has no examples to show; "
            "use 0 or null, or leave it out of benchmarks.tasks"
        )
    if settings.num_fewshot is not None and (own := [task for task in ours if embedded.examples(task)]):
        raise RequestError(
            f"benchmarks.num_fewshot={settings.num_fewshot}: the task {own[0]} always shows its own "
            f"{len(embedded.examples(own[0]))} examples; use null, or leave it out of benchmarks.tasks"
        )
    found = {task: task_identity.of_embedded(task) for task in ours}
    for task in ours:
        _check_answers(task, task_identity.embedded_settings(task), settings, positions)
    rest = tuple(task for task in settings.tasks if task not in embedded.EMBEDDED)
    if not rest and settings.include_path is None:
        return found
    asked = replace(settings, tasks=rest, limit=None, batch_size=1, max_length=None)
    fingerprints, written = _check_lm_eval(asked, data_root, _state(asked))
    for name, declared in written.items():
        _check_answers(name, declared, settings, positions)
    return found | fingerprints


def _check_answers(name: str, declared: Mapping[str, Any], settings: Benchmarks, positions: int | None) -> None:
    """Refuse answers that nothing ends, and those that may take all of the model's positions.

    declared  the task's settings, of which `generation_kwargs` say how answers are written
    """
    if declared.get("output_type") != "generate_until":
        return
    asked = declared.get("generation_kwargs") or {}
    limit = next((asked[key] for key in _LIMITS if asked.get(key) is not None), None)
    stops = asked.get("until", "\n\n")  # lm-eval's own, where a task names none
    stops = [stops] if isinstance(stops, str) else stops or []
    if "" in stops or (not stops and limit is None):
        raise RequestError(
            f"benchmarks.tasks: nothing ends an answer of {name}: its generation_kwargs have "
            f"{'an empty stop string' if stops else 'neither a stop string nor max_gen_toks'}; name in `until` the "
            "strings at which an answer ends"
        )
    readable = settings.max_length or positions
    limit = int(limit or _LIMIT)
    if readable and limit >= readable:
        of = f"benchmarks.max_length={readable}" if settings.max_length else f"the model's {readable} positions"
        raise RequestError(
            f"benchmarks.tasks: an answer of {name} may take {limit} tokens (max_gen_toks), which leaves a prompt none of "
            f"{of}: use a model that reads more, or a task with shorter answers"
        )


@functools.lru_cache
def _check_lm_eval(
    settings: Benchmarks, data_root: str | None, state: tuple[Any, ...]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """(a fingerprint of each task, the settings of those whose answers are written)."""
    found = find(settings)
    for name in found.names:
        if not settings.unsafe_code and any(_declared(leaf, "unsafe_code") for leaf in _leaves(name, found.known)):
            raise RequestError(
                f"benchmarks.tasks: {name} runs code that the model wrote, on this machine. If that is "
                "what you want, add benchmarks.unsafe_code=true"
            )
    loaded = load(settings, data_root)
    fingerprints, written = {}, {}
    for name, task in loaded["tasks"].items():
        shown = shots(task, settings)
        if settings.num_fewshot and not shown:
            log.warning("%s shows no examples, whatever benchmarks.num_fewshot is: it says so itself", name)
        _check_examples(name, task, shown, settings)
        fingerprints[name] = task_identity.of_task(task, shown, settings.fewshot_seed)
        if task.OUTPUT_TYPE == "generate_until":
            written[name] = {"output_type": task.OUTPUT_TYPE, "generation_kwargs": task.get_config("generation_kwargs")}
    fingerprints |= {f"group {name}": task_identity.of_group(group) for name, group in loaded["groups"].items()}
    return fingerprints, written


def _check_examples(name: str, task: Any, shown: int, settings: Benchmarks) -> None:
    """Refuse to show more examples than there are; a split that holds a single row is a placeholder."""
    if not shown:
        return
    shows = getattr(task, "fewshot_cfg", None)
    needed = shown + (shows is not None and shows.split == task.config.test_split)  # one may be the question itself
    have = len(task.fewshot_docs() or ())
    if have < max(needed, 2):
        raise RequestError(
            f"benchmarks.num_fewshot={'null' if settings.num_fewshot is None else settings.num_fewshot}: the "
            f"task {name} is to show {shown} and has {have} examples to show: use fewer, or 0"
        )


def shots(task: Any, settings: Benchmarks) -> int:
    """Examples that a task shows before a question, as lm-eval decides it.

    What is asked, else what the task says; a task that says 0 never shows any.
    """
    own = task.get_config("num_fewshot")
    return own or 0 if settings.num_fewshot is None or own == 0 else settings.num_fewshot


def _state(settings: Benchmarks) -> tuple[Any, ...]:
    """What changes when one of the user's own files does: YAML and the Python beside it."""
    folders = {_file(task, settings).parent for task in settings.tasks if task.endswith(_YAML)}
    folders |= {Path(settings.include_path).expanduser()} if settings.include_path else set()
    files = {file for folder in folders for suffix in (*_YAML, ".py") for file in folder.glob(f"**/*{suffix}")}
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files))


def _file(task: str, settings: Benchmarks) -> Path:
    """The file of a task that is asked for by its file: as it is named, or within `benchmarks.include_path`."""
    places = [Path(task).expanduser()]
    places += [Path(settings.include_path).expanduser() / task] if settings.include_path else []
    for place in places:
        if place.is_file():
            return place.resolve()
    raise RequestError(f"benchmarks.tasks: there is no file {' nor '.join(map(str, places))}")


def find(settings: Benchmarks) -> Found:
    """Where the tasks are that settings ask for. Raises RequestError for a name that is none."""
    if set(settings.tasks) <= set(embedded.EMBEDDED) and settings.include_path is None:
        return Found([*settings.tasks], {}, {})
    mine, names, unreadable = _own(settings)
    known = index() | mine
    for name in names:
        if name not in known and name not in embedded.EMBEDDED:
            near = did_you_mean(name, [*embedded.EMBEDDED, *known])
            where = f" or of {settings.include_path}" if settings.include_path else ""
            unread = f" Not read there: {'; '.join(unreadable)}" if unreadable else ""
            raise RequestError(f"benchmarks.tasks: '{name}' is no task of sweep or lm-eval{where}.{near}{unread}")
    return Found(names, known, mine)


def _own(settings: Benchmarks) -> tuple[Known, list[str], list[str]]:
    """(the user's own tasks, groups and tags, the names of what is asked for, files that could not be read and why).

    Raises RequestError for a file that is asked for and is no task, and for a name that is taken.
    """
    asked = {task: _file(task, settings) for task in settings.tasks if task.endswith(_YAML)}
    folder = Path(settings.include_path).expanduser().resolve() if settings.include_path else None
    if not asked and folder is None:
        return {}, [*settings.tasks], []
    theirs, mine, called, unreadable = index(), Known(), dict[Path, str](), list[str]()
    inside = (path.resolve() for path in lm_eval_private.yaml_files(folder)) if folder else ()
    for path in sorted({*asked.values(), *inside}):
        try:
            config = lm_eval_private.read_yaml(path)
            name = _checked_name(config.get("group") or config.get("task"))
        except Exception as error:  # whatever the YAML leads the loader to
            reason = " ".join(str(error).split())
            if path in asked.values():
                raise RequestError(f"benchmarks.tasks: {path} is no task: {reason}") from error
            unreadable.append(f"{path.name}: {reason}")  # one that others include, or that is none of the matter
            continue
        taken = theirs | mine | {task: {"path": TASK_FOLDER / f"{task}.yaml"} for task in embedded.EMBEDDED}
        other = taken[name]["path"] if name in taken else path
        if other is None or Path(other).resolve() != path:
            raise RequestError(
                f"{path} calls its task '{name}', as does {other or 'a tag of lm-eval'}: give it a name of its own"
            )
        called[path] = name
        for tag, entry in lm_eval_private.declared(config, path).items():  # the task itself, and its tags
            if tag == name:
                mine[name] = entry
            elif tag not in theirs:
                before = mine.get(tag, entry)
                mine[tag] = before | {"tags": sorted({*before["tags"], *entry["tags"]})}
    return mine, [called[asked[task]] if task in asked else task for task in settings.tasks], unreadable


def _checked_name(name: Any) -> str:
    """The name of a task, under which its columns and its fingerprint go. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError("it names no task")
    if set(name) & set("/,") or name in _RESERVED:
        raise ValueError(f"a task cannot be called '{name}': no / or comma, and none of {', '.join(sorted(_RESERVED))}")
    return name


def _leaves(name: str, known: Known) -> Iterator[str]:
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
    return lm_eval_private.read_yaml(Path(path)).get(key) or []


def hub_dataset(task: str) -> tuple[str, str] | None:
    """(its name on the hub, what it calls this part of it) of the data set of lm-eval's task; None where the hub has none."""
    if task in embedded.EMBEDDED or task not in (known := index()):
        return None
    (file, *others) = _leaves(task, known)
    place = _declared(file, "dataset_path")
    is_of_the_hub = isinstance(place, str) and place.count("/") == 1 and not others
    return (place, str(_declared(file, "dataset_name") or "default")) if is_of_the_hub else None


def index() -> Known:
    """Every task, group and tag of the installed lm-eval."""

    def search(folder: Path) -> None:
        (folder / "index.json").write_text(json.dumps(lm_eval_private.installed()))

    import lm_eval

    place = text.fingerprint([version("lm_eval"), str(Path(lm_eval.__file__).parent), _INDEX])
    return json.loads((cache.entry("tasks", place, search) / "index.json").read_text())


def load(settings: Benchmarks, data_root: str | None = None) -> dict[str, Any]:
    """lm-eval's task objects by name, with their groups, as `lm_eval.evaluate` takes them.

    Raises RequestError for data that cannot be found, a user's task that cannot be built, and one that is asked for twice.
    """
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    asked = find(settings)
    manager = lm_eval_private.manager(TASK_FOLDER, asked.known)
    random.seed(0)  # as lm-eval does: a task may shuffle its documents or choices
    np.random.seed(1234)  # noqa: NPY002
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    with lm_eval_private.data_found_in(data_root):
        for name in dict.fromkeys(asked.names):
            found = _build(manager, name, asked.mine, data_root)
            if twice := sorted(loaded["tasks"].keys() & found["tasks"].keys()):
                raise RequestError(f"benchmarks.tasks={','.join(asked.names)} asks for {twice[0]} twice: leave one out")
            for part in loaded:
                loaded[part] |= found.get(part, {})
    return loaded


def _build(manager: Any, name: str, mine: Known, data_root: str | None) -> dict[str, Any]:
    """The task, or all tasks of a group or tag; run where its data are found."""
    try:
        return manager.load([name])
    except OSError as error:  # ConnectionError is one
        raise RequestError(corpora.missing(f"benchmarks.tasks={name}", data_root, error)) from error
    except Exception as error:
        if name in mine:  # whatever its YAML and its functions lead lm-eval to
            raise RequestError(
                f"benchmarks.tasks: {mine[name]['path'] or name} cannot be built: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error
        if isinstance(error, ImportError):
            raise RequestError(f"benchmarks.tasks: {name} needs a package that is not installed: {error}") from error
        if isinstance(error, ValueError):
            raise RequestError(corpora.missing(f"benchmarks.tasks={name}", data_root, error)) from error
        raise
