"""The columns of a row that are known before its cell runs. A cell that fails leaves a row with these alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from sweep import identity, machine, versions
from sweep.config import Cell
from sweep.models import origin
from sweep.pruning import families
from sweep.settings import plain


def columns(cell: Cell, command: str) -> dict[str, Any]:
    """What was asked, by whom it runs, and on what."""
    return {
        "cell": identity.cell_name(cell),
        "model": cell.model.name,
        "method": cell.method.family,
        "criterion": families.criterion_shown(cell.method),
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "recovery": cell.recover.name,
        "quantize": cell.quantize.name,
        "quantize_method": cell.quantize.method if "quantize" in {stage.name for stage in cell.stages()} else None,
        "execution": cell.execution.name,
        "dtype": cell.dtype,
        "device": cell.device,
        "threads": cell.threads,
        "config": json.dumps(plain(cell), sort_keys=True),
        "command": command,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_fingerprint": origin.fingerprint(cell.model),
        "measuring_version": versions.MEASURING_VERSION,
        "stage_versions": json.dumps(stages) if (stages := identity.stage_versions(cell)) else None,
        "data_fingerprints": json.dumps(identity.data_fingerprints(cell), sort_keys=True),
        **machine.provenance(),
    }
