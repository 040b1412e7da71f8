"""What models are calibrated on, and the fingerprints of every text: deterministic, drawn by the seed alone.

`fingerprint` goes into the row: another version of Python, of a package or of a data set may carry other text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep.config import Calibration, Cell
from sweep.pruning.families import Vocab
from sweep.recovery import kinds
from sweep.settings import RequestError
from sweep.texts import corpora, embedded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def fingerprint(parts: Iterable[Any]) -> str:
    """16 hexadecimal digits that change when any of the parts does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Facts:
    """What is told of a text without holding it."""

    fingerprint: str
    size: int  # bytes of UTF-8


_FACTS: dict[Hashable, Facts] = {}


def facts(source: str, read: Callable[[], str], *asked: Hashable) -> Facts:
    """Fingerprint and size of the text that `read` gives: read once a process, and again when it is a file that changed.

    source  the text's name, or its file
    asked   with the file's state, tells this text from all others
    """
    path = Path(source).expanduser()
    stat = path.stat() if path.is_file() else None
    key = (source, *asked, stat and (str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    if key not in _FACTS:
        whole = read()
        _FACTS[key] = Facts(fingerprint([whole]), len(whole.encode()))
    return _FACTS[key]


def questions_fingerprint(task: str) -> str:
    """Of the questions on which a drop is measured."""
    return _questions_fingerprint(task, embedded.QUESTIONS[task])


@functools.cache
def _questions_fingerprint(task: str, question: Callable[[dict[str, Any]], Any]) -> str:
    return fingerprint([question(document) for document in embedded.EMBEDDED[task]()])


def calibration_facts(settings: Calibration, data_root: str | None = None) -> Facts:
    """Of the whole text of a calibration source, however much of it is drawn. Raises what `calibration_text` raises."""
    place = Calibration(settings.source, subset=settings.subset, split=settings.split, column=settings.column)
    return facts(settings.source, lambda: calibration_text(place, data_root), place, data_root)


def calibration_text(settings: Calibration, data_root: str | None = None) -> str:
    """All text of a calibration source. Raises RequestError when there is none, or when its settings contradict it."""
    source = settings.source
    if settings.split is not None:
        if source == "pydoc" or source in corpora.CALIBRATION or Path(source).expanduser().is_file():
            raise RequestError(
                f"calibration.split={settings.split} is of a data set of the hub, and calibration.source="
                f"{source} is none: leave the split out, or name the data set, such as "
                "Salesforce/wikitext"
            )
        corpus = corpora.Corpus(source, settings.subset, settings.split, settings.column or "text")
        return corpora.joined(corpus, data_root, f"calibration.source={source}")
    for name in ("subset", "column"):
        if (value := getattr(settings, name)) is not None:
            raise RequestError(
                f"calibration.{name}={value} is of a data set of the hub: add calibration.split, such as "
                "train, or leave it out"
            )
    if source == "pydoc":
        return "\n\n".join(embedded.pydoc_split().calibration)
    if source in corpora.CALIBRATION:
        return corpora.joined(corpora.CALIBRATION[source], data_root, f"calibration.source={source}")
    allowed = "pydoc, wikitext2, c4, a text file, or with calibration.split a data set of the hub"
    return read_file(source, "calibration.source", allowed)


def read_file(source: str, key: str, allowed: str) -> str:
    """The text of a UTF-8 file. Raises RequestError, in the words of the key that names it, when there is none."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise RequestError(f"{key} must be {allowed}; there is no file {source!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{key}: {source} is not UTF-8 text: {error}") from error


def for_cell(cell: Cell, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """The token ids that a cell's method reads; None for one that reads no text.

    (sequences, length) that the seed draws; for the frequencies of tokens the whole text, (tokens,): rare ones are told
    by much of it.
    """
    if cell.calibration is None:
        return None
    if isinstance(cell.method, Vocab):
        return calibration_stream(cell.calibration, tokenizer, cell.data_root)
    return calibration_tokens(cell.calibration, tokenizer, cell.seed, cell.data_root)


def calibration_tokens(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int, data_root: str | None = None
) -> Tensor:
    """Calibration sequences, (sequences, length) int64.

    The text is one stream of tokens cut into sequences without overlap; the seed draws which are used.
    Raises RequestError when the text is too short for what is asked.
    """
    import torch

    stream = calibration_stream(settings, tokenizer, data_root)
    available = len(stream) // settings.length
    if available < settings.sequences:
        raise RequestError(
            f"calibration.source={settings.source} gives {available} sequences of {settings.length} tokens; "
            f"{settings.sequences} are asked. Lower calibration.sequences or calibration.length"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[: settings.sequences]
    return stream[: available * settings.length].view(available, settings.length)[chosen]


def of_recovery(cell: Cell) -> Calibration | None:
    """The text that recovery reads, of which some is held out; None where nothing is recovered."""
    asked = cell.recover.text
    if cell.recover.name == kinds.NONE or asked.source is None or asked.sequences is None:
        return None
    sequences = asked.sequences + kinds.HELD_OUT
    return Calibration(
        asked.source, sequences, asked.length, subset=asked.subset, split=asked.split, column=asked.column
    )


def recovery_tokens(cell: Cell, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor] | None:
    """(what recovery is trained on, what its loss is told on), (sequences, length) each; None where nothing is recovered.

    Neither was read to prune, where both are sequences of one length of one text.
    Raises RequestError when the text is too short for all of it.
    """
    asked, before = of_recovery(cell), cell.calibration
    if asked is None:
        return None
    same = before is not None and replace(before, sequences=1, sequential=True) == replace(asked, sequences=1)
    read = before.sequences if same and before is not None else 0
    stream = calibration_stream(asked, tokenizer, cell.data_root)
    available = len(stream) // asked.length
    if available < read + asked.sequences:
        wanted = asked.sequences - kinds.HELD_OUT
        raise RequestError(
            f"recover.text.source={asked.source} gives {available} sequences of {asked.length} tokens, {read} of which "
            f"pruning reads; recover={cell.recover.name} asks for {wanted} and holds out {kinds.HELD_OUT}. Lower "
            "recover.text.sequences or recover.text.length, or name more text"
        )
    drawn = calibration_tokens(replace(asked, sequences=read + asked.sequences), tokenizer, cell.seed, cell.data_root)
    return drawn[read : -kinds.HELD_OUT], drawn[-kinds.HELD_OUT :]


def calibration_stream(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, data_root: str | None = None
) -> Tensor:
    """The whole calibration text, (tokens,) int64."""
    import torch

    from sweep.models import token_ids

    stream = token_ids.stream(tokenizer, calibration_text(settings, data_root))
    return torch.from_numpy(token_ids.Rows.of(tokenizer)(stream))
