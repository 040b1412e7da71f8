"""Load a model: from the hub, a folder or a GGUF file, whole or not at all."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sweep import cache
from sweep.config import Model
from sweep.models import checkpoint, headers, origin, pretrained
from sweep.models.decoders import DECODERS
from sweep.settings import RequestError

log = logging.getLogger(__name__)


_DECODERS = {
    *DECODERS,
    "gpt_neox_japanese",
    "trocr",
}  # some of whose configurations have an is_decoder that nothing reads


def load(model: Model, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer.

    A GGUF file is converted to safetensors once; afterwards the cached conversion is loaded.
    Raises RequestError when files are missing or damaged, when they do not hold the whole model, when its weights are
    quantised or not finite, and when it is no decoder.
    """
    place: Path | str
    if model.source == "gguf":
        place = converted(origin.gguf_file(model))
    elif model.source == "local":
        place = origin.checkpoint_folder(model)
    else:
        place = model.name
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.source == "hub":
        options["revision"] = model.revision or "main"
    try:
        check_decoder(AutoConfig.from_pretrained(place, **options), str(place))
        if isinstance(place, Path) and (place / headers.SWEEP_FILE).is_file():
            loaded, tokenizer = checkpoint.load_model(place, dtype, **options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            loaded = pretrained.load(place, getattr(torch, dtype), **options)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"model {model.name} cannot be loaded from {place}: {_first_line(error)}") from error
    if tokenizer is None:
        raise RequestError(f"model {model.name}: {place} holds no tokenizer: save the model with sweep.save")
    loaded = loaded.to(device).eval()
    if wrong := pretrained.not_finite(loaded.named_parameters()):
        advice = "try dtype=bfloat16 or float32" if dtype == "float16" else "the checkpoint is damaged"
        raise RequestError(
            f"{place} has NaN or infinite numbers in {len(wrong)} of its tensors ({headers.some(wrong)}) as "
            f"{dtype}: {advice}"
        )
    _check_causal(loaded, str(place))
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
        return AutoTokenizer.from_pretrained(converted(origin.gguf_file(model)))
    folder = headers.folder_of(model)
    if folder is None or model.trust_remote_code:
        return None
    place, options = (
        (str(folder), {}) if model.source == "local" else (model.name, {"revision": model.revision or "main"})
    )
    try:
        check_decoder(AutoConfig.from_pretrained(folder), place)
        if (folder / headers.SWEEP_FILE).is_file():
            return checkpoint.check(folder)
        if model.source == "local" or headers.is_whole(folder):
            pretrained.check(folder)
        return AutoTokenizer.from_pretrained(place, **options)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"model {model.name} cannot be loaded from {place}: {_first_line(error)}") from error


def check_decoder(config: PreTrainedConfig, place: str) -> None:
    """Refuse a model that does not predict the next token of a text. Raises RequestError."""
    kind, name = config.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder and a decoder"
    elif getattr(config, "is_decoder", True) is False and kind not in _DECODERS:
        what = "an encoder, whose tokens see those after them (is_decoder is false)"
    elif name is None and not hasattr(config, "auto_map"):
        what = "no language model"
    elif name is not None and name.endswith("ForConditionalGeneration"):
        what = "a model of more than text"
    else:
        return
    raise RequestError(
        f"{place} is {what} ({kind}); sweep prunes decoders that predict the next token of a text, such as "
        f"{', '.join(list(DECODERS)[:4])}: give one of these"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer with no token to begin a text, whose first token lm-eval predicts from it. Raises RequestError."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RequestError(
            f"the tokenizer of {place} has neither a BOS nor an EOS token, and benchmarks need one to begin a "
            "text with: name it as bos_token or eos_token in tokenizer_config.json, or measure no "
            "benchmarks (benchmarks.tasks=[])"
        )


@torch.inference_mode()
def _check_causal(model: PreTrainedModel, place: str) -> None:
    """Refuse a model whose logits change with tokens that come later: its likelihood of a text is none.

    Tried on two texts that differ in their last token. What differs before it in a decoder is rounding.
    """
    size = model.get_input_embeddings().weight.shape[0]
    texts = torch.linspace(0, size - 1, 5, device=model.device).long()
    one, other = (
        model(input_ids=texts[list(pick)].unsqueeze(0), use_cache=False).logits[0, :3].float()
        for pick in ((1, 2, 3, 0), (1, 2, 3, 4))
    )
    if (one - other).abs().max() > 8 * torch.finfo(model.dtype).eps * one.abs().max():
        raise RequestError(
            f"{place} is no decoder: what it says of a token changes with the tokens after it. sweep prunes "
            "decoders that predict the next token of a text"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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
        raise RequestError(f"model file {gguf} is damaged and cannot be converted: {_first_line(error)}") from error
    # Left in place, these make save_pretrained refuse: the weights are no longer quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted checkpoint, as far as its file headers can tell."""
    from safetensors import SafetensorError, safe_open

    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(folder / "model.safetensors", "pt"):  # compares the header with the file's length
            return None
    except SafetensorError as error:
        return f"model.safetensors is damaged ({error})"
