"""Packed layers in the places of a model's matrices: linear layers, and the fused parameters that hold many experts'.

A linear layer is replaced. Where code reads a parameter itself a stand-in takes the parameter's name, and the code is as it
was: of experts each one's matrix becomes a layer, under the name that `anatomy` gives it, `mlp.experts.3.up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.formats import packing, stand_in
from sweep.formats.packing import DenseMatrix, PackedLinear, packed
from sweep.formats.stand_in import Matrix, Stack
from sweep.models import anatomy


@dataclass(frozen=True)
class Place:
    """A parameter that holds the matrix of a linear layer, or one that code reads itself, such as those of many experts."""

    module: str
    parameter: str
    matrices: Mapping[str, Tensor]  # (out, in), views by the names of `anatomy.matrices`
    bias: Tensor | None = None  # of a linear layer; other code adds its own
    layout: anatomy.Layout | None = None  # of what code reads itself


def places(model: PreTrainedModel) -> Iterable[Place]:
    """Every parameter inside the blocks whose matrices can be packed, one at a time, so that each can be freed."""
    for path, block in anatomy.all_blocks(model).items():
        prunable = anatomy.matrices(block, path).keys()
        for name, module in list(block.named_modules(prefix=path)):
            if name in prunable and anatomy.multiplies_plainly(module):
                yield Place(name, "weight", {name: anatomy.weight(module).detach()}, module.bias)
            for parameter, (layout, matrices) in anatomy.held(module, name).items():
                if matrices.keys() <= prunable:
                    yield Place(name, parameter, matrices, layout=layout)


def put(model: PreTrainedModel, place: Place, layers: Mapping[str, PackedLinear]) -> None:
    """Put packed layers, by the names of a place's matrices, where these were. An expert's that is not packed stays dense."""
    if place.layout is None:
        model.set_submodule(place.module, layers[place.module])
        return
    held = getattr(model.get_submodule(place.module), place.parameter)
    told: dict[str, Any] = {"flipped": place.layout.flipped}
    if place.layout.parts == 1:
        name = packing.beside(f"{place.module}.{place.parameter}")
        told |= {"matrices": [name], "shape": list(held.shape)}
        layers = dict.fromkeys([name], *layers.values())
    else:
        told |= {"matrices": list(place.matrices), "flat": held.ndim == 2}
        rest = {name: DenseMatrix(matrix.clone()) for name, matrix in place.matrices.items() if name not in layers}
        layers = {**layers, **rest}
    _put_stand_in(model, f"{place.module}.{place.parameter}", layers, told)


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a checkpoint must say of stand-ins beside their layers, by the full name of the parameter.

    matrices  names of the layers, of experts one after the other
    flipped   whether code reads each as (in, out)
    flat      of experts, whether it reads all in two dimensions
    shape     of what is of no experts, as it is read
    """
    names = {id(layer): name for name, layer in packed(model).items()}
    found = {}
    for path, module in model.named_modules():
        for parameter, held in stand_in.stand_ins(module).items():
            matrices = held.matrices if isinstance(held, Stack) else (held,)
            told: dict[str, Any] = {"matrices": [names[id(part)] for matrix in matrices for part in matrix.parts]}
            told |= {"flat": held.flat} if isinstance(held, Stack) else {"shape": list(held.shape)}
            found[f"{path}.{parameter}"] = told | {"flipped": matrices[0].flipped}
    return found


def put_read(model: PreTrainedModel, layers: Mapping[str, PackedLinear], told: Mapping[str, Any]) -> None:
    """Put the packed layers of a checkpoint, by name, into a model that its configuration built; `told` as `facts` has it."""
    read = {name for its in told.values() for name in its["matrices"]}
    for full, its in told.items():
        _put_stand_in(model, full, layers, its)
    for name in layers.keys() - read:
        model.set_submodule(name, layers[name])


def _put_stand_in(
    model: PreTrainedModel, full: str, layers: Mapping[str, PackedLinear], told: Mapping[str, Any]
) -> None:
    """Put layers into the module whose parameter, by its full name, they hold, and a stand-in for that."""
    path, _, parameter = full.rpartition(".")
    module = model.get_submodule(path)
    delattr(module, parameter)
    if "shape" in told:
        (name,) = told["matrices"]
        layer, shape = layers[name], torch.Size(told["shape"])
        module.add_module(name.rpartition(".")[2], layer)
        setattr(module, parameter, Matrix((layer,), told["flipped"], None if len(shape) == 2 else shape))
        return
    experts: dict[str, list[PackedLinear]] = {}
    for name in told["matrices"]:
        number, _, matrix = name.removeprefix(f"{path}.").partition(".")
        if not hasattr(module, number):
            module.add_module(number, nn.Module())
        module.get_submodule(number).add_module(matrix, layers[name])
        experts.setdefault(number, []).append(layers[name])
    setattr(module, parameter, stand_in.stacked(experts.values(), flipped=told["flipped"], flat=told["flat"]))
