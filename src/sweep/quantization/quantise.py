"""Quantises the matrices of a model: each becomes values of a grid, and its grid is handed on to whatever runs it.

rtn   each weight becomes the nearest value of its grid (round to nearest).
gptq  column by column, what rounding loses is made good by the columns that follow, so that what the layer gives on
      calibration text changes least (Frantar et al. 2022, arXiv:2210.17323); blocks are taken in order, and each reads
      what the quantised ones before it put out. A zero stays zero: what pruning removed is part of what is made good.

With method.criterion=sparsegpt, gptq is the pass that prunes: a weight goes or is rounded as its column is settled
(arXiv:2301.00774). What that pass does not touch, such as the head, is quantised here, after it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep import calibrate, solver
from sweep.calibrate import Inputs
from sweep.config import Cell
from sweep.formats.grid import Grid
from sweep.models import anatomy, surgery
from sweep.quantization import forms
from sweep.quantization.forms import Quantize
from sweep.quantization.rounding import Rounder, nearest
from sweep.settings import RequestError
from sweep.solver import Rounding, no_rounding

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantised:
    """What the stage says that it did."""

    grids: Mapping[str, Grid]  # of the matrices that it quantised, by name
    calibration_tokens: int = 0
    damping: float | None = None  # the largest added to a Hessian, as a share of the mean of its diagonal
    tokenizer: None = None
    masks: None = None
    recipe: None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        read = {"calibration_tokens": self.calibration_tokens} if self.calibration_tokens else {}
        return {"quantize_damping": self.damping, **read}


@torch.no_grad()
def quantise(
    model: PreTrainedModel,
    asked: Quantize,
    tokens: Tensor | None = None,
    *,
    done: Collection[str] = (),
    sequential: bool = True,
    device: torch.device | str | None = None,
) -> Quantised:
    """Quantise the model in place.

    tokens      (sequences, length) calibration text for gptq
    done        names of matrices that have their grid already
    sequential  a block is calibrated on what the quantised blocks before it put out
    device      where gptq works, one block at a time; None = where the model lies
    Raises RequestError for what the model cannot meet, before anything is changed; ValueError that names the layer when
    weights or activations are not finite; RuntimeError when a zero would not stay zero.
    """
    wanted = [name for name in targets(model, asked) if name not in done]
    grids: dict[str, Grid] = {}
    damping = None
    if asked.method == "gptq":
        if tokens is None:
            raise ValueError("quantize.method=gptq reads calibration text: pass tokens")
        read = calibrate.read_blocks(
            model,
            wanted,
            tokens,
            hessian=True,
            sequential=sequential,
            device=None if device is None else torch.device(device),
            words="quantising",
        )
        for _, weights, inputs in read:
            damping = max(filter(None, [damping, _solve(asked, weights, inputs, grids)]), default=None)
    else:
        everything = targets(model, asked)
        for name in wanted:
            grids[name] = _round(asked, name, everything[name])
    return Quantised(_by_both_names(model, grids), 0 if tokens is None else tokens.numel(), damping)


def quantise_as(
    cell: Cell,
    model: PreTrainedModel,
    tokens: Tensor | None,
    *,
    done: Collection[str] = (),
    device: torch.device | str | None = None,
) -> Quantised:
    """`quantise`, as a cell asks for it: from the command line and from Python alike."""
    return quantise(
        model,
        cell.quantize,
        tokens if forms.reads_text(cell.quantize) else None,
        done=done,
        sequential=cell.calibration is None or cell.calibration.sequential,
        device=device,
    )


def targets(model: PreTrainedModel, asked: Quantize) -> dict[str, Tensor]:
    """The matrices that are quantised. Raises RequestError for what the model does not have or cannot meet."""
    found = anatomy.all_matrices(model, embeddings=asked.embeddings, head=asked.head)
    found = anatomy.without(found, asked.exclude, "quantize.exclude")
    group = asked.columns
    for name, weight in found.items():
        if group is not None and weight.shape[1] % group:
            fits = [str(other) for other in asked.form.groups if not weight.shape[1] % other]
            way = f"set quantize.group to {' or '.join(fits)}" if fits else "choose quantize=int8"
            raise RequestError(
                f"quantize={asked.name} gives {group} columns a scale, and {name} has {weight.shape[1]}, which is no "
                f"multiple: {way}, or add quantize.exclude=[{name}]"
            )
    return found


def while_pruning(cell: Cell, model: PreTrainedModel) -> Rounding:
    """What rounds the matrices of the cell's model in the pass that prunes them, where that quantises too."""
    asked = cell.quantize
    if not forms.jointly(asked, cell.method):
        return no_rounding
    names = set(targets(model, asked))
    return lambda name: Rounder(asked.form, asked.columns) if name in names else None


def _round(asked: Quantize, name: str, weight: Tensor) -> Grid:
    values, grid = nearest(asked.form, asked.columns, weight)
    _write(name, weight, values)
    return grid


def _write(name: str, weight: Tensor, values: Tensor) -> None:
    """Write the values of a grid into a matrix. Raises RuntimeError when a zero of it would not stay zero."""
    if torch.count_nonzero(values[weight == 0]):
        raise RuntimeError(f"{name}: quantisation would bring back weights that are zero")
    surgery.write_weights(weight, values)


def _solve(
    asked: Quantize, weights: Mapping[str, Tensor], inputs: Mapping[str, Inputs], grids: dict[str, Grid]
) -> float | None:
    """Quantise the matrices of one block, those with a common input together; the damping of their Hessians."""
    most = None
    for names in calibrate.by_input(weights, inputs):
        if names[0] not in inputs:  # an embedding, which reads no activations
            grids[names[0]] = _round(asked, names[0], weights[names[0]])
            continue
        hessian, rounder = inputs[names[0]].hessian, Rounder(asked.form, asked.columns)
        assert hessian is not None
        stacked: Sequence[Tensor] = [weights[name].float() for name in names]
        try:
            solved, damping = solver.by_column(stacked, hessian, asked.damping, rounder=rounder)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from error
        if damping > asked.damping:
            log.warning("%s: the Hessian was damped by %g instead of %g", names[0], damping, asked.damping)
        most = max(most or 0.0, damping)
        for name, (values, _), grid in zip(names, solved, rounder.grids([len(w) for w in stacked]), strict=True):
            _write(name, weights[name], values)
            grids[name] = grid
    return most


def _by_both_names(model: PreTrainedModel, grids: dict[str, Grid]) -> dict[str, Grid]:
    """The grids, that of a matrix that embedding and head share by the names of both."""
    shared = anatomy.shared_names(model)
    return grids | {other: grids[name] for name in grids if name in shared for other in shared}
