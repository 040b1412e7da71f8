"""The rows of results folders as runs: one a cell, with what was asked as its configuration and what was found as its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sweep.report import asked, variants
from sweep.settings import RequestError
from sweep.store import columns

_DESCRIBES = {"what was asked", "where it comes from"}  # kinds of columns that are no findings


@dataclass(frozen=True)
class Run:
    """One cell."""

    cell: str
    name: str  # by which a person recognises it; no two cells have the same
    model: str
    tags: tuple[str, ...]
    settings: dict[str, Any]  # words and numbers, by dotted key
    metrics: dict[str, float]  # what is no number, or not known, is left out


def read(folders: Sequence[str]) -> pd.DataFrame:
    """The rows of all folders, one a cell. Raises RequestError where there is no folder, or no row in it."""
    found = asked.read(folders)
    if found.empty:
        raise RequestError(f"{', '.join(folders)}: there is no row yet: run a sweep first")
    return found


def of(rows: pd.DataFrame) -> Iterator[Run]:
    """Of the rows that are ok."""
    for row in rows[rows.status == "ok"].to_dict("records"):
        words = [row["method"], row["criterion"], f"{row['sparsity']:g}" if row["sparsity"] else None]
        words += [row[name] if row[name] not in (None, "none") else None for name in ("recovery", "quantize")]
        said = [str(word) for word in words if not (word is None or word != word)]
        yield Run(
            row["cell"],
            " ".join([*said, f"seed {row['seed']}", row["cell"][:6]]),
            str(row["model"]),
            tuple(dict.fromkeys(said[:2])),
            variants.flat(row["config"]),
            {name: float(value) for name, value in row.items() if _is_found(name, value)},
        )


def _is_found(name: str, value: Any) -> bool:
    if isinstance(value, str | bool) or value is None or not isinstance(value, int | float):
        return False
    known = columns.COLUMNS.get(name)
    return math.isfinite(value) and (known is None or known.kind not in _DESCRIBES)
