"""report.html: one file that opens without a network: what to choose, the rows as a figure and as a table, two points compared."""

from __future__ import annotations

import base64
import gzip
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
from sweep.metrics import bare, is_exp, label, stderr, title
from sweep.report import drawing, frontier
from sweep.report.evidence import NOTHING, Evidence
from sweep.report.names import series
from sweep.report.parts import Part
from sweep.store import columns

_TEMPLATES = Path(__file__).parent / "templates"
_LEFT_OUT = {"config", "packages", "data_fingerprints", "schema_version"}  # long, and in the parquet files
_COMPARED = 60  # more points than this, and pairs of them are left to sweep.compare
_CHOICES = (  # by what the page is narrowed
    *("model", *(stage.column for stage in config.STAGES), "criterion", "variant", "execution"),
    *("setting", "version", "machine", "sparsity"),
)


def render(
    cells: int,
    models: Sequence[str],
    ok: pd.DataFrame,
    metrics: Sequence[str],
    costs: Sequence[str],
    left_out: Sequence[str],
    seen: Sequence[Part],
    failed: Sequence[str],
    evidence: Evidence = NOTHING,
) -> str:
    """The page as text.

    cells    how many rows there are, of these models
    ok       the rows that are ok, numbered, with paired latencies: the ones that are drawn
    seen     what stands apart, with what it comes to
    left_out, failed  sentences that stand above and below the figure
    """
    ok = ok.assign(series=series(ok)).sort_values(["series", "sparsity", "seed"], kind="stable")
    data = _data(ok, metrics, costs) | {"kept": _kept(seen), "pairs": _pairs(ok, metrics, evidence)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return environment.get_template("report.html.j2").render(
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
        data=Markup(text.replace("<", "\\u003c")),  # ends no element
        left_out=list(left_out),
        parts=list(seen),
        failed=list(failed),
        cells=cells,
        models=list(models),
    )


def _data(ok: pd.DataFrame, metrics: Sequence[str], costs: Sequence[str]) -> dict[str, Any]:
    """The rows, and what is known of their columns."""
    numeric = [
        c
        for c in ok.columns
        if pd.api.types.is_numeric_dtype(ok[c])
        and ok[c].dtype != bool
        and ok[c].notna().any()
        and not c.endswith(("_low", "_high"))
        and not bare(c).endswith("_stderr")
        and c not in ("seed", "schema_version", "point")
    ]
    gains = ["decode_speedup", "stored_bytes", *costs, "sparsity"]
    chosen = ["quality_kept", "decode_speedup", "prefill_speedup", "stored_bytes", "peak_memory_bytes"]
    return {
        "columns": _columns(ok),
        "count": len(ok),
        "choices": [c for c in _CHOICES if c in ok and ok[c].nunique() > 1],
        "x": list(dict.fromkeys(c for c in [*gains, *numeric] if c in numeric)),
        "y": list(dict.fromkeys(c for c in ["quality_kept", *metrics, *numeric] if c in numeric)),
        "metrics": list(metrics),
        "shown": [c for c in chosen if c in numeric],
        "sizes": [
            c for c in ("decode_ms_paired", "prefill_ms_paired", "stored_bytes", "peak_memory_bytes") if c in numeric
        ],
        "labels": {c: columns.label(c) for c in numeric},
        "scales": {c: columns.scale(c) for c in numeric if columns.scale(c) != 1},
        "losses": [c for c in numeric if columns.is_loss(c, ok)],
        "errors": {c: stderr(c) for c in numeric if stderr(c) in ok},
        "colours": drawing.COLOURS,
    }


def _kept(seen: Sequence[Part]) -> dict[str, list[float]]:
    """The ends of the interval of what is kept, by point."""
    found = {}
    for points in (part.overview.points for part in seen if part.overview):
        for point, low, high in points[["point", "kept_low", "kept_high"]].dropna().itertuples(index=False):
            found[str(point)] = [round(low, 5), round(high, 5)]
    return found


def _pairs(ok: pd.DataFrame, metrics: Sequence[str], evidence: Evidence) -> dict[str, Any]:
    """By metric, its label and every two points on the same documents, as Evidence.pairs_of has them."""
    found: dict[str, Any] = {}
    for metric in metrics:
        points = frontier.points(ok, "sparsity", metric)
        if len(points) > _COMPARED or not evidence.pairs(metric):
            continue
        task = title(metric.partition("/")[0])
        name = f"{label(bare(metric))}, {task}" + (" (difference: of the loss, in nats)" if is_exp(metric) else "")
        lines = [
            [None if np.isnan(v) else float(f"{v:.4g}") for v in pair] for pair in evidence.pairs_of(points, metric)
        ]
        found[metric] = {"label": name, "lower": columns.is_loss(metric, ok), "lines": lines}
    return found


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
