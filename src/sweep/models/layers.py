"""What a decoder says of itself block by block, and how it follows when blocks go: found by looking.

The configuration has lists with an entry for every block (`layer_types`), lists of the numbers of some blocks
(`mlp_only_layers`), counts of all, of the first or of the last blocks, and properties that make such a list of a pattern
(every fourth block is another). Blocks keep their own number, by which they find their states in a cache.

What is left of a pattern is none, as a rule: the blocks 0, 1, 3 of a pattern of period 2 are of no period. The configuration
then answers with what is left of the list in place of the property, and `Left` says how the model is built anew.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sweep.models import anatomy

_DEPTH = (
    r"(num_|n_)?(hidden_|decoder_)?(layers?|blocks)|num_decoder_layers"  # how configurations call the number of blocks
)
_NUMBERS = r".*(layers|_layer_ids|idxs|indexes|indices)"  # how they call a list of numbers of blocks
OWN = r"layer_(idx|id|number)"  # how blocks call their own
_FIRST = r"first_k_.*|num_dense_layers|num_(hash|dense)_.*layers"  # a number of blocks, the first
_LAST = r"num_kv_shared_layers"  # the last
_AT_LENGTH = r".*(token_ids?|_shape|_multipliers|_limit)"  # lists that say nothing of blocks


@dataclass(frozen=True)
class Left:
    """Which blocks are left of those that a configuration builds, and what it said before any went: plain data."""

    numbers: tuple[int, ...]
    said: dict[str, Any] = field(default_factory=dict)  # attributes of `configuration`


def configuration(model: PreTrainedModel) -> PreTrainedConfig:
    """That which describes the blocks: a part of the model's own where the model does more than decode text."""
    own = getattr(anatomy.decoder(model), "config", None)
    return own if isinstance(own, PreTrainedConfig) else model.config.get_text_config(decoder=True)


def per_block(config: PreTrainedConfig, depth: int) -> dict[str, Any]:
    """What the configuration says of `depth` blocks, by the name of the attribute."""
    return {name: value for name, value in _said(config) if _left(name, value, depth, range(depth)) is not None}


def _said(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(config).items()):
        if not name.startswith("_") and not isinstance(value, PreTrainedConfig):
            yield name, value


def _left(name: str, value: Any, depth: int, numbers: Sequence[int]) -> Any:
    """What an attribute says of the blocks that are left; None where it says nothing of single blocks, nor of how many."""
    if isinstance(value, bool) or re.fullmatch(_AT_LENGTH, name):
        return None
    if isinstance(value, int):
        if value == depth and re.fullmatch(_DEPTH, name):
            return len(numbers)
        if re.fullmatch(_FIRST, name):
            return sum(number < value for number in numbers)
        return sum(number >= depth - value for number in numbers) if re.fullmatch(_LAST, name) else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if _lists_numbers(name, value, depth):
        return type(value)(numbers.index(number) for number in value if number in numbers)
    return type(value)(value[number] for number in numbers) if len(value) == depth else None


def _lists_numbers(name: str, value: Sequence[Any], depth: int) -> bool:
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    flags = len(value) == depth and set(value) <= {0, 1} if whole else False
    return whole and not flags and re.fullmatch(_NUMBERS, name) is not None and list(value) == sorted(set(value))


def cut(config: PreTrainedConfig, depth: int, numbers: Sequence[int], undo: ExitStack) -> Left:
    """Have the configuration speak of the blocks with these numbers alone. What it then says is undone with `undo`."""
    lists = _properties(config, depth)
    before = dict(vars(config))
    undo.callback(restore, config, type(config), before)
    overrides = _overrides(config, depth, numbers)
    said = per_block(config, depth)
    for name, value in said.items():
        setattr(config, name, _left(name, value, depth, numbers))
    if overrides is not None:
        config.per_layer_config = overrides
    answers = {name: [value[number] for number in numbers] for name, value in lists.items()}
    if other := {name: answer for name, answer in answers.items() if _asked(config, name) != answer}:
        answer_with(config, other)
    return Left(tuple(numbers), said)


