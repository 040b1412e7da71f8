"""The report from synthetic rows: what is drawn, what is said, and what is refused."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import frames
from sweep.report import (
    __main__,
    asked,
    drawing,
    frontier,
    names,
    paired,
    plot,
    published,
    rendering,
    summary,
    variants,
)
from sweep.settings import RequestError


def folder(path: Path, rows: pd.DataFrame) -> str:
    (path / "cells").mkdir(parents=True)
    rows.to_parquet(path / "cells" / "0-table-made.parquet")
    return str(path)


def ready(rows: pd.DataFrame) -> pd.DataFrame:
    return frontier.with_paired_latency(variants.with_variant(rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on rows of which two failed."""
    place = tmp_path_factory.mktemp("results")
    rendering.report([folder(place, frames.rows(failed=2))], place / "report", rendering.Wanted(figures=("all",)))
    return place / "report"


def test_a_report_is_a_folder_of_figures_tables_and_a_page(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    for figure in (
        "pydoc-token_perplexity-against-latency",
        "capitals-acc-against-memory",
        "capitals-acc-against-sparsity",
        "capitals-acc-against-stored",
        "capitals-acc-against-macs",
        "overview",
        "decode-speedup-against-sparsity",
        "drop-by-benchmark",
    ):
        assert {f"{figure}.png", f"{figure}.svg", f"{figure}.pdf"} <= names
    assert {"table.md", "table.csv", "table.tex", "README.md", "report.html"} <= names
    assert "against-energy" not in "".join(names)  # the rows hold none


def test_failed_cells_are_listed_and_never_plotted(made: Path) -> None:
    front = (made / "README.md").read_text()
    assert "37 cells, 35 of them ok" in front
    assert front.count("out_of_memory: MemoryError") == 2
    table = pd.read_csv(made / "table.csv").set_index(["name", "sparsity"])
    assert table.seeds["neuron taylor_abs", 0.7] == 1 and table.seeds["neuron taylor_abs", 0.5] == 3
    assert (table["capitals/acc"] > 0).all()


@pytest.mark.parametrize("worst", [25.0, 466.0, 2.76e5, 3.3e9])
def test_the_whole_label_stands_in_the_figure_however_far_a_perplexity_explodes(worst: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = frames.rows()
    rows.loc[rows.index[-1], "pydoc/token_perplexity"] = worst
    figure = plot.cost_figure(ready(rows), "decode_ms_paired", "pydoc/token_perplexity")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.axes[0].yaxis.label.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0


def test_figures_of_equal_rows_are_equal_files(tmp_path: Path) -> None:
    rows = ready(frames.rows())
    for name in ("a", "b"):
        drawing.save(plot.cost_figure(rows, "decode_ms_paired", "capitals/acc"), tmp_path / name)
    for suffix in drawing.FORMATS:
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_a_figure_is_a_column_wide_and_its_axes_survive_a_long_legend() -> None:
    methods = tuple(("weight", f"criterion_{i}", "dense") for i in range(12))
    small = plot.cost_figure(ready(frames.rows()), "decode_ms_paired", "capitals/acc")
    large = plot.cost_figure(ready(frames.rows(methods=methods)), "decode_ms_paired", "capitals/acc")
    heights = [f.get_size_inches()[1] * f.axes[0].get_position().height for f in (small, large)]
    assert heights[0] == pytest.approx(heights[1])
    assert large.get_size_inches()[0] == small.get_size_inches()[0] == drawing.WIDTHS["column"]


def test_every_method_has_its_own_mark_and_colour() -> None:
    figure = plot.sparsity_figure(ready(frames.rows()), "capitals/acc")
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    methods = [lines[name] for name in ("weight magnitude", "weight wanda, bitmap", "neuron taylor_abs")]
    assert len({line.get_marker() for line in methods}) == len({line.get_color() for line in methods}) == 3
    assert len({line.get_linestyle() for line in methods}) == 3
    assert "dense" in lines


def test_points_within_noise_are_hollow() -> None:
    points = pd.DataFrame(
        {
            "x": [1.0, 2, 3],
            "y": [10.0, 5.0, 5.1],
            "x_low": np.nan,
            "x_high": np.nan,
            "y_low": [9.9, 4.9, 4.8],
            "y_high": [10.1, 5.1, 5.4],
        }
    )
    assert frontier.membership(points, x_is_loss=True, y_is_loss=True).tolist() == ["on", "on", "within noise"]
    assert frontier.membership(points.assign(y_low=[9.9, 4.9, 5.05]), x_is_loss=True, y_is_loss=True).tolist() == [
        "on",
        "on",
        "off",
    ]
    rows = ready(frames.rows(seeds=1))
    rows["capitals/acc_stderr"] = 0.5  # everything is within noise of dense
    axes = plot.sparsity_figure(rows, "capitals/acc").axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert sum(len(line.get_xdata()) for line in hollow) == (rows.method != "dense").sum()


def test_rows_that_differ_in_a_setting_are_two_methods_and_not_two_seeds() -> None:
    rows = frames.rows(seeds=1, methods=frames.METHODS[:1])
    other = rows.assign(config=[text.replace('"matrix"', '"global"') for text in rows.config])
    both = variants.with_variant(pd.concat([rows, other[other.method != "dense"]], ignore_index=True))
    points = frontier.points(both, "sparsity", "capitals/acc")
    assert (points.seeds == 1).all() and (points.setting == "").all()
    assert (
        variants.with_variant(frames.rows()).setting == ""
    ).all()  # a dense row reads no calibration text: no matter
    assert set(names.series(points[points.method == "weight"])) == {
        "weight magnitude",
        "weight magnitude (scope=global)",
    }


def test_rows_measured_differently_are_compared_with_their_own_dense_row() -> None:
    rows = frames.rows(seeds=1, methods=frames.METHODS[:1], sparsities=(0.5,))
    longer = rows.assign(config=[text.replace('["pydoc"]', '["pydoc"], "limit": 3') for text in rows.config])
    longer["capitals/acc"] = [0.5, 0.25]
    drops = plot.drop_table(variants.with_variant(pd.concat([rows, longer], ignore_index=True)), ["capitals/acc"])
    assert drops.loc["weight magnitude [limit=3]", "capitals/acc"].item() == pytest.approx(50)


def test_the_table_of_drops_is_signed_so_that_positive_is_worse() -> None:
    rows = ready(frames.rows(seeds=1))
    drops = plot.drop_table(rows, ["capitals/acc", "pydoc/token_perplexity"])
    dense, pruned = (
        rows[rows.method == "dense"].iloc[0],
        rows[(rows.criterion == "wanda") & (rows.sparsity == 0.3)].iloc[0],
    )
    line = drops.loc[("weight wanda, bitmap", 0.3)]
    assert line["capitals/acc"] == pytest.approx(100 * (1 - pruned["capitals/acc"] / dense["capitals/acc"]))
    ratio = pruned["pydoc/token_perplexity"] / dense["pydoc/token_perplexity"]
    assert line["pydoc/token_perplexity"] == pytest.approx(100 * (ratio - 1))


def test_counted_speedup_stands_beside_the_measured_one() -> None:
    rows = plot.with_counted_speedup(frames.rows(seeds=1))
    assert rows.counted_speedup[rows.sparsity == 0.5].tolist() == pytest.approx([2.0, 2.0, 2.0], rel=1e-6)
    figure = plot.speedup_figure(ready(rows))
    assert "counted" in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def simple(**columns: object) -> pd.DataFrame:
    base = {
        "cell": "c",
        "status": "ok",
        "model": "m",
        "method": "weight",
        "criterion": "a",
        "execution": "dense",
        "seed": 0,
        "variant": "",
        "setting": "",
    }
    frame = pd.DataFrame(base | columns)
    frame.loc[frame.sparsity == 0, ["method", "criterion"]] = ["dense", None]
    return frame


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_best_is_bold_and_what_is_within_noise_of_it_is_marked() -> None:
    rows = simple(
        sparsity=[0.0, 0.5, 0.5, 0.5], criterion=[None, "a_b", "c", "d"], acc=[0.8, 0.7, 0.69, 0.4], acc_stderr=0.02
    )
    table = summary.lines(rows, ["acc"], [])
    marked = {"acc": summary.marks(table, "acc", loss=False)}
    text = summary.markdown(table, marked)
    assert "| weight a_b | 0.5 | 1 | **0.700 ± 0.0392** |" in text
    assert "| weight c | 0.5 | 1 | 0.690 ± 0.0392 ~ |" in text and "0.400 ± 0.0392 |" in text
    tex = summary.latex(table, marked, "50 % & more")
    assert r"weight a\_b & 0.5 & \textbf{$0.700 \pm 0.0392$} \\" in tex and r"$^\dagger$" in tex
    assert r"\toprule" in tex and r"50 \% \& more" in tex


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"),
        (1.0, "1.00"),
        (15.16, "15.2"),
        (351.0, "351"),
        (48419.0, "48,419"),
        (2.76e8, "2.76e+08"),
        (-0.0123, "-0.0123"),
        (float("inf"), "inf"),
        (float("nan"), ""),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert names.number(value) == text


# -- requests ---------------------------------------------------------------------------------------------------------


def test_filters_keep_the_dense_row() -> None:
    rows = frames.rows()
    kept = asked.select(rows, ["criterion=wanda,taylor_abs", "sparsity<=0.3"])
    assert set(kept.method) == {"dense", "weight", "neuron"} and kept.sparsity.max() == 0.3
    assert set(asked.select(rows, ["criterion!=wanda"]).criterion.dropna()) == {"magnitude", "taylor_abs"}


def test_several_folders_are_one_and_a_cell_counts_once(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1)
    failed = rows.assign(status="failed", error="x")
    found = asked.read([folder(tmp_path / "a", rows[:5]), folder(tmp_path / "b", pd.concat([failed[3:5], rows[5:]]))])
    assert len(found) == len(rows) and (found.status == "ok").all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--x", "latenzy"], "--x latenzy: the rows have no such column. Did you mean 'latency'?"),
        (["--x", "device_memory"], "--x device_memory: no row has a value of peak_device_memory_bytes"),
        (["--y", "capitals/f1"], "Among them: pydoc/token_perplexity, capitals/acc"),
        (["--filter", "methodweight"], "must be COLUMN=VALUE"),
        (["--filter", "mehtod=weight"], "Did you mean 'method'?"),
        (["--filter", "sparsity=half"], "sparsity is a number, got 'half'"),
        (["--filter", "method=head"], "leaves no pruned row"),
        (["--facet", "colour"], "--facet colour: the rows have no such column"),
        (["--max-drop", "two"], "--max-drop must be a share such as 2% or 0.02; got 'two'"),
        (["--figures", "flip"], "--figures must be among overview, benchmark"),
        (["--figures", "flip"], "got 'flip'. Did you mean 'flips'?"),
        (["--max-bytes", "3 apples"], "--max-bytes must be a size such as 12GiB, 800MB"),
        (["--against", "nowhere.csv"], "--against: there is no file nowhere.csv"),
    ],
)
def test_a_wrong_request_is_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = folder(tmp_path / "rows", frames.rows(seeds=1))
    with pytest.raises(SystemExit) as stop:
        __main__.main([place, *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("sweep: ") and len(printed.splitlines()) == 1
    assert not (tmp_path / "rows" / "report").exists()


def test_all_failed_is_said(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1).assign(status="failed")
    with pytest.raises(RequestError, match="none of the 13 rows is ok"):
        rendering.report([folder(tmp_path, rows)], tmp_path / "out")


def test_flags_choose_what_is_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = folder(tmp_path / "rows", frames.rows(seeds=1))
    __main__.main(
        [
            place,
            "--out",
            str(tmp_path / "out"),
            "--x",
            "weights",
            "--y",
            "capitals/acc",
            "--facet",
            "method",
            "--max-ms",
            "18",
            "--max-bytes",
            "350MB",
            "--no-html",
            "--width",
            "page",
        ]
    )
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"capitals-acc-against-weights-method-weight", "capitals-acc-against-weights-method-neuron"} <= names
    assert not any("latency" in name or "pydoc" in name for name in names)
    assert not (tmp_path / "out" / "report.html").exists()
    said = capsys.readouterr().out
    assert "method=neuron" in said and said.count("18 ms a") == 2 and "350" in said


# -- published numbers ------------------------------------------------------------------------------------------------


def csv_of(path: Path, *lines: tuple) -> Path:
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows(
            [("model", "method", "criterion", "sparsity", "method.scope", "metric", "published", "source"), *lines]
        )
    return path


def test_published_numbers_stand_beside_ours_and_dense_comes_first(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1, methods=frames.METHODS[:1])
    dense = rows["capitals/acc"][0]
    path = csv_of(
        tmp_path / "p.csv",
        ("m", "dense", "", 0, "", "capitals/acc", round(dense, 3), "paper"),
        ("m", "weight", "magnitude", 0.5, "matrix", "capitals/acc", 0.4, "paper"),
        ("m", "weight", "magnitude", 0.5, "global", "capitals/acc", 0.4, "paper"),
    )
    text, agrees = published.compare(rows, path)
    assert agrees and text.splitlines()[0].endswith("agrees")
    ours = rows["capitals/acc"][rows.sparsity == 0.5].item()
    matrix, global_ = (line for line in text.splitlines() if "weight magnitude" in line)
    assert f"{ours:.4g}" in matrix and "not run" in global_
    off = csv_of(tmp_path / "q.csv", ("m", "dense", "", 0, "", "capitals/acc", dense * 1.07, "paper"))
    text, agrees = published.compare(rows, off)
    assert not agrees and "PROTOCOL DIFFERS" in text.splitlines()[0]
    text, agrees = published.compare(
        rows, csv_of(tmp_path / "r.csv", ("big", "dense", "", 0, "", "capitals/acc", 1, "p"))
    )
    assert agrees and "has not been measured" in text


def test_a_setting_that_a_published_line_leaves_empty_is_at_its_default(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1, methods=frames.METHODS[:1], sparsities=(0.5,))
    other = rows[1:].assign(cell="global", config=rows.config[1].replace('"matrix"', '"global"'))
    rows = pd.concat([rows, other.assign(**{"capitals/acc": 0.25})], ignore_index=True)
    lines = [("m", "weight", "magnitude", 0.5, scope, "capitals/acc", 0.4, "paper") for scope in ("", "global")]
    text, _ = published.compare(rows, csv_of(tmp_path / "p.csv", *lines))
    ours = [line.split("|")[5].strip() for line in text.splitlines() if "weight magnitude" in line]
    assert ours == [f"{rows['capitals/acc'][1]:.4g}", "0.25"]  # and not the one of all matrices beside both


def test_a_published_table_without_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("model,method\nm,dense\n")
    with pytest.raises(RequestError, match="the columns sparsity, metric, published, source are missing"):
        published.read(tmp_path / "p.csv")


# -- the page ---------------------------------------------------------------------------------------------------------


def data(page: Path) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)[1])


