"""The Pareto set against its definition; intervals over seeds; latency that is comparable between cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sweep.report import frontier


def test_pareto_is_what_nothing_dominates() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        x, y = draw.integers(0, 8, (2, 30)).astype(float)
        expected = [
            not any(x[j] <= x[i] and y[j] <= y[i] and (x[j] < x[i] or y[j] < y[i]) for j in range(30))
            for i in range(30)
        ]
        assert frontier.undominated(x, y).tolist() == expected


def rows(**changes: object) -> pd.DataFrame:
    base = {
        "model": "m",
        "method": "weight",
        "criterion": "magnitude",
        "execution": "dense",
        "sparsity": 0.5,
        "status": "ok",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return pd.DataFrame({**base, **changes})


def test_seeds_become_one_point_with_an_interval_and_failures_none() -> None:
    frame = rows(seed=[0, 1, 2, 3], cost=[1.0, 1, 1, 1], acc=[0.4, 0.5, 0.6, np.nan])
    frame.loc[3, "status"] = "failed"
    (point,) = frontier.points(frame, "cost", "acc").itertuples()
    assert point.seeds == 3
    assert point.y == pytest.approx(0.5)
    assert point.y_high - point.y == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)  # Student's t, 2 degrees
    assert np.isnan(frontier.points(frame[:1], "cost", "acc").y_low[0])


def test_the_interval_of_a_perplexity_is_that_of_its_loss() -> None:
    losses = np.array([5.8, 10.1, 11.2])
    frame = rows(seed=[0, 1, 2], cost=[1.0, 1, 1], **{"t/perplexity": np.exp(losses), "t/loss": losses})
    (loss,) = frontier.points(frame, "cost", "t/loss").itertuples()
    (found,) = frontier.points(frame, "cost", "t/perplexity").itertuples()
    assert found.y == pytest.approx(np.exp(losses).mean())
    assert (found.y_low, found.y_high) == pytest.approx((np.exp(loss.y_low), np.exp(loss.y_high)))
    one = rows(seed=[0], cost=[1.0], **{"t/perplexity": [20.0], "t/perplexity_stderr": [1.0]})
    (found,) = frontier.points(one, "cost", "t/perplexity").itertuples()
    assert (found.y_low, found.y_high) == pytest.approx((20 * np.exp(-1.96 / 20), 20 * np.exp(1.96 / 20)))


def test_numbered_rows_give_the_same_points_in_the_same_order() -> None:
    frame = rows(
        method=["weight", "dense", "neuron", "weight"],
        criterion=["wanda", None, "random", "wanda"],
        sparsity=[0.5, 0.0, 0.3, 0.5],
        seed=[0, 0, 0, 1],
        cost=[1.0, 2.0, 3.0, 4.0],
        acc=[0.4, 0.5, 0.6, 0.8],
    )
    found = frontier.points(frontier.numbered(frame)[::-1], "cost", "acc")
    pd.testing.assert_frame_equal(found, frontier.points(frame, "cost", "acc"))
    assert found.method.tolist() == ["dense", "neuron", "weight"]
    assert found.x.tolist() == [2.0, 3.0, 2.5] and found.seeds.tolist() == [1, 1, 2]


def test_paired_latency_follows_the_speedup_and_not_the_clock_of_the_day() -> None:
    frame = rows(
        method=["dense", "weight", "weight"],
        dense_decode_ms_per_token_p50=[92.0, 20.0, 20.0],  # the dense cell met a busy moment
        decode_speedup=[0.95, 1.0, 2.0],
        dense_prefill_ms_p50=[5.0, 5.0, 5.0],
        prefill_speedup=[1.0, 1.0, 1.0],
    )
    paired = frontier.with_paired_latency(frame)
    assert paired.decode_ms_paired.tolist() == [20.0, 20.0, 10.0]


def test_a_point_that_may_be_no_faster_than_a_better_one_is_not_on_the_frontier_for_certain() -> None:
    points = pd.DataFrame(
        {
            "x": [37.4, 38.2],
            "x_low": [34.6, np.nan],
            "x_high": [39.0, np.nan],
            "y": [455.0, 13.3],
            "y_low": np.nan,
            "y_high": np.nan,
        }
    )

    def differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one != other

    for sure, words in ((39.0, ["within noise", "on"]), (38.0, ["on", "on"])):
        points.loc[0, "x_high"] = sure
        for by in (differ, None):
            assert frontier.membership(points, x_is_loss=True, y_is_loss=True, differ=by).tolist() == words
