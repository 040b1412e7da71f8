"""What decides, beside settings and data, what a computation gives: of which version the code is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from sweep.config import Cell

# Raise when the code measures something else under the same configuration, or when a declared default of config changes.
MEASURING_VERSION = 6


def arithmetic(cell: Cell) -> list[Any]:
    """What decides, beside model and text, what a computation gives to the last digit: for the keys of caches."""
    return [cell.dtype, cell.device, cell.threads, *code()]


def code() -> list[Any]:
    """The part of it that is code."""
    return [
        MEASURING_VERSION,
        *(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "numpy")),
    ]
