"""What confusion counts say of many classifiers at once, against scikit-learn, one at a time."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from sweep import confusion


def test_counts_and_macro_metrics_are_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    truth, chosen = draw.integers(0, 4, 30), draw.integers(0, 3, (2, 5, 30))  # class 3 is never chosen
    counts = confusion.counts(truth, chosen)
    found = confusion.macro(counts)
    for place in np.ndindex(2, 5):
        assert (counts[place][:-1, :-1] == confusion_matrix(truth, chosen[place], labels=range(4))).all()
        values = precision_recall_fscore_support(truth, chosen[place], average="macro", zero_division=0.0)[:3]
        for name, value in zip(("precision", "recall", "f1"), values, strict=True):
            assert found[name][place] == pytest.approx(value)


def test_a_class_that_neither_occurs_nor_is_chosen_is_none() -> None:
    truth, chosen = [0, 0, 5, 5], [0, 5, 5, 5]
    assert confusion.macro(confusion.counts(truth, chosen))["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_no_choice_is_never_right() -> None:
    counts = confusion.counts([0, 1, 1], [-1, 1, -1])
    assert counts.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 0]]
    assert confusion.macro(counts)["recall"] == pytest.approx((0 + 1 / 2 + 0) / 3)  # what is no class is chosen, too
