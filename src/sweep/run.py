"""One cell, straight down the page: load, calibrate, prune and what may follow, verify, measure, return the row.

What changes the model in between is a stage (config.STAGES): it takes the model and what is known of it, changes it in
place, and returns what it did. What it costs is taken down here, and what has become of the model is counted here, without
asking it. A new stage is one line in `WORK`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep import cache, config, cost, execution, identity, machine, saving, turns, versions
from sweep.config import Calibration, Cell
from sweep.formats.grid import Grid
from sweep.locks import working_seconds
from sweep.measuring import answering, counting, divergence, drafting, efficiency, energy, perplexity, quality, reading
from sweep.measuring.answering import Requests
from sweep.measuring.counting import Stock
from sweep.models import loading, origin, requirements, runtimes, scratch
from sweep.pruning import families, methods, sharing
from sweep.pruning.masks import Masks
from sweep.pruning.recipe import Recipe
from sweep.quantization import forms, quantise
from sweep.recovery import recover
from sweep.settings import RequestError, plain
from sweep.shared_statistics import SharedStatistics
from sweep.texts import text, written

Tables = dict[str, pd.DataFrame | bytes]


@dataclass(frozen=True)
class Known:
    """What a stage is told beside the cell and its model."""

    tokenizer: Any
    tokens: Tensor | None  # (sequences, length) calibration text
    recovery: tuple[Tensor, Tensor] | None = None  # likewise, what recovery is trained on and what it is told by
    masks: Masks = field(default_factory=Masks)  # of weights that earlier stages have removed, and that stay so
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of matrices that earlier stages have quantised, by name
    recipe: Recipe | None = None  # of what earlier stages have removed
    memo: sharing.Memo = (
        sharing.unshared
    )  # where statistics of the model come from, while it is the one that was loaded
    meter: cost.Meter | None = None  # of the stage


class Done(Protocol):
    """What a stage says that it did."""

    @property
    def calibration_tokens(self) -> int: ...  # that it read
    @property
    def tokenizer(self) -> Any: ...  # the model's from now on, or None when it is the one that it was
    @property
    def masks(self) -> Masks | None: ...  # of the weights that it has removed; None where it has removed none
    @property
    def grids(self) -> Mapping[str, Grid]: ...  # of the matrices that it has quantised
    @property
    def recipe(self) -> Recipe | None: ...  # with which it would remove the same again; None where it has removed none
    @property
    def columns(self) -> Mapping[str, Any]: ...  # of the row
    @property
    def tables(self) -> Mapping[str, pd.DataFrame]: ...  # stored beside it


def _prune(cell: Cell, model: PreTrainedModel, known: Known) -> Done:
    rounding = quantise.while_pruning(cell, model)
    return methods.prune_as(cell, model, known.tokenizer, known.tokens, memo=known.memo, rounding=rounding)


def _recover(cell: Cell, model: PreTrainedModel, known: Known) -> Done:
    drawn = known.recovery
    assert drawn is not None
    dtype = str(model.dtype).removeprefix("torch.")
    return recover.recover(
        model,
        cell.recover,
        lambda: loading.load(cell.model, dtype, cell.device)[0],
        *drawn,
        known.masks,
        seed=cell.seed,
        memo=SharedStatistics(cell, drawn[0], known.meter) if known.meter else sharing.unshared,
        state=cache.folder() / "recovery" / text.fingerprint([identity.cell_name(cell), *versions.arithmetic(cell)]),
    )


def _quantise(cell: Cell, model: PreTrainedModel, known: Known) -> Done:
    return quantise.quantise_as(cell, model, known.tokens, done=known.grids)


WORK: dict[str, Callable[[Cell, PreTrainedModel, Known], Done]] = {  # of each stage
    "prune": _prune,
    "recovery": _recover,
    "quantize": _quantise,
}


def run_cell(cell: Cell, save_model: str | None = None, command: str | None = None) -> tuple[dict[str, Any], Tables]:
    """(the measured columns of the row, its tables: `samples`, `layers`, and `latency` and `units` where there are any).

    cell        with its device and threads decided
    save_model  folder that receives the pruned model, or None
    command     what makes this cell, for the model's card
    Raises whatever goes wrong; no row is written here.
    """
    with scratch.opened(cache.folder()) if cell.offload == "disk" else nullcontext():
        return _run(cell, save_model, command)


def _run(cell: Cell, save_model: str | None, command: str | None) -> tuple[dict[str, Any], Tables]:
    _quiet()
    torch.manual_seed(cell.seed)
    if cell.threads:
        torch.set_num_threads(cell.threads)
    row: dict[str, Any] = {"status": "ok", "gpu": machine.gpu_name(cell.device)}
    started = working_seconds()

    criterion = families.criterion_of(cell.method)
    model, tokenizer = loading.load(cell.model, cell.dtype, cell.device)
    row["load_seconds"] = working_seconds() - started
    if cell.benchmarks.tasks:
        requirements.check_tokenizer(tokenizer, cell.model.name)
    can_generate = efficiency.fits(model, cell.efficiency)
    before = Before.of(cell, model, tokenizer)

    known, read = _texts(cell, model, tokenizer)
    row |= read
    known, columns, tables = changed(cell, model, known)
    tokenizer = known.tokenizer
    if families.criterion_of(cell.method) != criterion:
        name = getattr(cell.method, "criterion", None)
        raise RequestError(f"method.criterion={name}: its file changed while the cell ran: run the command again")
    row |= columns | before.units_gone(cell, model)
    saves_plain = cell.execution.saved == "plain"
    if saves_plain:
        row |= _loads_in(model, tokenizer)
    if save_model is not None and saves_plain:
        _save(cell, model, known, before, save_model, command)
    model, row["kernel"] = execution.prepare(model, cell.execution, known.grids)

    held = counting.stock(model)
    row |= counting.coded(held, known.grids, model.dtype.itemsize, forms.scale_bits(cell.quantize))
    row |= counting.size(held) | counting.removed(before.stock, held, before.targets)
    tables["layers"] = counting.matrices(before.stock, held)
    if cell.method.removes_units and (removed := _recipe(cell, known.recipe)) is not None:
        tables["recipes"] = removed  # of weights it is as large as an eighth of a byte a weight: in checkpoints alone
    if not saves_plain and cell.execution.format.saves:
        row |= _loads_in(model, tokenizer)
    if save_model is not None and not saves_plain:
        _save(cell, model, known, before, save_model, command)

    row |= _memory(cell, model, generates=can_generate)
    asked: dict[str, Any] = {}
    columns, tables["samples"] = _quality(cell, model, tokenizer, before, asked)
    row |= columns
    if cell.efficiency.repeats:
        columns, tables["latency"] = _timed(cell, model, (tokenizer, before.tokenizer), held, row, asked)
        row |= columns
        row |= drafting.columns(row)
        row |= answering.correct_a_second(row, tables["samples"], [*asked])
    return row | {"cell_seconds": working_seconds() - started}, tables


def _texts(cell: Cell, model: PreTrainedModel, tokenizer: Any) -> tuple[Known, dict[str, Any]]:
    """(the texts that the stages read, what the row says of them); the model writes what it is to write itself."""
    with cost.Bill(model, cell.device) as bill:

        def write(asked: Calibration, seed: int) -> Tensor:
            memo = SharedStatistics(cell, written.beginning(tokenizer), bill)
            return written.write(model, tokenizer, memo, asked, seed)

        known = Known(tokenizer, text.for_cell(cell, tokenizer, write), text.recovery_tokens(cell, tokenizer, write))
    spent = bill.columns("calibration", 0)
    columns: dict[str, Any] = {name: spent[name] for name in ("calibration_seconds", "calibration_cpu_seconds")}
    for name, asked, tokens, before in (
        ("calibration", cell.calibration, known.tokens, 0),
        (
            "recovery",
            text.of_recovery(cell),
            known.recovery and torch.cat(known.recovery),
            text.read_before_recovery(cell),
        ),
    ):
        if asked is not None and tokens is not None:
            columns[f"{name}_sources"] = json.dumps(text.told(asked, tokens, cell.data_root, before))
    return known, columns


def changed(cell: Cell, model: PreTrainedModel, known: Known) -> tuple[Known, dict[str, Any], Tables]:
    """Have the stages change the model in place, one after the other.

    Returns what is then known of the model, the columns that say what the stages did and cost, and their tables.
    A stage that is not used costs nothing.
    """
    spent = (f"{stage.name}_{seconds}" for stage in config.STAGES for seconds in ("seconds", "cpu_seconds"))
    columns: dict[str, Any] = dict.fromkeys(spent, 0.0) | {"calibration_tokens": 0}
    tables: Tables = {}
    for number, stage in enumerate(cell.stages()):
        with cost.Bill(model, cell.device) as bill:
            if number == 0 and known.tokens is not None:  # nothing has changed the model yet
                done = WORK[stage.name](cell, model, replace(known, memo=SharedStatistics(cell, known.tokens, bill)))
            else:
                done = WORK[stage.name](cell, model, replace(known, meter=bill))
        columns |= bill.columns(stage.name, done.calibration_tokens) | dict(done.columns)
        tables |= done.tables
        known = replace(
            known,
            tokenizer=done.tokenizer or known.tokenizer,
            masks=done.masks or known.masks,
            grids={**known.grids, **done.grids},
            recipe=done.recipe or known.recipe,
        )
    return known, columns, tables


@dataclass(frozen=True)
class Before:
    """The model as it was loaded, with which what has become of it is compared."""

    stock: Stock
    targets: frozenset[str]  # of what the method may remove, by name
    units: int  # of the method's kind
    removable: int  # of them
    tokenizer: Any
    token_rows: Any

    @classmethod
    def of(cls, cell: Cell, model: PreTrainedModel, tokenizer: Any) -> Before:
        units, removable = methods.count_units(model, cell.method)
        targets = methods.targets(model, cell.method)
        return cls(counting.stock(model), targets, units, removable, tokenizer, quality.token_rows(model))

    def units_gone(self, cell: Cell, model: PreTrainedModel) -> dict[str, float]:
        """The fraction of the units that the model has lost, counted, as a column; none for a method that removes none."""
        if not self.removable:
            return {}
        return {"sparsity_units": (self.units - methods.count_units(model, cell.method)[0]) / self.removable}


def _save(cell: Cell, model: PreTrainedModel, known: Known, before: Before, folder: str, command: str | None) -> None:
    """Save the model as it is now, with a card that says how it came about."""
    asked = plain(cell)
    facts = {name: asked[name] for name in ("method", "sparsity", "dtype", "seed", "calibration", "execution")}
    facts |= {stage.group: asked[stage.group] for stage in cell.stages()}
    facts |= {"model": cell.model.name, "command": command, "cell": identity.cell_name(cell)}
    removed = counting.removed(before.stock, counting.stock(model), before.targets)
    facts |= {name: removed[name] for name in ("sparsity_achieved", "sparsity_all_parameters")}
    saving.save(model, known.tokenizer, folder, facts, _recipe(cell, known.recipe))


def _recipe(cell: Cell, of: Recipe | None) -> bytes | None:
    """The file of what was removed, which says of which model."""
    if of is None:
        return None
    name, fingerprint = cell.model.name, origin.fingerprint(cell.model)
    return of.to_bytes({"model": name, "fingerprint": fingerprint, "cell": identity.cell_name(cell)})


def _loads_in(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """As a column: what loads the checkpoint of the model as it is now."""
    return {"loads_in": ", ".join(runtimes.loads_in(model, tokenizer))}


def _memory(cell: Cell, model: PreTrainedModel, *, generates: bool) -> dict[str, Any]:
    """What a generation holds, as columns; none where its text is longer than what the model reads."""
    if not generates:
        return {}
    with cost.PeakMemory(cell.device) as memory:
        kv_cache = efficiency.generate_once(model, cell.efficiency)
    return {
        "kv_cache_bytes": kv_cache,
        "base_memory_bytes": memory.base,
        "peak_memory_bytes": memory.peak,
        "peak_device_memory_bytes": memory.device_peak,
    }


def _quality(
    cell: Cell, model: PreTrainedModel, tokenizer: Any, before: Before, asked: dict[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(columns, the value of every evaluated example); `asked` receives the requests whose answers were written."""
    distributions = divergence.of_dense(cell)
    reads = bool(cell.benchmarks.tasks or cell.perplexity.source)
    read, columns = reading.of(model) if reads else (reading.whole, {})
    found, samples = quality.evaluate(model, tokenizer, cell.benchmarks, cell.data_root, distributions, asked, read)
    columns |= found
    batch_size = cell.benchmarks.batch_size
    found, windows = perplexity.measure(model, tokenizer, cell.perplexity, cell.data_root, batch_size, read)
    columns |= found
    if cell.method.family in ("dense", "vocab"):  # the others leave the rows of all tokens as they are
        columns |= quality.rows_by_band(before.token_rows, before.tokenizer, tokenizer)
    return columns, pd.concat([samples, windows], ignore_index=True)


