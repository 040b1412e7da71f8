"""sweep's own format of checkpoints, written and read: models whose blocks differ in width, whose vocabulary was cut, or
whose matrices are packed, which transformers' format cannot say.

The weights lie in safetensors as always, under the names that the modules have, and their shapes are the model's. Beside
them `sweep.json` says what else the configuration does not: which token ids are left, which layers are packed in which
format, and what modules keep or lack (`differences`). No code is stored. The tokenizer of a cut vocabulary lies in a
folder of its own, so that nobody reads the old ids from it by accident.

What was written is read again and compared with the model in memory before it counts, in either format.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from sweep.formats.declared import FORMATS, Stored
from sweep.formats.packing import DenseMatrix, PackedLinear, packed
from sweep.models import (
    anatomy,
    cut_tokenizer,
    differences,
    headers,
    layers,
    origin,
    placing,
    pretrained,
    scratch,
    transformers_private,
    trial,
)
from sweep.settings import RequestError

FILE = headers.SWEEP_FILE
FORMAT = 1  # of a folder with a cut vocabulary alone
DIFFERS = 10  # of one that tells what the model is beyond its configuration, or whose experts are packed
_STORED: dict[str, Stored] = {form.name: form.stored for form in FORMATS.values() if form.stored}
_READ = sorted({FORMAT, DIFFERS, *(entry.version for entry in _STORED.values())})
_TOKENIZER = "tokenizer"  # folder
_SHARD = "1GB"  # of a file of a model that lies on the disk: while one is written, nothing of it is let go
logger = logging.getLogger(__name__)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether transformers builds this model from the configuration and tensors of these shapes alone."""
    if packed(model) or _answers(model):
        return False
    with scratch.paused():
        built = transformers_private.built(type(model), model.config, model.dtype)
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (built, model)]
    return shapes[0] == shapes[1] and not differences.buffers(built, model) and not differences.between(built, model)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write model and tokenizer so that `load_model` reads them, plainly where transformers' format will do.

    Raises RequestError for what no checkpoint holds, and when what was written is not the model when it is read again.
    """
    for layer in packed(model).values():
        layer.format.check_saves()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:  # whatever the configuration said
        model.config.tie_word_embeddings = False
    kept = None if tokenizer is None else cut_tokenizer.kept_ids(tokenizer)
    if tokenizer is not None:
        cut_tokenizer.original(tokenizer).save_pretrained(folder if kept is None else folder / _TOKENIZER)
    if kept is None and is_plain(model):
        _save(model, folder)
        if not (unlike := _unlike(model, folder)):
            return
        logger.info("transformers' own format does not give the model back (%s): it is written in sweep's", unlike)
    _save(model, folder, *_told_of(model, tokenizer))
    if unlike := _unlike(model, folder):
        raise RequestError(
            f"the model that was written to {folder} is not the one in memory when it is read again: {unlike}. "
            "Nothing is saved"
        )


def _save(
    model: PreTrainedModel,
    folder: Path,
    facts: dict[str, Any] | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model's files: with `sweep.json`, and with tensors beside those of its state, or as transformers does."""
    (folder / FILE).unlink(missing_ok=True)  # of a model that was saved there before
    # with it, under the names that the modules have here; of the class, since its own may lead here: save_pretrained_as_sweep
    size: dict[str, Any] = {"max_shard_size": _SHARD} if scratch.current() else {}
    if facts is None:
        type(model).save_pretrained(model, folder, **size)
        return
    state = None if not beside else {**model.state_dict(), **beside}
    type(model).save_pretrained(model, folder, save_original_format=False, state_dict=state, **size)
    (folder / FILE).write_text(json.dumps(facts), encoding="utf-8")


