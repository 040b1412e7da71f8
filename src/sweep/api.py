"""Pruning from Python, without a configuration or a results folder:

model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
pruned = sweep.prune(model, tokenizer, method="neuron", sparsity=0.3)
sweep.save(model, pruned.tokenizer or tokenizer, folder)
model, tokenizer = sweep.load_model(folder)

with sweep.offloaded():  # a model larger than memory
    model, tokenizer = sweep.load_model(folder)
    pruned = sweep.prune(model, tokenizer, method="wanda", sparsity=0.5)

A folder that `sweep.save` writes is loaded by transformers too, where its format can say what the model has become: its
blocks are equally wide and its vocabulary is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep import cache, config, plan, saving, settings
from sweep.models import checkpoint, cut_tokenizer, scratch
from sweep.pruning import criteria, families, methods, sharing
from sweep.pruning.families import Weight
from sweep.pruning.pruned import Pruned
from sweep.quantization import forms, quantise
from sweep.recovery import kinds
from sweep.recovery import recover as recovery
from sweep.settings import RequestError
from sweep.texts import text, written


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    sparsity: float | None = None,
    recover: str | Mapping[str, Any] = kinds.NONE,
    quantize: str | Mapping[str, Any] = forms.NONE,
    calibration: str | Mapping[str, Any] = "pydoc",
    sequences: int = 16,
    length: int = 256,
    seed: int = 0,
    sequential: bool = True,
    device: torch.device | str | None = None,
    data_root: str | None = None,
    **further: Any,
) -> Pruned:
    """Prune a model in place, quantise what is left on request, and say what was removed.

    method       a criterion of weights (magnitude, wanda, sparsegpt, alps, ...), or a family with its settings
                 (method="neuron", scope="layer")
    sparsity     fraction to remove; method="dense" removes nothing, and needs none
    recover      a kind, such as "local", or its settings as on the command line: {"name": "local", "steps": 10}. A copy of
                 the unpruned model is held meanwhile
    quantize     a form, such as "int8", or its settings as on the command line: {"name": "int4", "method": "gptq"}. The
                 model then holds the values of the form in its own dtype, and `grids` of the result says which these are
    calibration  as calibration.source on the command line, or its settings: {"source": "self", "temperature": 0.8};
                 `sequences` of `length` tokens are drawn from it by `seed`
    data_root    folder of data sets laid out as the hub names them, for calibration="wikitext2" or "c4" offline
    device       where a weight method works, one block at a time, while the rest of the model stays where it is
    further      the method's further settings, as on the command line: pattern="2:4", exclude=["*.0.*"], ...;
                 a criterion of your own is also taken as a function, criterion=my_score
    Raises RequestError for a request that makes no sense or that the model cannot meet, before it is changed.
    """
    own = further.get("criterion")
    with criteria.given(own) if callable(own) else nullcontext(own) as criterion:
        if sparsity is None and method != "dense":
            raise RequestError(f"sparsity is missing: give the fraction that method={method} is to remove")
        asked = _family(method) | further | ({} if criterion is None else {"criterion": criterion})
        text_read = {"source": calibration} if isinstance(calibration, str) else dict(calibration)
        text_read = {"sequences": sequences, "length": length, "sequential": sequential} | text_read
        cell = _cell(
            model,
            method=asked,
            sparsity=sparsity or 0.0,
            seed=seed,
            calibration=text_read,
            data_root=data_root,
            recover={"name": recover} if isinstance(recover, str) else recover,
            quantize={"name": quantize} if isinstance(quantize, str) else quantize,
        )
        if device is not None and not (isinstance(cell.method, Weight) or forms.reads_text(cell.quantize)):
            raise RequestError(
                f"device is read by weight methods and by quantize.method=gptq only, not by method={method}: leave it out"
            )
        plan.check_method(cell, model.config.to_dict())
        pruned = _changed(cell, model, tokenizer, device)
    if cell.method.family in families.SHRINKING:
        checkpoint.save_pretrained_as_sweep(model)
    return pruned


def _changed(
    cell: config.Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device | str | None
) -> Pruned:
    """Have the stages that the cell asks for change the model in place."""
    quantises = cell.quantize.name != forms.NONE
    if quantises and not cell.method.removes_units:
        quantise.targets(model, cell.quantize)  # raises before anything is changed
    write = functools.partial(written.write, model, tokenizer, sharing.unshared)
    tokens, rounding = text.for_cell(cell, tokenizer, write), quantise.while_pruning(cell, model)
    drawn = text.recovery_tokens(cell, tokenizer, write)
    dense = None if drawn is None else scratch.copied(model)
    pruned = methods.prune_as(cell, model, tokenizer, tokens, device=device, rounding=rounding)
    if drawn is not None and dense is not None:
        recovery.recover(model, cell.recover, lambda: dense, *drawn, pruned.masks, seed=cell.seed)
    if not quantises:
        return pruned
    done = quantise.quantise_as(cell, model, tokens, done=pruned.grids, device=device)
    return replace(pruned, grids={**pruned.grids, **done.grids})


def _cell(model: PreTrainedModel, **asked: Any) -> config.Cell:
    """The cell that measures nothing of a model in memory."""
    unmeasured = {"benchmarks": {"tasks": []}, "efficiency": {"repeats": 0}, "execution": {}}
    unmeasured["offload"] = "disk" if scratch.current() else "none"
    return config.parse({"model": {"name": type(model).__name__, "source": "local"}, **unmeasured, **asked})[0]


def _family(method: str) -> dict[str, str]:
    """The settings that a method stands for: those of a family, or of a criterion of weights."""
    of_weights = criteria.Names("weight")
    if method in families.FAMILIES:
        return {"family": method}
    if method in of_weights:
        return {"family": "weight", "criterion": method}
    known = [*of_weights, *families.FAMILIES]
    raise RequestError(
        f"method must be one of {', '.join(known)}; got {method!r}.{settings.did_you_mean(method, known)}"
    )


@contextmanager
def offloaded(folder: str | Path | None = None) -> Iterator[None]:
    """Within it, models that are loaded, and what pruning makes of them, lie on the disk and not in memory.

    folder  on whose disk, by default that of sweep's cache; what lies there has no name, and goes with the model
    Every number is the same to the bit. Raises RequestError, within, where the disk has no room.
    """
    with scratch.opened(cache.folder() if folder is None else Path(folder).expanduser()):
        yield


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a pruned model and its tokenizer to a folder that `sweep.load_model` loads: a new one, an empty one, or one
    that was written so before and not changed since.

    tokenizer  of a cut vocabulary, the one that `prune` returned
    Raises RequestError for a folder that holds anything else.
    """
    rows, kept = model.get_input_embeddings().weight.shape[0], cut_tokenizer.kept_ids(tokenizer)
    if tokenizer.vocab_size > rows or (kept is not None and len(kept) != rows):
        raise RequestError(
            f"the model knows {rows} tokens and the tokenizer {tokenizer.vocab_size}: after a vocabulary was cut, "
            "give the tokenizer that pruning returned, sweep.save(model, pruned.tokenizer, folder)"
        )
    saving.save(model, tokenizer, folder)
