"""Sweeps of accuracy against measured efficiency for pruned language models.

Nothing here imports torch: a notebook that only reads results opens at once.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "load", "load_model", "prune", "save"]


def __getattr__(name: str) -> Any:  # the names above resolve on first use, so that `import sweep` stays instant
    if name == "load":
        from sweep.store import load

        return load
    if name == "load_model":
        from sweep.models.checkpoint import load_model

        return load_model
    if name == "compare":
        from sweep.report.paired import table

        return table
    if name == "prune":
        from sweep.api import prune

        return prune
    if name == "save":
        from sweep.api import save

        return save
    raise AttributeError(f"module 'sweep' has no attribute {name!r}")
