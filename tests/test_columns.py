"""Which way a column points: by lm-eval's word, by our own declaration, and never by what a task is called."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from sweep import advice, catalogue, columns, paired, plot, store


def test_no_task_name_turns_a_metric_around() -> None:
    tasks = [*catalogue.index(), "embedding", "pydoc"]
    assert len(tasks) > 10_000
    for name in ("acc", "acc_norm", "exact_match,strict-match", "f1", "bleu", "mcc", "acc_band_zipf5up"):
        assert [task for task in tasks if columns.is_loss(f"{task}/{name}")] == []
    for name in ("ter", "wer", "brier_score", "perplexity", "word_perplexity", "bits_per_byte", "token_perplexity",
                 "kl_from_dense", "calibration_error", "loss_band_zipf0to3", "ter,strict-match"):  # fmt: skip
        assert [task for task in tasks if not columns.is_loss(f"{task}/{name}")] == []


def test_the_table_for_older_rows_is_lm_evals_own() -> None:
    import lm_eval.api.metrics  # fills the registry
    import yaml
    from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY

    class Bare(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """YAML whose tags (`!function`) mean nothing."""

    Bare.add_multi_constructor("!", lambda loader, suffix, node: None)
    said: dict[str, list[bool]] = {name: [better] for name, better in HIGHER_IS_BETTER_REGISTRY.items()}
    for path in (Path(lm_eval.__file__).parent / "tasks").rglob("*"):
        if path.is_file() and path.suffix in (".yaml", "") and b"metric_list" in (text := path.read_bytes()):
            for metric in (yaml.load(text, Bare) or {}).get("metric_list") or []:
                if isinstance(metric.get("higher_is_better"), bool):
                    said.setdefault(str(metric["metric"]), []).append(metric["higher_is_better"])
    assert len(said) > 100
    most = {name: sum(better) * 2 >= len(better) for name, better in said.items()}
    assert {name for name, better in most.items() if not better} == columns.LM_EVAL_LOSSES
    assert [name for name, better in most.items() if columns.is_loss(f"a/{name}") == better] == []


@pytest.mark.parametrize("column", [
    "decode_ms_paired", "prefill_ms_p50", "peak_memory_bytes", "stored_bytes", "nonzero_macs_per_token", "parameters",
    "energy_joules_per_token", "prune_seconds", "prune_forward_passes"])  # fmt: skip
def test_costs_are_better_low(column: str) -> None:
    assert columns.is_loss(column)


@pytest.mark.parametrize("column", [
    "sparsity", "sparsity_all_parameters", "sparsity_block_parameters", "decode_speedup", "counted_speedup",
    "tokens_per_second", "memory_bytes_per_second", "matrix_macs_per_second", "decode_bound_reached"])  # fmt: skip
def test_gains_are_better_high(column: str) -> None:
    assert not columns.is_loss(column)


def told(better: bool) -> pd.DataFrame:
    """A dense and a pruned row of a metric that no table knows, lower for the pruned one, with lm-eval's word on it."""
    base = {"status": "ok", "model": "m", "criterion": None, "execution": "dense", "seed": 0, "cost_ms": 1.0,
            "higher_is_better": json.dumps({"perplexity_of_crashes/oddness": better})}  # fmt: skip
    return pd.DataFrame([base | {"cell": "a", "method": "dense", "sparsity": 0.0, "perplexity_of_crashes/oddness": 0.9},
                         base | {"cell": "b", "method": "weight", "sparsity": 0.5, "perplexity_of_crashes/oddness": 0.3}])  # fmt: skip


def test_what_lm_eval_said_is_read_everywhere(tmp_path: Path) -> None:
    name = "perplexity_of_crashes/oddness"
    for better, change, words in ((True, 200 / 3, "worse"), (False, -200 / 3, "better")):
        rows = told(better)
        assert columns.is_loss(name, rows) != better
        drops = plot.drop_table(rows, [name])
        assert drops[name].item() == pytest.approx(change)
        allowed = advice.cheapest_within(rows, "cost_ms", name, 0.1, relative=True)
        assert ("no pruned cell" in allowed) == better
        label = plot.sparsity_figure(rows, name).axes[0].get_ylabel()
        assert f"({'higher' if better else 'lower'} is better)" in label
        folder = tmp_path / words
        for row in rows.to_dict("records"):
            row["config"] = json.dumps({"model": "m", "benchmarks": {}})
            del row["cost_ms"]
            value = row[name]
            samples = pd.DataFrame({"task": "perplexity_of_crashes", "document": [str(i) for i in range(40)],
                                    "metric": "oddness", "value": [value + i / 1000 for i in range(40)]})  # fmt: skip
            store.write(folder, row, {"samples": samples})
        store.compact(folder)
        assert columns.is_loss(name, pd.read_parquet(folder / "cells")) != better  # kept by compaction, read by pandas
        assert paired.table(folder, [name]).verdict.tolist() == [words]
