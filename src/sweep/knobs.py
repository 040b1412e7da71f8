"""What tells rows apart beyond the named columns: the settings inside `config` that vary between them. No torch.

Without this a global and a per-matrix magnitude row of one sparsity would look like two seeds of one point.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from typing import Any

import pandas as pd

from sweep.config import BY_ROW, Head, Layer, Neuron, Vocab, Weight

# Told by columns of their own, or no choice between methods.
_NAMED = {"model.name", "method.family", "method.criterion", "method.importance", "execution.name", "sparsity", "seed"}
_ASIDE = {"model.path", "model.revision", "model.file", "model.package", "model.source", "model.trust_remote_code",
          "data_root", "calibration"}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    family: {f.name: f.default for f in fields(kind)}
    for family, kind in (("weight", Weight), ("neuron", Neuron), ("head", Head), ("layer", Layer), ("vocab", Vocab))
}
_OF_THE_METHOD = ("method.", "calibration.", "execution.")
_MEASUREMENT = ("benchmarks.", "efficiency.", "perplexity.")  # how, and on what, the cell is measured


def flat(config: str | None) -> dict[str, Any]:
    """The resolved configuration of a row as `{"method.scope": "matrix", …}`; empty when the row has none."""
    if not isinstance(config, str):
        return {}
    found: dict[str, Any] = {}
    stack: list[tuple[str, Any]] = [("", json.loads(config))]
    while stack:
        where, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{where}.{key}" if where else key, inner) for key, inner in value.items()]
        else:
            found[where] = ",".join(map(str, value)) if isinstance(value, list) else value
    return found


def with_variant(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with two columns of words.

    setting  how the cell is measured (benchmarks, timing, dtype, device, threads), where that varies between the rows
    variant  the knobs of the method that vary between rows of one method and criterion, such as `scope=global`, where
             they are not at their default
    A dense row has the setting of what is compared with it, and no variant.
    """
    settings = [flat(config) for config in rows["config"]] if "config" in rows else [{} for _ in range(len(rows))]
    measured = [{k: v for k, v in s.items() if _is_measurement(k)} for s in settings]
    chosen = [{k: v for k, v in s.items() if k.startswith(_OF_THE_METHOD) and k not in _NAMED and not _is_default(k, s)}
              for s in settings]  # fmt: skip
    everything = pd.Series("all", index=rows.index)
    kind = rows.method.astype(str) + "/" + rows.criterion.astype(str)
    return rows.assign(setting=_words(measured, everything), variant=_words(chosen, kind))


def _is_default(key: str, setting: dict[str, Any]) -> bool:
    """Whether a setting goes without saying. A scope does when it is the paper's, or when a pattern stands in its place."""
    if setting[key] is None:
        return True
    if key == "method.scope" and setting.get("method.family") == "weight":
        usual = "row" if setting.get("method.criterion") in BY_ROW else "matrix"
        return setting[key] == usual or setting.get("method.pattern") is not None
    group, _, name = key.partition(".")
    defaults = _DEFAULTS.get(setting.get("method.family", ""), {})
    return group == "method" and name in defaults and setting[key] == defaults[name]


def _is_measurement(key: str) -> bool:
    known = key in _NAMED or key in _ASIDE or key.startswith(_OF_THE_METHOD)
    return not known and (key.startswith(_MEASUREMENT) or "." not in key)


def _words(settings: list[dict[str, Any]], groups: pd.Series) -> list[str]:
    """`key=value, …` for the keys whose values differ within the row's group; a key that only some rows have differs."""
    seen: dict[str, dict[str, Counter[str]]] = {}
    sizes = Counter(groups)
    for group, setting in zip(groups, settings, strict=True):
        values = seen.setdefault(group, {})
        for key, value in setting.items():
            values.setdefault(key, Counter())[str(value)] += 1
    varying = {group: sorted(key for key, found in keys.items() if max(found.values()) < sizes[group])
               for group, keys in seen.items()}  # fmt: skip
    return [", ".join(f"{key.rpartition('.')[2]}={setting[key]}" for key in varying[group] if key in setting)
            for group, setting in zip(groups, settings, strict=True)]  # fmt: skip