def test_the_page_holds_the_rows_and_needs_no_network(made: Path) -> None:
    text = (made / "report.html").read_text()
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']|url\(|@import|https?://""", outside)
    found = data(made / "report.html")
    assert found["count"] == 35
    assert len(found["columns"]["command"]) == 35 and found["columns"]["model"] == "m"
    assert sum("+method=weight sparsity=0.1" in command for command in found["columns"]["command"]) == 6
    assert {"method", "criterion", "execution", "sparsity"} <= set(found["choices"])
    library = re.search(r'<script id="plotly" type="text/plain">(.*?)</script>', text, re.S)
    assert library and b"Plotly" in gzip.decompress(base64.b64decode(library[1])) and len(text) < 3e6
    assert {"decode_ms_paired", "sparsity", "capitals/acc"} <= set(found["x"]) & set(found["y"])
    assert "MemoryError: no &lt;b&gt;memory&lt;/b&gt; left" in text  # what a failed cell says is text, not markup


def test_what_a_row_says_cannot_end_the_page(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1).assign(command="</script><script>alert(1)</script>")
    rendering.report([folder(tmp_path, rows)], tmp_path / "out", rendering.Wanted(x=("latency",), y=("capitals/acc",)))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "alert(1)</script>" not in text
    assert data(tmp_path / "out" / "report.html")["columns"]["command"] == "</script><script>alert(1)</script>"


