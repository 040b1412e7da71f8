"""The file that a block's measured drops are kept in, a row a unit from the moment that it is measured.

numpy's own, mapped into memory: what is put into a row is with the system at once, whatever becomes of this process
next, and a row that was half put there still holds a NaN, by which it counts as not measured. Each row says what it
cost, and the last one, of no unit, what the preparations cost. Whoever goes on from a part makes them again, and
replaces it: so nothing is counted twice, nor left out.

O: the options of the probe, as in `drop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.lib.recfunctions import structured_to_unstructured

from sweep import cache
from sweep.cost import Cost

_NAME = "measured.npy"
_COST = [f.name for f in fields(Cost)]
_SUMMED = [name for name in _COST if name != "peak_bytes"]
LAYOUT = [_NAME, "log_likelihoods", *_COST]  # with another one, another entry of the cache


def blank(units: int, options: int) -> np.ndarray:
    """Rows in which nothing is measured."""
    rows = np.empty(units + 1, [("log_likelihoods", float, options), *((name, float) for name in _COST)])
    rows[:] = np.nan
    return rows


def begun(folder: Path, units: int, options: int) -> np.ndarray:
    """The rows of the file in a folder, empty ones where there is none or a damaged one. What is put there is kept."""
    path, new = folder / _NAME, blank(units, options)
    try:
        rows = np.load(path)
        fits = rows.shape == new.shape and rows.dtype == new.dtype
    except (FileNotFoundError, ValueError, EOFError):
        fits = False
    if not fits:
        cache.write(path, lambda handle: np.save(handle, new))
    return np.load(path, mmap_mode="r+")


def whole(folder: Path) -> np.ndarray:
    """The rows of a complete measurement."""
    return np.load(folder / _NAME)


def put(rows: np.ndarray, places: Sequence[int], log_likelihoods: np.ndarray, spent: Cost) -> None:
    """Fill the rows at some places with log-likelihoods (places, O), which together cost so much."""
    places = list(places)
    filled = rows[places]
    filled["log_likelihoods"] = log_likelihoods
    for name in _SUMMED:
        filled[name] = getattr(spent, name) / len(places)
    filled["peak_bytes"] = spent.peak_bytes
    rows[places] = filled


def is_measured(rows: np.ndarray) -> np.ndarray:
    """(rows,) bool."""
    return ~np.isnan(structured_to_unstructured(rows)).any(1)


def cost(rows: np.ndarray) -> Cost:
    """What measured rows cost together."""
    return Cost(
        float(rows["seconds"].sum()),
        round(rows["block_tokens"].sum()),
        round(rows["peak_bytes"].max(initial=0)),
        float(rows["cpu_seconds"].sum()),
    )
