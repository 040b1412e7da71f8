"""Sweeps of accuracy against measured efficiency for pruned language models.

Nothing here imports torch: a notebook that only reads results opens at once.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_FOUND_IN = {  # each resolves on first use, so that `import sweep` stays instant
    "load": "sweep.store",
    "compare": "sweep.report.paired",
    "language_model": "sweep.models.wrappers",
    "load_model": "sweep.models.checkpoint",
    "offloaded": "sweep.api",
    "prune": "sweep.api",
    "save": "sweep.api",
}
_FORMERLY = {"plot": "sweep.report.plot", "paired": "sweep.report.paired", "knobs": "sweep.report.variants"}  # modules
__all__ = ["__version__", *_FOUND_IN]


def __getattr__(name: str) -> Any:
    if name in _FOUND_IN:
        return getattr(importlib.import_module(_FOUND_IN[name]), name)
    if name in _FORMERLY:  # older notebooks import them from here
        return importlib.import_module(_FORMERLY[name])
    raise AttributeError(f"module 'sweep' has no attribute {name!r}")
