"""A change of a model is tried before it stays: what the model says of a few tokens, and what its cache makes of them.

Windows of attention are made shorter than the text of the trial, so that what only a long text would show is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sweep.models import anatomy, layers, watching
from sweep.settings import RequestError

TOKENS = 9  # that are read
NEW = 3  # that are generated
WINDOW = 4
_WINDOWS = ("sliding_window", "attention_chunk_size")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of the largest logit; of narrower types:
_WIDE_TOLERANCE = 5e-2


@contextmanager
def evaluated(model: PreTrainedModel) -> Iterator[None]:
    """The model evaluates, and what it draws at random is always the same."""
    trained = model.training
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad(), watching.aside():
            torch.manual_seed(0)
            yield
    finally:
        model.train(trained)


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[None]:
    """`evaluated`, with short windows."""
    config = layers.configuration(model)
    windows = {name: _window(config, name) for name in _WINDOWS}
    try:
        for name, window in windows.items():
            if window:
                setattr(config, name, WINDOW)
        with evaluated(model):
            yield
    finally:
        for name, window in windows.items():
            if window:
                setattr(config, name, window)


def _window(config: PreTrainedConfig, name: str) -> int:
    value = vars(config).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW else 0


def ids(model: PreTrainedModel) -> Tensor:
    """(1, tokens) of the trial."""
    special = _special(model)
    ordinary = [token for token in range(model.get_input_embeddings().weight.shape[0]) if token not in special]
    draw = torch.randint(0, len(ordinary), (TOKENS,), generator=torch.Generator().manual_seed(0))
    return torch.tensor([[ordinary[place] for place in draw.tolist()]], device=model.device)


def _special(model: PreTrainedModel) -> set[int]:
    """Tokens that are more than read, but for those that a text is forced to end with, which cannot be held back: some
    types count positions from those that are no padding."""
    said = {**vars(model.config), **vars(layers.configuration(model)), **vars(model.generation_config)}
    found: dict[bool, set[int]] = {False: set(), True: set()}
    for name, value in said.items():
        if name.endswith(("_token_id", "_token_index")) and value is not None:
            found[name.startswith("forced_")].update(value if isinstance(value, list) else [value])
    return found[False] - found[True]


def logits(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    """(positions, rows) float32, of a model that keeps nothing of what it has read."""
    with reading(model):
        found = model(input_ids=ids(model) if tokens is None else tokens, use_cache=False).logits
    return found[0].float()


def generated(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """((1, tokens) that were read and written, (positions, rows) logits that a cache gave the written ones)."""
    rows = model.get_input_embeddings().weight.shape[0]
    asked = GenerationConfig(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        suppress_tokens=sorted(token for token in _special(model) if 0 <= token < rows),
    )
    with reading(model):
        tokens = ids(model)
        written = model.generate(tokens, generation_config=asked, attention_mask=torch.ones_like(tokens))
    return written.sequences, torch.cat(written.logits).float()


def cache_error(model: PreTrainedModel) -> float:
    """How far, of the largest logit, what a cache gives is from what reading everything anew gives."""
    tokens, with_cache = generated(model)
    without = logits(model, tokens[:, :-1])[-len(with_cache) :]
    return apart(with_cache, without)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest of what is wanted; infinite where the shapes are not the same."""
    if found.shape != wanted.shape or not torch.isfinite(wanted).all():
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def tolerance(model: PreTrainedModel) -> float:
    return _TOLERANCE.get(model.dtype, _WIDE_TOLERANCE)


