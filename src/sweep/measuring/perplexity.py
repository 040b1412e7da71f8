"""The perplexity that pruning papers report: one concatenated text, fixed windows, exp of the mean loss.

It is another number than a task's perplexity. The whole text is one stream of tokens, which one BOS begins where the
tokenizer adds one, as in the papers' scripts; windows of `seqlen` tokens do not overlap, the rest that fills no window is
dropped, and the first token of a window is not predicted, nor is a special token that stands in the text. What is joined
by what differs between data sets and changes the number, as does the window; both are in the row.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sweep.config import Model, Perplexity
from sweep.measuring import positions, words
from sweep.models import decoders, origin
from sweep.settings import RequestError
from sweep.texts import corpora, text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sweep.measuring.reading import Reading

_C4_WINDOWS = 256  # as SparseGPT and Wanda take them


def check(settings: Perplexity, data_root: str | None, model: Model) -> dict[str, str]:
    """The text's fingerprint by its name; empty where no perplexity is asked for.

    Raises RequestError when the text cannot be found, or when a window is longer than the model can read.
    """
    if settings.source is None:
        return {}
    longest = decoders.size(origin.shape(model), "positions")
    if longest and settings.seqlen > longest:
        raise RequestError(
            f"perplexity.seqlen={settings.seqlen} is more than the {longest} positions of {model.name}: "
            f"use at most {longest}"
        )
    source = settings.source
    found = text.facts(source, lambda: joined(source, data_root), "perplexity", data_root).fingerprint
    return {f"perplexity:{name(settings)}": f"{source}:{found}" if source in corpora.EVALUATED else found}


def name(settings: Perplexity) -> str:
    """How the text is called in columns: wikitext2, c4, or the name of the file without its suffix."""
    assert settings.source is not None
    return settings.source if settings.source in corpora.EVALUATED else Path(settings.source).stem


def joined(source: str, data_root: str | None) -> str:
    """The concatenated text: "wikitext2" (raw test split), "c4" (opening of the validation split) or a text file."""
    if source in corpora.EVALUATED:
        return corpora.joined(corpora.EVALUATED[source], data_root, f"perplexity.source={source}")
    return text.read_file(source, "perplexity.source", "wikitext2, c4 or a text file")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Perplexity,
    data_root: str | None,
    batch_size: int,
    read: Reading | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(columns of the row, the mean loss of every window as samples); both empty where none is asked for.

    read  how the model reads the windows; None = each batch of them from end to end
    Raises RequestError when the text fills no window. A loss that is no number is recorded, with a warning.
    """
    if settings.source is None:
        return {}, pd.DataFrame()
    from sweep.measuring import reading, scorer
    from sweep.models import token_ids

    windows = _windows(settings, tokenizer, data_root)
    count = len(windows)
    told = ~np.isin(windows[:, 1:], token_ids.special(tokenizer))
    rows = token_ids.Rows.of(tokenizer, token_ids.embedded(model))
    scored = scorer.score(
        model,
        [(window, settings.seqlen - 1) for window in rows(windows).tolist()],
        batch_size * scorer.TOKENS_PER_ROW,
        widest=0,
        rows=rows,
        read=read or reading.whole,
    )
    losses = np.array(
        [-scores.log_probs[here].mean(dtype=np.float64) for scores, here in zip(scored, told, strict=True)]
    )
    mean, called = float(losses.mean()), name(settings)
    by_position = positions.columns([-scores.log_probs for scores in scored], [*told], settings.seqlen)
    value = words.exp(mean)
    if not math.isfinite(value):
        warnings.warn(f"{called}/perplexity is {value}", stacklevel=2)
    error = float(losses.std(ddof=1) / math.sqrt(count) * value) if count > 1 else None  # by the delta method
    samples = pd.DataFrame(
        {"task": called, "document": [str(i) for i in range(count)], "metric": "loss", "value": losses}
    )
    return {
        **{f"{called}/{metric}": number for metric, number in by_position.items()},
        f"{called}/perplexity": value,
        f"{called}/perplexity_stderr": error,
        "perplexity_tokens": count * settings.seqlen,
        "perplexity_windows": count,
        "perplexity_join": repr(
            corpora.EVALUATED[settings.source].join if settings.source in corpora.EVALUATED else ""
        ),
    }, samples


def _windows(settings: Perplexity, tokenizer: PreTrainedTokenizerBase, data_root: str | None) -> NDArray[np.int64]:
    """(windows, seqlen) the tokens of the text. Raises RequestError where they fill no window."""
    from sweep.models import token_ids

    assert settings.source is not None
    stream = token_ids.stream(tokenizer, joined(settings.source, data_root))
    count = len(stream) // settings.seqlen
    if settings.source == "c4":
        count = min(count, _C4_WINDOWS)
    if not count:
        raise RequestError(
            f"perplexity.source={settings.source} has {len(stream)} tokens, which fill no window of "
            f"perplexity.seqlen={settings.seqlen}: lower it, or give a longer text"
        )
    count = min(count, settings.windows or count)
    return np.array(stream[: count * settings.seqlen]).reshape(count, settings.seqlen)
