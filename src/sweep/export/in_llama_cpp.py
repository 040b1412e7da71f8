"""A program of its own, since llama.cpp ends the process that gives it a bad file: `python -m sweep.export.in_llama_cpp`
takes a request as JSON on standard input, and prints what llama.cpp says of the file in it as JSON.

request  `file`; `texts` to split; `prompt`, token ids whose logits are asked for, `greedy`, how many tokens to go on by, and
         `logits`, the file that receives (tokens, rows) float32 of the prompt; without a prompt the vocabulary alone is read
answer   `ids` of each text; `greedy`, the tokens of the continuation
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    llama_cpp.llama_backend_init()
    json.dump(_asked(request["file"], request), sys.stdout)


def _asked(file: str, request: dict[str, Any]) -> dict[str, Any]:
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = not request.get("prompt")
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(file.encode(), settings)
    if model is None:
        raise SystemExit("error: it does not load")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    answer: dict[str, Any] = {"ids": [_ids(vocabulary, text) for text in request["texts"]]}
    if request.get("prompt"):
        answer |= _run(model, llama_cpp.llama_vocab_n_tokens(vocabulary), request)
    llama_cpp.llama_model_free(model)
    return answer


def _ids(vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    room = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), False, False)
    return list(room[: max(count, 0)])


def _run(model: Any, rows: int, request: dict[str, Any]) -> dict[str, Any]:
    prompt = request["prompt"]
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(prompt) + request["greedy"]
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.flash_attn_type = 0  # off; keys and values in float32: nothing is rounded but what the file rounds
    settings.type_k = settings.type_v = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    if context is None:
        raise SystemExit("error: no context of it can be made")
    logits = [_next(context, token, rows) for token in prompt]
    np.save(request["logits"], np.stack(logits))
    greedy = [int(logits[-1].argmax())]
    while len(greedy) < request["greedy"]:
        greedy.append(int(_next(context, greedy[-1], rows).argmax()))
    llama_cpp.llama_free(context)
    return {"greedy": greedy}


def _next(context: Any, token: int, rows: int) -> np.ndarray:
    """The logits after one more token."""
    batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
    if status := llama_cpp.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode returned {status}")
    found = llama_cpp.llama_get_logits(context)
    return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (rows,)).copy()


if __name__ == "__main__":
    main()
