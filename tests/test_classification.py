"""Metrics of a classifier against their formulas, written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from sweep.measuring import classification


def test_two_classes_by_hand() -> None:
    truth, chosen = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 0]
    tp, fp, fn, tn = 2, 1, 2, 3
    found = classification.metrics(truth, chosen, [0.9] * 8)
    assert found["accuracy"] == pytest.approx((tp + tn) / 8)
    assert found["precision"] == pytest.approx(tp / (tp + fp))
    assert found["recall"] == pytest.approx(tp / (tp + fn))
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    other = 2 * tn / (2 * tn + fp + fn)
    assert found["f1_macro"] == pytest.approx((found["f1"] + other) / 2)
    assert found["f1_weighted"] == pytest.approx((found["f1"] + other) / 2)  # four examples of each class
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / root)
    assert found["calibration_error"] == pytest.approx(0.9 - 5 / 8)


def test_several_classes_have_no_binary_metrics_and_weights_follow_the_classes() -> None:
    truth, chosen = [0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 0]
    found = classification.metrics(truth, chosen)
    assert "f1" not in found and "calibration_error" not in found
    each = [2 * 2 / (3 + 3), 2 * 1 / (1 + 2), 2 * 1 / (2 + 1)]  # 2 * hits / (examples + choices)
    assert found["f1_macro"] == pytest.approx(np.mean(each))
    assert found["f1_weighted"] == pytest.approx(np.average(each, weights=[3, 1, 2]))


def test_calibration_error_is_the_gap_within_bins() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.30, 0.30])
    correct = np.array([1, 1, 1, 0, 0, 1])
    assert classification.calibration_error(correct, confidence) == pytest.approx((4 * 0.2 + 2 * 0.2) / 6)
    assert classification.calibration_error([1, 1], [1.0, 1.0]) == 0
    assert np.isnan(classification.calibration_error([1, 0], [np.nan, 0.5]))


def test_the_error_of_f1_is_that_of_drawing_examples() -> None:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 4, 200)
    chosen = np.where(draw.random(200) < 0.6, truth, draw.integers(0, 4, 200))
    resampled = [f1_score(truth[i], chosen[i], average="macro") for i in draw.integers(0, 200, (400, 200))]
    assert classification.f1_stderr(truth, chosen) == pytest.approx(np.std(resampled), rel=0.15)


def test_no_choice_is_made_of_losses_that_are_no_numbers() -> None:
    chosen, confidence = classification.choice([-1.0, -2.0])
    assert chosen == 0 and confidence == pytest.approx(1 / (1 + np.exp(-1)))
    for values in ([np.nan, -1.0], [-np.inf, -np.inf]):
        chosen, confidence = classification.choice(values)
        assert chosen == -1 and np.isnan(confidence)
    assert classification.metrics([0, 1], [-1, 1])["accuracy"] == 0.5
    assert np.isfinite(classification.f1_stderr([0, 1], [-1, 1]))


def test_nothing_gives_no_metrics() -> None:
    with pytest.raises(ValueError, match="no examples"):
        classification.metrics([], [])
