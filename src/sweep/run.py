"""One cell, straight down the page: load, calibrate, prune, measure quality, measure efficiency, return the row."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd
import torch

from sweep import cost, execution, identity, machine, saving, turns
from sweep.config import Cell
from sweep.locks import working_seconds
from sweep.measuring import counting, divergence, efficiency, energy, perplexity, quality
from sweep.models import loading
from sweep.pruning import methods, sharing
from sweep.pruning.families import Dense
from sweep.settings import plain
from sweep.shared_statistics import SharedStatistics
from sweep.texts import text


def run_cell(
    cell: Cell, save_model: str | None = None, command: str | None = None
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """(the measured columns of the row, its tables: `samples`, `layers`, and `latency` and `units` where there are any).

    cell        with its device and threads decided
    save_model  folder that receives the pruned model, or None
    command     what makes this cell, for the model's card
    Raises whatever goes wrong; no row is written here.
    """
    _quiet()
    torch.manual_seed(cell.seed)
    if cell.threads:
        torch.set_num_threads(cell.threads)
    row: dict[str, Any] = {"status": "ok", "gpu": machine.gpu_name(cell.device)}
    started = working_seconds()

    model, tokenizer = loading.load(cell.model, cell.dtype, cell.device)
    row["load_seconds"] = working_seconds() - started
    if cell.benchmarks.tasks:
        loading.check_tokenizer(tokenizer, cell.model.name)
    can_generate = efficiency.fits(model, cell.efficiency)
    tokens = text.for_cell(cell, tokenizer)
    dense_tokenizer, token_rows = tokenizer, quality.token_rows(model)
    unpruned, (units, removable) = counting.stock(model), methods.count_units(model, cell.method)
    targets = methods.targets(model, cell.method)
    with cost.Bill(model, cell.device) as bill:
        memo = sharing.unshared if tokens is None else SharedStatistics(cell, tokens, bill)
        pruned = methods.prune_as(cell, model, tokenizer, tokens, memo=memo)
        tokenizer = pruned.tokenizer or tokenizer
    row |= bill.columns(pruned.calibration_tokens)
    row["calibration_tokens"] = pruned.calibration_tokens
    row["damping"] = pruned.damping
    if pruned.measured is not None:
        row["units_measured"] = int(pruned.measured["measured"].sum())
    if removable:
        row["sparsity_units"] = (units - methods.count_units(model, cell.method)[0]) / removable
    model, row["kernel"] = execution.prepare(model, cell.execution)
    held = counting.stock(model)
    row |= counting.size(held) | counting.removed(unpruned, held, targets)
    tables = {"layers": counting.matrices(unpruned, held)}
    if save_model is not None:
        asked = plain(cell)
        facts = {name: asked[name] for name in ("method", "sparsity", "dtype", "seed", "calibration")}
        facts |= {"execution": cell.execution.name, "model": cell.model.name, "command": command}
        facts["cell"] = identity.cell_name(cell)
        facts |= {name: row[name] for name in ("sparsity_achieved", "sparsity_all_parameters")}
        saving.save(model, tokenizer, save_model, facts)

    if can_generate:
        with cost.PeakMemory(cell.device) as memory:
            row["kv_cache_bytes"] = efficiency.generate_once(model, cell.efficiency)
        row["base_memory_bytes"], row["peak_memory_bytes"] = memory.base, memory.peak
        row["peak_device_memory_bytes"] = memory.device_peak

    distributions = divergence.of_dense(cell)
    metrics, samples = quality.evaluate(model, tokenizer, cell.benchmarks, cell.data_root, distributions)
    columns, windows = perplexity.measure(model, tokenizer, cell.perplexity, cell.data_root, cell.benchmarks.batch_size)
    metrics |= columns
    if cell.method.family in ("dense", "vocab"):  # the others leave the rows of all tokens as they are
        metrics |= quality.rows_by_band(token_rows, dense_tokenizer, tokenizer)
    samples = pd.concat([samples, windows], ignore_index=True)

    tables["samples"] = samples
    if pruned.measured is not None:
        tables["units"] = pruned.measured
    if cell.efficiency.repeats:
        dense = model if isinstance(cell.method, Dense) else loading.load(cell.model, cell.dtype, cell.device)[0]
        with turns.alone() as others:
            columns, tables["latency"] = efficiency.latency(model, dense, cell.efficiency)
            columns |= efficiency.energy_of_decoding(model, cell.efficiency, energy.counters(cell.device))
            rates = efficiency.roofline(cell.device, cell.dtype, torch.get_num_threads())
        read = counting.read_bytes(held, cell.efficiency.batch_size) + (row["kv_cache_bytes"] or 0)
        row |= columns | efficiency.bounds(row | columns, read, cell.efficiency.batch_size, rates)
        row["other_cores_busy"] = others.cores
    return row | {"cell_seconds": working_seconds() - started} | metrics, tables


def _quiet() -> None:
    """Libraries speak up only when something is wrong."""
    loading.quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
