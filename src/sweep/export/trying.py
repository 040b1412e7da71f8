"""What llama.cpp makes of a file: whether it loads, splits text as the tokenizer does, and computes what the model does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.export import gguf_types, gguf_vocabulary
from sweep.models import cut_tokenizer, trial
from sweep.settings import RequestError

GREEDY = 64  # tokens
_PROMPT = 16  # tokens


def check_installed() -> None:
    """Raises RequestError where llama.cpp's Python package is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise RequestError(
            "a GGUF file counts as written once llama.cpp has loaded it and computes the same, and its package is not "
            "installed: pip install 'sweep-pruning[gguf]', which builds it (a compiler and some minutes)"
        )


def _asked(file: Path, **request: Any) -> dict[str, Any]:
    """What llama.cpp says of a file. Raises RequestError with its last words where it does not load it."""
    given = {"file": str(file), "threads": torch.get_num_threads(), **request}
    done = subprocess.run(
        [sys.executable, "-m", "sweep.export.in_llama_cpp"], input=json.dumps(given), capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word of why"]
        words = next((line for line in lines if "error" in line.lower() or "ASSERT" in line), lines[-1])
        raise RequestError(f"llama.cpp does not take the file that was written: {words.strip()[:300]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def reads(file: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp gives the tokenizer's ids, by a file that holds at least the vocabulary.

    Of another way of splitting it may end the process, which is a no.
    """
    texts = _texts(tokenizer)
    try:
        return bool(_asked(file, texts=texts)["ids"] == [_ids(tokenizer, text) for text in texts])
    except RequestError:
        return False


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that tell ways of splitting apart; of a cut vocabulary those of whose tokens all are left."""
    whole, kept = cut_tokenizer.original(tokenizer), cut_tokenizer.kept_ids(tokenizer)
    parts = gguf_vocabulary.SAMPLE.split(" ")
    texts = [gguf_vocabulary.SAMPLE, *(" ".join(parts[i : i + 2]) for i in range(len(parts))), *parts]
    left = None if kept is None else set(kept)
    return [
        text
        for text in texts
        if text and (left is None or left.issuperset(whole(text, add_special_tokens=False)["input_ids"]))
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def compare(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, kind: str
) -> dict[str, float]:
    """Raise RequestError unless llama.cpp reads text and computes as the model does, which has the values of the file.

    kind     of the file, in `gguf_types.TYPES`
    returns  `apart`, how far the logits are from the model's, of the largest; `rounding`, how far the model's own are once
             what matrices read is rounded as llama.cpp does; `greedy`, how many tokens of the continuation are the same

    Logits may be apart by what is declared for the kind, or by twice what rounding alone does to this model where that is
    more: a model that lost heads or blocks can carry it further than the dense one. A continuation may part from ours only where the two best tokens are no further apart than that.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, rows, (_PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [] if tokenizer is None else _texts(tokenizer)
    if tokenizer is not None and (known := _ids(tokenizer, texts[0])[:_PROMPT] if texts else []):
        prompt = known
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "logits.npy"
        request = {"prompt": prompt, "greedy": GREEDY, "logits": str(place), "texts": texts}
        answer = _asked(file, **request)
        theirs = torch.from_numpy(np.load(place))
    for text, ids in zip(texts, answer["ids"], strict=True):
        if tokenizer is not None and ids != _ids(tokenizer, text):
            raise RequestError(
                f"llama.cpp splits {text!r} into other tokens than the tokenizer does: nothing is written"
            )
    ours = logits(model, prompt)
    apart = trial.apart(theirs, ours)
    with gguf_types.reading(model, kind):
        rounding = trial.apart(logits(model, prompt), ours)
    tolerance = gguf_types.TYPES[kind].tolerance
    if rounding < 1:  # what is more is no rounding: float16 ends at 65504
        tolerance = max(tolerance, 2 * rounding)
    if not apart <= tolerance:
        raise RequestError(
            f"llama.cpp's logits are {apart:.2g} of the largest from the model's, more than {tolerance:.2g}: nothing is written"
        )
    same = _same(model, prompt, answer["greedy"], tolerance)
    return {"apart": apart, "rounding": rounding, "greedy": same}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """(tokens, rows) float32."""
    with trial.evaluated(model):
        return model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].float().cpu()


def _same(model: PreTrainedModel, prompt: Sequence[int], theirs: Sequence[int], tolerance: float) -> int:
    """How many tokens of a continuation are the model's own greedy ones. Raises RequestError where another is no tie."""
    found = logits(model, [*prompt, *theirs[:-1]])[len(prompt) - 1 :]
    for number, (token, row) in enumerate(zip(theirs, found, strict=True)):
        best = int(row.argmax())
        if token != best:
            gap = float(row[best] - row[token]) / float(found.abs().max())
            if gap > 2 * tolerance:
                raise RequestError(
                    f"llama.cpp goes on with another token than the model after {number} tokens: nothing is written"
                )
            return number
    return len(theirs)