def restore(config: PreTrainedConfig, kind: type, before: dict[str, Any]) -> None:
    config.__class__ = kind
    vars(config).clear()
    vars(config).update(before)


def _overrides(config: PreTrainedConfig, depth: int, numbers: Sequence[int]) -> dict[int, dict[str, Any]] | None:
    """Of a configuration whose blocks differ in single attributes, these, by the numbers that the blocks will have."""
    told = config.to_dict().get("per_layer_config") if getattr(config, "is_heterogeneous", False) else None
    if not told:
        return None
    config.per_layer_config = None
    by_number = {int(number): own for number, own in told.items()}
    return {new: by_number[old] for new, old in enumerate(numbers) if old in by_number}


def _properties(config: PreTrainedConfig, depth: int) -> dict[str, list[Any]]:
    """The properties that make a list with an entry for every block."""
    found = {}
    for kind in type(config).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, property) and name != "per_layer_config" and name not in found:
                value = _asked(config, name)
                if isinstance(value, list | tuple) and len(value) == depth:
                    found[name] = list(value)
    return found


def _asked(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name)
    except Exception:
        return None


def _answer(name: str, config: Any) -> list[Any]:
    return list(type(config).answers[name])


def answer_with(config: PreTrainedConfig, answers: dict[str, list[Any]]) -> None:
    """Have the configuration give these lists in place of its properties, or beside them."""
    kind, inherited = type(config), dict(getattr(type(config), "answers", {}))
    base = kind.__mro__[1] if inherited else kind
    own = {**inherited, **answers}
    members = {name: property(functools.partial(_answer, name)) for name in own}
    config.__class__ = type(base.__name__, (base,), {**members, "answers": own, "__module__": base.__module__})


def indices(blocks: Sequence[nn.Module]) -> dict[tuple[str, str], Callable[[int], int]]:
    """The numbers that blocks keep of themselves, by module within the block and attribute, as functions of the block's.

    Such a number grows evenly from block to block: by one, or by two where a block has two entries in a cache.
    """
    seen: dict[tuple[str, str], dict[int, int]] = {}
    for number, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
                    seen.setdefault((path, name), {})[number] = value
    found = {place: _line(place[1], values) for place, values in seen.items()}
    return {place: line for place, line in found.items() if line is not None}


def _line(name: str, values: Mapping[int, int]) -> Callable[[int], int] | None:
    first, last = min(values), max(values)
    start, end = values[first], values[last]
    step, rest = divmod(end - start, max(last - first, 1))
    own = re.fullmatch(OWN, name)
    if len(values) == 1:
        return int if own and start == first else None
    if rest or step < 1 or any(value != start + step * (number - first) for number, value in values.items()):
        return None
    if not own and (len(values) < 3 or not 0 <= start - step * first < step):  # widths that grow are no numbers
        return None
    return functools.partial(_at, start - step * first, step)


def _at(start: int, step: int, number: int) -> int:
    return start + step * number


def tables(
    model: PreTrainedModel, config: PreTrainedConfig, depth: int, numbers: Sequence[int]
) -> list[tuple[nn.Linear | nn.Embedding, int, Tensor]]:
    """Matrices beside the blocks that have some rows or columns for each: with their dimension and what of it is left."""
    sizes = {
        value for name, value in vars(config).items() if "per_layer" in name and isinstance(value, int) and value > 1
    }
    inside = {id(module) for block in anatomy.blocks(model) for module in block.modules()}
    found = []
    for name, module in anatomy.decoder(model).named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or id(module) in inside or "per_layer" not in name:
            continue
        dimension = int(isinstance(module, nn.Embedding))
        width = module.weight.shape[dimension]
        if width % depth == 0 and width // depth in sizes:
            size = width // depth
            rows = (torch.tensor(numbers)[:, None] * size + torch.arange(size)).flatten()
            found.append((module, dimension, rows))
    return found
