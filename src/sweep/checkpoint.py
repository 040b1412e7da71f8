"""A pruned model as a folder, with a card that says how it came about. `sweep.load_model` loads every such folder,
transformers' own `from_pretrained` those whose blocks are equally wide and whose vocabulary is whole.

The folder appears whole: it is written beside its place under a name with a leading dot, then renamed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep import __version__
from sweep.config import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, facts: Mapping[str, Any]
) -> None:
    """Write model, tokenizer and card to `folder`, in place of an earlier checkpoint.

    facts  what the card states: see `card`
    Raises RequestError when the folder holds something else than a checkpoint.
    """
    path = Path(folder).expanduser()
    check_place(path)
    from sweep import shrunk  # brings torch, which a look at a folder does not need

    path.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        # Left from a quantised file, these make save_pretrained refuse: the weights are no longer quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        shrunk.write(model, tokenizer, half)
        (half / "README.md").write_text(card(facts), encoding="utf-8")
        half.chmod(0o755)  # mkdtemp makes it the owner's alone
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / path.name)
            half.rename(path)
            shutil.rmtree(old)
        else:
            half.rename(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder holds a checkpoint. Folders appear whole, so one file tells."""
    return (Path(folder).expanduser() / "config.json").is_file()


def check_place(folder: str | Path) -> None:
    """Refuse a folder that holds something else. Raises RequestError."""
    path = Path(folder).expanduser()
    if path.exists() and not is_checkpoint(path) and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"save_model={folder} exists and is no checkpoint: name a new or an empty folder")


def card(facts: Mapping[str, Any]) -> str:
    """The model card, from `model`, `method` (a mapping of settings), `sparsity`, `sparsity_achieved`,
    `sparsity_all_parameters`, `dtype`, `seed`, `calibration` (a mapping, or None) and `command`, each where known."""
    import torch
    import transformers

    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(facts['model'])}"] if facts.get("model") else []
    lines += ["tags: [pruned, sparse]", "---", "", f"# {facts.get('model', 'Model')}, pruned", ""]
    rows = {
        "method": _words(facts["method"]),
        "sparsity asked": facts.get("sparsity"),
        "sparsity achieved, of the weights that the method targets": facts.get("sparsity_achieved"),
        "sparsity achieved, of all parameters": facts.get("sparsity_all_parameters"),
        "dtype": facts.get("dtype"),
        "seed": facts.get("seed"),
        "calibration": _words(facts["calibration"]) if facts.get("calibration") else "none: the method reads no text",
        "written by": f"sweep {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value is not None)]
    if facts.get("execution") == "bitmap":
        lines += ["", "Pruned matrices are stored as one bit a weight and their non-zeros: load the folder with "
                  "`sweep.load_model(FOLDER)`, since transformers does not know the format."]  # fmt: skip
    else:
        lines += ["", "Removed weights are stored as zeros; a matrix that lost whole units is smaller."]
    if facts.get("command"):
        lines += ["", "Made by", "", "```sh", str(facts["command"]), "```"]
    return "\n".join(lines) + "\n"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in settings.items() if value not in (None, (), []))


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
