"""How a pruned model is run. Zeros in a dense matrix save nothing: only another form of its matrices can.

Some formats, such as `dense`, run the weights as pruning has left them. The others hold in a form of their own the
matrices of the blocks that suit it, those with a zero for most, and each expert's by itself; embeddings and head stay as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep.config import Execution
from sweep.formats.grid import Grid
from sweep.formats.packing import PackedLinear, Packing
from sweep.models import placing
from sweep.models.placing import Place
from sweep.settings import RequestError


def prepare(
    model: PreTrainedModel, execution: Execution, grids: Mapping[str, Grid] | None = None
) -> tuple[PreTrainedModel, str]:
    """(the model in the form in which it will be measured, the kernel that will run it).

    grids  to which matrices were quantised, by the names of `anatomy.matrices`
    Changes the model in place. Raises RequestError when the execution cannot run here and `fallback` is off.
    """
    form = execution.format
    stays_dense = form.fallback == "dense" and execution.fallback and model.device.type not in form.devices
    if form.module is None or stays_dense:
        return model, "torch"
    packing = form.packing(execution.kernel, model.dtype)
    if packing.lacks and not execution.fallback:
        raise RequestError(
            f"execution={form.name}, kernel {execution.kernel}: {packing.lacks}. Install a C++ compiler, choose another "
            "execution.kernel, or set execution.fallback=true to run a slow substitute"
        )
    _pack(model, packing, grids or {})
    return model, packing.kernel


@torch.no_grad()
def _pack(model: PreTrainedModel, packing: Packing, grids: Mapping[str, Grid]) -> None:
    """Put packed layers in the places of the matrices of the blocks that suit, experts' among them, freeing these.

    Raises RequestError, which names the matrix, for one that cannot be packed.
    """
    for place in placing.places(model):
        layers = {
            name: _packed(name, weight, place, packing, grids.get(name))
            for name, weight in place.matrices.items()
            if packing.suits(weight, grids.get(name))
        }
        if layers:
            placing.put(model, place, layers)


def _packed(name: str, weight: Tensor, place: Place, packing: Packing, grid: Grid | None) -> PackedLinear:
    try:
        return packing.make(weight, place.bias, grid)
    except (RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name} cannot be run in this form ({error}): use execution=dense, or exclude it from pruning with "
            "method.exclude"
        ) from error
