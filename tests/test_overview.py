"""What is left of quality, what is gained, and what to choose: against what each is defined by."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

import frames
from sweep.report import asked, decision, frontier, names, overview, parts, plot
from sweep.report.decision import Limits

TASKS = ["a/acc", "b/token_perplexity", "c/exact_match"]


def made(sparsities: tuple[float, ...] = (0.1, 0.3), **columns: object) -> pd.DataFrame:
    """A dense row and those of one recipe, packed, with the benchmarks of TASKS as given."""
    rows = frames.rows(seeds=1, sparsities=sparsities, methods=(("weight", "wanda", "bitmap"),))
    rows = rows[[name for name in rows if "/" not in name]].assign(**columns)
    return frontier.numbered(frontier.with_paired_latency(rows))


def seen(rows: pd.DataFrame, metrics: list[str] | None = None) -> overview.Overview:
    found = overview.overview(rows, metrics or asked.quality_metrics(rows))
    assert found is not None
    return found


def test_what_is_kept_stands_between_guessing_and_the_dense_model() -> None:
    rows = made(
        **{
            "a/acc": [0.75, 0.5, 0.25],
            "a/chance": 0.25,
            "b/token_perplexity": [10.0, 20.0, 100.0],
            "c/exact_match": 0.5,
        }
    )
    kept = seen(rows, TASKS).points.set_index("sparsity").kept
    assert kept.tolist() == pytest.approx([1, np.mean([0.5, 0.5, 1]), np.mean([0, 0.1, 1])])
    assert overview.with_kept(rows, TASKS).quality_kept.tolist() == pytest.approx(kept.tolist())


def test_chance_of_rows_from_before_it_was_kept_is_that_of_the_task() -> None:
    rows = made(**{"capitals/acc": [0.75, 0.5, 0.25], "piqa/acc": 0.75, "mine/acc": 0.5, "capitals/f1_macro": 0.5})
    found = {name: overview.chance(rows, name).unique().tolist() for name in rows if "/" in name}
    assert found == {"capitals/acc": [0.25], "piqa/acc": [0.5], "mine/acc": [0.0], "capitals/f1_macro": [0.0]}
    assert overview.chance(rows.assign(**{"mine/chance": 0.2}), "mine/acc").unique().tolist() == [0.2]
    assert overview.chance(rows.assign(**{"mine_x/chance": 0.1, "mine_y/chance": 0.3}), "mine/acc").unique() == [0.2]


def test_a_benchmark_that_the_dense_model_only_guesses_is_left_out() -> None:
    rows = made(**{"a/acc": [0.27, 0.1, 0.4], "a/acc_stderr": 0.02, "a/chance": 0.25, "c/exact_match": [0.5, 0.4, 0.3]})
    found = seen(rows, ["a/acc", "c/exact_match"])
    assert found.benchmarks == ("c/exact_match",) and "accuracy, a" in found.notes[0]
    assert seen(rows.assign(**{"a/acc_stderr": 0.001}), ["a/acc", "c/exact_match"]).benchmarks[0] == "a/acc"


def test_a_group_of_tasks_counts_once() -> None:
    config = json.dumps({"benchmarks": {"tasks": ["group", "group_b"]}})
    metrics = ["group/acc", "group_a/acc", "group_b/acc", "groups/acc"]
    rows = made(config=config, **dict.fromkeys(metrics, 0.5))
    assert seen(rows, metrics).benchmarks == ("group/acc", "group_b/acc", "groups/acc")


def test_a_row_without_a_benchmark_of_its_dense_one_has_no_mean() -> None:
    rows = made(**{"a/acc": [0.8, np.nan, 0.4], "c/exact_match": 0.5})
    assert seen(rows, ["a/acc", "c/exact_match"]).points.sparsity.tolist() == [0.0, 0.3]
    assert overview.overview(made(), []) is None
    assert overview.overview(rows[rows.baseline], ["a/acc"]) is None


def test_the_interval_of_what_is_kept_follows_from_the_errors_of_both() -> None:
    rows = made((0.3,), **{"a/acc": [0.8, 0.6], "a/acc_stderr": [0.02, 0.03], "b/token_perplexity": [10.0, 12.5]})
    rows["b/token_perplexity_stderr"] = [0.1, 0.2]
    draw = np.random.default_rng(0)
    dense, pruned = (
        draw.normal((a, b), (c, d), (200_000, 2)).T for a, b, c, d in ((0.8, 10, 0.02, 0.1), (0.6, 12.5, 0.03, 0.2))
    )
    drawn = (pruned[0] / dense[0] + dense[1] / pruned[1]) / 2
    point = seen(rows, ["a/acc", "b/token_perplexity"]).points.iloc[1]
    assert (point.kept_high - point.kept_low) / 2 == pytest.approx(1.96 * drawn.std(), rel=0.02)
    assert point.interval == "documents"


def test_seeds_widen_it_where_they_scatter() -> None:
    rows = frames.rows(seeds=3, sparsities=(0.3,), methods=frames.METHODS[1:2])
    rows = rows[[name for name in rows if "/" not in name]].assign(**{"a/acc": [0.8, 0.8, 0.6, 0.4]})
    point = seen(frontier.numbered(rows)).points.iloc[1]
    half = student.ppf(0.975, 2) * 0.25 / np.sqrt(3)
    assert (point.kept_low, point.kept, point.kept_high) == pytest.approx((0.75 - half, 0.75, 0.75 + half))


def test_a_gain_is_one_beyond_the_machines_noise() -> None:
    rows = made(**{"a/acc": 0.5}).assign(
        decode_speedup=[0.98, 1.2, 1.4], decode_speedup_low=[0.9, 1.1, 1.3], decode_speedup_high=[1.1, 1.3, 1.5]
    )
    rows["decode_control"], rows["decode_control_high"] = 1.1, 1.25  # what dense gains on itself in the same repeats
    rows["peak_memory_bytes"], rows["stored_bytes"] = [100, 98, 80], [100, 90, 50]
    points = seen(rows).points
    assert points.decode.tolist() == [1.0, 1.2, 1.4] and points.decode_sure.tolist() == [False, False, True]
    assert points.memory.tolist() == pytest.approx([1, 100 / 98, 1.25]) and points.memory_sure.tolist() == [
        False,
        False,
        True,
    ]
    assert points["stored bytes"].tolist() == pytest.approx([1, 100 / 90, 2])
    assert points["stored bytes_sure"].tolist() == [False, True, True]


# -- what to choose ---------------------------------------------------------------------------------------------------


def choices(rows: pd.DataFrame, asked_: Limits = Limits()) -> tuple[dict[str, list[str]], decision.Decision]:  # noqa: B008
    """The cells of the table by what limits a line, and the decision."""
    found = decision.decide(seen(rows), rows, asked_)
    return {line[0]: line[1:] for line in found.table()[1:]}, found


def bought(error: float = 0.0, **columns: object) -> pd.DataFrame:
    rows = made((0.1, 0.2, 0.4), **{"a/exact_match": [0.8, 0.796, 0.77, 0.4], "a/exact_match_stderr": error})
    return rows.assign(
        decode_speedup=[1, 1.1, 1.2, 1.5], stored_bytes=[100, 90, 80, 60], peak_memory_bytes=100, **columns
    ).assign(
        decode_speedup_low=lambda r: r.decode_speedup - 0.02, decode_speedup_high=lambda r: r.decode_speedup + 0.02
    )


def test_a_budget_buys_what_gains_most_within_it() -> None:
    table, found = choices(bought())
    assert list(table) == ["1 % lost", "2 % lost", "5 % lost", "10 % lost"]
    assert [gain.name for gain in found.gains] == ["decode", "prefill", "memory", "stored bytes"]
    one, five = table["1 % lost"], table["5 % lost"]
    assert (
        one[0] == "weight wanda, bitmap at 10 %: 1.10x (1.08 to 1.12)"
        and one[3] == "weight wanda, bitmap at 10 %: 1.11x"
    )
    assert five[0] == "weight wanda, bitmap at 20 %: 1.20x (1.18 to 1.22)"
    assert one[2] == five[2] == "nothing: no pruned cell gains beyond noise"


def test_what_gains_nothing_is_never_recommended() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        rows = bought(0.01)
        rows["decode_speedup"] = draw.uniform(0.8, 1.3, 4)
        rows["decode_speedup_low"] = rows.decode_speedup - draw.uniform(0, 0.2, 4)
        rows["prefill_speedup"] = rows["prefill_speedup_low"] = 0.9
        table, found = choices(rows)
        points = seen(rows).points.set_index("point")
        for _, line in found.lines:
            for gain, choice in zip(found.gains, line, strict=True):
                assert choice.point is None or (
                    points.loc[choice.point, gain.name] > 1 and not points.baseline[choice.point]
                )
        assert all(line[1].startswith("nothing") for line in table.values())


def test_a_budget_that_nothing_keeps_says_so_and_asks_for_less() -> None:
    rows = bought()
    rows["a/exact_match"] = [0.8, 0.7, 0.6, 0.5]
    table, found = choices(rows)
    assert table["1 % lost"][0] == "nothing: no pruned cell keeps 99 %"
    (why, command), *_ = found.further
    assert "sparsity=0.05" in shlex.split(command) and "lower sparsity" in why


def test_what_is_not_certain_is_said_and_more_seeds_are_asked_for() -> None:
    table, found = choices(bought(error=0.02))
    assert table["1 % lost"][0].startswith("perhaps weight wanda, bitmap at 10 %")
    (why, command), *_ = found.further
    assert "more seeds" in why
    assert command == "python -m sweep +method=weight sparsity=0.1 'model.path=a b' seed=1,2,3 -m"
    config = json.dumps({"calibration": None, "benchmarks": {"limit": 20}})
    _, found = choices(bought(error=0.02, config=config))
    assert found.further[0][1].endswith("benchmarks.limit=null")


def test_the_certain_goes_before_what_gains_more() -> None:
    rows = bought()
    rows["a/exact_match_stderr"] = [0.0, 0.0, 0.05, 0.0]
    table, _ = choices(rows)
    assert table["5 % lost"][0].startswith("weight wanda, bitmap at 10 %: 1.10x")


def test_limits_of_cost_fill_one_more_line() -> None:
    rows = bought()
    slow = rows.decode_ms_paired.tolist()
    table, _ = choices(rows.assign(decode_ms_paired=[20.0, 18.0, 16.0, 13.0]), Limits(ms=17))
    assert slow and list(table)[-1] == "17 ms a token" and len(table) == 5
    assert table["17 ms a token"][0] == "weight wanda, bitmap at 20 %: 1.20x (1.18 to 1.22), keeps 96.2 %"
    table, _ = choices(rows, Limits(drop=0.03, memory=50))
    assert table["3 % lost, 5e-05 MB"] == ["nothing: no pruned cell is within it"] * 4
    assert len(choices(rows, Limits(drop=0.05))[0]) == 4


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        (("2%", None, None), Limits(0.02)),
        (("0.02", 30.0, "900MB"), Limits(0.02, 30.0, 900_000_000)),
        ((None, None, None), Limits()),
    ],
)
def test_limits_are_read_from_flags(given: tuple, limits: Limits) -> None:
    assert asked.limits(*given) == limits and limits.any() == (given != (None, None, None))


def test_zeros_in_dense_matrices_are_to_be_run_packed() -> None:
    rows = bought().assign(execution="dense", decode_speedup_low=0.9, stored_bytes=100)
    _, found = choices(frontier.numbered(rows.drop(columns="point")))
    (why, command), *_ = found.further
    assert command.endswith("execution=auto") and "skip none" in why
    untimed = rows.assign(**{name: np.nan for name in rows if "speedup" in name or name.endswith("_paired")})
    assert choices(frontier.numbered(untimed.drop(columns="point")))[1].further[0][1].endswith("efficiency=quick")


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_overview_in_words_fits_a_terminal_and_names_the_frontier() -> None:
    rows = frontier.numbered(frontier.with_paired_latency(frames.rows()))
    found = seen(rows)
    text = overview.words(found)
    table = [line for line in text.splitlines() if "%" in line and "x" in line and not line.startswith("Quality")]
    assert len(table) == 13 and max(map(len, table)) <= 100
    best = overview.on_frontier(found.points, overview.GAINS[0])
    assert sum(line.startswith("*") for line in table) == best.sum() - found.points.baseline[best].sum()
    assert max(map(len, decision.decide(found, rows).words().partition("To be surer")[0].splitlines())) <= 100
    many = frames.rows(seeds=1, methods=tuple(("weight", f"c{i}", "dense") for i in range(12)))
    assert "in the report" in overview.words(seen(frontier.numbered(many)))


def test_what_is_beyond_the_axes_stands_at_the_edge_with_its_numbers() -> None:
    rows = made((0.1, 0.3, 0.5), **{"a/exact_match": [0.8, 0.76, 0.6, 0.08]}).assign(
        decode_speedup=[1, 1.2, 0.25, 3.0], decode_speedup_low=np.nan, decode_speedup_high=np.nan
    )
    axes = plot.overview_figure(seen(rows)).axes[0]
    (low, high), (floor, _) = axes.get_xlim(), axes.get_ylim()
    assert low > 0.5 and high < 2 and 10 < floor <= 75
    assert {text.get_text() for text in axes.texts} >= {"10 %, 3.00x", "0.25x", "0.1"}
    marks = {
        (line.get_marker(), round(float(x), 3), round(float(y), 3))
        for line in axes.lines
        if line.get_marker() in "v<>*"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert {("v", round(high, 3), round(floor, 3)), ("<", round(low, 3), 75.0), ("*", 1.0, 100.0)} <= marks


def test_words_beside_marks_lie_upon_no_mark_and_no_other_words() -> None:
    rows = frontier.numbered(frontier.with_paired_latency(frames.rows(seeds=1)))
    figure = plot.overview_figure(seen(rows))
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert boxes
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize(("width", "rows_of_axes"), [("page", 1), ("column", 2)])
def test_two_gains_stand_side_by_side_on_a_page(width: str, rows_of_axes: int) -> None:
    rows = frontier.numbered(frontier.with_paired_latency(frames.rows(seeds=1)))
    figure = plot.overview_figure(seen(rows), width)
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == rows_of_axes and len(figure.axes) == 2
    untimed = made(**{"a/exact_match": [0.8, 0.7, 0.6]})
    untimed = untimed.assign(
        **{name: np.nan for name in untimed if "speedup" in name}, stored_bytes=1, peak_memory_bytes=1
    )
    (alone,) = plot.overview_figure(seen(untimed), width).axes
    assert alone.get_xlabel() == "sparsity requested (fraction removed)"


def test_a_sweep_is_told_in_words_without_its_documents() -> None:
    text = parts.told(frames.rows())
    assert text.startswith("Quality kept: mean of 2 benchmarks") and "1 % lost" in text
    assert parts.told(frames.rows(seeds=1).head(1)) == ""
    untimed = frames.rows(seeds=1)
    assert parts.told(untimed[[name for name in untimed if "/" not in name]]) == ""


def test_names_are_short_enough_to_read_aloud() -> None:
    assert names.recipe("weight wanda, bitmap", 0.3) == "weight wanda, bitmap at 30 %"
    assert names.times(1.5, 1.4, 1.6) == "1.50x (1.40 to 1.60)" and names.percent(0.973) == "97.3 %"
