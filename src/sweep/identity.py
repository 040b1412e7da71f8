"""The name of a cell: a hash of everything that can change its numbers, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sweep import versions
from sweep.config import Cell
from sweep.measuring import catalogue, perplexity
from sweep.models import origin
from sweep.pruning import families, recipe
from sweep.settings import stated
from sweep.texts import text

# Settings that are not hashed themselves. Paths and names say where something lies: what lies there is fingerprinted.
FINGERPRINTED = {
    "model.name": "what it is called in rows",
    "model.source": "by the model's fingerprint",
    "model.path": "by the model's fingerprint",
    "model.package": "by the model's fingerprint",
    "model.file": "by the model's fingerprint",
    "model.revision": "by the model's fingerprint, which has the commit",
    "data_root": "by the data that are found there",
    "benchmarks.tasks": "each by its documents and its resolved configuration",
    "benchmarks.include_path": "by the tasks that are found there",
    "benchmarks.num_fewshot": "with each task: how many examples it shows, which depends on the task as well",
    "benchmarks.fewshot_seed": "with each task that shows examples",
    "benchmarks.unsafe_code": "a permission; what runs without it runs the same with it",
    "perplexity.source": "by its text",
    "method.replay": "by what the recipe holds",
    "execution.saved": "how a saved model is stored: what is measured is the same",
    "calibration.source": "by its text",
    "calibration.subset": "by its text",
    "calibration.split": "by its text",
    "calibration.column": "by its text",
    "calibration.sources": "by their texts, shares and temperatures",
    "recover.text.source": "by its text",
    "recover.text.subset": "by its text",
    "recover.text.split": "by its text",
    "recover.text.column": "by its text",
    "recover.text.sources": "by their texts, shares and temperatures",
}
CRITERION = "method.criterion"  # a user's own function is hashed by its source, and not by where that lies


def cell_name(cell: Cell) -> str:
    """16 hexadecimal digits. Where the model lies, the results folder, and how the sweep is run do not count."""
    return hashlib.sha256(json.dumps(_content(cell), sort_keys=True).encode()).hexdigest()[:16]


def data_fingerprints(cell: Cell) -> dict[str, str]:
    """Fingerprints of the texts that a cell reads, and of a criterion of the user's own, as far as they are known before it runs."""
    found = catalogue.check(cell.benchmarks, cell.data_root)
    found |= perplexity.check(cell.perplexity, cell.data_root, cell.model)
    probe = families.probe_task(cell.method)
    if probe is not None:
        found[f"{probe} of the drop"] = text.questions_fingerprint(probe)
    criterion = families.criterion_of(cell.method)
    if criterion is not None and criterion.source is not None:
        found[CRITERION] = criterion.source.fingerprint
    if (file := getattr(cell.method, "replay", None)) is not None:
        found["method.replay"] = recipe.fingerprint(file)
    if cell.calibration is not None:
        found["calibration"] = text.calibration_fingerprint(cell.calibration, cell.data_root)
    if (recovery := text.of_recovery(cell)) is not None:
        found["recovery"] = text.calibration_fingerprint(recovery, cell.data_root)
    return found


def stage_versions(cell: Cell) -> dict[str, int]:
    """Of which version the stages are that the cell uses, from 2 on: neither a new stage nor the first version of one
    renames a recorded row."""
    return {stage.name: stage.version for stage in cell.stages() if stage.version > 1}


def _content(cell: Cell) -> dict[str, Any]:
    content = stated(cell)
    for setting in FINGERPRINTED:
        *groups, name = setting.split(".")
        holder = content
        for group in groups:
            holder = holder.get(group) or {}
        holder.pop(name, None)
    data = data_fingerprints(cell)
    if CRITERION in data:
        del content["method"]["criterion"]
    if stages := stage_versions(cell):
        content["stages"] = stages
    return content | {
        "fingerprint": origin.fingerprint(cell.model),
        "data": data,
        "measuring_version": versions.MEASURING_VERSION,
    }
