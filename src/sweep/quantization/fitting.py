"""Requests for quantisation that no model of this shape can meet, told before anything is loaded. No torch.

What contradicts itself whatever the model is told where settings are declared: forms.normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweep.config import Cell
from sweep.models import decoders
from sweep.pruning.families import Neuron
from sweep.quantization.forms import NONE
from sweep.settings import RequestError


def check(cell: Cell, shape: Mapping[str, Any]) -> None:
    """Refuse a group that does not divide what the matrices of a model of this shape read.

    shape  of the model, as its configuration says it
    Raises RequestError. What the model's configuration does not tell is left to the stage.
    """
    asked = cell.quantize
    if asked.name == NONE or asked.columns is None:
        return
    cut = cell.method if isinstance(cell.method, Neuron) and cell.sparsity else None
    if cut is not None and cut.multiple_of % asked.columns and not asked.exclude:
        raise RequestError(
            f"quantize={asked.name} gives {asked.columns} columns a scale, and method=neuron leaves any number of neurons "
            f"to read: set method.multiple_of={asked.columns}, or choose quantize=int8"
        )
    for what in ("hidden", "neurons", "expert_neurons"):
        size = decoders.size(shape, what)
        if size % asked.columns and not asked.exclude:
            fits = [f"quantize.group={group}" for group in asked.form.groups if size % group == 0]
            raise RequestError(
                f"quantize={asked.name} gives {asked.columns} columns a scale, and the model's "
                f"{decoders.key(shape, what)} is {size}, which is no multiple: set "
                f"{' or '.join([*fits, 'quantize=int8'])}, or quantize.exclude=[...] the matrices that read it"
            )
