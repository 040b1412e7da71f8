"""The sublayers of a block, its attention and its FFN with the norms that are theirs: found by looking, proved by trying.

A block is called with a few tokens. Going backwards through the modules that it calls, one that still matters while those
after it add nothing is where a sublayer ends; one that matters no longer belongs to a sublayer that ends later. What a
sublayer that is gone gives is nothing, where the block adds it to the hidden state, or the hidden state that the module gets,
where the module adds it itself or norms the sum. With all of them gone a block must hand on what it gets: that is the proof.

A sublayer mixes positions (attention, and whatever takes its place: a state-space or a convolution) or has matrices alone.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.models import anatomy, layers, trial
from sweep.models.differences import Substitute
from sweep.settings import RequestError

Kind = Literal["attention", "ffn"]
Call = tuple[tuple[Any, ...], dict[str, Any], Any]  # arguments, arguments by name, output
_ANSWER = (
    "kv_sharing_modes"  # what tells transformers' caches of each block whether it keeps keys and values of its own
)


class Nothing(Substitute):
    """Stands where a part of a removed sublayer was: it has no weights, and gives no more than its place asks for.

    hands_on  the argument that it gives, by place or name; None gives zeros
    others    how many values beside that it gives, all None; no tuple without
    width     of the zeros, where it is not that of the hidden state that comes
    """

    def __init__(self, hands_on: int | str | None = None, others: int | None = None, width: int | None = None) -> None:
        super().__init__()
        self.hands_on, self.others, self.width = hands_on, others, width

    def settings(self) -> dict[str, Any]:
        return {"hands_on": self.hands_on, "others": self.others, "width": self.width}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _given(args, kwargs, self.hands_on, self.width)
        return given if self.others is None else (given, *[None] * self.others)


def _given(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hands_on: int | str | None, width: int | None = None
) -> Tensor:
    if hands_on is not None:
        return args[hands_on] if isinstance(hands_on, int) else kwargs[hands_on]
    hidden = trial.hidden_state(args, kwargs)
    return torch.zeros_like(hidden) if width is None else hidden.new_zeros(*hidden.shape[:-1], width)


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of one block. Names are those within the block."""

    block: int
    kind: Kind
    ends: Mapping[str, Nothing]  # what stands there instead of the modules that give what the sublayer adds
    inside: Mapping[str, Nothing]  # likewise, of those that matter no longer without it

    def tensors(self, block: nn.Module) -> list[Tensor]:
        """All that goes with the sublayer."""
        return [p for name in (*self.ends, *self.inside) for p in block.get_submodule(name).parameters()]


