"""A model from where it comes: the hub, a folder or a GGUF file, whole or not at all."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sweep.config import Model
from sweep.models import checkpoint, conversion, headers, origin, pretrained, requirements
from sweep.settings import RequestError


def load(model: Model, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer.

    A GGUF file is converted to safetensors once; afterwards the cached conversion is loaded.
    Raises RequestError when files are missing or damaged, when they do not hold the whole model, when its weights are
    quantised or not finite, and when it is no decoder.
    """
    place: Path | str
    if model.source == "gguf":
        place = conversion.converted(origin.gguf_file(model))
    elif model.source == "local":
        place = origin.checkpoint_folder(model)
    else:
        place = model.name
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.source == "hub":
        options["revision"] = model.revision or "main"
    try:
        requirements.check_decoder(AutoConfig.from_pretrained(place, **options), str(place))
        if isinstance(place, Path) and (place / headers.SWEEP_FILE).is_file():
            loaded, tokenizer = checkpoint.load_model(place, dtype, **options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            loaded = pretrained.load(place, getattr(torch, dtype), **options)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"model {model.name} cannot be loaded from {place}: {headers.first_line(error)}") from error
    if tokenizer is None:
        raise RequestError(f"model {model.name}: {place} holds no tokenizer: save the model with sweep.save")
    loaded = loaded.to(device).eval()
    if wrong := pretrained.not_finite(loaded.named_parameters()):
        advice = "try dtype=bfloat16 or float32" if dtype == "float16" else "the checkpoint is damaged"
        raise RequestError(
            f"{place} has NaN or infinite numbers in {len(wrong)} of its tensors ({headers.some(wrong)}) as "
            f"{dtype}: {advice}"
        )
    requirements.check_causal(loaded, str(place))
    return loaded, tokenizer


def quiet() -> None:
    """Have transformers speak up only when something is wrong: it says so in exceptions, and in `check` and `load`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check(model: Model, *, convert: bool = False) -> PreTrainedTokenizerBase | None:
    """Refuse, from the headers of its files, a model that `load` would refuse; its tokenizer, for further checks.

    convert  a GGUF file that was never converted, which else is left to loading
    Raises RequestError. What is not on this machine yet, or runs code of its own, is left to loading: then None.
    """
    if convert and model.source == "gguf":
        return AutoTokenizer.from_pretrained(conversion.converted(origin.gguf_file(model)))
    folder = headers.folder_of(model)
    if folder is None or model.trust_remote_code:
        return None
    place, options = (
        (str(folder), {}) if model.source == "local" else (model.name, {"revision": model.revision or "main"})
    )
    try:
        requirements.check_decoder(AutoConfig.from_pretrained(folder), place)
        if (folder / headers.SWEEP_FILE).is_file():
            return checkpoint.check(folder)
        if model.source == "local" or headers.is_whole(folder):
            pretrained.check(folder)
        return AutoTokenizer.from_pretrained(place, **options)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"model {model.name} cannot be loaded from {place}: {headers.first_line(error)}") from error


@functools.lru_cache
def skeleton(model: Model) -> PreTrainedModel | None:
    """The model without its weights, on the meta device: what it consists of, told before it is loaded.

    None where its configuration is not at hand or does not tell: code of the model's own, blocks of several widths, a
    GGUF file that was never converted, a type that transformers does not know.
    """
    shape = origin.shape(model)
    shrunk = model.source == "local" and (origin.checkpoint_folder(model) / headers.SWEEP_FILE).is_file()
    if "model_type" not in shape or model.trust_remote_code or shrunk:
        return None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    except ValueError:  # loading says why
        return None
