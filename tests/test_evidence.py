"""What is marked as better or within noise is told by the documents that both answered, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import frames
from sweep.report import frontier, overview, plot, rendering, summary, variants
from sweep.report.evidence import NOTHING, Evidence

PAGES, METRIC, COST = 17, "pydoc/token_perplexity", "decode_ms_paired"


def cells(added: dict[str, float], noise: float = 0.01, seeds: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(numbered rows, samples) of a dense cell and of criteria at one sparsity, by how many nats each adds to the loss.

    Pages differ by much more than cells do, so that the cells' own intervals all overlap.
    """
    methods = tuple(("weight", criterion, "dense") for criterion in added)
    rows = frames.rows(seeds=seeds, sparsities=(0.5,), methods=methods)
    draw = np.random.default_rng(0)
    tokens = np.round(300 * np.exp(draw.normal(0, 0.8, PAGES)))
    hard = draw.normal(3, 0.8, PAGES)
    samples = []
    for i, row in rows.iterrows():
        losses = hard + added.get(row.criterion, 0.0) + draw.normal(0, noise, PAGES)
        outcomes = pd.DataFrame({"log_likelihood": -losses * tokens, "tokens": tokens})
        outcomes["acc"] = (hard + 3 * added.get(row.criterion, 0.0) < 3.5).astype(float)
        long = outcomes.melt(var_name="metric", ignore_index=False).rename_axis("document").reset_index()
        samples.append(long.assign(cell=row.cell, task="pydoc", document=long.document.astype(str)))
        mean = (losses * tokens).sum() / tokens.sum()
        rows.loc[i, [METRIC, f"{METRIC}_stderr"]] = np.exp(mean), np.exp(mean) * 0.2
        rows.loc[i, ["pydoc/acc", "pydoc/acc_stderr"]] = outcomes.acc.mean(), 0.1
    ready = frontier.numbered(frontier.with_paired_latency(variants.with_variant(rows)))
    return ready, pd.concat(samples, ignore_index=True)


def marked(rows: pd.DataFrame, evidence: Evidence) -> dict[str, str]:
    table = summary.lines(rows, [METRIC], [])
    return dict(zip(table.criterion, summary.marks(table, METRIC, loss=True, evidence=evidence), strict=True))


def test_what_overlaps_may_differ_on_every_page() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15, "c": 0.1005})
    by_intervals, by_documents = marked(rows, NOTHING), marked(rows, Evidence(rows, samples))
    assert by_intervals["b"] == by_intervals["c"] == "within noise"
    assert by_documents["a"] == "best" and by_documents["b"] == "" and by_documents["c"] == "within noise"


def test_seeds_that_scatter_deny_what_documents_say() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15}, seeds=3)
    assert marked(rows, Evidence(rows, samples))["b"] == ""
    points = frontier.points(rows, "sparsity", METRIC)  # the dense one's interval over documents is no scatter
    places = np.flatnonzero(points.method != "dense")
    assert (Evidence(rows, samples).p_values(points, places, np.zeros(2, dtype=int), METRIC) < 0.05).all()
    assert (NOTHING.p_values(points, places, np.zeros(2, dtype=int), METRIC) > 0.05).all()
    scattered = rows.copy()
    scattered.loc[rows.criterion == "b", METRIC] += [-9.0, 0.0, 9.0]
    assert marked(scattered, Evidence(rows, samples))["b"] == "within noise"


def test_a_ruined_model_is_not_within_noise_of_dense_since_its_seeds_scatter() -> None:
    rows, samples = cells({"a": 6.0}, seeds=3)
    rows.loc[rows.criterion == "a", METRIC] = [5_762.0, 8_089.0, 12_893.0]
    points = frontier.points(rows, "sparsity", METRIC)
    ruined, dense = (np.flatnonzero(points.method == method) for method in ("weight", "dense"))
    for evidence in (NOTHING, Evidence(rows, samples)):
        assert evidence.p_values(points, ruined, dense, METRIC) < 0.05


def test_a_metric_without_interval_or_documents_is_told_from_nothing() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15})
    rows[f"{METRIC}_stderr"] = np.nan
    found = marked(rows, NOTHING)
    assert found["a"] == "best" and found["b"] == "within noise"
    assert marked(rows, Evidence(rows, samples))["b"] == ""
    points = frontier.points(rows, "weights_bytes", METRIC)  # what is counted needs no interval
    one, other = (np.flatnonzero(points.criterion == name) for name in "ab")
    assert NOTHING.p_values(points, one, other, METRIC) == 1
    counted = frontier.points(rows, "sparsity", "macs_per_token")
    pruned, dense = (np.flatnonzero((counted.method == "dense") == is_dense)[:1] for is_dense in (False, True))
    counted.loc[pruned, "y"] /= 2
    assert NOTHING.p_values(counted, pruned, dense, "macs_per_token") == 0


def test_a_cell_without_documents_is_compared_by_its_interval() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15, "c": 2.0})
    lacking = samples[~samples.cell.isin(rows.cell[rows.criterion != "a"])]
    found = marked(rows, Evidence(rows, lacking))
    assert found["b"] == "within noise" and found["c"] == ""
    fewer = samples[(samples.cell != rows.cell[rows.criterion == "b"].item()) | (samples.document != "0")]
    assert marked(rows, Evidence(rows, fewer))["b"] == "within noise"  # not the same documents


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_unpaired_comparison_is_welchs(scale: float) -> None:
    from scipy.stats import ttest_ind

    draw = np.random.default_rng(0)
    rows = frames.rows(seeds=4, sparsities=(0.5,), methods=frames.METHODS[:2])
    rows["capitals/acc"] = scale * draw.normal(0.5, 0.1, len(rows))
    points = frontier.points(variants.with_variant(rows), "sparsity", "capitals/acc")
    places = np.flatnonzero(points.method != "dense")
    found = NOTHING.p_values(points, places[:1], places[1:], "capitals/acc")
    values = [rows.loc[rows.criterion == criterion, "capitals/acc"] for criterion in ("magnitude", "wanda")]
    assert found[0] == pytest.approx(ttest_ind(*values, equal_var=False).pvalue)


