"""A checkpoint in transformers' own format, read whole or not at all: transformers gives random numbers to what is missing,
and says so nowhere but in a log.

What is missing is asked of transformers itself, which knows ties, old names, and what modules make anew. Tried on tensors
without data it tells the same from the files' headers, before a weight is read.

Names are read through what training leaves around them: wrappers of the model or of its modules, and the pairs of torch's
pruning, whose product is the weight.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sweep.models import headers, origin, scratch
from sweep.models.headers import some
from sweep.settings import RequestError

# Of DataParallel and DeepSpeed, Lightning, PEFT; of torch.compile, FSDP and activation checkpointing, around any module.
_AROUND = re.compile(
    r"^(module|_forward_module|base_model\.model)\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|"
    r"_checkpoint_wrapped_module)\."
)
# A pruned weight of torch.nn.utils.prune, and of torch.ao.pruning: its name, and that of its mask.
_PAIRS = (
    (re.compile(r"^(?P<name>.*)_orig$"), "{name}_mask", "{name}"),
    (
        re.compile(r"^(?P<module>.*)\.parametrizations\.(?P<name>\w+)\.original$"),
        "{module}.parametrizations.{name}.0.mask",
        "{module}.{name}",
    ),
)
# Masks and tables that modules make anew: old files hold them still.
_REMADE = re.compile(r"(inv_freq|masked_bias|position_ids|causal_mask|decoder\.version|(attn|attention)\.bias)$")
_ADVICE = (  # by what a name has in it
    (r"lora_|\.base_layer\.", "Merge the adapter first: PeftModel.merge_and_unload()"),
    (
        r"qweight|qzeros|scales|_scale|absmax|quant",
        "The weights are quantised: give the checkpoint that they were made from",
    ),
    (
        r"parametrizations|_orig$|_mask$|weight_[guv]$",
        "Remove the parametrisations, such as prune.remove(module, 'weight'), before saving",
    ),
    (r"v_head\.|score\.|classifier|pooler", "It is a model with another head than a language model's"),
    (
        r"lm_head|embed_out",
        "Save the model with its head, of AutoModelForCausalLM; or, where the head is the embedding, set "
        "tie_word_embeddings to true in config.json",
    ),
)
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    KeyError,
    TypeError,
    RuntimeError,
    OSError,
)

# What headers of safetensors call the types that weights may have; pickles name theirs in torch's words.
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# What of a repository of the hub is fetched to be read from the disk.
_READ = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.tiktoken", "*.jinja"]

Told = Mapping[str, Collection[Any]]  # what transformers says of a checkpoint's tensors: output_loading_info


def load(place: Path | str, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint folder, or of a repository of the hub.

    options  for transformers' from_pretrained
    Raises RequestError when a file is damaged, when the weights are quantised, or when a tensor is missing, unknown, or of
    another shape.
    """
    config = None
    if not isinstance(place, Path) and scratch.current():
        place = Path(snapshot_download(place, revision=options.get("revision"), allow_patterns=_READ))
    if isinstance(place, Path):
        headers.check_folder(place)
        stored = tensors(place, "meta")
        if scratch.current() or _renamed(stored, place) is not None:
            stored = tensors(place)
            model, told = _from_tensors(place, _renamed(stored, place) or stored, dtype=dtype, **options)
            refuse(told, str(place))
            return model
    elif config := origin.hub_config(place, options.get("revision")):
        headers.check_config(config.parent)
    model, told = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    if config and _problems(told):  # the tensors that it has fetched may have other names
        return load(config.parent, dtype, **{**options, "revision": None})
    if config and headers.is_whole(config.parent):
        headers.check_folder(config.parent)
        tensors(config.parent, "meta")
    refuse(told, str(place))
    return model


def check(folder: Path, **options: Any) -> None:
    """Refuse, from the headers of its files, a checkpoint folder that `load` would refuse. Raises RequestError."""
    headers.check_folder(folder)
    found = tensors(folder, "meta")
    _, told = _from_tensors(folder, _renamed(found, folder) or found, dtype="auto", device_map={"": "meta"}, **options)
    refuse(told, str(folder))
    check_finite(folder)


