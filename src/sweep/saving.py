"""A pruned model as a folder, with a card that says how it came about. `sweep.load_model` loads every such folder,
transformers' own `from_pretrained` those whose blocks are equally wide and whose vocabulary is whole.

The folder appears whole: it is written beside its place under a name with a leading dot, read again and compared with the
model in memory, which takes the memory of one more, then renamed. It takes the place of nothing but the same cell's
earlier model, as sweep has written it: `.sweep-saved.json` in it tells. What a killed process has left beside it goes with
the next save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep import __version__, cache, store
from sweep.config import Execution, Model
from sweep.formats.declared import DENSE
from sweep.models import origin
from sweep.pruning import recipe
from sweep.settings import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAVED = ".sweep-saved.json"  # the cell, and of each file its size and time
_RESULTS = ("cells", "set_aside", "report")  # of a results folder, beside its tables
_CARD = "| written by | sweep "  # in the card of a checkpoint older than that file


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    removed: bytes | None = None,
) -> None:
    """Write model, tokenizer and card to `folder`, in place of the same cell's earlier model.

    facts    what the card states: see `card`; and `cell`, the name of the cell, where it is of one
    removed  the recipe of what was removed, which `method.replay` reads, or None
    Raises RequestError when the folder holds anything else.
    """
    facts = facts or {}
    path = check_place(folder, facts.get("cell"))
    from sweep.models import (
        checkpoint,
        runtimes,
        transformers_private,
    )  # bring torch, which a look at a folder does not need

    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_remains(path)
    mine = f".{path.name}.{socket.gethostname()}-{os.getpid()}."
    half = Path(tempfile.mkdtemp(prefix=mine, dir=path.parent))
    try:
        transformers_private.forget_quantiser(model)
        checkpoint.write(model, tokenizer, half)
        facts = {**facts, "loads_in": runtimes.loads_in(model, tokenizer)}
        (half / "README.md").write_text(card(facts), encoding="utf-8")
        if removed is not None:
            (half / recipe.FILE).write_bytes(removed)
        (half / _SAVED).write_text(json.dumps({"cell": facts.get("cell"), "files": _files(half)}))
        half.chmod(0o755)  # mkdtemp makes it the owner's alone
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=mine, dir=path.parent))
            path.rename(old / path.name)
            half.rename(path)
            shutil.rmtree(old)
        else:
            half.rename(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _remove_remains(path: Path) -> None:
    """Remove what processes of this machine that were killed while they saved to `path` have left beside it."""
    named = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(socket.gethostname())}-(\d+)\.\w{{8}}")
    for place in path.parent.iterdir():
        if (match := named.fullmatch(place.name)) and not _lives(int(match[1])):
            shutil.rmtree(place, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether this machine has such a process, be it another user's."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def holds(folder: str | Path, cell: str) -> bool:
    """Whether the folder holds the model of this cell. Folders appear whole, so one file tells."""
    path = Path(folder).expanduser()
    return (path / "config.json").is_file() and _saved(path).get("cell") in (cell, None)


def cell_of(folder: str | Path) -> str:
    """The name of the cell whose model a folder holds. Raises RequestError where no cell has saved it."""
    cell = _saved(Path(folder).expanduser()).get("cell")
    if cell is None:
        raise RequestError(
            f"{folder} is no checkpoint that a cell of a sweep has saved: run one with save_model={folder}"
        )
    return str(cell)


def rewrite(folder: Path, texts: Mapping[Path, str]) -> None:
    """Write text files of a checkpoint anew, which stays one that `save` has written.

    texts  by path in the folder
    Raises RequestError where somebody else has changed the folder since.
    """
    saved = _saved(check_place(folder, cell_of(folder)))
    for file, words in texts.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(words, encoding="utf-8")
    (folder / _SAVED).write_text(json.dumps({**saved, "files": _files(folder)}))


def check_place(folder: str | Path, cell: str | None = None, guarded: Mapping[str, Path] | None = None) -> Path:
    """The folder to save to, links followed. Refuses one where anything would be lost but an earlier model of `cell`.

    guarded  folders that it must not be, hold, or lie in, by what they are
    Raises RequestError.
    """
    if "://" in str(folder):
        raise RequestError(f"save_model={folder} must be a folder of this machine, not a URL")
    path = Path(folder).expanduser().resolve()
    for what, place in (guarded or {}).items():
        place = place.expanduser().resolve()
        if relation := _relation(path, place):
            raise RequestError(
                f"save_model={folder} {relation} {what} ({place}), which saving would change: name another folder"
            )
    above = next((p for p in path.parents if os.path.lexists(p)), path)
    try:
        tempfile.TemporaryDirectory(prefix=".sweep-", dir=above).cleanup()  # as `save` will: written there, and renamed
    except OSError as error:
        raise RequestError(
            f"save_model={folder} cannot be made: {above} is no folder that takes a new one ({error.strerror})"
        ) from error
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    saved = _saved(path) if path.is_dir() else {}
    if not (saved or _is_older(path)):
        raise RequestError(
            f"save_model={folder} exists and is no checkpoint that sweep has written: name a new or an empty folder"
        )
    if saved and (changed := sorted(dict(saved["files"].items() ^ _files(path).items()))):
        raise RequestError(
            f"save_model={folder} was changed after sweep had written it ({', '.join(changed[:3])}): name "
            "another folder, or remove this one"
        )
    if saved.get("cell") not in (cell, None):
        raise RequestError(
            f"save_model={folder} holds the model of another cell, {saved['cell']}: name another folder, or "
            "one for each cell with {cell} in its name"
        )
    return path


def guarded(model: Model, results: str) -> dict[str, Path]:
    """The folders that no model is saved to, since they are the user's or the library's own, by what they are."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = {"sweep's cache": cache.folder(), "the hub's cache": Path(HF_HUB_CACHE)}
    if model.source == "local":
        found["the folder that the model comes from"] = origin.checkpoint_folder(model)
    if model.source == "gguf":
        found["the file that the model comes from"] = origin.gguf_file(model)
    if "://" not in results:
        found |= {
            f"the results' folder {name}": Path(results) / name for name in (*store.TABLES, store.RECIPES, *_RESULTS)
        }
    return found


