"""From the choice of each example to the metrics of a classifier. numpy and scikit-learn alone.

A multiple-choice task is a classifier whose classes are the places of the choices: `continents` always lists the same
six, so that its classes mean something; where each question has choices of its own, a class is a place, and only
accuracy and calibration say much.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike

from sweep import confusion

_BINS = 15  # of the calibration error, equal in width (Guo et al. 2017, arXiv:1706.04599)
_DRAWS = 1000


def metrics(truth: ArrayLike, chosen: ArrayLike, confidence: ArrayLike | None = None) -> dict[str, float]:
    """Accuracy, precision, recall, F1, Matthews correlation, and calibration error when confidences are given.

    truth, chosen  (N,) integer classes
    confidence     (N,) probability that the chosen class was given

    A class that is never chosen has precision 0, one that never occurs is left out of the mean over classes
    (`_macro`) unless it is chosen. `_weighted` weighs classes by their examples. With two classes, 0 and 1, the plain
    `precision`, `recall` and `f1` are those of class 1. Raises ValueError when there are no examples.
    """
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

    y, z = np.asarray(truth), np.asarray(chosen)
    if not len(y):
        raise ValueError("no examples, so no metrics")
    found = {"accuracy": float(accuracy_score(y, z))}
    averages = ["macro", "weighted"] + (["binary"] if set(y) | set(z) <= {0, 1} else [])
    for average in averages:
        values = precision_recall_fscore_support(y, z, average=average, zero_division=0.0)[:3]
        suffix = "" if average == "binary" else f"_{average}"
        found |= {f"{name}{suffix}": float(v) for name, v in zip(("precision", "recall", "f1"), values, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class only: the correlation is 0, which is what it is worth
        found["matthews"] = float(matthews_corrcoef(y, z))
    if confidence is not None:
        found["calibration_error"] = calibration_error(y == z, confidence)
    return found


def calibration_error(correct: ArrayLike, confidence: ArrayLike) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over 15 bins of confidence."""
    right, sure = np.asarray(correct, dtype=float), np.asarray(confidence, dtype=float)
    if np.isnan(sure).any():
        return float("nan")
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, sure - right, _BINS)
    return float(np.abs(gaps).sum() / len(right))


def f1_stderr(truth: ArrayLike, chosen: ArrayLike, seed: int = 0) -> float:
    """Standard error of the macro F1, by bootstrap over examples.

    The F1 depends on an example through its pair (truth, choice) alone, so that drawing examples with replacement is
    drawing the confusion counts from a multinomial distribution.
    """
    counts = confusion.counts(truth, chosen)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts.ravel() / counts.sum(), _DRAWS)
    return float(confusion.macro(draws.reshape(_DRAWS, *counts.shape))["f1"].std(ddof=1))


def choice(log_likelihoods: ArrayLike) -> tuple[int, float]:
    """(the likeliest choice, its probability among the choices) from the choices' log-likelihoods.

    NaN makes the choice -1 and the probability NaN: no choice was made.
    """
    values = np.asarray(log_likelihoods, dtype=float)
    if np.isnan(values).any() or not np.isfinite(values.max()):
        return -1, float("nan")
    return int(values.argmax()), float(1 / np.exp(values - values.max()).sum())