def test_infinite_perplexities_are_null_in_the_page_and_break_no_figure(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1)
    rows.loc[3, "pydoc/token_perplexity"] = np.inf
    rendering.report([folder(tmp_path, rows)], tmp_path / "out", rendering.Wanted(x=("latency",)))
    columns = data(tmp_path / "out" / "report.html")["columns"]
    assert columns["pydoc/token_perplexity"][columns["cell"].index(rows.cell[3])] is None
    assert columns["pydoc/token_perplexity"].count(None) == 1


def test_only_the_formats_asked_for_are_written(tmp_path: Path) -> None:
    place = folder(tmp_path, frames.rows(seeds=1))
    __main__.main([place, "--formats", "svg", "--no-html", "--y", "capitals/acc", "--x", "macs"])
    made = tmp_path / "report"
    assert list(made.glob("*.svg")) and not [*made.glob("*.png"), *made.glob("*.pdf")]
    assert "](capitals-acc-against-macs.svg)" in (made / "README.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        __main__.main([place, "--formats", "gif"])


def test_loss_by_word_frequency_is_drawn_where_rows_have_it() -> None:
    rows = ready(frames.rows(seeds=1, sparsities=(0.5,)))
    assert plot.band_figure(rows, "pydoc") is None
    rows["pydoc/loss_band_zipf5up"] = 2.0 + (rows.method != "dense")
    rows["pydoc/loss_band_no_word"] = np.where(rows.method == "dense", 1.0, 3.25)
    figure = plot.band_figure(rows, "pydoc")
    assert figure is not None
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5 up", "none"]
    assert {text.get_text() for text in axes.texts} == {"+1.00", "+2.25"}  # nats, and no per cent


def test_the_blocks_shares_are_drawn_where_they_differ(tmp_path: Path) -> None:
    rows = frames.rows(seeds=2, sparsities=(0.5, 0.7), methods=frames.METHODS[:1])
    place = folder(tmp_path, rows)
    (tmp_path / "layers").mkdir()
    for row in rows.itertuples():
        lost = [0, 0] if row.method == "dense" else [40, 80]
        pd.DataFrame(
            {"block": [0, 0, 1], "matrix": ["a", "b", "a"], "weights": [60, 40, 100], "zeros": [lost[0], 0, lost[1]]}
        ).to_parquet(tmp_path / "layers" / f"{row.cell}.parquet")
    layers = rendering._table([place], rows, "layers")
    assert layers is not None
    figure = plot.layer_figure(ready(rows), layers)
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [0, 1] and list(line.get_ydata()) == [0.4, 0.8]
    assert line.get_label() == "weight magnitude 0.5"
    even = layers.assign(zeros=layers.weights // 2)
    assert plot.layer_figure(ready(rows), even) is None
    files = rendering.report([place], tmp_path / "report", rendering.Wanted(figures=("blocks",), formats=("png",)))
    assert "sparsity-by-block.png" in {file.name for file in files}


def test_a_long_name_takes_two_lines_of_the_legend_and_stays_within_the_figure() -> None:
    rows = ready(frames.rows(seeds=1, methods=frames.METHODS[:1]))
    rows.loc[rows.method != "dense", "variant"] = (
        "a_setting=of_some_length, another_setting=that_is_as_long_as_the_first"
    )
    figure = plot.sparsity_figure(rows, "capitals/acc")
    (legend,) = figure.legends
    assert "\n" in legend.get_texts()[0].get_text()
    figure.canvas.draw()
    assert legend.get_window_extent().x1 <= figure.bbox.width


def test_flips_are_counted_both_ways_and_drawn(tmp_path: Path) -> None:
    rows = frames.rows(seeds=1, sparsities=(0.5,), methods=frames.METHODS[:1])
    rows["config"] = '{"benchmarks": {}}'
    dense, pruned = rows.cell
    answers = {dense: [1, 1, 1, 0, 0], pruned: [0, 1, 0, 1, 0]}
    place = folder(tmp_path, rows)
    (tmp_path / "samples").mkdir()
    for cell, values in answers.items():
        pd.DataFrame(
            {
                "task": "capitals",
                "document": [str(i) for i in range(5)],
                "metric": "acc",
                "value": [float(v) for v in values],
            }
        ).to_parquet(tmp_path / "samples" / f"{cell}.parquet")
    found = paired.flips(ready(asked.read([place])), rendering._table([place], rows, "samples"), "capitals/acc")
    assert found[["lost", "gained"]].to_numpy().tolist() == [[0.4, 0.2]]
    assert not len(paired.flips(ready(rows), rendering._table([place], rows, "samples"), "continents/acc"))
    (axes,) = plot.flips_figure(found, "capitals").axes
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[0.4], [0.2]]
    files = rendering.report([place], tmp_path / "report", rendering.Wanted(figures=("flips",), formats=("png",)))
    assert "capitals-flips.png" in {file.name for file in files}


def test_loss_by_position_is_drawn_where_rows_have_it() -> None:
    rows = ready(frames.rows())
    assert plot.position_figure(rows, "pydoc") is None
    for place, added in enumerate((0.1, 0.2, 0.4)):
        rows[f"pydoc/loss_at_{128 * place}to{128 * (place + 1)}"] = np.where(rows.baseline, 2.0, 2.0 + added)
    figure = plot.position_figure(rows, "pydoc")
    assert figure is not None
    (axes,) = figure.axes
    line = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    assert list(line.get_xdata()) == [0, 128, 256]
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.2, 0.4])


