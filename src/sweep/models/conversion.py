"""A GGUF file as a checkpoint of transformers: converted when first asked for, and kept in the cache."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweep import cache
from sweep.models import headers, origin, pretrained, transformers_private
from sweep.settings import RequestError

log = logging.getLogger(__name__)


def converted(gguf: Path) -> Path:
    """The folder of `gguf` as a float32 safetensors checkpoint, converted when first asked for.

    float32, because the values that a 4-bit block stands for are exact in it and not in bfloat16.
    Raises RequestError when the GGUF file cannot be read; a damaged conversion is named, dropped and made again.
    """
    key = origin.conversion_key(gguf)
    folder = cache.entry("models", key, lambda half: _convert(gguf, half))
    if problem := _damage(folder):
        log.warning("%s in the cached conversion %s; converting %s again", problem, folder, gguf.name)
        cache.discard(folder)
        folder = cache.entry("models", key, lambda half: _convert(gguf, half))
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
        pretrained.refuse(told, str(gguf))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except RequestError:
        raise
    except Exception as error:  # the reader raises whatever the damaged bytes lead it to
        raise RequestError(
            f"model file {gguf} is damaged and cannot be converted: {headers.first_line(error)}"
        ) from error
    transformers_private.forget_quantiser(model)
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted checkpoint, as far as its file headers can tell."""
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(folder / "model.safetensors", "pt"):  # compares the header with the file's length
            return None
    except SafetensorError as error:
        return f"model.safetensors is damaged ({error})"
