"""How a pruned model is run. Zeros in a dense matrix save nothing: only another form of its matrices can.

Some formats, such as `dense`, run the weights as pruning has left them. The others hold in a form of their own the
matrices of the blocks that suit it, those with a zero for most; embeddings and head stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from sweep.config import Execution
from sweep.formats.grid import Grid
from sweep.formats.packing import Packing
from sweep.models import anatomy
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
    """Put a packed layer in place of each linear layer of the blocks that suits, freeing its matrix.

    Raises RequestError, which names the layer, for one that cannot be packed.
    """
    for name in anatomy.linears(model):
        layer = model.get_submodule(name)
        weight, grid = anatomy.weight(layer), grids.get(name)
        if packing.suits(weight, grid):
            try:
                model.set_submodule(name, packing.make(weight, layer.bias, grid))
            except (RuntimeError, ValueError) as error:
                raise RequestError(
                    f"{name} cannot be run in this form ({error}): use execution=dense, or exclude it from "
                    "pruning with method.exclude"
                ) from error
