"""The door through which a pruning asks for statistics of the unpruned model, so that others may have measured them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Tensors = dict[str, Tensor]
Memo = Callable[[str, Callable[[], Tensors]], Tensors]  # (what, how to measure it) -> it, measured now or before


def unshared(what: str, measure: Callable[[], Tensors]) -> Tensors:
    """For those who share with nobody: measured now."""
    return measure()


def once(memo: Memo) -> Memo:
    """The same, and asked once at most for each thing."""
    known: dict[str, Tensors] = {}

    def ask(what: str, measure: Callable[[], Tensors]) -> Tensors:
        if what not in known:
            known[what] = memo(what, measure)
        return known[what]

    return ask
