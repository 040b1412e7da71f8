"""What tells rows apart beyond the named columns: settings inside `config`, data, versions and machines. No torch.

Without this a global and a per-matrix magnitude row of one sparsity would look like two seeds of one point, and so would
one cell that two versions of the code have measured. What lies somewhere (a model, a task, a text) is told apart by its
fingerprint and shown by a name: a folder may be called in many ways, and its content may change under one name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import pandas as pd

from sweep import config
from sweep.pruning import criteria, families
from sweep.settings import flat_fields, renamed
from sweep.sources import MIX, Source

# Told by columns of their own, or no choice between methods.
_NAMED = {"method.family", "method.criterion", "method.importance", "execution.name", "sparsity", "seed"} | {
    f"{stage.group}.name" for stage in config.STAGES
}
# No number depends on them beyond what fingerprints and the names below say.
# A function of one's own and a recipe are told by what is in them, wherever that lies.
_FILES = {"method.criterion": "method.source", "method.replay": "method.recipe"}
_ASIDE = {
    "data_root",
    "execution.saved",
    "method.replay",
    "calibration",
    "calibration.subset",
    "calibration.split",
    "calibration.column",
    "calibration.sources",
    "recover.text.subset",
    "recover.text.split",
    "recover.text.column",
    "recover.text.sources",
    "benchmarks.include_path",
    "benchmarks.num_fewshot",
    "benchmarks.fewshot_seed",
    "benchmarks.unsafe_code",
}
_SHOTS = ("benchmarks.num_fewshot", "benchmarks.fewshot_seed")  # part of what a task is


def _defaults(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in flat_fields(kind):
        if is_dataclass(f.default):
            yield from _defaults(type(f.default), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.default


_DEFAULTS: dict[str, dict[str, Any]] = {  # by group, or by a method's family
    name: dict(_defaults(kind)) for name, kind in (families.FAMILIES | config.GROUPS).items()
}
_SCOPES = {criterion.name: criterion.within for criterion in criteria.declared("weight")}  # of the papers
_NOW = {f"method.{was}": f"method.{now}" for was, now in renamed(families.Weight).items()}  # keys of older rows
# Before this measuring version some defaults were others, and a task's fingerprint did not say which examples it shows.
_CHANGED = 6
_FORMERLY = {"benchmarks.num_fewshot": 0, "benchmarks.max_length": 2048}
_LATER = tuple(f"{stage.group}." for stage in config.STAGES if stage.group != "method")  # what follows pruning
_RECIPE = ("method.", "calibration.", "execution.", *_LATER)
_MEASUREMENT = ("benchmarks.", "efficiency.", "perplexity.")  # how, and on what, the cell is measured
UNKNOWN = -1  # the measuring version of a row that cannot tell it: older than any other


def flat(text: str | None) -> dict[str, Any]:
    """The resolved configuration of a row as `{"method.scope": "matrix", …}`; empty when the row has none."""
    if not isinstance(text, str):
        return {}
    found: dict[str, Any] = {}
    stack: list[tuple[str, Any]] = [("", json.loads(text))]
    while stack:
        where, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{where}.{key}" if where else key, inner) for key, inner in value.items()]
        else:
            found[_NOW.get(where, where)] = ",".join(map(_item, value)) if isinstance(value, list) else value
    return found


def _item(value: Any) -> str:
    """One of a list; of a mix of texts one of these with its share, such as `25% self at 0.5`."""
    if not isinstance(value, dict):
        return str(value)
    warmth = value["temperature"]
    name = value["source"] if warmth == Source.temperature else f"{value['source']} at {warmth:g}"
    return f"{100 * value['share']:g}% {name}"


def _text(setting: dict[str, Any], group: str) -> Any:
    """What the text of a group of settings is called."""
    source = setting.get(f"{group}.source")
    return setting.get(f"{group}.sources") if source == MIX else source


def tasks(text: str) -> list[str]:
    """The tasks that a row's configuration asks for."""
    return (json.loads(text).get("benchmarks") or {}).get("tasks") or []


def versions(rows: pd.DataFrame) -> pd.Series:
    """The measuring version of each row, or UNKNOWN."""
    known = rows.get("measuring_version", pd.Series(UNKNOWN, index=rows.index))
    return pd.to_numeric(known).fillna(UNKNOWN).astype(int)


def models(rows: pd.DataFrame) -> pd.Series:
    """What the model of each row is called: one name for one fingerprint."""
    shown = _names(rows.model.tolist(), _column(rows, "model_fingerprint").tolist(), versions(rows).tolist())
    return pd.Series(shown, index=rows.index, dtype=object)


