"""A pruned model as a folder that `AutoModelForCausalLM.from_pretrained` loads, with a card that says how it came about.

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
) -> int:
    """Write model, tokenizer and card to `folder`, in place of an earlier checkpoint, and return its weights' bytes.

    facts  what the card states: see `card`
    Raises RequestError when the folder holds something else than a checkpoint, or when transformers could not load the
    model again because its shapes are not those of its configuration.
    """
    path = Path(folder).expanduser()
    check_place(path)
    _check_shapes(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        # Left from a quantised file, these make save_pretrained refuse: the weights are no longer quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
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
    return stored_bytes(path)


def stored_bytes(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint, as they lie on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
    lines += ["", "Removed weights are stored as zeros; a matrix that lost whole units is smaller."]
    if facts.get("command"):
        lines += ["", "Made by", "", "```sh", str(facts["command"]), "```"]
    return "\n".join(lines) + "\n"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in settings.items() if value not in (None, (), []))


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_shapes(model: PreTrainedModel) -> None:
    """transformers builds a model from its configuration and refuses weights of another shape: say so now."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.config).state_dict()
    for name, tensor in model.state_dict().items():
        if name in built and built[name].shape != tensor.shape:
            raise RequestError(
                f"save_model: {name} is {tuple(tensor.shape)} where the model's configuration says "
                f"{tuple(built[name].shape)}; a model whose layers differ in width cannot be saved in transformers' format"
            )
