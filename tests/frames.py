"""Synthetic rows for what reads rows: the columns of the schema, with numbers that nobody measured."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

METHODS = (("weight", "magnitude", "dense"), ("weight", "wanda", "bitmap"), ("neuron", "taylor_abs", "shrunk"))


def rows(
    seeds: int = 3,
    sparsities: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7),
    models: tuple[str, ...] = ("m",),
    methods: tuple[tuple[str, str, str], ...] = METHODS,
    failed: int = 0,
) -> pd.DataFrame:
    """A dense row for each model, and a row for each method, sparsity and seed; the last `failed` ones failed."""
    draw = np.random.default_rng(0)
    lines = []
    for model in models:
        lines.append(_line(model, "dense", None, "dense", 0.0, 0, draw))
        lines += [
            _line(model, *method, sparsity, seed, draw)
            for method in methods
            for sparsity in sparsities
            for seed in range(seeds)
        ]
    frame = pd.DataFrame(lines)
    measured = [c for c in frame if "/" in c or c.endswith(("_p50", "_bytes")) or "speedup" in c]
    for i in frame.index[len(frame) - failed :]:
        frame.loc[i, "status"] = "out_of_memory"
        frame.loc[i, "error"] = "Traceback\nMemoryError: no <b>memory</b> left"
        frame.loc[i, measured] = np.nan
    return frame


def twice(rows_: pd.DataFrame, **changes: object) -> pd.DataFrame:
    """The rows, and again under other names, measured a day later, with these columns changed."""
    again = rows_.assign(
        cell=[f"{int(cell, 16) ^ 1:016x}" for cell in rows_.cell],
        started_at=rows_.started_at.str.replace("01-01T", "01-02T"),
        **changes,
    )
    return pd.concat([rows_, again], ignore_index=True)


def _line(
    model: str,
    method: str,
    criterion: str | None,
    execution: str,
    sparsity: float,
    seed: int,
    draw: np.random.Generator,
) -> dict:
    harm = {"magnitude": 6.0, "wanda": 3.0, "taylor_abs": 2.0}.get(criterion or "", 1.0) * sparsity
    noise = draw.normal(0, 0.01)
    gain = {"dense": 1.0, "bitmap": 0.8 + sparsity, "shrunk": 1 + 0.6 * sparsity}[execution] + noise
    kept = 1 - sparsity if execution == "shrunk" else 1.0
    config = {
        "model": {"name": model},
        "method": {"family": method, "criterion": criterion, "scope": "matrix"},
        "sparsity": sparsity,
        "seed": seed,
        "benchmarks": {"tasks": ["pydoc"]},
        "dtype": "bfloat16",
        "calibration": {"source": "pydoc"} if criterion in ("wanda", "taylor_abs") else None,
    }
    return {
        "cell": f"{draw.integers(2**60):016x}", "status": "ok", "error": None, "model": model, "method": method,
        "criterion": criterion, "sparsity": sparsity, "sparsity_achieved": sparsity,
        "sparsity_all_parameters": 0.8 * sparsity, "seed": seed, "execution": execution, "dtype": "bfloat16",
        "device": "cpu", "threads": 2, "parameters": int(1e8 * kept), "nonzero_parameters": int(1e8 * (1 - sparsity)),
        "weights_bytes": int(2e8 * kept), "stored_bytes": int(2e8 * kept), "macs_per_token": int(1e8 * kept),
        "nonzero_macs_per_token": int(1e8 * (1 - sparsity)), "prefill_ms_p50": 50 / gain,
        "dense_prefill_ms_p50": 50.0, "decode_ms_per_token_p50": 20 / gain, "dense_decode_ms_per_token_p50": 20.0,
        "prefill_speedup": gain, "prefill_speedup_low": gain - 0.02, "prefill_speedup_high": gain + 0.02,
        "decode_speedup": gain, "decode_speedup_low": gain - 0.02, "decode_speedup_high": gain + 0.02,
        "tokens_per_second": 50 * gain, "peak_memory_bytes": int(4e8 * kept), "config": json.dumps(config), "schema_version": 1,
        "command": f"python -m sweep +method={method} sparsity={sparsity:g} seed={seed} 'model.path=a b'",
        "started_at": f"2026-01-01T00:00:{seed:02d}+00:00",
        "pydoc/token_perplexity": 15 * np.exp(harm**2) * (1 + noise), "pydoc/token_perplexity_stderr": np.nan,
        "capitals/acc": 0.25 + 0.55 * np.exp(-harm) + noise / 4, "capitals/acc_stderr": 0.02,
    }  # fmt: skip  # a row, read as a table: a column a line would fill two pages
