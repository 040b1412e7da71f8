"""The language model inside a model of more than text, such as one that sees images, as a model of its own."""

from __future__ import annotations

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from sweep.models import transformers_private
from sweep.settings import RequestError


@torch.no_grad()
def language_model(whole: PreTrainedModel) -> PreTrainedModel:
    """The decoder of text inside `whole`, with its head, which share their tensors with it: to be pruned, saved, measured.

    Raises RequestError where there is none, or it does not say of a text what the whole model says.
    """
    config, name = whole.config.get_text_config(decoder=True), type(whole).__name__
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or config is whole.config:
        raise RequestError(f"{name} holds no language model that transformers builds by itself ({config.model_type})")
    inside = [m for m in whole.modules() if isinstance(m, PreTrainedModel) and isinstance(m.config, type(config))]
    found = next((m for m in inside if isinstance(m, kind)), None)
    if found is None:
        found = transformers_private.built(kind, config, whole.dtype)
        try:
            found.base_model.load_state_dict(inside[0].state_dict(), assign=True)
        except (IndexError, RuntimeError) as error:
            raise RequestError(f"the language model of {name} is not built as a {kind.__name__}: {error}") from error
        head = whole.get_output_embeddings()
        tied = head.weight is whole.get_input_embeddings().weight
        found.get_output_embeddings().weight = found.get_input_embeddings().weight if tied else head.weight
    found.eval()
    ids = torch.arange(3, 14, device=whole.device)[None] % whole.get_input_embeddings().weight.shape[0]
    said, wanted = (model(input_ids=ids, use_cache=False).logits.float() for model in (found, whole.eval()))
    if said.shape != wanted.shape or not torch.allclose(said, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
        raise RequestError(f"the language model of {name} alone does not say what the whole model says of a text")
    return found
