"""Packed layers in the places of a model's matrices: linear layers, and the fused parameters that hold many experts'.

A linear layer is replaced. Of a fused parameter each expert's matrix becomes a layer of its own, under the name that
`anatomy` gives it, `mlp.experts.3.up_proj`, and a stand-in takes the parameter's name: the code that reads it is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.formats import stand_in
from sweep.formats.packing import DenseMatrix, PackedLinear, packed
from sweep.models import anatomy

_PLAIN = (nn.Linear.forward, Conv1D.forward)  # a layer that does something else with its matrix keeps it


@dataclass(frozen=True)
class Place:
    """A parameter that holds the matrix of a linear layer, or those of the experts of one module."""

    module: str
    parameter: str
    matrices: Mapping[str, Tensor]  # (out, in), views by the names of `anatomy.matrices`
    bias: Tensor | None = None  # of a linear layer; experts add theirs themselves
    layout: anatomy.Layout | None = None  # of experts


def places(model: PreTrainedModel) -> Iterable[Place]:
    """Every parameter inside the blocks whose matrices can be packed, one at a time, so that each can be freed."""
    for path, block in anatomy.all_blocks(model).items():
        prunable = anatomy.matrices(block, path).keys()
        for name, module in list(block.named_modules(prefix=path)):
            if name in prunable and type(module).forward in _PLAIN:
                yield Place(name, "weight", {name: anatomy.weight(module).detach()}, module.bias)
            for parameter, (layout, matrices) in anatomy.several(module, name).items():
                if matrices.keys() <= prunable:
                    yield Place(name, parameter, matrices, layout=layout)


def put(model: PreTrainedModel, place: Place, layers: Mapping[str, PackedLinear]) -> None:
    """Put packed layers, by the names of a place's matrices, where these were. An expert's that is not packed stays dense."""
    if place.layout is None:
        model.set_submodule(place.module, layers[place.module])
        return
    beside = {name: DenseMatrix(matrix.clone()) for name, matrix in place.matrices.items() if name not in layers}
    flat = getattr(model.get_submodule(place.module), place.parameter).ndim == 2
    told = {"matrices": list(place.matrices), "flipped": place.layout.flipped, "flat": flat}
    _put_experts(model, place.module, place.parameter, beside | dict(layers), told)


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a checkpoint must say of packed experts beside their layers: by the full name of the parameter that held them,
    the names of the layers, expert by expert, and whether the code reads each as (in, out), and all in two dimensions."""
    names = {id(layer): name for name, layer in packed(model).items()}
    return {
        f"{path}.{parameter}": {
            "matrices": [names[id(part)] for matrix in stack.matrices for part in matrix.parts],
            "flipped": stack.matrices[0].flipped,
            "flat": stack.flat,
        }
        for path, module in model.named_modules()
        for parameter, stack in stand_in.stacks(module).items()
    }


def put_read(model: PreTrainedModel, layers: Mapping[str, PackedLinear], told: Mapping[str, Any]) -> None:
    """Put the packed layers of a checkpoint, by name, into a model that its configuration built; `told` as `facts` has it."""
    of_experts = {name for its in told.values() for name in its["matrices"]}
    for full, its in told.items():
        path, _, parameter = full.rpartition(".")
        _put_experts(model, path, parameter, layers, its)
    for name in layers.keys() - of_experts:
        model.set_submodule(name, layers[name])


def _put_experts(
    model: PreTrainedModel, path: str, parameter: str, layers: Mapping[str, PackedLinear], told: Mapping[str, Any]
) -> None:
    module = model.get_submodule(path)
    experts: dict[str, list[PackedLinear]] = {}
    for name in told["matrices"]:
        _, number, matrix = name.removeprefix(path).rsplit(".", 2)
        if not hasattr(module, number):
            module.add_module(number, nn.Module())
        module.get_submodule(number).add_module(matrix, layers[name])
        experts.setdefault(number, []).append(layers[name])
    delattr(module, parameter)
    setattr(module, parameter, stand_in.stacked(experts.values(), flipped=told["flipped"], flat=told["flat"]))
