"""The name of a cell: a hash of everything that can change its numbers, and of nothing else."""

from __future__ import annotations

import hashlib
import json

from sweep import catalogue, perplexity, sources, text, unit_requests
from sweep.config import Cell, as_dict

MEASURING_VERSION = 6  # raise when the code measures something else under the same configuration


def cell_name(cell: Cell) -> str:
    """16 hexadecimal digits. Where the model lies, the results folder, and how the sweep is run do not count."""
    return hashlib.sha256(json.dumps(_content(cell), sort_keys=True).encode()).hexdigest()[:16]


def data_fingerprints(cell: Cell) -> dict[str, str]:
    """Fingerprints of the texts that a cell reads, as far as they are known before it runs."""
    found = catalogue.check(cell.benchmarks, cell.data_root)
    found |= perplexity.check(cell.perplexity, cell.data_root, cell.model)
    probe = getattr(cell.method, "task", None)  # on which a drop is measured
    if probe is not None:
        found[f"{probe} of the drop"] = text.fingerprint(
            [unit_requests.QUESTIONS[probe](d) for d in text.EMBEDDED[probe]()]
        )
    if cell.calibration is not None:
        found["calibration"] = text.fingerprint([text.calibration_text(cell.calibration, cell.data_root)])
    return found


def _content(cell: Cell) -> dict[str, object]:
    content = as_dict(cell)
    del content["data_root"]  # where the data lie; what they are, their fingerprints say
    content["model"] = sources.fingerprint(cell.model)
    return content | {"data": data_fingerprints(cell), "measuring_version": MEASURING_VERSION}