def _timed(
    cell: Cell,
    model: PreTrainedModel,
    tokenizers: tuple[Any, Any],
    held: Stock,
    row: Mapping[str, Any],
    asked: Requests,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(columns of latency, answers, energy and what bounds them; every timed repeat), with no other cell at work meanwhile.

    tokenizers  of the model, and of the dense one
    asked       requests whose answers are timed
    """
    dense = loading.load(cell.model, cell.dtype, cell.device)[0] if cell.stages() else model
    with turns.alone() as others:
        columns, repeats = efficiency.latency(model, dense, cell.efficiency)
        if asked:
            answers, more = answering.timed((model, dense), tokenizers, asked, cell.efficiency, cell.benchmarks)
            columns, repeats = columns | answers, pd.concat([repeats, more], ignore_index=True)
        columns |= efficiency.energy_of_decoding(model, cell.efficiency, energy.counters(cell.device))
        rates = efficiency.roofline(cell.device, cell.dtype, torch.get_num_threads())
    read = counting.read_bytes(held, cell.efficiency.batch_size) + (row["kv_cache_bytes"] or 0)
    columns |= efficiency.bounds({**row, **columns}, read, cell.efficiency.batch_size, rates)
    return columns | {"other_cores_busy": others.cores}, repeats


def _quiet() -> None:
    """Libraries speak up only when something is wrong."""
    loading.quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
