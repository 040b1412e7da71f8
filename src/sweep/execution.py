"""How a pruned model is run. Zeros in a dense matrix save nothing: only another execution can.

`dense` runs the weights as they are, `shrunk` is what removal of units leaves; both need no change of the model.
`bitmap`, `csr` and `semi_structured` hold the pruned matrices in a sparse form alone. Layers without a zero stay as they
are, and so do embeddings and head. A kernel for another device has its place in `_bitmap_layer`, behind the same three
tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.config import Execution
from sweep.formats import bitmap
from sweep.formats.csr import CsrLinear
from sweep.formats.semi_structured import SemiStructuredLinear, is_two_of_four
from sweep.models import anatomy
from sweep.settings import RequestError


def prepare(model: PreTrainedModel, execution: Execution) -> tuple[PreTrainedModel, str]:
    """(the model in the form in which it will be measured, the kernel that will run it).

    Changes the model in place. Raises RequestError when the execution cannot run here and `fallback` is off.
    """
    match execution.name:
        case "dense" | "shrunk":
            return model, "torch"
        case "bitmap":
            kernel = _bitmap_kernel(model.dtype, execution)
            _replace(model, lambda weight, bias: _bitmap_layer(weight, bias, kernel))
            return model, f"bitmap {kernel}"
        case "csr":
            _replace(model, CsrLinear)
            return model, "torch csr"
        case "semi_structured":
            if model.device.type != "cuda" and execution.fallback:
                return model, "torch"
            _replace(model, SemiStructuredLinear, suits=is_two_of_four)
            return model, "torch 2:4"


def packed(model: PreTrainedModel) -> dict[str, bitmap.BitmapLinear | CsrLinear | SemiStructuredLinear]:
    """The layers that hold their matrix in a sparse form, by name."""
    kinds = bitmap.BitmapLinear | CsrLinear | SemiStructuredLinear
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _bitmap_kernel(dtype: torch.dtype, execution: Execution) -> str:
    if execution.kernel == "torch":
        return "torch"
    try:
        if execution.kernel == "auto":
            return bitmap.fastest(dtype)
        if execution.kernel in bitmap.kernels():
            return execution.kernel
        reason = f"this processor runs {', '.join(bitmap.kernels())}"
    except bitmap.KernelError as error:
        reason = str(error)
    if execution.fallback:
        return "torch"
    raise RequestError(
        f"execution=bitmap, kernel {execution.kernel}: {reason}. Install a C++ compiler, choose another "
        "execution.kernel, or set execution.fallback=true to run a slow substitute"
    )


def _bitmap_layer(weight: Tensor, bias: Tensor | None, kernel: str) -> nn.Module:
    return bitmap.BitmapLinear(*bitmap.compress(weight), columns=weight.shape[1], bias=bias, kernel=kernel)


def has_zeros(weight: Tensor) -> bool:
    return bool(torch.count_nonzero(weight) < weight.numel())


@torch.no_grad()
def _replace(
    model: PreTrainedModel,
    make: Callable[[Tensor, Tensor | None], nn.Module],
    suits: Callable[[Tensor], bool] = has_zeros,
) -> None:
    """Put `make(weight, bias)` in place of each linear layer of the blocks that suits, freeing its matrix.

    Raises RequestError, which names the layer, for one that cannot be made.
    """
    for name in anatomy.linears(model):
        layer = model.get_submodule(name)
        weight = anatomy.weight(layer)
        if suits(weight):
            try:
                model.set_submodule(name, make(weight, layer.bias))
            except (RuntimeError, ValueError) as error:
                raise RequestError(
                    f"{name} cannot be run in this form ({error}): use execution=dense, or exclude it from "
                    "pruning with method.exclude"
                ) from error