def with_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose models also write answers, of which half are lost, and which are longer than dense ones."""
    rows["sums/exact_match"] = np.where(rows.baseline, 0.8, 0.4)
    rows["sums/exact_match_stderr"] = 0.01
    rows["sums/generated_tokens_mean"] = np.where(rows.baseline, 10.0, 30.0)
    rows["sums/answer_speedup"] = np.where(rows.baseline, 1.0, 0.5)
    rows["sums/answer_speedup_stderr"] = 0.02
    return rows


def test_what_is_lost_stands_side_by_side_by_kind() -> None:
    rows = ready(frames.rows(seeds=1))
    named = asked.quality_metrics(rows)
    assert plot.kinds_figure(rows, named) is None, "nothing was written"
    rows["pages/token_perplexity"] = np.where(rows.baseline, 10.0, 40.0)
    rows = with_answers(rows)
    lost = plot.loss_by_kind(rows, asked.quality_metrics(rows))
    assert {"choice", "perplexity", "generation"} >= set(lost) >= {"perplexity", "generation"}
    assert lost.generation.to_numpy() == pytest.approx(50.0)
    alone = plot.loss_by_kind(rows, ["pages/token_perplexity", "sums/exact_match"])
    assert alone.perplexity.to_numpy() == pytest.approx(75.0), (
        "a quarter is kept where the perplexity is four times as high"
    )
    assert plot.kinds_figure(rows, ["sums/exact_match"]) is None, "nothing stands beside it"
    figure = plot.kinds_figure(rows, ["pages/token_perplexity", "sums/exact_match"])
    assert figure is not None
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["perplexity", "generation"]


def test_an_answer_is_drawn_against_a_token(tmp_path: Path) -> None:
    rows = ready(frames.rows())
    assert plot.answer_figure(rows, "sums") is None
    figure = plot.answer_figure(with_answers(rows), "sums")
    assert figure is not None
    marks = [y for line in figure.axes[0].lines for y in np.ravel(line.get_ydata()) if line.get_linestyle() == "None"]
    assert marks and marks == pytest.approx([0.5] * len(marks))
    place = folder(
        tmp_path,
        with_answers(frames.rows().pipe(lambda r: r.assign(baseline=r.method == "dense"))).drop(columns="baseline"),
    )
    made = {path.name for path in rendering.report([place], tmp_path / "report", rendering.Wanted(formats=("png",)))}
    assert {"lost-by-kind.png", "sums-answer-against-token.png"} <= made


def test_of_many_recipes_the_best_are_named_and_the_others_grey(tmp_path: Path) -> None:
    many = tuple(("weight", f"criterion{i:02}", "dense") for i in range(drawing.MOST_NAMED + 5))
    rows = frames.rows(seeds=1, sparsities=(0.5,), methods=many)
    for figure, is_loss in (
        (plot.sparsity_figure(rows, "pydoc/token_perplexity"), True),
        (plot.sparsity_figure(rows, "capitals/acc"), False),
    ):
        (legend,) = figure.legends
        said = [text.get_text() for text in legend.get_texts()]
        named = [word for word in said if word.startswith("weight criterion")]
        assert len(named) == drawing.MOST_NAMED and "5 others, which the table has" in said
        metric = "pydoc/token_perplexity" if is_loss else "capitals/acc"
        ranked = rows[rows.method == "weight"].sort_values(metric, ascending=is_loss).criterion[: drawing.MOST_NAMED]
        assert {word.removeprefix("weight ") for word in named} == set(ranked)


def test_settings_that_change_together_are_said_once() -> None:
    rows = frames.rows(seeds=1, sparsities=(0.5,), methods=(("weight", "magnitude", "dense"),))
    pruned = rows[rows.method == "weight"]
    changed = [
        {"recover.steps": 8, "recover.text.sequences": 8},
        {"recover.steps": 32, "recover.text.sequences": 32},
        {"recover.steps": 32, "recover.text.sequences": 32, "recover.batch": 2},
    ]
    frame = pd.concat([pruned.assign(config=json.dumps(_nested(each))) for each in changed], ignore_index=True)
    words = variants.with_variant(pd.concat([rows[rows.method == "dense"], frame], ignore_index=True)).variant
    assert words[1:].tolist() == ["recover.steps=8", "recover.steps=32", "recover.batch=2, recover.steps=32"]


def _nested(settings: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return found
