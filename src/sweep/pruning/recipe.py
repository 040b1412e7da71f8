"""What a pruning removed, as a file: units by their numbers, masks of weights at one bit a weight. No torch.

`method.replay=FILE` removes the same of another model of the same shape. The file is one of safetensors: the numbers of the
units that went, `gone`, and of each pruned matrix its packed mask, `masks.NAME`; and a text of JSON that says how they were
chosen and in what they lie. Values that a method gave the weights that stay are not in it, and not replayed.

Legend: a bit of a mask is 1 where the weight is kept, packed as by numpy.packbits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sweep.settings import RequestError

# In a checkpoint. It ends otherwise than weights do: vLLM reads all that does so as weights of the model.
FILE = "recipe.sweep"
VERSION = 1
_KEY, _GONE, _MASK = "sweep_recipe", "gone", "masks."
_KEYS = ("method", "sparsity", "seed", "shapes", "units", "masked")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    method: Mapping[str, Any]  # its settings, `family` among them
    sparsity: float  # as asked
    seed: int
    shapes: Mapping[str, Shape]  # of what the method may remove, by name, in the model as it was
    units: tuple[int, ...]  # how many units each block had; none for weights
    # of the units that went, their numbers as `Pruned.gone` has them
    gone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    masks: Mapping[str, tuple[np.ndarray, Shape]] = field(default_factory=dict)  # packed, with the shape of the matrix
    told: Mapping[str, Any] = field(default_factory=dict)  # of the model and the cell, for who reads it

    def check(self, shapes: Mapping[str, Shape], units: tuple[int, ...]) -> None:
        """Refuse a model whose tensors or units are others. Raises RequestError that names the first that is."""
        for name in (*self.shapes, *shapes):
            theirs, ours = self.shapes.get(name), shapes.get(name)
            if theirs != ours:
                words = ["is not there" if shape is None else f"is {_words(shape)}" for shape in (theirs, ours)]
                raise RequestError(
                    f"method.replay: {name} {words[0]} in the model that the recipe was made of, and {words[1]} in this one: "
                    "a recipe is for models of the same shape"
                )
        if units != self.units:
            raise RequestError(
                f"method.replay: the blocks have {list(self.units)} units in the model that the recipe was made of, and "
                f"{list(units)} in this one: a recipe is for models of the same shape"
            )

    def to_bytes(self, told: Mapping[str, Any] | None = None) -> bytes:
        """The content of its file.

        told  what else the file states: model, fingerprint, cell, ...
        """
        from safetensors.numpy import save

        about = {
            "version": VERSION,
            "method": dict(self.method),
            "sparsity": self.sparsity,
            "seed": self.seed,
            "shapes": self.shapes,
            "units": self.units,
            "masked": {name: shape for name, (_, shape) in self.masks.items()},
            **self.told,
            **(told or {}),
        }
        packed = {_MASK + name: bits for name, (bits, _) in self.masks.items()}
        return save({_GONE: np.ascontiguousarray(self.gone), **packed}, {_KEY: json.dumps(about)})

    def write(self, file: str | Path, told: Mapping[str, Any] | None = None) -> None:
        Path(file).write_bytes(self.to_bytes(told))


def read(file: str | Path) -> Recipe:
    """The recipe in a file. Raises RequestError for one that is not there, is damaged, or is of another version."""
    from safetensors.numpy import load_file

    path = _mark(file)[0]
    about, tensors = told(file), load_file(path)
    shapes, masked = ({name: tuple(shape) for name, shape in about[key].items()} for key in ("shapes", "masked"))
    sizes = {_MASK + name: -(-math.prod(shape) // 8) for name, shape in masked.items()}
    for name in (_GONE, *sizes):
        if name not in tensors or tensors[name].size != sizes.get(name, tensors[name].size):
            raise RequestError(f"method.replay={path}: it is damaged: {name} is missing or of another size")
    return Recipe(
        about["method"],
        about["sparsity"],
        about["seed"],
        shapes,
        tuple(about["units"]),
        tensors[_GONE],
        {name: (tensors[_MASK + name], shape) for name, shape in masked.items()},
        {name: value for name, value in about.items() if name not in ("version", *_KEYS)},
    )


def told(file: str | Path) -> dict[str, Any]:
    """What a recipe says of itself, without what it removes: `method`, `sparsity`, ... Raises RequestError as `read` does."""
    return _told(*_mark(file))


def fingerprint(file: str | Path) -> str:
    """Changes with what the file holds. Raises RequestError where there is none."""
    return _fingerprint(*_mark(file))


def _mark(file: str | Path) -> tuple[str, int, int]:
    """The path, and what changes when another file comes to lie there. A checkpoint stands for the recipe in it."""
    path = Path(file).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise RequestError(f"method.replay={file}: there is no file {str(path)!r} in {Path.cwd()}")
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _fingerprint(path: str, size: int, time: int) -> str:
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _told(path: str, size: int, time: int) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise RequestError(
            f"method.replay={path}: it is cut, or no recipe at all ({error}): name a {FILE} that sweep has written"
        ) from error
    if not isinstance(about, dict):
        raise RequestError(f"method.replay={path}: it is no recipe: name a {FILE} that sweep has written")
    if about.get("version") != VERSION:
        raise RequestError(
            f"method.replay={path}: it is a recipe of version {about.get('version')}, and this version of sweep reads "
            f"{VERSION}: install the version that wrote it"
        )
    if missing := [name for name in _KEYS if name not in about]:
        raise RequestError(f"method.replay={path}: it is damaged: it does not say its {', '.join(missing)}")
    return about


def _words(shape: Shape) -> str:
    return " x ".join(map(str, shape))