def _relation(path: Path, place: Path) -> str | None:
    if path == place:
        return "is"
    return "holds" if path in place.parents else "lies in" if place in path.parents else None


def _saved(path: Path) -> dict[str, Any]:
    """What `save` has left in a folder; empty when it is not of `save`, or older than that file."""
    return origin.read_json(path / _SAVED) if (path / _SAVED).is_file() else {}


def _is_older(path: Path) -> bool:
    card = path / "README.md"
    return (
        (path / "config.json").is_file()
        and card.is_file()
        and _CARD in card.read_text(encoding="utf-8", errors="ignore")
    )


def _files(path: Path) -> dict[str, Any]:
    """Of every file its size and time, under its relative name."""
    stats = {
        str(file.relative_to(path)): file.stat() for file in path.rglob("*") if file.is_file() and file.name != _SAVED
    }
    return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()}


def card(facts: Mapping[str, Any]) -> str:
    """The model card, from `model`, `method` (a mapping of settings), `sparsity`, `sparsity_achieved`,
    `sparsity_all_parameters`, `dtype`, `seed`, `calibration` (a mapping, or None), `execution` (a mapping) and `command`,
    `loads_in` (the names of `models.runtimes.loads_in`), each where known."""
    import torch
    import transformers

    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(facts['model'])}"] if facts.get("model") else []
    done = _done(facts)
    tags = ["pruned", "sparse"] * ("pruned" in done) + ["quantized"] * ("quantised" in done)
    lines += [f"tags: [{', '.join(tags)}]", "---", "", f"# {facts.get('model') or 'Model'}, {' and '.join(done)}", ""]
    rows = {
        "method": _words(facts["method"]) if facts.get("method") else None,
        "quantised": _words(facts["quantize"]) if facts.get("quantize") else None,
        "sparsity asked": facts.get("sparsity"),
        "sparsity achieved, of the weights that the method targets": facts.get("sparsity_achieved"),
        "sparsity achieved, of all parameters": facts.get("sparsity_all_parameters"),
        "dtype": facts.get("dtype"),
        "seed": facts.get("seed"),
        "calibration": _words(facts["calibration"])
        if facts.get("calibration")
        else "none: the method reads no text"
        if "calibration" in facts
        else None,
        "loads in": _loads(facts.get("loads_in")),
        "written by": f"sweep {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value is not None)]
    run = Execution(**(facts.get("execution") or {}))
    stored = run.format.stored
    if stored is not None and run.saved != "plain":
        lines += [
            "",
            f"Pruned matrices are stored as {stored.words}: load the folder with `sweep.load_model(FOLDER)`, since "
            "transformers does not know the format.",
        ]
    else:
        lines += ["", "Removed weights are stored as zeros; a matrix that lost whole units is smaller."]
        if run.saved == "plain":
            lines += [
                "",
                f"It was measured as `execution={run.name}`, and is stored in plain matrices, which transformers loads; "
                "`execution.saved=packed` stores it as it was measured.",
            ]
    if facts.get("command"):
        lines += ["", "Made by", "", "```sh", str(facts["command"]), "```"]
    return "\n".join(lines) + "\n"


def _loads(names: Sequence[str] | None) -> str | None:
    """In words: llama.cpp by a file of its own; where blocks that are alike would be loaded by more, what makes them so."""
    if names is None:
        return None
    said = ", ".join(f"{name} (`python -m sweep.export gguf`)" if name == "llama.cpp" else name for name in names)
    if "transformers" in names:
        return said
    more = [name for name in ("transformers", "llama.cpp", "vLLM") if name not in names]
    return (
        f"{said}; {', '.join(more[:-1])} and {more[-1]} load plain matrices (`execution.saved=plain`) in blocks that are alike "
        "(`method.scope=layer`, and `method.multiple_of=32` for widths that quantised files hold)"
    )


def _done(facts: Mapping[str, Any]) -> list[str]:
    """What was done to the model, in words."""
    pruned = (facts.get("method") or {}).get("family") != DENSE.name
    return ["pruned"] * pruned + ["quantised"] * bool(facts.get("quantize"))


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in settings.items() if value not in (None, (), []))


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_words(value)})"
    return " ".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
