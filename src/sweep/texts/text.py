"""What models are calibrated on, and the fingerprints of every text: deterministic, drawn by the seed alone.

A calibration text is sequences of one source or of several. A source is a text that exists, cut into sequences, or one that
is made: by the model itself, or of random tokens.

`fingerprint` goes into the row: another version of Python, of a package or of a data set may carry other text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sweep import sources
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


Writer: TypeAlias = Callable[[Calibration, int], "Tensor"]  # (what, seed) -> (sequences, length) that the model writes
_MADE_VERSION = 1  # raise when what is made comes out otherwise


class TooShort(RequestError):
    """A text that gives fewer sequences than are asked for."""

    def __init__(self, asked: Calibration, available: int) -> None:
        super().__init__(
            f"calibration.source={asked.source} gives {available} sequences of {asked.length} tokens; "
            f"{asked.sequences} are asked. Lower calibration.sequences or calibration.length"
        )
        self.source, self.available = asked.source, available


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


def calibration_facts(settings: Calibration, data_root: str | None = None) -> Facts | None:
    """Of the whole text of a source, however much of it is drawn; None for what is made.

    Raises what `calibration_documents` raises.
    """
    if settings.source in sources.MADE:
        return None
    place = Calibration(settings.source, subset=settings.subset, split=settings.split, column=settings.column)
    return facts(settings.source, lambda: calibration_text(place, data_root), place, data_root)


def calibration_fingerprint(settings: Calibration, data_root: str | None = None) -> str:
    """Of what sequences are drawn from: texts by what they say, what is made by how it is made, a mix by both and shares.

    Raises what `calibration_documents` raises.
    """
    if settings.source == sources.MIX:
        mixed = zip(parts(settings), settings.sources, strict=True)
        return fingerprint(
            [calibration_fingerprint(part, data_root), each.share, each.temperature] for part, each in mixed
        )
    found = calibration_facts(settings, data_root)
    return found.fingerprint if found else fingerprint([settings.source, _MADE_VERSION])


def calibration_text(settings: Calibration, data_root: str | None = None) -> str:
    """All text of a source that exists. Raises what `calibration_documents` raises."""
    documents, between = calibration_documents(settings, data_root)
    return between.join(documents)


def calibration_documents(settings: Calibration, data_root: str | None = None) -> tuple[Sequence[str], str]:
    """(the documents of a source that exists, what stands between them where they are one text).

    Raises RequestError when there is none, or when its settings contradict it.
    """
    source = settings.source
    if settings.split is not None:
        if source == "pydoc" or source in corpora.CALIBRATION or Path(source).expanduser().is_file():
            raise RequestError(
                f"calibration.split={settings.split} is of a data set of the hub, and calibration.source="
                f"{source} is none: leave the split out, or name the data set, such as "
                "Salesforce/wikitext"
            )
        corpus = corpora.Corpus(source, settings.subset, settings.split, settings.column or "text")
        return corpora.documents(corpus, data_root, f"calibration.source={source}"), corpus.join
    for name in ("subset", "column"):
        if (value := getattr(settings, name)) is not None:
            raise RequestError(
                f"calibration.{name}={value} is of a data set of the hub: add calibration.split, such as "
                "train, or leave it out"
            )
    if source == "pydoc":
        return embedded.pydoc_split().calibration, "\n\n"
    if source in corpora.CALIBRATION:
        corpus = corpora.CALIBRATION[source]
        return corpora.documents(corpus, data_root, f"calibration.source={source}"), corpus.join
    allowed = "pydoc, wikitext2, c4, self, random, mix, a text file, or with calibration.split a data set of the hub"
    return [read_file(source, "calibration.source", allowed)], ""


def parts(settings: Calibration, key: str = "calibration") -> list[Calibration]:
    """The text by its sources, each with the sequences that come from it.

    key  of the group that asks for it, for messages
    Raises RequestError where a source of a mix gives none of so few.
    """
    if settings.source != sources.MIX:
        return [settings]
    taken = sources.order([each.share for each in settings.sources], settings.sequences)
    found = []
    for number, each in enumerate(settings.sources):
        if not (count := taken.count(number)):
            raise RequestError(
                f"{key}.sources: a share of {each.share:g} of {settings.sequences} sequences is none of "
                f"{each.source}: raise {key}.sequences or the share"
            )
        place = {name: getattr(each, name) for name in sources.PLACE}
        found.append(replace(settings, sources=(), sequences=count, **place))
    return found


def check(asked: Calibration, data_root: str | None, key: str, positions: int | None = None) -> None:
    """Refuse a text that is not there, or that is too short whatever the tokenizer: a token is at least one byte.

    key        of the group that asks for it, for messages
    positions  of the model, which writes no further
    """
    for part in parts(asked, key):
        if part.source == sources.SELF and positions is not None and part.length > positions:
            raise RequestError(
                f"{key}.length={part.length} is more than the {positions} positions of the model, which is to write so many "
                f"tokens: lower {key}.length"
            )
        found = calibration_facts(part, data_root)
        if found is not None and found.size < part.sequences * part.length:
            raise RequestError(
                f"{key}.source={part.source} has {found.size} bytes, which cannot give {part.sequences} "
                f"sequences of {part.length} tokens: lower {key}.sequences or {key}.length"
            )


def read_file(source: str, key: str, allowed: str) -> str:
    """The text of a UTF-8 file. Raises RequestError, in the words of the key that names it, when there is none."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise RequestError(f"{key} must be {allowed}; there is no file {source!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{key}: {source} is not UTF-8 text: {error}") from error


def for_cell(cell: Cell, tokenizer: PreTrainedTokenizerBase, write: Writer | None = None) -> Tensor | None:
    """The token ids that a cell's method reads; None for one that reads no text.

    (sequences, length) that the seed draws; for the frequencies of tokens the whole text, (tokens,): rare ones are told
    by much of it.
    """
    if cell.calibration is None:
        return None
    if isinstance(cell.method, Vocab):
        return calibration_stream(cell.calibration, tokenizer, cell.data_root)
    return calibration_tokens(cell.calibration, tokenizer, cell.seed, cell.data_root, write)


def calibration_tokens(
    settings: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    data_root: str | None = None,
    write: Writer | None = None,
) -> Tensor:
    """Calibration sequences, (sequences, length) int64, of which the first are those that fewer would be.

    write  what the model writes itself, where that is asked for
    Raises RequestError when a text is too short for what is asked.
    """
    import torch

    drawn = [_sequences(part, tokenizer, seed, data_root, write) for part in parts(settings)]
    if len(drawn) == 1:
        return drawn[0]
    upcoming = [iter(sequences) for sequences in drawn]
    taken = sources.order([each.share for each in settings.sources], settings.sequences)
    return torch.stack([next(upcoming[number]) for number in taken])


def _sequences(
    asked: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int, data_root: str | None, write: Writer | None
) -> Tensor:
    """Sequences of one source.

    A text is one stream of tokens, or one for each document, cut into sequences without overlap; the seed draws which are
    used.
    """
    import torch

    if asked.source == sources.SELF:
        if write is None:
            raise ValueError("a text that the model writes itself needs the model: pass write")
        return write(asked, seed)
    generator = torch.Generator().manual_seed(seed)
    if asked.source == sources.RANDOM:
        rows = _spelling_rows(tokenizer)
        return rows[torch.randint(len(rows), (asked.sequences, asked.length), generator=generator)]
    whole = [calibration_text(asked, data_root)] if asked.packed else calibration_documents(asked, data_root)[0]
    cut = []
    for text in whole:
        stream = _stream(text, tokenizer)
        cut.append(stream[: len(stream) // asked.length * asked.length].view(-1, asked.length))
    available = sum(map(len, cut))
    if available < asked.sequences:
        raise TooShort(asked, available)
    chosen = torch.randperm(available, generator=generator)[: asked.sequences]
    return torch.cat(cut)[chosen]


def _spelling_rows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that random text is made of: all but those that steer."""
    import numpy as np
    import torch

    from sweep.models import token_ids

    spelling = np.setdiff1d(token_ids.known(tokenizer), token_ids.special(tokenizer))
    return torch.from_numpy(np.unique(token_ids.Rows.of(tokenizer)(spelling)))


def told(settings: Calibration, tokens: Tensor, data_root: str | None = None, before: int = 0) -> list[dict[str, Any]]:
    """Of each source of calibration tokens what it is, its fingerprint, and how many tokens of it were drawn.

    tokens  (sequences, length); what the model wrote itself, and random tokens, have these for a fingerprint
    before  how many sequences were drawn before them
    """
    taken = sources.order([each.share for each in settings.sources] or [1.0], before + settings.sequences)[before:]
    found = []
    for number, part in enumerate(parts(settings)):
        own = tokens if tokens.dim() == 1 else tokens[[i for i, source in enumerate(taken) if source == number]]
        exists = calibration_facts(part, data_root)
        mark = exists.fingerprint if exists else fingerprint(own.tolist())
        found.append({"source": part.source, "fingerprint": mark, "tokens": own.numel()})
    return found


def of_recovery(cell: Cell) -> Calibration | None:
    """The text that recovery reads, of which some is held out; None where nothing is recovered."""
    asked = cell.recover.text
    if cell.recover.name == kinds.NONE or asked.source is None or asked.sequences is None:
        return None
    own = {f.name: getattr(asked, f.name) for f in fields(asked)}
    return Calibration(**own | {"sequences": asked.sequences + kinds.HELD_OUT})


def read_before_recovery(cell: Cell) -> int:
    """How many sequences of recovery's text pruning reads: none where it reads another text, or another length of it."""
    asked, before = of_recovery(cell), cell.calibration
    if asked is None or before is None:
        return 0
    same = replace(before, sequences=1, sequential=True) == replace(asked, sequences=1)
    return before.sequences if same else 0


def is_written(cell: Cell) -> bool:
    """Whether the model is to write any of the texts that its stages read."""
    asked = [settings for settings in (cell.calibration, of_recovery(cell)) if settings is not None]
    return any(part.source == sources.SELF for settings in asked for part in parts(settings))


def recovery_tokens(
    cell: Cell, tokenizer: PreTrainedTokenizerBase, write: Writer | None = None
) -> tuple[Tensor, Tensor] | None:
    """(what recovery is trained on, what its loss is told on), (sequences, length) each; None where nothing is recovered.

    Neither was read to prune, where both are sequences of one length of one text.
    Raises RequestError when the text is too short for all of it.
    """
    asked = of_recovery(cell)
    if asked is None:
        return None
    read = read_before_recovery(cell)
    both = replace(asked, sequences=read + asked.sequences)
    try:
        drawn = calibration_tokens(both, tokenizer, cell.seed, cell.data_root, write)
    except TooShort as error:
        wanted = asked.sequences - kinds.HELD_OUT
        raise RequestError(
            f"recover.text.source={error.source} gives {error.available} sequences of {asked.length} tokens, {read} of which "
            f"pruning reads; recover={cell.recover.name} asks for {wanted} and holds out {kinds.HELD_OUT}. Lower "
            "recover.text.sequences or recover.text.length, or name more text"
        ) from error
    return drawn[read : -kinds.HELD_OUT], drawn[-kinds.HELD_OUT :]


def calibration_stream(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, data_root: str | None = None
) -> Tensor:
    """The whole of a text that exists, (tokens,) int64."""
    return _stream(calibration_text(settings, data_root), tokenizer)


def _stream(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    import torch

    from sweep.models import token_ids

    return torch.from_numpy(token_ids.Rows.of(tokenizer)(token_ids.stream(tokenizer, text)))
