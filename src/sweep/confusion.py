"""Classifiers told by their counts, many at once: macro precision, recall and F1 from (truth, choice) pairs.

scikit-learn, which gives a row its metrics (sweep.measuring.classification), takes one classifier at a time. A bootstrap, a
jackknife over documents and the drop of every unit ask for thousands, which it would take a thousand times as long for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def counts(truth: ArrayLike, chosen: ArrayLike) -> NDArray[np.int64]:
    """(…, classes, classes), row the truth, column the choice, of several choices (…, N) of the same N documents.

    The last class is none of theirs: a choice of -1, which is no choice, counts as it, and is never right.
    """
    y, z = np.asarray(truth, dtype=np.int64), np.asarray(chosen, dtype=np.int64)
    classes = int(max(y.max(), z.max())) + 2
    pairs = (y * classes + z % classes).reshape(-1, len(y))
    pairs += classes**2 * np.arange(len(pairs))[:, None]
    found = np.bincount(pairs.ravel(), minlength=len(pairs) * classes**2)
    return found.reshape(*z.shape[:-1], classes, classes)


def macro(counted: NDArray) -> dict[str, NDArray[np.float64]]:
    """`precision`, `recall` and `f1`, (…), of counts (…, classes, classes), as scikit-learn's `average="macro"`.

    The mean is over the classes that occur or are chosen; a class that is never chosen has precision 0.
    """
    hits, asked, given = np.diagonal(counted, axis1=-2, axis2=-1), counted.sum(-1), counted.sum(-2)
    seen = (asked + given) > 0
    over = {"precision": given, "recall": asked, "f1": (asked + given) / 2}
    return {name: (hits / np.maximum(below, 0.5) * seen).sum(-1) / seen.sum(-1) for name, below in over.items()}
