"""Data sets of the hub, from the network, from the cache of datasets, or offline from a folder; and texts made of them.

`data_root` names a folder that holds each data set as the hub names it, FOLDER/org/name.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sweep import cache
from sweep.settings import RequestError


@dataclass(frozen=True)
class Corpus:
    """A text made of a data set's documents."""

    dataset: str
    subset: str | None
    split: str
    column: str = "text"
    join: str = "\n\n"  # between documents
    file: str | None = None  # the only one of the data set that is read
    documents: int | None = None  # the first so many; None = all


# Evaluated as SparseGPT and Wanda do. For calibration they draw from all documents of C4's first training file that are
# longer than a sequence, one sequence each; here the file's opening is one stream, of which sequences are drawn.
EVALUATED = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": Corpus(
        "allenai/c4", None, "validation", join=" ", file="en/c4-validation.00000-of-00008.json.gz", documents=1100
    ),
}
CALIBRATION = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", "train", join=" "),
    "c4": Corpus("allenai/c4", None, "train", file="en/c4-train.00000-of-01024.json.gz", documents=8000),
}


def joined(corpus: Corpus, data_root: str | None, asked: str) -> str:
    """The text of a corpus. Raises what `documents` raises."""
    return corpus.join.join(documents(corpus, data_root, asked))


@functools.lru_cache
def documents(corpus: Corpus, data_root: str | None, asked: str) -> tuple[str, ...]:
    """The documents of a corpus, in order.

    asked  the setting that asks for it, for messages
    Raises RequestError when the data are not found, or have no such column of text.
    """
    import datasets

    files = {corpus.split: corpus.file} if corpus.file else None
    place = Path(data_root).expanduser().absolute() / corpus.dataset if data_root else None
    found, kept = (str(place), copies()) if place and place.is_dir() else (corpus.dataset, None)
    try:
        with without_bars() if kept else contextlib.nullcontext():
            rows = datasets.load_dataset(found, corpus.subset, data_files=files, split=corpus.split, cache_dir=kept)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        raise RequestError(missing(asked, data_root, error)) from error
    if corpus.column not in rows.column_names:
        raise RequestError(
            f"{asked}: {corpus.dataset} has no column '{corpus.column}', but {', '.join(rows.column_names)}"
        )
    found = rows[: min(corpus.documents or len(rows), len(rows))][corpus.column]
    if not all(isinstance(document, str) for document in found):
        raise RequestError(f"{asked}: the column '{corpus.column}' of {corpus.dataset} holds no text")
    return tuple(found)


def missing(asked: str, data_root: str | None, error: Exception) -> str:
    """What to say when the data of `asked` could not be loaded."""
    looked = f"in data_root={data_root}, " if data_root else ""
    offline = "" if os.environ.get("HF_HUB_OFFLINE") == "1" else " (HF_HUB_OFFLINE=1 makes the search there short)"
    return (
        f"{asked}: no data. Looked {looked}in the cache of datasets and on the hub{offline}: "
        f"{str(error).strip().splitlines()[0]}. Without a network, data_root=FOLDER names a folder that holds "
        "each data set as the hub names it, FOLDER/org/name"
    )


def copies() -> Path:
    """Where datasets keeps what it makes of the files in a `data_root`: the user's own cache may not be writable."""
    return cache.folder().absolute() / "datasets"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """While open, datasets draws no progress bars: what lies on a disk is soon read."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
