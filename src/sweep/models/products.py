"""What a module multiplies by the matrices of its fused experts: seen where torch is asked for the product.

Whether experts go one by one or in one product of many, and whatever their code is called, the matrix is a view of the
parameter, and tells by its address of which expert it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sweep.models import anatomy, transformers_private

_PRODUCTS = {
    nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}


@contextmanager
def read_by(experts: nn.Module, parameter: nn.Parameter, observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `observe(expert, x)` is called with each (tokens, in) x that is multiplied by an expert's matrix.

    parameter  (experts, ., .), of the module
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Watch(parameter, observe):
            return own(*args, **kwargs)

    own = experts.forward
    with ExitStack() as restore:
        restore.enter_context(transformers_private.experts_one_by_one(experts))
        anatomy.replace_forward(restore, experts, forward)
        yield


class _Watch(TorchFunctionMode):
    def __init__(self, parameter: nn.Parameter, observe: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.first, self.size, self.count = parameter.data_ptr(), parameter[0].nbytes, len(parameter)
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            x, matrix = args[:2]
            expert, beyond = divmod(matrix.data_ptr() - self.first, self.size)
            if 0 <= expert < self.count and not beyond:
                if matrix.ndim == 2:
                    self.observe(expert, x)
                else:
                    for number, rows in enumerate(x):
                        self.observe(number, rows)
        return func(*args, **(kwargs or {}))
