"""Models whose blocks differ in width, whose vocabulary was cut, or whose matrices are compressed, as folders: what
transformers' format lacks.

The weights lie in safetensors as always. `sweep.json` beside them says that their shapes, not the configuration's, are
the model's, which token ids are left, and which layers lie in the bitmap format. No code is stored. The tokenizer of a
cut vocabulary lies in a folder of its own, so that nobody reads the old ids from it by accident.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sweep.formats import bitmap
from sweep.models import anatomy, cut_tokenizer, headers, origin, pretrained, surgery
from sweep.settings import RequestError

FILE = headers.SWEEP_FILE
FORMAT, COMPRESSED_FORMAT = 1, 2  # of a folder without and with compressed layers
_TOKENIZER = "tokenizer"  # folder


def is_plain(model: PreTrainedModel) -> bool:
    """Whether transformers builds a model of these shapes from the configuration alone."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.config)
    shapes = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (built, model))
    return next(shapes) == next(shapes) and _head_counts(built) == _head_counts(model)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write model and tokenizer so that `load_model` reads them, plainly where transformers' format will do."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:  # whatever the configuration said
        model.config.tie_word_embeddings = False
    kept = None if tokenizer is None else cut_tokenizer.kept_ids(tokenizer)
    plain = kept is None and is_plain(model)
    # else under the names that the modules have here; of the class, since its own may lead here: save_pretrained_as_sweep
    type(model).save_pretrained(model, folder, save_original_format=plain)
    if tokenizer is not None:
        cut_tokenizer.original(tokenizer).save_pretrained(folder if kept is None else folder / _TOKENIZER)
    (folder / FILE).unlink(missing_ok=True)  # of a model that was saved there before
    if plain:
        return
    facts: dict[str, Any] = {"format": FORMAT, "kept_token_ids": kept}
    if kept is not None:
        facts["token_rows"] = cut_tokenizer.rows_before(tokenizer)
    compressed = {name: m.in_features for name, m in model.named_modules() if isinstance(m, bitmap.BitmapLinear)}
    facts |= {"format": COMPRESSED_FORMAT, "bitmap_columns": compressed} if compressed else {}
    (folder / FILE).write_text(json.dumps(facts), encoding="utf-8")


def save_pretrained_as_sweep(model: PreTrainedModel) -> None:
    """Have the model's own `save_pretrained` write what `load_model` reads, where transformers' format lacks what it is."""
    model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    if is_plain(model):
        type(model).save_pretrained(model, folder, **options)
        (Path(folder) / FILE).unlink(missing_ok=True)
    elif options:
        raise RequestError(
            f"save_pretrained: this model's blocks differ in width, which transformers' format cannot say, "
            f"and sweep's own knows no {', '.join(options)}: leave it out"
        )
    else:
        write(model, None, Path(folder))


def load_model(
    folder: str | Path, dtype: str | None = None, device: str = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of a checkpoint folder in evaluation mode, and its tokenizer, whatever pruning left of it.

    dtype    such as "bfloat16"; None = as saved
    options  for transformers' from_pretrained
    returns  no tokenizer, None, where the folder holds none
    Raises RequestError when there is no such checkpoint, when it is damaged or does not hold the whole model, or when a
    newer version has written it.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise RequestError(f"{folder} is no checkpoint: there is no config.json in it")
    kind = getattr(torch, dtype) if dtype else "auto"
    facts = _facts(path)
    model = _load_own(path, facts, kind, **options) if facts else pretrained.load(path, kind, **options)
    return model.to(device).eval(), _tokenizer(path, facts, **options)


def check(folder: Path) -> PreTrainedTokenizerBase | None:
    """Refuse, from the headers of its files, a folder with `sweep.json` that `load_model` would refuse; its tokenizer.

    Raises RequestError. Layers in the bitmap format are left to loading.
    """
    facts = _facts(folder)
    if not facts.get("bitmap_columns"):
        _load_own(folder, facts, "auto", place="meta")
    pretrained.check_finite(folder)
    return _tokenizer(folder, facts)


def _facts(path: Path) -> dict[str, Any]:
    """What `sweep.json` says; empty where there is none."""
    if not (path / FILE).is_file():
        return {}
    facts = origin.read_json(path / FILE)
    if facts.get("format") not in (FORMAT, COMPRESSED_FORMAT):
        raise RequestError(
            f"{path / FILE} has format {facts.get('format')}, and this version of sweep reads {FORMAT} and "
            f"{COMPRESSED_FORMAT}: install the version that wrote it"
        )
    return facts


def _tokenizer(path: Path, facts: dict[str, Any], **options: Any) -> PreTrainedTokenizerBase | None:
    kept = facts.get("kept_token_ids")
    place = path if kept is None else path / _TOKENIZER
    if not headers.has_tokenizer(place):
        return None
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    return tokenizer if kept is None else cut_tokenizer.remapped(tokenizer, kept, facts.get("token_rows"))


def _load_own(
    path: Path, facts: dict[str, Any], dtype: torch.dtype | str, place: str = "cpu", **options: Any
) -> PreTrainedModel:
    """The model of a folder with `sweep.json`; on the device "meta" without its numbers."""
    weights = pretrained.tensors(path, place)
    config = AutoConfig.from_pretrained(path, **options)
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    compressed = facts.get("bitmap_columns", {})
    _take_shapes(model, weights)
    _take_compressed(model, weights, compressed)
    own = {
        name: tensor.shape for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in compressed
    }
    told = {
        "missing_keys": own.keys() - weights.keys() - getattr(model, "all_tied_weights_keys", {}).keys(),
        "unexpected_keys": weights.keys() - own.keys(),
        "mismatched_keys": [
            (name, weights[name].shape, shape)
            for name, shape in own.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    pretrained.refuse(told, str(path))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


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
    for attention in anatomy.attentions(model) if anatomy.is_known(model) else ():  # else no head of it was cut
        surgery.set_head_counts(attention)


def _take_compressed(model: PreTrainedModel, weights: dict[str, Tensor], columns: dict[str, int]) -> None:
    """Put the compressed layers in place of the dense ones. Takes their tensors out of `weights`."""
    for name, count in columns.items():
        try:
            mask, values, offsets = (weights.pop(f"{name}.{part}") for part in ("mask", "values", "offsets"))
            bias = weights.pop(f"{name}.bias", None)
            layer = bitmap.BitmapLinear(
                mask,
                values.to(model.dtype),
                offsets,
                columns=count,
                bias=None if bias is None else bias.to(model.dtype),
                kernel="torch",
            )
        except (KeyError, ValueError) as error:
            raise RequestError(f"layer {name} of the checkpoint is damaged: {error}") from error
        model.set_submodule(name, layer)
    if columns:
        _choose_kernel(model)


def _choose_kernel(model: PreTrainedModel) -> None:
    try:
        kernel = bitmap.fastest(model.dtype)
    except bitmap.KernelError as error:
        warnings.warn(f"compressed layers run slowly, expanded for every call: {error}", stacklevel=3)
        return
    for module in model.modules():
        if isinstance(module, bitmap.BitmapLinear):
            module.use(kernel)


def _head_counts(model: PreTrainedModel) -> list[tuple[int, int, int]] | None:
    """Equal shapes do not make equal heads: eight of size 16 are as wide as four of size 32."""
    if not anatomy.is_known(model):
        return None
    return [(a.heads, a.groups, a.head_dim) for a in anatomy.attentions(model)]
