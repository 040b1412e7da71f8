"""Which way a column points: by lm-eval's word, by our own declaration, and never by what a task is called."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import frames
from sweep import runner, store
from sweep.measuring import catalogue
from sweep.metrics import BANDS, HIGH, LM_EVAL_LOSSES, LOW, METRICS, Metric, main_metrics, pooled, record, stderr
from sweep.report import __main__, asked, frontier, overview, paired, plot
from sweep.settings import RequestError
from sweep.store import columns


def test_no_task_name_turns_a_metric_around() -> None:
    tasks = [*catalogue.index(), "embedding", "pydoc"]
    assert len(tasks) > 10_000
    for name in ("acc", "acc_norm", "exact_match,strict-match", "f1", "bleu", "mcc", "acc_band_zipf5up"):
        assert [task for task in tasks if columns.is_loss(f"{task}/{name}")] == []
    for name in (
        "ter",
        "wer",
        "brier_score",
        "perplexity",
        "word_perplexity",
        "bits_per_byte",
        "token_perplexity",
        "kl_from_dense",
        "calibration_error",
        "loss_band_zipf0to3",
        "ter,strict-match",
    ):
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
    assert {name for name, better in most.items() if not better} == LM_EVAL_LOSSES
    assert [name for name, better in most.items() if columns.is_loss(f"a/{name}") == better] == []


DECLARED = {**columns.COLUMNS, **columns.MADE}
COSTS = {"bits", "bytes", "seconds", "milliseconds", "joules", "MACs", "parameters", "passes"}


@pytest.mark.parametrize("column", DECLARED.values(), ids=DECLARED)
def test_a_column_says_what_it_is(column: columns.Column) -> None:
    assert column.kind in (columns.ASKED, columns.COUNTED, columns.MEASURED, columns.ORIGIN) and column.meaning
    assert (column.better == LOW) == (column.unit in COSTS) == columns.is_loss(column.name)
    assert column.kind != columns.MEASURED or columns.is_measured(column.name)
    for ending, unit in columns._ENDINGS.items():  # the unit that a name ends in is the one that is meant
        assert not column.name.endswith(ending) or column.unit == unit


def test_what_is_typed_after_x_means_one_column() -> None:
    assert asked.AXES["latency"] == "decode_ms_paired" and asked.AXES["sparsity"] == "sparsity"
    assert len(asked.AXES) == len([column for column in DECLARED.values() if column.short])


@pytest.mark.parametrize(
    ("column", "label", "scale"),
    [
        ("peak_memory_bytes", "peak resident memory (MB)", 1e6),
        ("kv_cache_bytes", "kv cache (MB)", 1e6),
        ("macs_per_token", "MACs per token (millions, counted)", 1e6),
        ("decode_macs_per_byte", "decode macs per byte", 1),
        ("prune_seconds", "prune seconds", 1),
        ("of_the_readers_own_bytes", "of the readers own (MB)", 1e6),
        ("of_the_readers_own", "of the readers own", 1),
        ("gsm8k/exact_match,strict-match", "exact match (strict-match), GSM8K", 1),
        ("continents/f1_macro", "macro F1, continents", 1),
        ("pydoc/loss_band_zipf0to3", "loss band zipf0to3, Python reference", 1),
    ],
)
def test_an_axis_has_its_unit(column: str, label: str, scale: float) -> None:
    assert (columns.label(column), columns.scale(column)) == (label, scale)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_of_ours_points_as_it_says(metric: Metric) -> None:
    assert metric.better in (LOW, HIGH, None) and bool(metric.meaning) != metric.by_lm_eval
    for band in BANDS:
        name = metric.name.format(band=band, range="128to256")
        column = f"task/{name},some-filter"
        assert record(column) is metric
        assert columns.is_loss(column) == (metric.better == LOW)
    assert not metric.by_lm_eval or metric.name in LM_EVAL_LOSSES


def test_a_pooled_metric_is_the_mean_that_comparisons_take() -> None:
    outcomes = pd.DataFrame({"kl_from_dense": [1.0, 8.0, 2.0], "tokens": [10.0, 20.0, 30.0]})
    found = pooled(outcomes.to_dict("records"))
    assert found["kl_from_dense"] == pytest.approx(11 / 60) == paired.estimate(outcomes, "kl_from_dense").value
    residuals = paired.estimate(outcomes, "kl_from_dense").residuals
    assert found["kl_from_dense_stderr"] == pytest.approx((3 / 2 * (residuals**2).sum()) ** 0.5)
    assert pooled([{"kl_from_dense": 1.0, "tokens": 2.0}]) == {"kl_from_dense": 0.5, "kl_from_dense_stderr": None}
    assert pooled([{"tokens": 2.0}]) == {}


def told(better: bool) -> pd.DataFrame:
    """A dense and a pruned row of a metric that no table knows, lower for the pruned one, with lm-eval's word on it."""
    base = {
        "status": "ok",
        "model": "m",
        "criterion": None,
        "execution": "dense",
        "seed": 0,
        "cost_ms": 1.0,
        "higher_is_better": json.dumps({"perplexity_of_crashes/oddness": better}),
    }
    return pd.DataFrame(
        [
            base | {"cell": "a", "method": "dense", "sparsity": 0.0, "perplexity_of_crashes/oddness": 0.9},
            base | {"cell": "b", "method": "weight", "sparsity": 0.5, "perplexity_of_crashes/oddness": 0.3},
        ]
    )


