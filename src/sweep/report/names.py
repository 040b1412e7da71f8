"""What recipes are called in figures and tables. No torch."""

from __future__ import annotations

import math

import pandas as pd

from sweep import config
from sweep.formats import declared

_PACKED = [name for name, form in declared.FORMATS.items() if form.module]  # named even where no other is shown
_DIGITS = 3  # significant ones of a measured number


def series(points: pd.DataFrame) -> pd.Series:
    """The name of each point's recipe, stage after stage: as short as tells it from the others of the figure."""
    name = pd.Series("", index=points.index)
    for stage in config.STAGES:
        word = points[stage.column].astype(str)
        if stage.group == "method":
            word += (" " + points.criterion.astype(str)).where(points.criterion.notna(), "")
        used = points[stage.column] != stage.nothing
        name += ((" + " + word).where(name != "", word)).where(used, "")
    name = name.where(~points.baseline, "dense")
    name += (" (" + points.variant + ")").where(points.variant != "", "")
    several = points.groupby(name).execution.transform("nunique") > 1
    name += (", " + points.execution.astype(str)).where(several | points.execution.isin(_PACKED), "")
    for words in ("setting", "machine"):
        name += (" [" + points[words] + "]").where(points[words] != "", "")
    if points.version.nunique() > 1:
        name += " (version " + points.version + ")"
    if points.model.nunique() > 1:
        name += ", " + points.model.astype(str)
    return name


def recipe(name: str, sparsity: float) -> str:
    """A series at a sparsity: `weight wanda, bitmap at 30 %`."""
    return f"{name} at {100 * sparsity:.4g} %" if sparsity else name


def number(value: float) -> str:
    """A measured number with three significant digits, large ones grouped."""
    if not math.isfinite(value):
        return "" if math.isnan(value) else "inf"
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.2e}"
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(abs(value)))) if value else 1
    return f"{value:,.{decimals}f}"


def percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """A share with its interval: `97.3 % (96.1 to 98.4)`."""
    return f"{100 * value:.1f} %" + _ends(f"{100 * low:.1f}", f"{100 * high:.1f}")


def times(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """A ratio with its interval: `1.32x (1.28 to 1.35)`."""
    return f"{value:.2f}x" + _ends(f"{low:.2f}", f"{high:.2f}")


def _ends(low: str, high: str) -> str:
    """An interval behind its value, where one is known and is not the value itself."""
    return "" if low in (high, "nan") else f" ({low} to {high})"