class _Watched:
    """A block that can be called again as a model called it, with parts of it giving something else."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        self.calls: dict[str, Call] = {}
        self.order: list[str] = []
        self.output = self.run(note=True)
        self.entering = trial.hidden_state(args, kwargs)

    def run(
        self,
        changed: Mapping[str, Callable[[tuple, dict, Any], Any]] | None = None,
        *,
        note: bool = False,
        stir: bool = False,
    ) -> Tensor:
        """What leaves the block. `stir`: another hidden state enters."""
        handles: list[Any] = []
        depth = [0]
        for name, module in self.block.named_modules():
            if module is self.block or not any(True for _ in module.parameters()):
                continue
            if note:
                handles += self._noting(name, module, depth)
            elif changed and name in changed:
                handles.append(_hooked(module, changed[name]))
        try:
            args, kwargs = _copied(self.args), _copied(self.kwargs)
            if stir:
                hidden = trial.hidden_state(args, kwargs)
                hidden.add_(_noise(hidden))
            return first(self.block(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, name: str, module: nn.Module, depth: list[int]) -> Iterator[Any]:
        def enter(*_: Any) -> None:
            depth[0] += 1

        def leave(_: Any, args: tuple, kwargs: dict, output: Any) -> None:
            depth[0] -= 1
            if depth[0] == 0:
                if name in self.calls:
                    raise RequestError(f"it calls its {name} more than once")
                self.calls[name] = _copied(args), _copied(kwargs), _copied(output)
                self.order.append(name)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, with_kwargs=True)

    def differs(self, one: Tensor, other: Tensor) -> bool:
        return not torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def _hooked(module: nn.Module, change: Callable[[tuple, dict, Any], Any]) -> Any:
    """The handle of a hook that changes what the module gives."""
    return module.register_forward_hook(lambda _, *call: change(*call), with_kwargs=True)


def first(output: Any) -> Tensor:
    """The hidden state of what a block or a part of it gives."""
    return output if isinstance(output, Tensor) else output[0]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {key: _copied(each) for key, each in value.items()} if type(value) is dict else value


def _noise(like: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    size = like.float().std() if like.numel() > 1 else 1.0
    return (torch.randn(like.shape, generator=draw).to(like.device) * (size + 1e-3)).to(like.dtype)


def _stirred(args: tuple, kwargs: dict, output: Any) -> Any:
    hidden = first(output)
    return _in_place_of(output, hidden + _noise(hidden))


def _in_place_of(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


def passed(nothing: Nothing) -> Callable[[tuple, dict, Any], Any]:
    """By hand: what stands in a module's place while the module is still there."""

    def change(args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = first(output)
        zeros = nothing.hands_on is None
        given = torch.zeros_like(hidden) if zeros else _given(args, kwargs, nothing.hands_on)
        return _in_place_of(output, given)

    return change


def _ends(block: _Watched) -> dict[str, Nothing]:
    """Where sublayers end, the last first, and what stands there without them. Raises RequestError."""

    def search(rest: Sequence[str], found: dict[str, Nothing]) -> dict[str, Nothing] | None:
        changes = {name: passed(nothing) for name, nothing in found.items()}
        base = block.run(changes)
        if not rest:
            return found if _hands_on(block, base) else None
        name = rest[-1]
        if not block.differs(block.run({**changes, name: _stirred}), base):
            return search(rest[:-1], found)
        for nothing in _candidates(block.calls[name]):
            more = {**changes, name: passed(nothing)}
            if block.differs(block.run(more, stir=True), block.run(more)):  # the hidden state still goes through
                whole = search(rest[:-1], {**found, name: nothing})
                if whole is not None:
                    return whole
        return None

    ends = search(block.order, {})
    if ends is None:
        raise RequestError("without its parts it does not hand on what it gets: they are not added to a hidden state")
    return ends


def _hands_on(block: _Watched, leaving: Tensor) -> bool:
    """Whether what leaves is what entered, each feature scaled alike at all positions: some blocks scale what they add to."""
    if leaving.shape != block.entering.shape:
        return False
    after, before = (each.float().flatten(0, -2) for each in (leaving, block.entering))
    scale = (after * before).sum(0) / before.square().sum(0).clamp_min(1e-30)
    rough = 1e-4 if leaving.dtype == torch.float32 else 2e-2
    return bool((scale > 0).all()) and torch.allclose(
        after, scale * before, rtol=rough, atol=rough * float(after.abs().max())
    )


def _candidates(call: Call) -> list[Nothing]:
    args, kwargs, output = call
    others = None if isinstance(output, Tensor) else len(output) - 1
    places = [
        place
        for place, value in trial.named(args, kwargs)
        if isinstance(value, Tensor) and value.shape == first(output).shape and value.is_floating_point()
    ]
    return [Nothing(place, others) for place in (None, *reversed(places))]


_Found = tuple[Kind, dict[str, Nothing], dict[str, Nothing]]


def _of_block(block: _Watched) -> list[_Found]:
    """The sublayers of a block in the order of their ends: kind, and what stands there without them."""
    ends = _ends(block)
    groups: list[dict[str, Nothing]] = []
    for name in [name for name in block.order if name in ends]:
        if _has_matrices(block.block.get_submodule(name)) or not (groups and ends[name].hands_on is not None):
            groups.append({})
        groups[-1][name] = ends[name]
    return [_completed(block, group) for group in groups]


def _completed(block: _Watched, ends: dict[str, Nothing]) -> _Found:
    """A sublayer, with what matters no longer without it. Raises RequestError where it cannot be taken out."""
    changes = {name: passed(nothing) for name, nothing in ends.items()}
    wanted = block.run(changes)
    inside = [
        name
        for name in block.order
        if name not in ends and not block.differs(block.run({**changes, name: _stirred}), wanted)
    ]
    names = [*ends, *inside]
    if not any(_has_matrices(block.block.get_submodule(name)) for name in names):
        raise RequestError(f"its {', '.join(ends)} is no attention and no FFN")
    kind: Kind = "attention" if any(_mixes(block, name) for name in names) else "ffn"
    wide = {name: _wide(block.calls[name], nothing) for name, nothing in ends.items()}
    full = {name: _as_wide(block.calls[name]) for name in inside}
    choices: list[_Found] = [
        (kind, ends, {name: _handing_on(block.calls[name]) for name in inside}),
        (kind, wide, full),
        # norms whose weight is read by code of the block stay
        (kind, wide, {name: full[name] for name in inside if _has_matrices(block.block.get_submodule(name))}),
    ]
    problem: Exception | None = None
    for found in choices:
        with ExitStack() as undo:
            try:
                _take_out(block.block, Sublayer(0, *found), undo)
                if not block.differs(block.run(), wanted):
                    return found
            except Exception as error:  # of code of somebody else's, which may read anything of what is gone
                problem = error
    raise RequestError(f"it cannot be called without its {', '.join(names)} ({problem or 'it gives something else'})")


def _handing_on(call: Call) -> Nothing:
    """What stands where nothing is read any more: it gives the hidden state that it gets."""
    args, kwargs, output = call
    hidden = trial.hidden_state(args, kwargs)
    place = next(place for place, value in trial.named(args, kwargs) if value is hidden)
    return Nothing(place, None if isinstance(output, Tensor) else len(output) - 1)


def _as_wide(call: Call) -> Nothing:
    """The same, where code between the modules goes by the width of what comes: zeros as wide as that was."""
    args, kwargs, output = call
    same = trial.hidden_state(args, kwargs).shape == first(output).shape
    return _handing_on(call) if same else _wide(call, Nothing(None, _handing_on(call).others))


def _wide(call: Call, nothing: Nothing) -> Nothing:
    args, kwargs, output = call
    if nothing.hands_on is not None or trial.hidden_state(args, kwargs).shape == first(output).shape:
        return nothing
    return Nothing(None, nothing.others, first(output).shape[-1])


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _mixes(block: _Watched, name: str) -> bool:
    """Whether what the module gives at a position depends on what it gets at another."""
    args, kwargs, output = block.calls[name]
    args, kwargs = _copied(args), _copied(kwargs)
    hidden = trial.hidden_state(args, kwargs)
    rows = hidden.view(-1, hidden.shape[-1])  # of one text
    middle = len(rows) // 2  # attention in windows or chunks passes something on from there
    rows[middle] += 3 * _noise(rows[middle])
    after = first(block.block.get_submodule(name)(*args, **kwargs))
    one, other = (each.reshape(len(rows), -1).float() for each in (first(output), after))
    near = torch.isclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())).all(-1)
    return not bool(near[torch.arange(len(rows)) != middle].all())