def test_what_lm_eval_said_is_read_everywhere(tmp_path: Path) -> None:
    name = "perplexity_of_crashes/oddness"
    for better, change, words in ((True, 200 / 3, "worse"), (False, -200 / 3, "better")):
        rows = told(better)
        assert columns.is_loss(name, rows) != better
        drops = plot.drop_table(rows, [name])
        assert drops[name].item() == pytest.approx(change)
        kept = overview.with_kept(frontier.with_words(rows), [name]).quality_kept
        assert kept.tolist() == pytest.approx([1, 1 / 3 if better else 3])
        label = plot.sparsity_figure(rows, name).axes[0].get_ylabel()
        assert f"({'higher' if better else 'lower'} is better)" in label
        folder = tmp_path / words
        for row in rows.to_dict("records"):
            row["config"] = json.dumps({"model": "m", "benchmarks": {}})
            del row["cost_ms"]
            value = row[name]
            samples = pd.DataFrame(
                {
                    "task": "perplexity_of_crashes",
                    "document": [str(i) for i in range(40)],
                    "metric": "oddness",
                    "value": [value + i / 1000 for i in range(40)],
                }
            )
            store.write(folder, row, {"samples": samples})
        store.compact(folder)
        assert columns.is_loss(name, pd.read_parquet(folder / "cells")) != better  # kept by compaction, read by pandas
        assert paired.compare(folder, [name]).verdict.tolist() == [words]


STRICT, FLEXIBLE = (f"gsm8k/exact_match,{name}" for name in ("strict-match", "flexible-extract"))


def filtered(seeds: int = 1) -> pd.DataFrame:
    """Rows of a task with two answer filters, which disagree: strict falls, flexible rises."""
    rows = frames.rows(seeds=seeds, methods=frames.METHODS[:1], sparsities=(0.5,))
    rows = rows[[c for c in rows if "/" not in c]]
    for name, values in ((STRICT, [0.4, 0.1]), (FLEXIBLE, [0.3, 0.5])):
        rows[name], rows[stderr(name)] = values, 0.02
    return rows


def measured(rows: pd.DataFrame) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if pd.notna(value)} for row in rows.to_dict("records")]


def written(path: Path, rows: pd.DataFrame, names: tuple[str, str]) -> str:
    """A results folder of the rows, with samples in which the two filters' metrics have these names."""
    for row in measured(rows):
        here = [
            (name, i, i < 100 * row[column])
            for name, column in zip(names, (STRICT, FLEXIBLE), strict=True)
            for i in range(100)
        ]
        samples = pd.DataFrame(
            [("gsm8k", str(i), name, float(right)) for name, i, right in here],
            columns=["task", "document", "metric", "value"],
        )
        store.write(path, row, {"samples": samples})
    return str(path)