def check_finite(folder: Path) -> None:
    """Refuse a checkpoint folder whose tensors hold NaN or infinite numbers; reads all of it. Raises RequestError."""
    if wrong := not_finite((n, t) for n, t in _each(folder, "cpu") if not _REMADE.search(n)):
        raise RequestError(
            f"{folder} has NaN or infinite numbers in {len(wrong)} of its tensors ({some(wrong)}): the "
            "checkpoint is damaged"
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or infinite numbers. Reads each once, and holds no copy of it."""
    return [
        name
        for name, tensor in tensors
        if tensor.is_floating_point()
        and tensor.numel()
        and not math.isfinite(sum(extreme.item() for extreme in tensor.detach().aminmax()))
    ]


def refuse(told: Told, place: str) -> None:
    """Raise RequestError when transformers tells that tensors do not fit the model, and name some of them."""
    if problems := _problems(told):
        names = " ".join(name for found in problems.values() for name in found)
        advice = next((f". {advice}" for pattern, advice in _ADVICE if re.search(pattern, names)), "")
        raise RequestError(
            f"{place} is not the model that its configuration tells of: "
            + "; ".join(f"{what}: {len(found)} ({some(found)})" for what, found in problems.items())
            + advice
        )


def _problems(told: Told) -> dict[str, list[str]]:
    """What is wrong, and the tensors of which it is true; empty when nothing is."""
    shapes = [f"{name} {tuple(stored)} and not {tuple(wanted)}" for name, stored, wanted in told["mismatched_keys"]]
    unknown = [name for name in told["unexpected_keys"] if not _REMADE.search(name)]
    found = {
        "tensors missing": told["missing_keys"],
        "tensors that are none of its own": unknown,
        "tensors of another shape": shapes,
    }
    return {what: sorted(names) for what, names in found.items() if names}


def _from_tensors(folder: Path, state: dict[str, Tensor], **options: Any) -> tuple[PreTrainedModel, Told]:
    """The model that a folder describes, of these tensors."""
    options.pop("revision", None)
    config = AutoConfig.from_pretrained(folder, **{k: v for k, v in options.items() if k == "trust_remote_code"})
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=options.pop("trust_remote_code", False)))
    model, told = kind.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, told


def tensors(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint folder under the names that they have there; on the device "meta" they have no data.

    Raises RequestError when a file is damaged, and when one of torch holds quantised weights.
    """
    return dict(_each(folder, device))


def _each(folder: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    """`tensors` one by one, so that those of safetensors need not be held together."""
    for file in headers.weight_files(folder):
        try:
            if file.suffix != ".safetensors":
                if scratch.current():
                    raise RequestError(
                        f"offload=disk reads weights where they lie, which {file} does not let it: save the model as "
                        "safetensors"
                    )
                mapped = zipfile.is_zipfile(file)  # which the format of torch before 1.6 cannot be
                found = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
                if other := [name for name, value in found.items() if not isinstance(value, Tensor)]:
                    raise TypeError(f"{some(other)} is no tensor: save the model's state_dict() alone")
                headers.check_types({name: _CODES.get(t.dtype, str(t.dtype)) for name, t in found.items()}, file)
                yield from found.items()
            elif device == "meta":
                yield from ((n, torch.empty(t.shape, device="meta")) for n, t in headers.tensors(file).items())
            elif held := scratch.current():
                yield from held.tensors(file).items()
            else:
                with safe_open(file, "pt") as opened:
                    yield from ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - no mapping
        except _UNREADABLE as error:
            raise RequestError(f"{file} is damaged, or no file of tensors: {headers.first_line(error)}") from error


def _renamed(stored: dict[str, Tensor], place: Path) -> dict[str, Tensor] | None:
    """The tensors under the names that the model's modules have, pruned weights put together; None when all have them.

    Raises RequestError where two are the same module's: nothing says which of them is meant.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        if name in found:
            raise RequestError(
                f"{place} holds {name} twice, once in a wrapper or a pruning pair and once without: leave one out"
            )
        found[name] = tensor

    for name, tensor in stored.items():
        while (inner := _AROUND.sub("", name)) != name:
            name = inner
        add(name, tensor)
    for name in list(found):
        for pair, mask, weight in _PAIRS:
            if (match := pair.match(name)) and (mask := mask.format(**match.groupdict())) in found:
                kept = found.pop(mask)
                original = found.pop(name)
                add(weight.format(**match.groupdict()), original * kept.to(original.dtype))
    return found if found.keys() != stored.keys() else None