def test_points_of_the_frontier_are_told_apart_by_their_documents() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15, "c": 0.1005})
    at = {"a": 3.0, "b": 2.0, "c": 4.0}  # what each costs: a, b and the dense one are on the frontier
    rows["cost_ms"] = rows.criterion.map(at).fillna(10.0)

    def standings(evidence: Evidence) -> dict[str, str]:
        points = frontier.points(rows, "cost_ms", METRIC)
        found = frontier.membership(points, x_is_loss=True, y_is_loss=True, differ=evidence.differ(points, METRIC))
        return dict(zip(points.criterion.fillna("dense"), found, strict=True))

    assert standings(Evidence(rows, samples)) == {"dense": "on", "a": "on", "b": "on", "c": "within noise"}
    assert standings(NOTHING) == {"dense": "within noise", "a": "within noise", "b": "on", "c": "within noise"}
    rows.loc[rows.criterion == "c", "cost_ms"] = 2.5  # cheaper than a, and as good: a is there by chance
    assert standings(Evidence(rows, samples))["a"] == "within noise"
    rows.loc[rows.criterion == "b", "cost_ms"] = 3.5  # dearer than a and worse on every page
    assert standings(Evidence(rows, samples))["b"] == "off" and standings(NOTHING)["b"] == "within noise"


def test_a_figure_is_hollow_where_documents_say_so_and_names_what_its_bars_are_over() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.0005})

    def hollow(evidence: Evidence) -> int:
        axes = plot.sparsity_figure(rows, METRIC, evidence=evidence).axes[0]
        return sum(len(line.get_xdata()) for line in axes.lines if line.get_markerfacecolor() == "white")

    assert hollow(NOTHING) == 2 and hollow(Evidence(rows, samples)) == 1

    def words(figure: object) -> set[str]:
        return {text.get_text() for text in figure.legends[0].get_texts()}  # type: ignore[attr-defined]

    assert "95 % over documents" in words(plot.sparsity_figure(rows, METRIC))
    seeds, _ = cells({"a": 0.10}, seeds=3)
    assert {"95 % over seeds", "95 % over documents", "95 % over repeats"} <= words(
        plot.cost_figure(seeds, COST, METRIC)
    )
    plain = rows.drop(columns=f"{METRIC}_stderr")
    assert not any(text.startswith("95 %") for text in words(plot.sparsity_figure(plain, METRIC)))
    pruned = plain.method != "dense"  # the dense model's own interval has no length: it is what others are divided by
    plain.loc[pruned, [f"{COST}_low", f"{COST}_high"]] = np.nan
    assert not any(text.startswith("95 %") for text in words(plot.cost_figure(plain, COST, METRIC)))


def test_what_is_kept_is_known_better_by_the_documents_that_both_answered() -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15})
    found, vague = (overview.overview(rows, [METRIC], known) for known in (Evidence(rows, samples), NOTHING))
    assert found is not None and vague is not None
    kept, apart = found.points.set_index("criterion"), vague.points.set_index("criterion")
    assert kept.kept["a"] == pytest.approx(np.exp(-0.10), rel=0.02)
    width = kept.kept_high - kept.kept_low
    assert width["b"] < 0.05 < (apart.kept_high - apart.kept_low)["b"]
    assert kept.kept_high["b"] < kept.kept_low["a"] and apart.kept_high["b"] > apart.kept_low["a"]


def test_a_report_says_by_what_it_marks_and_what_its_intervals_are_over(tmp_path: Path) -> None:
    rows, samples = cells({"a": 0.10, "b": 0.15, "c": 0.1005})
    for name in ("cells", "samples"):
        (tmp_path / name).mkdir()
    frames_rows = rows.drop(columns=["point", "variant", "setting", "version", "machine"])
    frames_rows.to_parquet(tmp_path / "cells" / "0-table-made.parquet")
    for cell, outcomes in samples.groupby("cell"):
        outcomes.drop(columns="cell").to_parquet(tmp_path / "samples" / f"{cell}.parquet")
    out = tmp_path / "report"
    rendering.report([str(tmp_path)], out, rendering.Wanted(y=(METRIC,), x=("latency",), formats=("svg",), html=False))
    lines = [line.split("|") for line in (out / "table.md").read_text().splitlines() if "| 0.5 |" in line]
    table = {line[1].strip(): line[4] for line in lines}
    assert "**" in table["weight a"] and "~" not in table["weight b"] and "~" in table["weight c"]
    for file in ("table.md", "README.md", "table.tex"):
        text = (out / file).read_text().replace("\\_", "_").replace("\\%", "%")
        assert (
            "Told by the documents that both answered for perplexity, Python reference, else by their intervals."
            in text
        )
        assert (
            "half a 95 % interval, over documents for perplexity, Python reference; over repeats for decode latency"
            in text
        )
    saved = pd.read_csv(out / "table.csv")
    assert set(saved[f"{METRIC}_over"]) == {"documents"} and "point" not in saved
    assert "95 % over documents" in (out / "pydoc-token_perplexity-against-sparsity.svg").read_text()