def test_an_answer_filter_is_part_of_a_metric_in_every_door(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert stderr(STRICT) == "gsm8k/exact_match_stderr,strict-match"
    place = written(tmp_path / "rows", filtered(), ("exact_match,strict-match", "exact_match,flexible-extract"))
    __main__.main([place, "--formats", "png", "--figures", "flips"])
    files = {path.stem for path in (tmp_path / "rows" / "report").iterdir()}
    assert {
        "gsm8k-exact_match-strict-match-against-sparsity",
        "gsm8k-exact_match-flexible-extract-against-sparsity",
        "gsm8k-exact_match-strict-match-flips",
        "gsm8k-exact_match-flexible-extract-flips",
    } <= files
    table = pd.read_csv(tmp_path / "rows" / "report" / "table.csv")
    assert table[f"{STRICT}_high"].tolist() == pytest.approx([0.4392, 0.1392])  # its own standard error
    page = (tmp_path / "rows" / "report" / "report.html").read_text()
    assert f'"errors":{{"{STRICT}":"{stderr(STRICT)}"' in page
    __main__.main(
        [
            place,
            "--out",
            str(tmp_path / "one"),
            "--y",
            f"{STRICT},{FLEXIBLE}",
            "--filter",
            f"{STRICT}>=0.1",
            "--formats",
            "png",
            "--no-html",
        ]
    )
    assert "exact match (strict-match), GSM8K" in (tmp_path / "one" / "table.md").read_text()
    found = paired.compare(place, [STRICT, FLEXIBLE]).set_index("metric")
    assert found.difference.to_dict() == pytest.approx({STRICT: -0.3, FLEXIBLE: 0.2})
    assert found.verdict.to_dict() == {STRICT: "worse", FLEXIBLE: "better"} and found.lost[STRICT] == 30
    (row,) = [row for row in measured(store.load(place)) if row["method"] == "weight"]
    row |= {"cell_seconds": 1.0, "decode_speedup": None}
    assert runner.headline(row).startswith(f"{STRICT} 0.1, {FLEXIBLE} 0.5")
    assert {STRICT, FLEXIBLE} <= set(runner.lines_of([row])[0]) and "gsm8k/" in runner.listing([row])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        __main__.main([place, "--y", "gsm8k/exact_match"])
    assert f"It is there under each of its answer filters. Among them: {STRICT}, {FLEXIBLE}" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["calibration", "recovery", "weight_criteria"])
def test_no_two_cells_of_a_study_are_the_same_line_at_the_end_of_a_sweep(study: str) -> None:
    rows = [
        {name: value for name, value in row.items() if value == value}  # as a sweep reads them: without NaN
        for row in store.load(Path(__file__).parents[1] / "experiments" / study / "results").to_dict("records")
    ]
    lines = runner.lines_of(rows)
    cells = [(line["recipe"], line["seed"]) for line in lines]
    assert len(set(cells)) == len(cells) == len(rows)
    assert cells[0][0].startswith("dense")
    recipes = [recipe for recipe, _ in cells if not recipe.startswith("dense")]
    together = [recipe for place, recipe in enumerate(recipes) if place == 0 or recipes[place - 1] != recipe]
    assert len(set(together)) == len(together), "seeds of one recipe stand apart"


@pytest.mark.parametrize("study", ["calibration", "generation", "prune_or_quantise", "recovery", "weight_criteria"])
def test_the_list_at_the_end_of_a_sweep_fits_a_terminal(study: str) -> None:
    rows = [
        {name: value for name, value in row.items() if value == value}
        for row in store.load(Path(__file__).parents[1] / "experiments" / study / "results").to_dict("records")
    ]
    said = runner.listing(rows)
    assert max(map(len, said.splitlines())) <= runner.WIDTH
    metrics = {name for line in runner.lines_of(rows) for name in line if "/" in name}
    assert all(
        name in said or f"{name.partition('/')[0]}/" in said for name in metrics
    )  # in the table, or named below it


def test_no_rows_are_no_table() -> None:
    assert runner.listing([]) == ""


def test_samples_from_before_filters_were_named_are_read_as_far_as_they_are_clear(tmp_path: Path) -> None:
    both = written(tmp_path / "both", filtered(), ("exact_match", "exact_match"))
    with pytest.raises(
        RequestError, match="have no exact_match,strict-match. Older versions wrote answers under several filters"
    ):
        paired.compare(both, [STRICT])
    one = filtered().drop(columns=[FLEXIBLE, stderr(FLEXIBLE)])
    for row in measured(one):
        samples = pd.DataFrame(
            {
                "task": "gsm8k",
                "document": [str(i) for i in range(100)],
                "metric": "exact_match",
                "value": [float(i < 100 * row[STRICT]) for i in range(100)],
            }
        )
        store.write(tmp_path / "one", row, {"samples": samples})
    assert paired.compare(tmp_path / "one", [STRICT]).difference.item() == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("found", "first"),
    [
        (["a/acc_norm", "a/acc", "a/acc_stderr", "a/f1"], ["a/acc"]),
        (["a/bleu", "a/ter", "a/bleu_stderr"], ["a/bleu"]),
        (["a/word_perplexity", "a/token_perplexity"], ["a/token_perplexity"]),
        (["a/rows_band_no_word", "b/kl_from_dense"], []),
        (["a/wer_stderr,x", "a/wer,x", "a/wer,y"], ["a/wer,x", "a/wer,y"]),
    ],
)
def test_the_metric_that_is_read_first(found: list[str], first: list[str]) -> None:
    assert main_metrics(found) == first
