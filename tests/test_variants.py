"""What is one point, what is another, and what is compared with what: seeds, versions, fingerprints and machines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import frames
from sweep import config, identity, store
from sweep.config import Benchmarks
from sweep.report import asked, frontier, names, paired, plot, published, rendering, variants
from sweep.settings import plain
from test_config import ASKED

ONE = frames.METHODS[:1]


def one_cell(**columns: object) -> pd.DataFrame:
    """A dense row and one pruned row."""
    return frames.rows(seeds=1, methods=ONE, sparsities=(0.5,)).assign(**columns)


def two_versions() -> pd.DataFrame:
    rows = frames.twice(one_cell(measuring_version=5), measuring_version=6)
    return rows.assign(**{"pydoc/token_perplexity": [15.0, 16.0, 15.0, 19.0]})


def test_two_versions_of_a_cell_are_never_two_seeds() -> None:
    points = frontier.points(variants.with_variant(two_versions()), "sparsity", "pydoc/token_perplexity")
    pruned = points[points.method == "weight"].set_index("version")
    assert pruned.seeds.tolist() == [1, 1] and pruned.y.to_dict() == {"5": 16, "6": 19} and pruned.y_low.isna().all()
    assert sorted(names.series(points[points.method == "weight"])) == [
        "weight magnitude (version 5)",
        "weight magnitude (version 6)",
    ]
    drops = plot.drop_table(two_versions(), ["pydoc/token_perplexity"])["pydoc/token_perplexity"]
    assert sorted(drops) == pytest.approx([100 / 15, 400 / 15])  # each after the dense row of its version


def test_two_versions_of_a_stage_are_two_points_beside_one_dense_model() -> None:
    first = one_cell()
    later = first[first.method == "weight"].assign(cell="later", stage_versions='{"prune": 2}')
    points = frontier.points(pd.concat([first, later], ignore_index=True), "sparsity", "pydoc/token_perplexity")
    assert names.series(points).tolist() == ["dense", "weight magnitude", "weight magnitude (prune=2)"]
    assert frontier.dense_of(points).tolist() == [0, 0, 0] and points.seeds.tolist() == [1, 1, 1]


def with_quantised() -> pd.DataFrame:
    """A dense and a pruned row from before there were forms, and the same two quantised to int8, the pruned one by gptq too."""
    old = one_cell()
    settings = [{"name": "int8", "method": method} for method in ("rtn", "rtn", "gptq")]
    new = pd.concat([old, old[~variants.is_baseline(old)]], ignore_index=True).assign(
        cell=["a", "b", "c"], quantize="int8", started_at="2026-02-01T00:00:00"
    )
    new["config"] = [
        json.dumps(json.loads(row) | {"quantize": asked}) for row, asked in zip(new.config, settings, strict=True)
    ]
    return pd.concat([old, new], ignore_index=True)


def test_a_quantised_dense_model_is_compared_with_the_dense_one_and_is_none() -> None:
    rows = with_quantised()
    assert variants.is_baseline(rows).tolist() == [True, False, False, False, False]
    points = frontier.points(rows, "sparsity", "pydoc/token_perplexity")
    assert dict(zip(names.series(points), points.seeds, strict=True)) == {
        "dense": 1,
        "int8": 1,
        "weight magnitude": 1,
        "weight magnitude + int8": 1,
        "weight magnitude + int8 (quantize.method=gptq)": 1,
    }
    places = dict(zip(names.series(points), frontier.dense_of(points), strict=True))
    assert set(places.values()) == {list(places).index("dense")}
    dense, *others = rows.cell
    assert paired.against_dense(rows.set_index("cell")) == [(dense, other) for other in others]


def test_a_report_of_quantised_models_names_them_and_has_one_dense_line(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    with_quantised().to_parquet(tmp_path / "cells" / "0-table-made.parquet")
    rendering.report([str(tmp_path)], tmp_path / "report", rendering.Wanted(formats=("svg",)))
    table = pd.read_csv(tmp_path / "report" / "table.csv")
    assert table[table.baseline].name.tolist() == ["dense"]
    assert {"int8", "weight magnitude + int8"} <= set(table[~table.baseline].name)


def test_two_rows_of_one_seed_are_one_draw_and_the_newer_counts() -> None:
    rows = frames.twice(one_cell()).assign(**{"capitals/acc": [0.8, 0.5, 0.8, 0.25]})
    points = frontier.points(rows, "sparsity", "capitals/acc")
    assert points.seeds.tolist() == [1, 1] and sorted(points.y) == [0.25, 0.8]
    rows.loc[3, "status"] = "failed"
    assert sorted(frontier.points(rows, "sparsity", "capitals/acc").y) == [0.5, 0.8]


def test_no_figure_or_answer_of_a_report_sets_one_version_beside_another(tmp_path: Path) -> None:
    """Wanda was not measured again: its old rows would look better or worse for what has changed in measuring."""
    old = frames.rows(seeds=2, sparsities=(0.3, 0.5), methods=frames.METHODS[:2]).assign(measuring_version=4)
    new = frames.twice(old, measuring_version=6)[len(old) :]
    again = new[(new.method == "dense") | (new.criterion == "magnitude")]
    (tmp_path / "cells").mkdir()
    pd.concat([old, again], ignore_index=True).to_parquet(tmp_path / "cells" / "0-table-made.parquet")

    def reported(*filters: str) -> tuple[str, pd.DataFrame]:
        rendering.report(
            [str(tmp_path)], tmp_path / "out", rendering.Wanted(filters=filters, formats=("png",), html=False)
        )
        front = (tmp_path / "out" / "README.md").read_text()
        return front, pd.read_csv(tmp_path / "out" / "table.csv").set_index("name")

    front, table = reported()
    assert (
        "14 cells, 14 of them ok. Left out, since measuring versions are not compared: 9 of version 4; --filter measuring_version=N reports another."
        in front
    )
    assert list(table.index) == ["dense", "weight magnitude", "weight magnitude"] and "wanda" not in front
    assert (table.seeds[table.method != "dense"] == 2).all()
    front, table = reported("measuring_version=4")
    assert set(table.index) == {"dense", "weight magnitude", "weight wanda, bitmap"} and "Left out" not in front


def test_a_row_that_cannot_tell_its_version_is_the_oldest() -> None:
    rows = frames.twice(one_cell(measuring_version=np.nan), measuring_version=6)
    kept, said = frontier.newest(rows, "ask for them")
    assert kept.measuring_version.tolist() == [6, 6]
    assert said == ["Left out, since measuring versions are not compared: 2 of an unknown one; ask for them."]
    assert frontier.newest(kept, "")[1] == frontier.newest(one_cell(), "")[1] == []
    older = asked.select(rows, ["measuring_version!=6"])  # the way to ask for what has no number
    assert len(older) == 2 and frontier.newest(older, "")[0].equals(older)


def test_what_has_only_begun_to_be_measured_anew_is_still_the_earlier_version() -> None:
    kept, said = frontier.newest(two_versions()[:3], "ask for them")
    assert kept.measuring_version.tolist() == [5, 5] and "1 of version 6" in said[0]
    dense = two_versions().query("method == 'dense'")
    assert frontier.newest(dense, "")[0].measuring_version.tolist() == [6]
    assert frontier.newest(dense[:0], "")[0].empty


def test_a_default_that_changed_makes_no_other_setting() -> None:
    rows = two_versions()
    for version, shots in ((5, 0), (6, Benchmarks.num_fewshot)):
        here = rows.measuring_version == version
        rows.loc[here, "config"] = [
            json.dumps(json.loads(text) | {"benchmarks": {"tasks": ["pydoc"], "num_fewshot": shots}})
            for text in rows.config[here]
        ]
    assert (variants.with_variant(rows).setting == "").all()
    assert frontier.newest(rows, "")[0].measuring_version.tolist() == [6, 6]


def names_of_one_model() -> pd.DataFrame:
    """Three pruned cells and the one dense cell of a model that went by three names."""
    rows = frames.rows(seeds=1, methods=ONE, sparsities=(0.1, 0.3, 0.5))
    return rows.assign(model=["opt", "opt", "opt/", "/models/opt"], model_fingerprint="folder:0123456789abcdef")


def test_one_model_by_three_names_has_one_dense_row_and_one_name() -> None:
    rows = names_of_one_model()
    assert set(variants.with_variant(rows).model) == {"opt"}
    assert plot.drop_table(rows, ["capitals/acc"])["capitals/acc"].notna().sum() == 3
    assert len(paired.against_dense(rows.set_index("cell"))) == 3
    assert plot.with_counted_speedup(rows).counted_speedup.notna().all()
    for name in ("opt", "opt/", "/models/opt"):
        assert len(asked.select(rows, [f"model={name}"])) == 4


def test_a_folder_whose_content_changed_is_two_models() -> None:
    rows = frames.twice(one_cell(model_fingerprint="folder:aaaaaaaaaaaa"), model_fingerprint="folder:bbbbbbbbbbbb")
    assert sorted(set(variants.with_variant(rows).model)) == ["m (aaaaaaaa)", "m (bbbbbbbb)"]
    points = frontier.points(rows, "sparsity", "capitals/acc")
    assert (points.seeds == 1).all() and len(points) == 4
    assert len(asked.select(rows, ["model=m"])) == 4
    assert set(asked.select(rows, ["model=m (aaaaaaaa)"]).model_fingerprint) == {"folder:aaaaaaaaaaaa"}


def test_other_documents_under_one_name_are_another_setting() -> None:
    data = [json.dumps({"pydoc": mark, "calibration": text}) for mark in ("a" * 16, "b" * 16) for text in "xy"]
    rows = pd.concat([one_cell(data_fingerprints=text)[1:] for text in data], ignore_index=True)
    points = frontier.points(rows, "sparsity", "capitals/acc")
    assert (points.seeds == 1).all() and len(set(points.setting)) == 2 and set(points.variant) == {""}
    moved = [json.loads(text) for text in rows.config]  # another text to calibrate on, in a file of the same name
    rows["config"] = [json.dumps(c | {"calibration": {"source": "text.txt"}}) for c in moved]
    assert sorted(set(variants.with_variant(rows).variant)) == ["source=text.txt (x)", "source=text.txt (y)"]
    rows["data_fingerprints"] = data[0]
    rows["config"] = [json.dumps(c | {"calibration": {"source": f"{i}/text.txt"}}) for i, c in enumerate(moved)]
    assert set(variants.with_variant(rows).variant) == {""}  # one text, wherever it lies


def test_texts_are_told_by_their_sources_and_an_older_row_is_at_the_default() -> None:
    def row(**text: object) -> dict:
        return plain(
            config.parse(ASKED | {"method": {"family": "weight", "criterion": "wanda"}, "calibration": text})[0]
        )

    halves = [{"source": "pydoc"}, {"source": "self"}]
    uneven = [{"source": "pydoc", "share": 0.75}, {"source": "self", "share": 0.25, "temperature": 0.5}]
    told = {
        "source=pydoc": row(source="pydoc"),
        "packed=False, source=pydoc": row(source="pydoc", packed=False),
        "source=random": row(source="random"),
        "source=self": row(source="self"),
        "source=self, temperature=0.5": row(source="self", temperature=0.5),
        "source=50% pydoc,50% self": row(source="mix", sources=halves),
        "source=75% pydoc,25% self at 0.5": row(source="mix", sources=uneven),
    }
    older = row(source="pydoc")
    older["calibration"] = {"source": "pydoc", "sequences": 16, "length": 256, "sequential": True}
    del older["recover"]
    rows = frames.rows(seeds=1, methods=ONE, sparsities=(0.5,))[1:]
    rows = pd.concat([rows.assign(config=json.dumps(each)) for each in (*told.values(), older)], ignore_index=True)
    assert variants.with_variant(rows).variant.tolist() == [*told, "source=pydoc"]


def test_a_setting_that_no_cells_name_depends_on_parts_no_rows() -> None:
    """Else a pruned row would lack the dense row that it shares with another: see identity.FINGERPRINTED."""
    by_name = {"model.name", "benchmarks.tasks", "perplexity.source", "calibration.source", "recover.text.source"}
    prints = '{"pydoc": "a", "calibration": "b", "perplexity:x": "c", "recovery": "d"}'
    for key in identity.FINGERPRINTED:
        settings = [json.dumps({"method": {"family": "weight"}, **_nested(key, value)}) for value in ("one", "two")]
        rows = pd.concat(
            [one_cell(config=text, data_fingerprints=prints)[1:] for text in settings],
            ignore_index=True,
        )
        told = variants.with_variant(rows)
        assert key in by_name or key.startswith("model.") or key in variants._ASIDE, key
        assert set(told.setting) == set(told.variant) == {""}, key


def _nested(key: str, value: str) -> dict[str, object]:
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def test_paired_latency_is_never_pooled_over_processors() -> None:
    rows = one_cell(cpu="slow", gpu=None, dense_decode_ms_per_token_p50=40.0)
    rows = frames.twice(rows, cpu="fast", dense_decode_ms_per_token_p50=20.0, seed=1)
    rows["decode_speedup"] = [1.0, 2.0, 1.0, 2.0]
    timed = frontier.with_paired_latency(rows)
    assert timed.decode_ms_paired.tolist() == [40, 20, 20, 10]
    points = frontier.points(timed, "decode_ms_paired", "capitals/acc")
    assert (points.seeds == 1).all() and sorted(points.x) == [10, 20, 20, 40]
    assert set(points.machine) == {"cpu=slow", "cpu=fast"}
    only = pd.concat([rows[:1], rows[3:]], ignore_index=True)  # a dense cell is measured once, on one of the machines
    assert frontier.dense_of(variants.with_variant(only)).tolist() == [0, 0]


def test_older_rows_tell_their_version_by_their_name(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1] / "experiments"
    recorded = {study.parent.name: store.load(study) for study in root.glob("*/results")}
    assert all(rows.measuring_version.notna().all() for rows in recorded.values())
    row = recorded["weight_vs_neuron"].iloc[0]
    assert row.measuring_version == 4
    store.write(
        tmp_path,
        {
            "cell": row.cell,
            "status": "ok",
            "config": row.config,
            "data_fingerprints": "{}",
            "model_fingerprint": row.model_fingerprint,
        },
        {},
    )
    assert store.load(tmp_path).measuring_version.isna().all()  # other data than the name was made of


def test_published_numbers_stand_beside_one_setting_at_a_time(tmp_path: Path) -> None:
    lines = "model,method,sparsity,metric,published,source\n"
    lines += "m,dense,0,pydoc/token_perplexity,15,here\nm,weight,0.5,pydoc/token_perplexity,18,here\n"
    (tmp_path / "published.csv").write_text(lines)
    text, agrees = published.compare(two_versions(), tmp_path / "published.csv")
    assert agrees and "Left out" in text and " 19 " in text and "17.5" not in text
    text, _ = published.compare(names_of_one_model().assign(model=["opt", "m", "opt", "m"]), tmp_path / "published.csv")
    assert "not run" not in text
    apart = frames.twice(one_cell(cpu="slow"), cpu="fast", seed=1)
    text, _ = published.compare(
        apart.assign(**{"pydoc/token_perplexity": [15, 16, 15, 19]}), tmp_path / "published.csv"
    )
    assert "[cpu=slow]" in text and "[cpu=fast]" in text


def test_a_comparison_leaves_older_versions_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = pd.DataFrame({"task": "capitals", "document": ["0", "1"], "metric": "acc", "value": [1.0, 0.0]})
    for row in two_versions()[["cell", "status", "method", "config", "sparsity", "seed", "measuring_version"]].to_dict(
        "records"
    ):
        store.write(tmp_path, row, {"samples": samples})
    with caplog.at_level(logging.WARNING):
        found = paired.compare(tmp_path, ["capitals/acc"])
    assert len(found) == 1 and "2 of version 5; name their cells in pairs to compare them" in caplog.text
    old = two_versions().cell[:2]
    assert len(paired.compare(tmp_path, ["capitals/acc"], [tuple(old)])) == 1


def test_what_two_machines_timed_is_not_compared(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1, methods=ONE).assign(cpu=["slow", "slow", "slow", "fast", "fast"], gpu=None)
    (tmp_path / "cells").mkdir()
    rows.to_parquet(tmp_path / "cells" / "0-table-made.parquet")
    rendering.report(
        [str(tmp_path)], tmp_path / "out", rendering.Wanted(figures=("cost",), formats=("png",), html=False)
    )
    files = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {f"capitals-acc-against-latency-cpu-{cpu}" for cpu in ("slow", "fast")} <= files
    assert "capitals-acc-against-latency" not in files
    front = (tmp_path / "out" / "README.md").read_text()
    assert "## cpu=slow\n" in front and "## cpu=fast\n" in front and front.count("| at most | decode |") == 2
    rows["dense_decode_ms_per_token_p50"] = [40.0, 40, 40, 20, 20]
    ((_, slow), (_, fast)) = asked.by_machine(frontier.with_paired_latency(rows))
    (dense,) = fast[fast.method == "dense"].itertuples()
    assert dense.decode_ms_paired == 20 and np.isnan(dense.peak_memory_bytes) and dense.weights_bytes > 0
    assert plot.drop_table(fast, ["capitals/acc"])["capitals/acc"].notna().all()
    assert slow.decode_ms_paired.notna().all() and len(slow) == 3 and len(fast) == 3


def test_a_key_of_an_older_row_is_read_under_its_present_name() -> None:
    assert variants.flat('{"method": {"family": "weight", "head": true}}')["method.lm_head"] is True
