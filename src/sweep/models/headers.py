"""What the files of a checkpoint tell before a weight is read: where the tensors lie, their names, types and shapes, and
what no model to prune can come of. No torch.

A file of safetensors opens with the length of its header, 8 bytes, and the header itself: JSON that gives every tensor's
type, shape and place (https://huggingface.co/docs/safetensors). A folder of several has an index that says what lies where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sweep.config import Model
from sweep.models import origin
from sweep.settings import RequestError

# In the order in which transformers looks for them: the weights, or an index of the files that hold them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.model",
    "*.tiktoken",
)
SWEEP_FILE = "sweep.json"  # beside weights whose shapes transformers' format cannot say
_LENGTH = 8  # bytes that give the length of the header
_POINTER = b"version https://git-lfs"
_FLOATS = {"F64", "F32", "F16", "BF16"}
# What else may lie in a folder without weights that can be read, and what to do.
_OTHERS = {
    "adapter_model.*": "merge the adapter into its model (PeftModel.merge_and_unload) and save that",
    "*.gguf": "give the file itself: model=gguf model.path=FILE",
    "consolidated.*": "convert it to transformers' format",
    "tf_model.h5": "load it with from_pretrained(..., from_tf=True) and save it again",
    "flax_model.msgpack": "load it with from_pretrained(..., from_flax=True) and save it again",
    "*.safetensors": "name the file model.safetensors, or fetch the model.safetensors.index.json that belongs to several",
    "*.bin": "name the file pytorch_model.bin, or fetch the pytorch_model.bin.index.json that belongs to several",
}


class Tensor(NamedTuple):
    dtype: str  # as safetensors writes it: F32, BF16, I8, …
    shape: tuple[int, ...]
    start: int  # byte of the file
    end: int


def check(model: Model) -> None:
    """Refuse a checkpoint whose files tell that it cannot be loaded, or that its weights are none to prune.

    Raises RequestError. A model of the hub is looked at as far as it was fetched before; a GGUF file is read when it is
    converted.
    """
    folder = folder_of(model)
    if folder is None:
        return
    if model.source == "hub":
        check_config(folder)  # the rest may not be here yet
        return
    check_folder(folder)
    cut = folder / "tokenizer"  # of a cut vocabulary
    place = cut if (folder / SWEEP_FILE).is_file() and cut.is_dir() else folder
    if not model.trust_remote_code and not has_tokenizer(place):
        raise RequestError(
            f"{place} holds no tokenizer ({', '.join(TOKENIZERS[:4])}, …): save the model's own there with "
            f"tokenizer.save_pretrained({str(place)!r})"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether any file that a tokenizer is made from lies in the folder."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZERS)


def folder_of(model: Model) -> Path | None:
    """The folder that the model's files lie in; None when there is none yet, or the model is a GGUF file."""
    if model.source == "local":
        return origin.checkpoint_folder(model)
    if model.source == "gguf":
        return None
    found = origin.hub_config(model.name, model.revision)
    return found.parent if found else None


def check_folder(folder: Path) -> None:
    """Refuse quantised weights, adapters, and files that are missing or damaged. Raises RequestError."""
    check_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise RequestError(f"{folder} holds an adapter: {_OTHERS['adapter_model.*']}")
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            check_types({name: tensor.dtype for name, tensor in tensors(file).items()}, file)


def check_config(folder: Path) -> None:
    """Refuse weights that are quantised, as the configuration tells. Raises RequestError."""
    config = origin.read_json(folder / "config.json")
    if quantised := config.get("quantization_config") or config.get("compression_config"):
        method = quantised.get("quant_method", "compressed") if isinstance(quantised, dict) else quantised
        raise RequestError(
            f"{folder} is quantised ({method}), and pruning needs the weights themselves: give the checkpoint "
            "that it was made from, or load it with transformers, call model.dequantize() and save it"
        )


def check_types(dtypes: Mapping[str, str], file: Path) -> None:
    """Refuse weights that are whole numbers or of 8 bits: they are quantised, whatever the configuration says.

    dtypes  of the file's tensors, as safetensors writes them
    Raises RequestError.
    """
    packed = sorted(name for name, dtype in dtypes.items() if name.endswith("weight") and dtype not in _FLOATS)
    if packed:
        raise RequestError(
            f"{file} holds quantised weights ({some(packed)}: {dtypes[packed[0]]}), and pruning needs the "
            "weights themselves: give the checkpoint that it was made from"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, as transformers chooses them.

    Raises RequestError when there are none, or when the index names one that is not there.
    """
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        advice = next(
            (
                f": there is {file.name}; {what}"
                for pattern, what in _OTHERS.items()
                for file in sorted(folder.glob(pattern))
            ),
            "",
        )
        raise RequestError(f"{folder} holds no weights ({WEIGHTS[0]} or {WEIGHTS[2]}, or the index of several){advice}")
    if first.suffix != ".json":
        return [_itself(first)]
    index = origin.read_json(first).get("weight_map")
    if not isinstance(index, Mapping) or not index:
        raise RequestError(f"{first} is damaged: it has no weight_map")
    files = sorted({folder / str(name) for name in index.values()})
    if absent := [file.name for file in files if not file.is_file()]:
        raise RequestError(
            f"{folder} lacks {len(absent)} of the {len(files)} files that {first.name} names "
            f"({some(absent)}): fetch the rest of the checkpoint"
        )
    return [_itself(file) for file in files]


def is_whole(folder: Path) -> bool:
    """Whether all files of weights are there: of a model of the hub, some may still have to be fetched."""
    try:
        return bool(weight_files(folder))
    except RequestError:
        return False


def _itself(file: Path) -> Path:
    with file.open("rb") as handle:
        if handle.read(len(_POINTER)) == _POINTER:
            raise RequestError(f"{file} is the pointer that git-lfs leaves for a file: fetch it with git lfs pull")
    return file


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, without reading them. Raises RequestError for a damaged or cut file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH), "little")
            if size < _LENGTH or length > size - _LENGTH:
                raise ValueError(f"{size} bytes, less than its header")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        data = _LENGTH + length
        found = {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }
        end = max((tensor.end for tensor in found.values()), default=data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RequestError(f"{file} is damaged: {error}; fetch it again") from error
    if end != size:
        raise RequestError(f"{file} is damaged: it has {size} bytes where its header tells of {end}; fetch it again")
    return found


def some(names: list[str], shown: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:shown]) + (f", … {len(names) - shown} more" if len(names) > shown else "")


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
