"""What calibration text tells of a model: statistics of activations, gathered by hooks while it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def inputs_observed(layers: Sequence[nn.Module], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `observe(i, x)` is called with each input x of `layers[i]`; removed again on any exit."""
    handles = [layer.register_forward_pre_hook(lambda _, args, i=i: observe(i, args[0]))
               for i, layer in enumerate(layers)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