def find(model: PreTrainedModel) -> list[list[Sublayer]]:
    """The sublayers of every block, in the order in which it adds them. Raises RequestError saying what was not found."""
    blocks = list(anatomy.blocks(model))
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block in calls:
            raise RequestError("a block is called more than once")
        calls[block] = _copied(args), {name: _copied(value) for name, value in kwargs.items()}

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        trial.attempt("reading a few tokens", lambda: trial.logits(model))
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[Sublayer]] = []
    known: dict[tuple[Any, ...], list[_Found]] = {}  # blocks that are built alike are looked at once
    with trial.reading(model):
        for number, block in enumerate(blocks):
            try:
                if block not in calls:
                    raise RequestError("it reads no text")
                parts = trial.attempt("calling it", functools.partial(_parts, block, calls[block], known))
            except RequestError as error:
                raise RequestError(
                    f"the sublayers of block {number} of {type(model).__name__}, a {type(block).__name__}, are not found: "
                    f"{error}. Use method.unit=block, or +method=weight"
                ) from error
            found.append([Sublayer(number, *part) for part in parts])
    return found


def _parts(
    block: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], known: dict[tuple[Any, ...], list[_Found]]
) -> list[_Found]:
    watched = _Watched(block, *call)
    built = *((name, type(part)) for name, part in block.named_modules()), *watched.order
    if built not in known:
        known[built] = _of_block(watched)
    ends = {name: passed(nothing) for _, own, _ in known[built] for name, nothing in own.items()}
    if not _hands_on(watched, watched.run(ends)):
        raise RequestError("without its parts it does not hand on what it gets")
    return known[built]


