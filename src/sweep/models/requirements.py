"""What a model and its tokenizer must be to be pruned and measured: a decoder of text, and a token to begin a text with."""

from __future__ import annotations

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sweep.models import decoders
from sweep.settings import RequestError

# Decoders whose configuration may have an is_decoder that nothing reads.
_UNREAD = {*decoders.DECODERS, "gpt_neox_japanese", "trocr"}


def check_decoder(config: PreTrainedConfig, place: str) -> None:
    """Refuse a model that does not predict the next token of a text. Raises RequestError."""
    kind, built = config.model_type, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder and a decoder"
    elif getattr(config, "is_decoder", True) is False and kind not in _UNREAD:
        what = "an encoder, whose tokens see those after them (is_decoder is false)"
    elif built is None and not hasattr(config, "auto_map"):
        what = "no language model"
    elif built is not None and built.__name__.endswith("ForConditionalGeneration"):
        what = "a model of more than text"
    else:
        return
    text = config.get_text_config(decoder=True)
    if type(text) is not type(config) and MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None) is not None:
        raise RequestError(
            f"{place} is a model of more than text ({kind}); the language model inside, of type {text.model_type}, can be "
            "pruned: in Python, load the whole by transformers, sweep.language_model(whole).save_pretrained(FOLDER), save "
            "its tokenizer there too, and give that folder"
        )
    raise RequestError(
        f"{place} is {what} ({kind}); sweep prunes decoders that predict the next token of a text, such as "
        f"{', '.join(list(decoders.DECODERS)[:4])}: give one of these"
    )


@torch.inference_mode()
def check_causal(model: PreTrainedModel, place: str) -> None:
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer with no token to begin a text, whose first token lm-eval predicts from it. Raises RequestError."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RequestError(
            f"the tokenizer of {place} has neither a BOS nor an EOS token, and benchmarks need one to begin a "
            "text with: name it as bos_token or eos_token in tokenizer_config.json, or measure no "
            "benchmarks (benchmarks.tasks=[])"
        )
