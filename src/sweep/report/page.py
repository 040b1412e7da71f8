"""report.html: one file that opens without a network, to filter the rows, choose the axes, and copy a cell's command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sweep import config
from sweep.metrics import bare, stderr
from sweep.report import drawing
from sweep.report.names import series
from sweep.report.parts import Part
from sweep.store import columns

_TEMPLATES = Path(__file__).parent / "templates"
_LEFT_OUT = {"config", "packages", "data_fingerprints", "schema_version"}  # long, and in the parquet files
_FILTERS = (
    "model",
    *(stage.column for stage in config.STAGES),
    "criterion",
    "variant",
    "execution",
    "setting",
    "version",
    "machine",
)


def render(
    rows: pd.DataFrame,
    ok: pd.DataFrame,
    metrics: Sequence[str],
    costs: Sequence[str],
    left_out: Sequence[str],
    seen: Sequence[Part],
    failed: Sequence[str],
) -> str:
    """The page as text.

    rows     all rows, with variant and setting
    ok       those that are ok, with paired latencies: the ones that are drawn
    seen     what stands apart, with what it comes to
    left_out, failed  sentences that stand above and below the figure
    """
    ok = ok.assign(series=series(ok)).sort_values(["series", "sparsity", "seed"], kind="stable")
    numeric = [
        c
        for c in ok.columns
        if pd.api.types.is_numeric_dtype(ok[c])
        and ok[c].dtype != bool
        and ok[c].notna().any()
        and not c.endswith(("_low", "_high"))
        and not bare(c).endswith("_stderr")
        and c not in ("seed", "schema_version")
    ]
    first = [c for c in ["decode_speedup", *costs, "sparsity"] if c in numeric]
    data = {
        "columns": _columns(ok),
        "count": len(ok),
        "filters": [c for c in _FILTERS if c in ok and ok[c].nunique() > 1],
        "x": first + [c for c in numeric if c not in first],
        "y": list(dict.fromkeys(c for c in ["quality_kept", *metrics, *numeric] if c in numeric)),
        "labels": {c: columns.label(c) for c in numeric},
        "scales": {c: columns.scale(c) for c in numeric if columns.scale(c) != 1},
        "losses": [c for c in numeric if columns.is_loss(c, ok)],
        "errors": {c: stderr(c) for c in numeric if stderr(c) in ok},
        "colours": drawing.COLOURS,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        data=Markup(
            json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        ),  # ends no element
        left_out=list(left_out),
        parts=list(seen),
        failed=list(failed),
        cells=len(rows),
        models=sorted(set(rows.model.dropna())),
    )


def _columns(rows: pd.DataFrame) -> dict[str, Any]:
    """Each column as its values, or as one value where all rows agree; null where nothing was measured."""
    found: dict[str, Any] = {}
    for name in rows.columns:
        column = rows[name]
        if name in _LEFT_OUT or not column.notna().any():
            continue
        if pd.api.types.is_float_dtype(column):
            finite = np.isfinite(column.to_numpy())
            values = [float(f"{v:.6g}") if good else None for v, good in zip(column, finite, strict=True)]
        else:
            values = [None if pd.isna(v) else v.item() if hasattr(v, "item") else v for v in column]
        found[name] = values[0] if all(v == values[0] for v in values) else values
    return found
