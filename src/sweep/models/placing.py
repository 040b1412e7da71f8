"""Packed layers in the places of a model's matrices: linear layers, and the fused parameters that hold many experts'.

A linear layer is replaced. Of a fused parameter each expert's matrix becomes a layer of its own, under the name that
`anatomy` gives it, `mlp.experts.3.up_proj`, and a stand-in takes the parameter's name: the code that reads it is as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.formats import stand_in
from sweep.formats.packing import DenseMatrix, PackedLinear
from sweep.models import anatomy, transformers_private

_PLAIN = (nn.Linear.forward, Conv1D.forward)  # a layer that does something else with its matrix keeps it


@dataclass(frozen=True)
class Place:
    """A parameter that holds the matrix of a linear layer, or those of the experts of one module."""

    module: str
    parameter: str
    matrices: Mapping[str, Tensor]  # (out, in), views by the names of `anatomy.matrices`
    bias: Tensor | None = None  # of a linear layer; experts add theirs themselves


def places(model: PreTrainedModel) -> Iterable[Place]:
    """Every parameter inside the blocks whose matrices can be packed, one at a time, so that each can be freed."""
    for path, block in anatomy.all_blocks(model).items():
        names = [name for name, _ in block.named_modules(prefix=path)]
        prunable = anatomy.matrices(block, path).keys()
        for name in names:
            module = model.get_submodule(name)
            if name in prunable and type(module).forward in _PLAIN:
                yield Place(name, "weight", {name: anatomy.weight(module).detach()}, module.bias)
            for parameter, fused in anatomy.fused(module).items():
                found = anatomy.expert_matrices(module, f"{name}.", parameter, fused)
                if found.keys() <= prunable:
                    yield Place(name, parameter, found)


def put(model: PreTrainedModel, place: Place, layers: Mapping[str, PackedLinear]) -> None:
    """Put packed layers, by the names of a place's matrices, where these were. An expert's that is not packed stays dense."""
    if place.parameter == "weight" and place.matrices.keys() == {place.module}:
        model.set_submodule(place.module, layers[place.module])
        return
    beside = {name: DenseMatrix(matrix.clone()) for name, matrix in place.matrices.items() if name not in layers}
    _put_experts(model.get_submodule(place.module), place.module, place.parameter, beside | dict(layers))


def put_read(model: PreTrainedModel, layers: Mapping[str, PackedLinear]) -> None:
    """Put packed layers by name, as a checkpoint has them, into a model that is built from its configuration alone."""
    of_experts: dict[str, dict[str, PackedLinear]] = defaultdict(dict)
    for name, layer in layers.items():
        path = name.rpartition(".")[0].rpartition(".")[0]
        if path and anatomy.fused(_module(model, path)):
            of_experts[path][name] = layer
        else:
            model.set_submodule(name, layer)
    for path, its in of_experts.items():
        module = model.get_submodule(path)
        for parameter, fused in anatomy.fused(module).items():
            names = transformers_private.gate_and_up(module, parameter, fused[0]).keys()
            if mine := {name: layer for name, layer in its.items() if name.rpartition(".")[2] in names}:
                _put_experts(module, path, parameter, mine)


def _put_experts(module: nn.Module, path: str, parameter: str, layers: Mapping[str, PackedLinear]) -> None:
    experts: dict[int, list[PackedLinear]] = defaultdict(list)
    for name, layer in layers.items():
        _, number, matrix = name.removeprefix(path).rsplit(".", 2)
        if not hasattr(module, number):
            module.add_module(number, nn.Module())
        module.get_submodule(number).add_module(matrix, layer)
    order = list(transformers_private.gate_and_up(module, parameter, getattr(module, parameter)[0]))
    for number, expert in module.named_children():
        if number.isdigit():
            experts[int(number)] = [getattr(expert, matrix) for matrix in order]
    flipped = anatomy.are_flipped(module, parameter)
    delattr(module, parameter)
    setattr(module, parameter, stand_in.stacked((experts[i] for i in range(len(experts))), flipped=flipped))


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return nn.Module()
