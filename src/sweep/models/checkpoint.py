"""sweep's own format of checkpoints, written and read: models whose blocks differ in width, whose vocabulary was cut, or
whose matrices are packed, which transformers' format cannot say.

The weights lie in safetensors as always. `sweep.json` beside them says that their shapes, not the configuration's, are
the model's, which token ids are left, and which layers are packed in which format. No code is stored. The tokenizer of a
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

from sweep.formats.declared import FORMATS, Stored
from sweep.formats.packing import DenseMatrix, PackedLinear, packed
from sweep.models import cut_tokenizer, headers, origin, parts, placing, pretrained, surgery
from sweep.settings import RequestError

FILE = headers.SWEEP_FILE
FORMAT = 1  # of a folder without packed layers
_STORED: dict[str, Stored] = {form.name: form.stored for form in FORMATS.values() if form.stored}
_READ = sorted({FORMAT, *(entry.version for entry in _STORED.values())})
_TOKENIZER = "tokenizer"  # folder


def is_plain(model: PreTrainedModel) -> bool:
    """Whether transformers builds a model of these shapes from the configuration alone."""
    if packed(model):
        return False
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.config)
    shapes = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (built, model))
    return next(shapes) == next(shapes) and _head_counts(built) == _head_counts(model)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write model and tokenizer so that `load_model` reads them, plainly where transformers' format will do.

    Raises RequestError for layers in a format that no checkpoint holds.
    """
    layers = packed(model)
    for layer in layers.values():
        layer.format.check_saves()
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
    for name, layer in layers.items():
        if isinstance(layer, DenseMatrix):
            continue
        entry = _STORED[layer.format.name]
        facts["format"] = max(facts["format"], entry.version)
        facts.setdefault(entry.key, {})[name] = layer.facts()
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

    Raises RequestError. Packed layers are left to loading.
    """
    facts = _facts(folder)
    if not any(facts.get(entry.key) for entry in _STORED.values()):
        _load_own(folder, facts, "auto", place="meta")
    pretrained.check_finite(folder)
    return _tokenizer(folder, facts)


def _facts(path: Path) -> dict[str, Any]:
    """What `sweep.json` says; empty where there is none."""
    if not (path / FILE).is_file():
        return {}
    facts = origin.read_json(path / FILE)
    if facts.get("format") not in _READ:
        raise RequestError(
            f"{path / FILE} has format {facts.get('format')}, and this version of sweep reads "
            f"{' and '.join(map(str, _READ))}: install the version that wrote it"
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
    layers = _packed_layers(weights, facts, model.dtype)
    _take_shapes(model, weights, layers)
    placing.put_read(model, layers)
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
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


def _packed_layers(weights: dict[str, Tensor], facts: dict[str, Any], dtype: torch.dtype) -> dict[str, PackedLinear]:
    """The packed layers of a folder, by name, to multiply in this dtype. Takes their tensors out of `weights`."""
    found = {}
    for form, entry in _STORED.items():
        layers = facts.get(entry.key)
        if not layers:
            continue
        FORMATS[form].check_dtype(str(dtype).removeprefix("torch."))
        packing = FORMATS[form].packing("auto", dtype)
        assert packing.read is not None
        if packing.lacks:
            warnings.warn(f"layers in the format {form} run slowly: {packing.lacks}", stacklevel=4)
        parts: dict[str, list[str]] = {name: [] for name in layers}
        for full in weights:
            name, _, part = full.rpartition(".")
            if name in parts:
                parts[name].append(part)
        for name, its in layers.items():
            tensors = {part: weights.pop(f"{name}.{part}") for part in parts[name]}
            try:
                layer = packing.read(tensors, its)
                if other := tensors.keys() - layer.state_dict().keys():
                    raise ValueError(f"{', '.join(sorted(other))} is none of its tensors")
            except (KeyError, ValueError) as error:
                what = f"it has no tensor {error}" if isinstance(error, KeyError) else error
                raise RequestError(f"layer {name} of the checkpoint is damaged: {what}") from error
            found[name] = layer
    return found


def _take_shapes(model: PreTrainedModel, weights: dict[str, Tensor], layers: dict[str, PackedLinear]) -> None:
    """Give the linear layers the shapes of the stored weights, and the attention modules the counts that follow."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        stored, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        if name in layers:  # whose place the module keeps until the counts are known
            matrix = torch.empty((layers[name].out_features, layers[name].in_features), device="meta")
            stored = matrix.t() if isinstance(module, Conv1D) else matrix
        if stored is None:
            continue
        if stored.shape != module.weight.shape:
            module.weight = nn.Parameter(stored.to(module.weight.dtype))
        if bias is not None and (module.bias is None or bias.shape != module.bias.shape):
            module.bias = nn.Parameter(bias.to(module.weight.dtype))
        if isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        else:
            module.out_features, module.in_features = module.weight.shape
    for attention in parts.attentions(model) if parts.is_known(model) else ():  # else no head of it was cut
        surgery.set_head_counts(attention)


def _head_counts(model: PreTrainedModel) -> list[tuple[int, int, int]] | None:
    """Equal shapes do not make equal heads: eight of size 16 are as wide as four of size 32."""
    if not parts.is_known(model):
        return None
    return [(a.heads, a.groups, a.head_dim) for a in parts.attentions(model)]