def attempt(what: str, function: Callable[[], Any]) -> Any:
    """What a function gives. Raises RequestError saying what failed."""
    try:
        return function()
    except RequestError:
        raise
    except Exception as error:
        if "memory" in f"{type(error).__name__} {error}".lower():
            raise
        raise RequestError(
            f"{what} fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


class Proof:
    """What a model says while blocks or parts of them are passed by, to be compared with what it says once they are gone.

    passing  has them passed by until it is closed
    """

    def __init__(self, model: PreTrainedModel, passing: Callable[[ExitStack], None]) -> None:
        self.model = model
        with ExitStack() as restore:
            passing(restore)
            self.wanted = attempt("the model without them, passed by one by one,", lambda: logits(model))
        self.by_cache = self._cache()

    def _cache(self) -> float | None:
        """Of the model as it is; None where it does not generate."""
        try:
            return cache_error(self.model)
        except Exception:
            return None

    def check(self) -> None:
        """Raises RequestError saying which check fails: what is left is not the model in which they were passed by."""
        allowed = tolerance(self.model)
        off = apart(attempt("the model that is left", lambda: logits(self.model)), self.wanted)
        if not off <= allowed:
            raise RequestError(
                f"its logits are {off:.2g} of the largest apart from those of a model in which they are passed by"
            )
        if self.by_cache is None:
            return
        off = attempt("generation with what is left", lambda: cache_error(self.model))
        if not off <= max(allowed, 4 * self.by_cache):
            raise RequestError(f"with a cache its logits are {off:.2g} of the largest apart from those without one")


@dataclass(frozen=True)
class Form:
    """What a block gives: a tensor, or several values of which the first is the hidden state."""

    kind: type  # of the output
    others: int = 0  # values beside the hidden state
    carried: dict[int, int | str] = field(default_factory=dict)  # of these, what the next block gets, by its argument

    def of(self, hidden: Tensor, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """A hidden state in this form; what goes from block to block beside it as it came, all else None."""
        if not issubclass(self.kind, tuple | list):
            return hidden
        others = [_argument(args, kwargs or {}, self.carried.get(place + 1)) for place in range(self.others)]
        return self.kind(hidden, *others) if hasattr(self.kind, "_fields") else self.kind([hidden, *others])


def pass_by(restore: ExitStack, like: Mapping[nn.Module, Form]) -> None:
    """Have blocks hand on what they get, in the form of what they gave, until `restore` is closed."""
    for block, form in like.items():
        anatomy.replace_forward(restore, block, lambda *args, form=form, **kwargs: handed_on(args, kwargs, form))


def handed_on(args: tuple[Any, ...], kwargs: dict[str, Any], form: Form) -> Any:
    """The hidden state among a block's arguments, in the form of what the block gives."""
    return form.of(hidden_state(args, kwargs), args, kwargs)


def hidden_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor of numbers, none of ids, among a block's arguments."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())


def with_hidden_state(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another hidden state."""
    old = hidden_state(args, kwargs)
    return tuple(hidden if value is old else value for value in args), {
        name: hidden if value is old else value for name, value in kwargs.items()
    }


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int | str, Any]]:
    """Arguments with their places or names."""
    return [*enumerate(args), *kwargs.items()]


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int | str | None) -> Any:
    if isinstance(place, int):
        return args[place] if place < len(args) else None
    return None if place is None else kwargs.get(place)


def forms(model: PreTrainedModel) -> dict[nn.Module, Form]:
    """What each block gives while a text is read. Raises RequestError for a block that reads none, or not once."""
    blocks = list(anatomy.blocks(model))
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
    handles = [block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for block in blocks]
    try:
        attempt("reading a few tokens", lambda: logits(model))
    finally:
        for handle in handles:
            handle.remove()
    read = {call[0] for call in calls}
    if silent := [number for number, block in enumerate(blocks) if block not in read]:
        raise RequestError(f"block {silent[0]} reads no text")
    carried: dict[int, int | str] = {}
    for (_, _, _, output), (_, args, kwargs, _) in itertools.pairwise(calls):
        if isinstance(output, tuple | list):
            places = {id(value): place for place, value in named(args, kwargs) if isinstance(value, Tensor)}
            carried |= {at: places[id(value)] for at, value in enumerate(output) if at and id(value) in places}
    return {
        block: Form(type(output), len(output) - 1, carried) if isinstance(output, tuple | list) else Form(type(output))
        for block, _, _, output in calls
    }