def pass_by(restore: ExitStack, block: nn.Module, part: Sublayer) -> None:
    """Have a block do without a sublayer, whose modules are still there, until `restore` is closed."""
    for name, nothing in part.ends.items():
        restore.callback(_hooked(block.get_submodule(name), passed(nothing)).remove)


def around(
    block: nn.Module, part: Sublayer, later: Sequence[Sublayer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The hidden state before a sublayer and after it, when the block is called so. `later`: those that come after it."""
    with ExitStack() as restore:
        for other in later:
            pass_by(restore, block, other)
        after = first(block.forward(*args, **kwargs))
        pass_by(restore, block, part)
        return first(block.forward(*args, **kwargs)), after


def remove(model: PreTrainedModel, gone: Sequence[Sublayer]) -> None:
    """Take sublayers out of their blocks: weights, computations, and their places in a cache.

    It is tried on a few tokens as the removal of blocks is. Raises RequestError where what is left does not say what the
    model says while they are passed by, and the model is as it was.
    """
    blocks = list(anatomy.blocks(model))

    def passing(restore: ExitStack) -> None:
        for part in gone:
            pass_by(restore, blocks[part.block], part)

    try:
        proof = trial.Proof(model, passing)
        with ExitStack() as undo:
            states = {number for part in gone if part.kind == "attention" for number in _states(blocks[part.block])}
            for part in gone:
                _take_out(blocks[part.block], part, undo)
            _keep_none(model, states - {number for block in blocks for number in _states(block)}, undo)
            proof.check()
            undo.pop_all()
    except RequestError as error:
        names = ", ".join(f"{next(iter(part.ends))} of block {part.block}" for part in gone)
        raise RequestError(
            f"{names} of {type(model).__name__} cannot be removed: {error}. Use method.unit=block"
        ) from error


def _take_out(block: nn.Module, part: Sublayer, undo: ExitStack) -> None:
    for name, nothing in {**part.inside, **part.ends}.items():
        undo.callback(block.set_submodule, name, block.get_submodule(name))
        block.set_submodule(name, copy.copy(nothing))


def _states(block: nn.Module) -> set[int]:
    """The numbers under which parts of a block find their states in a cache."""
    return {
        value
        for part in block.modules()
        if part is not block
        for name, value in vars(part).items()
        if re.fullmatch(layers.OWN, name) and isinstance(value, int)
    }


def _keep_none(model: PreTrainedModel, states: set[int], undo: ExitStack) -> None:
    """Have caches keep nothing under these numbers, until `undo` is closed."""
    config = layers.configuration(model)
    said = getattr(config, _ANSWER, None)
    modes = list(said) if said is not None else [None] * config.num_hidden_layers
    if not states or max(states) >= len(modes):
        return
    if any(modes[number] == "store" for number in states):
        raise RequestError("other blocks read the keys and values of its attention")
    for number in states:
        modes[number] = "reuse"  # transformers' word for a block that keeps none
    undo.callback(layers.restore, config, type(config), dict(vars(config)))
    if isinstance(getattr(type(config), _ANSWER, None), property):
        layers.answer_with(config, {_ANSWER: modes})
    else:
        setattr(config, _ANSWER, modes)
