"""Models whose blocks differ in width, or whose vocabulary was cut, as folders: what transformers' format lacks.

The weights lie in safetensors as always. `sweep.json` beside them says that their shapes, not the configuration's, are
the model's, and which token ids are left. No code is stored. The tokenizer of a cut vocabulary lies in a folder of its
own, so that nobody reads the old ids from it by accident.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sweep import heads, models, surgery, vocabulary
from sweep.config import RequestError

FILE = "sweep.json"
FORMAT = 1
_TOKENIZER = "tokenizer"  # folder


def is_plain(model: PreTrainedModel) -> bool:
    """Whether transformers builds a model of these shapes from the configuration alone."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.config)
    shapes = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (built, model))
    return next(shapes) == next(shapes) and _head_counts(built) == _head_counts(model)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer so that `load_model` reads them, plainly where transformers' format will do."""
    kept = vocabulary.kept_ids(tokenizer)
    plain = kept is None and is_plain(model)
    model.save_pretrained(folder, save_original_format=plain)  # else under the names that the modules have here
    vocabulary.original(tokenizer).save_pretrained(folder if kept is None else folder / _TOKENIZER)
    if plain:
        return
    facts = {"format": FORMAT, "kept_token_ids": kept}
    (folder / FILE).write_text(json.dumps(facts), encoding="utf-8")


def load_model(
    folder: str | Path, dtype: str | None = None, device: str = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a checkpoint folder in evaluation mode, and its tokenizer, whatever pruning left of it.

    dtype    such as "bfloat16"; None = as saved
    options  for transformers' from_pretrained
    Raises RequestError when there is no such checkpoint, or when a newer version has written it.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise RequestError(f"{folder} is no checkpoint: there is no config.json in it")
    kind = getattr(torch, dtype) if dtype else "auto"
    if not (path / FILE).is_file():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **options)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(path, **options)
    facts = json.loads((path / FILE).read_text(encoding="utf-8"))
    if facts["format"] != FORMAT:
        raise RequestError(f"{path / FILE} has format {facts['format']}, and this version of sweep reads {FORMAT}: "
                           "install the version that wrote it")  # fmt: skip
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    config = AutoConfig.from_pretrained(path, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=kind if dtype else config.dtype)
    _take_shapes(model, weights)
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    model.tie_weights()
    if absent := missing - set(getattr(model, "all_tied_weights_keys", {})):
        raise RequestError(f"{path}: the weights lack {', '.join(sorted(absent))}; the checkpoint is damaged")
    kept = facts["kept_token_ids"]
    tokenizer = AutoTokenizer.from_pretrained(path if kept is None else path / _TOKENIZER, **options)
    return model.to(device).eval(), tokenizer if kept is None else vocabulary.remapped(tokenizer, kept)


def _take_shapes(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give the linear layers the shapes of the stored weights, and the attention modules the counts that follow."""
    for name, module in model.named_modules():
        stored = weights.get(f"{name}.weight")
        if not isinstance(module, nn.Linear | Conv1D) or stored is None:
            continue
        bias = weights.get(f"{name}.bias")
        if stored.shape != module.weight.shape:
            module.weight = nn.Parameter(stored.to(module.weight.dtype))
        if bias is not None and (module.bias is None or bias.shape != module.bias.shape):
            module.bias = nn.Parameter(bias.to(module.weight.dtype))
        if isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        else:
            module.out_features, module.in_features = module.weight.shape
    for attention in heads.attentions(model):
        surgery.set_head_counts(attention)


def _head_counts(model: PreTrainedModel) -> list[tuple[int, int, int]] | None:
    """Equal shapes do not make equal heads: eight of size 16 are as wide as four of size 32."""
    if model.config.model_type not in models.ARCHITECTURES:
        return None
    return [(a.heads, a.groups, a.head_dim) for a in heads.attentions(model)]