def is_called(rows: pd.DataFrame, name: str) -> pd.Series:
    """Whether the model of each row goes by this name, in that row, in another of the same fingerprint, or in a report."""
    prints = _column(rows, "model_fingerprint")
    named = (rows.model == name) | (models(rows) == name)
    return named | prints.isin(set(prints[named].dropna()))


def at_default(rows: pd.DataFrame, key: str) -> pd.Series:
    """Whether each row has a setting at its default, or has no such setting."""
    settings = [flat(text) for text in _column(rows, "config")]
    found = [key not in s or _is_default(key, s, of) for s, of in zip(settings, versions(rows), strict=True)]
    return pd.Series(found, index=rows.index, dtype=bool)


def is_baseline(rows: pd.DataFrame) -> pd.Series:
    """Whether each row is of the dense model, which no stage has changed: what all others are compared with.

    A row that is older than a stage did not use it.
    """
    unused = [_column(rows, stage.column).fillna(stage.nothing) == stage.nothing for stage in config.STAGES]
    return functools.reduce(operator.and_, unused)


def with_variant(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with one name for each model, a word for each stage, `baseline`, which says whether a row is of the
    dense model, and four columns of words, empty where all rows agree.

    setting  how, and on what, the cell is measured: benchmarks, timing, dtype, device, threads
    variant  the settings of the recipe that vary between rows of one method, criterion and what follows them, such as
             `scope=global`, and the versions of its stages
    version  the measuring version
    machine  processor and GPU
    Of setting and variant, what is at its default goes without saying. A dense row has the setting of what is compared
    with it, and no variant.
    """
    version = versions(rows).tolist()
    settings = [flat(text) for text in _column(rows, "config")]
    data = [json.loads(text) if isinstance(text, str) else {} for text in _column(rows, "data_fingerprints")]
    _name_what_was_read(settings, data, version)
    measured = [
        {k: v for k, v in s.items() if _is_measurement(k) and not _is_default(k, s, of)}
        for s, of in zip(settings, version, strict=True)
    ]
    chosen = [
        {k: v for k, v in s.items() if _is_choice(k) and not _is_default(k, s, of)}
        | {name: d[of_file][:8] for of_file, name in _FILES.items() if of_file in d}
        | {f"stages.{name}": v for name, v in json.loads(stages if isinstance(stages, str) else "{}").items()}
        for s, d, stages, of in zip(settings, data, _column(rows, "stage_versions"), version, strict=True)
    ]
    machines = [
        {k: v for k, v in zip(("cpu", "gpu"), pair, strict=True) if isinstance(v, str)}
        for pair in zip(_column(rows, "cpu"), _column(rows, "gpu"), strict=True)
    ]
    everything = pd.Series("all", index=rows.index)
    stages = {stage.column: _column(rows, stage.column).fillna(stage.nothing) for stage in config.STAGES}
    recipe = pd.Series(list(zip(*stages.values(), rows.criterion.astype(str), strict=True)), index=rows.index)
    return rows.assign(
        **stages,
        baseline=is_baseline(rows),
        model=models(rows),
        setting=_words(measured, everything),
        variant=_words(chosen, recipe),
        version=["unknown" if v == UNKNOWN else str(v) for v in version] if len(set(version)) > 1 else "",
        machine=_words(machines, everything),
    )


def _name_what_was_read(settings: list[dict[str, Any]], data: list[dict[str, str]], version: list[int]) -> None:
    """Tasks and texts in the settings of rows are called by one name for one fingerprint."""
    for key, names, prints in (
        (
            "benchmarks.tasks",
            [_tasks(*pair) for pair in zip(settings, version, strict=True)],
            [_tasks_fingerprint(*row) for row in zip(settings, data, version, strict=True)],
        ),
        (
            "perplexity.source",
            [s.get("perplexity.source") for s in settings],
            [next((d[k] for k in d if k.startswith("perplexity:")), None) for d in data],
        ),
        ("calibration.source", [_text(s, "calibration") for s in settings], [d.get("calibration") for d in data]),
        (
            "recover.text.source",
            [_text(s, "recover.text") for s in settings],  # none is the calibration text, told by its own name
            [d.get("recovery") if s.get("recover.text.source") else None for s, d in zip(settings, data, strict=True)],
        ),
    ):
        for setting, name in zip(settings, _names(names, prints, version), strict=True):
            if key in setting:
                setting[key] = name


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name] if name in rows else pd.Series(None, index=rows.index, dtype=object)


def _names(names: Sequence[Any], prints: Sequence[Any], version: Sequence[int]) -> list[Any]:
    """One name for each fingerprint, with its beginning where another one of the same version goes by the same name.

    The name is the one that most rows give it, the shortest of several. Without a fingerprint a name is what it is.
    """
    known = [isinstance(mark, str) and isinstance(name, str) for name, mark in zip(names, prints, strict=True)]
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for name, mark, is_known in zip(names, prints, known, strict=True):
        if is_known:
            given[mark][name] += 1
    chosen = {mark: min(counts, key=lambda name: (-counts[name], len(name), name)) for mark, counts in given.items()}
    holders: dict[tuple[int, str], set[str]] = defaultdict(set)
    for mark, of, is_known in zip(prints, version, known, strict=True):
        if is_known:
            holders[of, chosen[mark]].add(mark)
    unclear = {mark for marks in holders.values() if len(marks) > 1 for mark in marks}
    shown = {
        mark: f"{name} ({re.split('[:@]', mark)[-1][:8]})" if mark in unclear else name for mark, name in chosen.items()
    }
    return [shown[mark] if is_known else name for name, mark, is_known in zip(names, prints, known, strict=True)]


def _tasks(setting: dict[str, Any], version: int) -> str | None:
    """What a row's tasks are called: with the examples that are shown, where that is not as a task says."""
    tasks = setting.get("benchmarks.tasks")
    shots = [
        f"{key.rpartition('.')[2]}={setting[key]}"
        for key in _SHOTS
        if key in setting and not _is_default(key, setting, version)
    ]
    return None if tasks is None else ", ".join([tasks, *shots])


def _tasks_fingerprint(setting: dict[str, Any], data: dict[str, str], version: int) -> str | None:
    tasks = {
        name: mark
        for name, mark in data.items()
        if name not in ("calibration", "recovery", *_FILES)
        and not name.startswith("perplexity:")
        and not name.endswith(" of the drop")
    }
    if not tasks:
        return None
    content = [tasks, None if version >= _CHANGED else setting.get("benchmarks.num_fewshot")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_default(key: str, setting: dict[str, Any], version: int) -> bool:
    """Whether a setting goes without saying. A scope does when it is the paper's, or when a pattern stands in its place."""
    group, _, name = key.partition(".")
    if key == "method.scope" and setting.get("method.family") == "weight":
        usual = _SCOPES.get(setting.get("method.criterion", ""), "matrix")
        return setting[key] in (None, usual) or setting.get("method.pattern") is not None
    if key in _FORMERLY and version < _CHANGED:
        return setting[key] == _FORMERLY[key]
    defaults = _DEFAULTS.get(setting.get("method.family", "") if group == "method" else group, {})
    return setting[key] == defaults.get(name)


def _is_choice(key: str) -> bool:
    return key.startswith(_RECIPE) and key not in _NAMED and key not in _ASIDE


def _is_measurement(key: str) -> bool:
    return key not in _NAMED and key not in _ASIDE and (key.startswith(_MEASUREMENT) or "." not in key)


def _words(settings: list[dict[str, Any]], groups: pd.Series) -> list[str]:
    """`key=value, …` for the keys whose values differ within the row's group; a key that only some rows have differs."""
    seen: dict[str, dict[str, Counter[str]]] = {}
    sizes = Counter(groups)
    for group, setting in zip(groups, settings, strict=True):
        values = seen.setdefault(group, {})
        for key, value in setting.items():
            values.setdefault(key, Counter())[str(value)] += 1
    varying = {
        group: _one_of_each(
            sorted(key for key, found in keys.items() if max(found.values()) < sizes[group]),
            [setting for of, setting in zip(groups, settings, strict=True) if of == group],
        )
        for group, keys in seen.items()
    }
    return [
        ", ".join(f"{_short(key)}={setting[key]}" for key in varying[group] if key in setting)
        for group, setting in zip(groups, settings, strict=True)
    ]


def _one_of_each(keys: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys without those that tell the same rows apart as one before them does: steps, and the text that they take."""
    chosen: dict[tuple[int, ...], str] = {}
    for key in sorted(keys, key=lambda key: (key.startswith("calibration.") or ".text." in key, key)):  # texts last
        numbers: dict[str | None, int] = {}
        values = [str(setting[key]) if key in setting else None for setting in settings]
        chosen.setdefault(tuple(numbers.setdefault(value, len(numbers)) for value in values), key)
    return sorted(chosen.values())


def _short(key: str) -> str:
    """A setting's name alone, which says enough; of a stage after pruning with the stage, which is no method's own."""
    return key if key.startswith(_LATER) else key.rpartition(".")[2]