def _told_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what `sweep.json` says of a model, what of it lies in tensors that no state dict holds)."""
    kept = None if tokenizer is None else cut_tokenizer.kept_ids(tokenizer)
    facts: dict[str, Any] = {"format": FORMAT, "kept_token_ids": kept}
    if kept is not None and tokenizer is not None:
        facts["token_rows"] = cut_tokenizer.rows_before(tokenizer)
    for name, layer in packed(model).items():
        if entry := _STORED.get(layer.format.name):
            facts["format"] = max(facts["format"], entry.version)
            facts.setdefault(entry.key, {})[name] = layer.facts()
    with scratch.paused():
        built = transformers_private.built(type(model), model.config, model.dtype)
    beyond, buffers = differences.between(built, model), differences.buffers(built, model)
    facts["shapes"] = differences.shapes(built, model)  # which the differences have changed by now, as reading does
    more = {"differences": beyond, "stand_ins": placing.facts(model), "answers": _answers(model)}
    if buffers or any(more.values()):
        facts |= {name: found for name, found in more.items() if found} | {"format": max(facts["format"], DIFFERS)}
    return facts, buffers


def _answers(model: PreTrainedModel) -> dict[str, dict[str, list[Any]]]:
    """What parts of the configuration answer in place of their properties, which no file of it says; by name of the part."""
    parts = {"": model.config} | {n: c for n, c in vars(model.config).items() if isinstance(c, PreTrainedConfig)}
    return {name: found for name, part in parts.items() if (found := dict(getattr(type(part), "answers", {})))}


@torch.no_grad()
def _unlike(model: PreTrainedModel, folder: Path) -> str:
    """In what the model of a folder differs from the one in memory; empty where it is the same.

    Compared are the modules and what they keep, every tensor, rounded as it is in memory, and then, with the tensors of
    the one in memory in both, the logits of a few tokens.
    """
    try:
        options: dict[str, Any] = {"trust_remote_code": True} if model.is_remote_code() else {}
        with scratch.paused():  # read where it lies, and not copied to lie beside it
            again, _ = load_model(folder, **options)
        transformers_private.run_alike(again, model)
        if beyond := differences.between(again, model):
            return f"its modules are others ({str(beyond)[:200]})"
    except Exception as error:  # whatever a library says of a model that it cannot build
        return headers.first_line(error)
    read, held = again.state_dict(), model.state_dict()
    others = [name for name in held if name not in read or not differences.same(read[name], held[name])]
    if others := [*others, *differences.buffers(again, model)]:
        return f"{len(others)} of its tensors are others ({headers.some(others)})"
    differences.set_tensors(again, held | dict(model.named_buffers()))
    again.tie_weights()
    ids = torch.randint(
        0, model.get_input_embeddings().weight.shape[0], (2, 8), generator=torch.Generator().manual_seed(0)
    )
    expected = _logits(model, ids.to(model.device))
    try:
        got = _logits(again, ids.to(model.device))
    except Exception as error:  # heads of another size than the configuration's, for one
        return f"it cannot be run ({headers.first_line(error)})"
    off = trial.apart(got, expected)  # where tensors lie decides in which order some products are summed
    return "" if off <= trial.tolerance(model) else f"its logits are {off:.2g} of the largest apart"


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(sequences, tokens, rows) float32."""
    with trial.evaluated(model):
        found = model(input_ids=ids, use_cache=False).logits
    return found.float().nan_to_num()  # what is no number is to be so in both


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
    """The model of a folder with `sweep.json`; on the device "meta" without its numbers.

    Its tensors have the shapes that are stored, and the dtypes unless another is asked for.
    """
    weights = pretrained.tensors(path, place)
    config = AutoConfig.from_pretrained(path, **options)
    for part, answers in facts.get("answers", {}).items():
        layers.answer_with(getattr(config, part) if part else config, answers)
    stored = config.dtype or torch.float32
    with scratch.paused(), torch.device(place), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=stored if dtype == "auto" else dtype, **options)
    model.tie_weights()
    try:
        differences.make(model, facts.get("differences", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path / FILE} is damaged: it does not fit the model of config.json ({error})") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    matrices = _packed_layers(weights, facts, model.dtype)
    placing.put_read(model, matrices, facts.get("stand_ins", {}))
    own = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in matrices}
    copied = scratch.current() is None  # what is read lies in the file still; there, it is copied where it is set
    for name, tensor in weights.items():
        kept = dtype == "auto" or tensor.dtype != stored  # such as a router's, which are wider than the rest
        weights[name] = tensor.to(
            tensor.dtype if kept else own[name].dtype if name in own else model.dtype, copy=copied
        )
    told = {
        "missing_keys": own.keys() - weights.keys() - getattr(model, "all_tied_weights_keys", {}).keys(),
        "unexpected_keys": differences.set_tensors(model, weights),
        "mismatched_keys": _of_other_shapes(weights, facts.get("shapes"), shapes),
    }
    pretrained.refuse(told, str(path))
    model.tie_weights()
    if facts["format"] < DIFFERS:
        _count_anew(model, {name for name, tensor in model.state_dict().items() if tensor.shape != shapes.get(name)})
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
    for stands in facts.get("stand_ins", {}).values():  # of experts some matrices may be dense
        for name in stands["matrices"]:
            if name not in found:
                found[name] = DenseMatrix(weights.pop(f"{name}.matrix").to(dtype))
    return found


def _of_other_shapes(
    weights: Mapping[str, Tensor], told: Mapping[str, list[int]] | None, shapes: Mapping[str, torch.Size]
) -> list[tuple[str, torch.Size, torch.Size]]:
    """The tensors of a folder that have another shape than they should: as what it says of them, or else as the model.

    told    by the folder, by name; None by an older one, whose tensors may have any
    shapes  by name, of the model without its tensors
    """
    if told is None:
        return []
    return [
        (name, tensor.shape, shapes[name])
        for name, tensor in weights.items()
        if name in shapes and list(tensor.shape) != told.get(name, list(shapes[name]))
    ]


def _count_anew(model: PreTrainedModel, cut: Collection[str]) -> None:
    """Of a folder that does not say what its modules keep: what follows from the shapes of their matrices.

    cut  the names of the tensors whose shapes are not those that the configuration builds
    """
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif any(f"{path}.{child}.weight" in cut for child, _ in module.named_children()):
            _count_heads(module)


def _count_heads(module: nn.Module) -> None:
    """Have an attention module keep the numbers that follow from the shapes of its matrices; another module is left."""
    size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    own = dict(module.named_children())
    output = next((own[name] for name in ("o_proj", "out_proj", "dense", "c_proj") if name in own), None)
    if not size or not isinstance(output, nn.Linear | Conv1D):
        return
    heads = anatomy.weight(output).shape[1] // size
    groups = anatomy.weight(own["k_proj"]).shape[0] // size if "k_proj" in own else heads
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": groups}
    counts |= {"num_key_value_groups": heads // groups, "split_size": heads * size}
    for name, count in counts.items():
        if hasattr(module, name):
            setattr(module, name, count)
