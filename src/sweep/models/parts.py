"""The FFNs and the attention of each block: found by looking (`candidates`), proved by trying (`proof`)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedModel

from sweep.models import anatomy, candidates, flow, proof
from sweep.models.candidates import Attention, Experts, Ffn, Part
from sweep.models.flow import Pass
from sweep.settings import RequestError

__all__ = ["Attention", "Experts", "Ffn", "attentions", "ffns"]
Found = TypeVar("Found")


def _once(find: Callable[[PreTrainedModel], list[Found]]) -> Callable[[PreTrainedModel], list[Found]]:
    """`find`, which copies and runs every block, once for a model whose modules and shapes are still the same."""
    known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list, list[Found]]] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def found(model: PreTrainedModel) -> list[Found]:
        built = [(id(m), [p.shape for p in m.parameters(recurse=False)]) for m in model.modules()]
        if model not in known or known[model][0] != built:
            known[model] = built, find(model)
        return list(known[model][1])

    return found


@_once
def ffns(model: PreTrainedModel) -> list[Ffn | Experts]:
    """The feed-forward networks of every block, in order. Raises RequestError where they cannot be told or cut."""
    with flow.passed(model) as seen:
        found: list[Part] = [*candidates.ffns(model, seen), *candidates.experts(model)]
        return _proved(model, seen, sorted(found, key=lambda part: part.block), "neuron", "ffn")


@_once
def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention of every block that has one, in order. Raises RequestError where they cannot be told or cut."""
    with flow.passed(model) as seen:
        return _proved(model, seen, candidates.attentions(model, seen), "head", "attention")


_NONE = {
    "ffn": "no linear layer of its blocks reads what others make neuron by neuron, and no module holds experts that are known",
    "attention": "no linear layer of its blocks reads heads, each of which queries of its own reach",
}


def _proved(model: PreTrainedModel, seen: Pass, found: Sequence[Part], method: str, targets: str) -> list:
    """Those that a cut was tried on; what else looked like one is left as it is, unless nothing else is left."""
    blocks = anatomy.blocks(model)
    outcomes = [proof.tried(blocks[part.block], part, seen.calls[part.block]) for part in found]
    proved = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if proved:
        return proved
    why = f"block {found[0].block}, cut by way of trial, fails: {outcomes[0]}" if found else _NONE[targets]
    raise RequestError(
        f"method={method} cannot cut {type(model).__name__}: {why}. Use +method=weight method.targets={targets}, "
        "or +method=layer, which cut none"
    )
