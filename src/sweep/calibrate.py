"""What calibration text tells of a model: statistics of activations, gathered by hooks while it reads.

T tokens.

Statistics of linear layers are streamed: the text goes through the model one block at a time, so that what is held is
the text's hidden state, (T, hidden), and the statistics of one block, however many blocks there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.models import anatomy, watching
from sweep.models.logits import Tail, descend, given
from sweep.settings import RequestError

log = logging.getLogger(__name__)

BATCH = 4  # sequences in one forward pass
_TRIED = 24  # tokens of the text on which it is tried whether it can be streamed
_NO_FLOAT64 = {"mps"}  # kinds of devices
_STRIP = 256  # columns of a Hessian that are summed by one product, at least


def exact_device(device: torch.device | str) -> torch.device:
    """Where sums in float64 of what a device computes are kept: on itself, or on the CPU where it has no such type."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in _NO_FLOAT64 else device


Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and keyword arguments


@dataclass
class Text:
    """Calibration text on its way through the model: what the next block reads, batch by batch.

    hidden  (batch, length, hidden size) each
    calls   what the model passes to each block beside it: calls[batch][block]
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    kinds: list[int | None]  # into how long a tuple each block puts what comes out; None = into none


@dataclass
class Inputs:
    """Sums over the calibration tokens of what a linear layer reads; layers with the same input share one object."""

    squares: Tensor  # (in,) float64
    lower: Tensor | None  # (in, in) float32, X^T X on and below the diagonal; None where it is not asked for
    tokens: int = 0

    @classmethod
    def none(cls, width: int, device: torch.device, *, hessian: bool) -> Inputs:
        """Of a layer that has read nothing yet."""
        return cls(
            torch.zeros(width, dtype=torch.float64, device=exact_device(device)),
            torch.zeros(width, width, device=device) if hessian else None,
        )

    @property
    def hessian(self) -> Tensor | None:
        """X^T X, (in, in) float32; the identity for a layer that read nothing, such as an expert never chosen."""
        if self.lower is None or not self.tokens:
            return None if self.lower is None else torch.eye(len(self.lower), device=self.lower.device)
        return self.lower.tril() + self.lower.tril(-1).t()

    @property
    def norm(self) -> Tensor:
        """||x_j||_2 of each feature, (in,) float32; ones for a layer that read nothing."""
        return self.squares.sqrt().float() if self.tokens else torch.ones_like(self.squares, dtype=torch.float32)

    def add(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        self.squares += rows.square().sum(0).to(self.squares)
        self.tokens += len(rows)
        if self.lower is not None:
            width = rows.shape[1]
            strip = max(_STRIP, -(-width // 4))
            for a in range(0, width, strip):  # most of what is above the diagonal is spared
                b = min(a + strip, width)
                self.lower[a:, a:b].addmm_(rows[:, a:].t(), rows[:, a:b])


class NotStreamed(RequestError):
    """A text cannot go through the model's blocks one after another; it can through the model as a whole."""


@torch.no_grad()
def enter(model: PreTrainedModel, tokens: Tensor) -> Text:
    """The text before the first block, and what the model will pass to every block.

    tokens  (sequences, length)

    The model itself runs, with blocks that only note how they are called: whatever an architecture makes per layer
    (masks of sliding windows, rotary embeddings, positions) is what it would be. Whether a text that goes from block to
    block so comes to what the model makes of it is tried on a short one first. Raises NotStreamed where it does not.
    """
    return entered(model, kinds_of(model, tokens[:1, :_TRIED]), ({"input_ids": batch} for batch in tokens.split(BATCH)))


@watching.aside()
@torch.no_grad()
def kinds_of(model: PreTrainedModel, tokens: Tensor) -> list[int | None]:
    """Of each block, into how long a tuple it puts its hidden state: see `_as`.

    tokens  (1, length) a short text, on which it is tried
    Raises NotStreamed unless each block reads what the one before it puts out, and nothing else of the text.
    """
    blocks = list(anatomy.blocks(model))
    if len(anatomy.all_blocks(model)) != len(blocks):
        raise _not_streamed(model, "it has several lists of blocks")
    read, found = _reads(model, blocks, tokens)
    try:
        trial = entered(model, found, [{"input_ids": tokens}])
        for index, block in enumerate(blocks):
            if not _alike(trial.hidden[0], read[index]):
                raise _not_streamed(model, f"block {index} reads more than what the block before it puts out")
            through(trial, index, block, advance=True)
        if not _alike(trial.hidden[0], read[-1]):
            raise _not_streamed(model, "the last block puts out something else")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, NotStreamed):
            raise
        raise _not_streamed(model, str(error)) from error
    return found


def _not_streamed(model: PreTrainedModel, why: str) -> NotStreamed:
    return NotStreamed(f"a text cannot be taken through {type(model).__name__} block by block: {why}")


def _alike(one: Tensor, other: Tensor) -> bool:
    size = float(other.float().abs().nan_to_num(0, posinf=0).max())  # what is no number is to be so in both
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def _reads(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor
) -> tuple[list[Tensor], list[int | None]]:
    """(what each block reads of a short text, and what the last puts out; into how long a tuple each puts it, or None).

    Raises NotStreamed unless each block runs once, in order, and multiplies by what no other does.
    """
    read: list[Tensor] = []
    kinds: list[int | None] = []
    order: list[int] = []
    users: dict[int, set[int]] = {}

    def enters(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order.append(index)
        read.append(_split(args, kwargs)[0].clone())

    def leaves(index: int, out: Any) -> None:
        kinds.append(len(out) if isinstance(out, tuple | list) else None)
        if index == len(blocks) - 1:
            read.append((out[0] if isinstance(out, tuple | list) else out).clone())

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: enters(index, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
            hooks.callback(block.register_forward_hook(lambda _, __, out, index=index: leaves(index, out)).remove)
        hooks.enter_context(
            watching.Products(
                model.parameters(),
                lambda parameter, *_: users.setdefault(id(parameter), set()).update(order[-1:]),
            )
        )
        model(input_ids=tokens.to(model.get_input_embeddings().weight.device), use_cache=False)
    if order != list(range(len(blocks))):
        raise _not_streamed(model, f"it ran {len(order)} blocks where it has {len(blocks)}, or in another order")
    inside = [{id(parameter) for parameter in block.parameters()} for block in blocks]
    for parameter, its in users.items():
        if sum(parameter in own for own in inside) > 1 and len(its) > 1:
            raise _not_streamed(model, "some of its blocks share matrices")
    return read, kinds


@torch.no_grad()
def entered(model: PreTrainedModel, kinds: Sequence[int | None], batches: Iterable[Mapping[str, Tensor]]) -> Text:
    """What `enter` gives, where the blocks' kinds are known, of batches of all that the model is called with."""
    text, blocks = Text([], [], list(kinds)), list(anatomy.blocks(model))

    def noting(index: int) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            if index == 0:
                text.hidden.append(hidden)
                text.calls.append([])
            text.calls[-1].append((args, kwargs))
            if index == len(blocks) - 1:
                raise Noted
            return _as(kinds[index], hidden)

        return note

    with ExitStack() as restore:
        for index, block in enumerate(blocks):
            anatomy.replace_forward(restore, block, noting(index))
        for batch in batches:
            there = model.get_input_embeddings().weight.device
            try:
                model(**{name: value.to(there) for name, value in batch.items()}, use_cache=False)
            except Noted:
                continue
    return text


def _as(kind: int | None, hidden: Tensor) -> Any:
    """A hidden state as a block puts it out: alone, or as the first of a tuple."""
    return hidden if kind is None else (hidden, *[None] * (kind - 1))


class Noted(Exception):
    """All that was to be seen has been: what remains of a model, or of a block, need not run."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(the hidden state, the other arguments, the other keyword arguments) of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


@torch.no_grad()
def through(text: Text, index: int, block: nn.Module, *, advance: bool) -> None:
    """Run the text through block `index`; with `advance`, what comes out is what the next block reads."""
    for number, hidden in enumerate(text.hidden):
        try:
            out = put_out(block, hidden, text.calls[number][index])
        except Noted:
            continue
        if advance:
            text.hidden[number] = out


def put_out(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """What a block makes of a hidden state. It may lie on another device: the state goes there and comes back."""
    device = next(block.parameters()).device
    args, kwargs = each(call, lambda tensor: tensor.to(device))
    out = block(hidden.to(device), *args, **kwargs)
    return (out[0] if isinstance(out, tuple | list) else out).to(hidden.device)


def each(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """What blocks are told, with every tensor in it changed, or everything of another kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(each(item, change, kind) for item in value)
    if isinstance(value, dict):
        return {name: each(item, change, kind) for name, item in value.items()}
    return value


@contextmanager
def leaving(model: PreTrainedModel, kinds: Sequence[int | None], hidden: Tensor) -> Iterator[None]:
    """While open, no block runs, and the last puts out this hidden state: what a batch has become on its way."""
    blocks = list(anatomy.blocks(model))

    def at(index: int) -> Callable[..., Any]:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            read = _split(args, kwargs)[0]
            return _as(kinds[index], hidden.to(read.device) if index == len(blocks) - 1 else read)

        return hand_on

    with ExitStack() as restore:
        for index, block in enumerate(blocks):
            anatomy.replace_forward(restore, block, at(index))
        yield


def inputs_of(
    text: Text, index: int, block: nn.Module, prefix: str, *, hessian: bool, advance: bool
) -> dict[str, Inputs]:
    """What each matrix of block `index` reads of the text, by the matrix's name, as `anatomy.matrices` names it.

    Unless the text is to advance, a block is left when its last matrix has read its input, since nobody needs the
    product. Which is the last, the first batch tells; where matrices did not read once each, every batch runs to its end.
    Raises ValueError that names the matrix whose input is not finite.
    """
    reading = _Reading(anatomy.matrices(block, prefix), block.parameters(), hessian=hessian)
    with ExitStack() as hooks:
        # what is the same tensor within one batch is none in the next
        hooks.callback(block.register_forward_pre_hook(lambda *_: reading.begin()).remove)
        if not advance:
            hooks.callback(block.register_forward_hook(lambda *_: reading.stop_at_last()).remove)
        hooks.enter_context(reading)
        through(text, index, block, advance=advance)
    return reading.inputs()


class _Reading(watching.Products):
    """While open, sums what matrices read.

    matrices  (out, in) by name, views of `parameters`
    share     one sum for those that read the same tensor, where each reads as often as the others
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], parameters: Iterable[Tensor], *, hessian: bool, share: bool = True
    ) -> None:
        super().__init__(parameters, self._add)
        self._matrices, self._hessian, self._share = matrices, hessian, share
        self._places: dict[int, list[tuple[str, watching.Piece]]] = {}  # of each parameter the matrices in it
        for name, matrix in matrices.items():
            piece = watching.Piece.of(matrix)
            self._places.setdefault(id(self.owner(matrix)), []).append((name, piece))
        self._found: dict[str, Inputs] = {}
        self._latest: dict[tuple[Any, ...], tuple[Tensor, Inputs]] = {}  # of a batch; the tensors are held, and stay
        self._met: list[str] = []  # the matrices in the order in which they read
        self._last: str | None = None

    def begin(self) -> None:
        """A batch comes."""
        self._latest.clear()

    def stop_at_last(self) -> None:
        """Leave each further batch where the last matrix has read, if every one has read once."""
        if sorted(self._met) == sorted(self._matrices):
            self._last = self._met[-1]

    def inputs(self) -> dict[str, Inputs]:
        """Of every matrix, in order, what it has read."""
        self._latest.clear()
        for name, matrix in self._matrices.items():
            if name not in self._found:
                self._found[name] = Inputs.none(matrix.shape[1], matrix.device, hessian=self._hessian)
            elif not torch.isfinite(self._found[name].squares).all():
                raise ValueError(f"{name}: the calibration activations that it reads are not finite")
        return {name: self._found[name] for name in self._matrices}

    def _add(self, parameter: Tensor, piece: watching.Piece, x: Tensor) -> None:
        names = [name for name, its in self._places.get(id(parameter), []) if piece.meets(its)]
        if not names:
            return
        if len(x):
            self._sum(names, x)
        self._met += names
        if names[-1] == self._last:
            raise Noted

    def _sum(self, names: Sequence[str], x: Tensor) -> None:
        if not self._share:
            for name in names:
                self._found.setdefault(name, Inputs.none(x.shape[-1], x.device, hessian=self._hessian)).add(x)
            return
        key = (watching.place(x), x.storage_offset(), x.shape, x.stride(), x._version)
        if names[0] not in self._found:
            shared = self._latest[key][1] if key in self._latest else None  # another matrix reads the same tensor
            inputs = shared or Inputs.none(x.shape[-1], x.device, hessian=self._hessian)
            self._found |= dict.fromkeys(names, inputs)
        inputs = self._found[names[0]]
        if key not in self._latest or self._latest[key][1] is not inputs:  # else counted when the first one read it
            inputs.add(x)
            self._latest[key] = (x, inputs)


Read = tuple[str, dict[str, Tensor], dict[str, Inputs]]  # a block's name, matrices of it, what each of them reads


def read_blocks(
    model: PreTrainedModel,
    names: Collection[str],
    tokens: Tensor,
    *,
    hessian: bool,
    sequential: bool,
    words: str,
    device: torch.device | None = None,
) -> Iterator[Read]:
    """(block name, its matrices, what each of them reads of the text) block by block. The caller changes a block before
    the next is read.

    names       of matrices, as `anatomy.matrices` has them, of the embedding, or of the head
    sequential  a block reads what the changed blocks before it put out
    words       what is being done, for the progress bar
    device      of a block for as long as it is here; None = where it lies

    Embedding and head come as blocks named "": the embedding, which reads no activations, has no inputs. Matrices that
    read nothing of the text are warned of.
    """
    blocks, head = anatomy.all_blocks(model), model.get_output_embeddings()
    inside = tuple(f"{name}." for name in blocks)
    outside = [name for name in names if not name.startswith(inside)]
    last = [name for name in outside if model.get_submodule(name) is head]
    for name in outside:
        if name not in last:
            yield "", {name: anatomy.weight(model.get_submodule(name)).detach()}, {}
    text = _by_blocks(model, tokens, device)
    unread: list[str] = []
    kept = {} if sequential or text is not None else _read_whole(model, tokens, blocks, hessian=hessian)
    for index, (name, block) in enumerate(tqdm(blocks.items(), desc=words, unit="block", leave=False)):
        home = next(block.parameters()).device
        block.to(device or home)
        read_on = index + 1 < len(blocks) or bool(last)  # somebody reads what the block puts out
        if text is not None:
            inputs = inputs_of(text, index, block, name, hessian=hessian, advance=read_on and not sequential)
        else:
            inputs = kept or _read_whole(model, tokens, {name: block}, hessian=hessian)
        weights = {n: weight for n, weight in anatomy.matrices(block, name).items() if n in names}
        inputs = {n: inputs[n] for n in weights}
        unread += [n for n in weights if not inputs[n].tokens]
        yield name, weights, inputs
        del inputs
        if text is not None and sequential and read_on:
            through(text, index, block, advance=True)
        del weights
        block.to(home)
    for name in last:
        inputs = (
            {name: head_inputs(model, text, hessian=hessian)} if text else _head_whole(model, tokens, name, hessian)
        )
        yield "", {name: anatomy.weight(head).detach()}, inputs
    if unread:
        log.warning(
            "%d matrices read nothing of the calibration text and are scored as if all that they read were alike, such as "
            "%s. More text (calibration.sequences) reaches more experts; method.exclude leaves out what none reaches.",
            len(unread),
            ", ".join(unread[:3]),
        )


def _by_blocks(model: PreTrainedModel, tokens: Tensor, device: torch.device | None) -> Text | None:
    """The text before the first block; None where it does not go from block to block.

    device  of a block for as long as it is at work; None = where it lies
    Raises RequestError where blocks are to go there one by one, and the text does not.
    """
    try:
        return enter(model, tokens)
    except NotStreamed as error:
        if device is not None:
            raise RequestError(
                f"{error}; with device={device} only what is taken so can be pruned: leave it out"
            ) from error
        log.info("%s: the whole model reads the text for each block", error)
        return None


@torch.no_grad()
def _read_whole(
    model: PreTrainedModel, tokens: Tensor, blocks: Mapping[str, nn.Module], *, hessian: bool
) -> dict[str, Inputs]:
    """What each matrix of some blocks reads while the model reads the text from end to end.

    For models in which a text does not go from block to block: slower, a pass through all of it each time.
    """
    matrices = {n: matrix for name, block in blocks.items() for n, matrix in anatomy.matrices(block, name).items()}
    reading = _Reading(matrices, model.parameters(), hessian=hessian, share=False)
    with reading:
        for batch in tokens.split(BATCH):
            reading.begin()
            model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
    return reading.inputs()


@torch.no_grad()
def _head_whole(model: PreTrainedModel, tokens: Tensor, name: str, hessian: bool) -> dict[str, Inputs]:
    """What the head reads while the model reads the text from end to end."""
    weight = anatomy.weight(model.get_output_embeddings()).detach()
    with _Reading({name: weight}, model.parameters(), hessian=hessian) as reading:
        for batch in tokens.split(BATCH):
            reading.begin()
            model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
    return reading.inputs()


def by_input(
    names: Iterable[str], inputs: Mapping[str, Inputs], apart: Callable[[str], Hashable] = lambda name: None
) -> list[list[str]]:
    """The names of matrices, those with a common input together; one that reads none, such as an embedding, is alone.

    apart  what must be equal, too, of matrices that stand together
    """
    together: dict[Hashable, list[str]] = {}
    for name in names:
        together.setdefault((id(inputs[name]), apart(name)) if name in inputs else name, []).append(name)
    return list(together.values())


@torch.no_grad()
def head_inputs(model: PreTrainedModel, text: Text, *, hessian: bool) -> Inputs:
    """What the head reads of text that has gone through all blocks."""
    head = model.get_output_embeddings()
    width, device = anatomy.weight(head).shape[1], anatomy.weight(head).device
    inputs = Inputs.none(width, device, hessian=hessian)

    def observe(_: int, x: Tensor) -> None:
        inputs.add(x)
        raise Noted  # its product, a score for every word, is not needed

    with inputs_observed([head], observe):
        for hidden in text.hidden:
            with leaving(model, text.kinds, hidden), suppress(Noted):
                model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=device), use_cache=False)
    return inputs


def gradient_norms(model: PreTrainedModel, tokens: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """||g||_2 of each weight over the calibration sequences, (out, in) float32, by the names of `weights`.

    weights  views of the model's parameters, as `anatomy.matrices` gives them
    Only the parameters that these are views of take part in the backward pass.
    """
    owners = anatomy.owners(model, weights)
    needed = {id(owner): owner for owner in owners.values()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    sums = {name: torch.zeros(view.shape, device=view.device) for name, view in weights.items()}
    tail = Tail(model)
    try:
        for parameter in required:
            parameter.requires_grad_(id(parameter) in needed)
        for sequence in tqdm(tokens.split(1), desc="gradients", unit="sequence", leave=False):
            with torch.enable_grad():
                states = tail.states(input_ids=sequence.to(model.device))[0, :-1]
            descend(tail, states, given(sequence[0, 1:].to(model.device)))
            for name, view in weights.items():
                owner = owners[name]
                if owner.grad is not None:
                    offset = view.storage_offset() - owner.storage_offset()
                    as_view = owner.grad.contiguous().as_strided(view.shape, view.stride(), offset)
                    sums[name] += as_view.float().square()
            for parameter in needed.values():
                parameter.grad = None
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
            parameter.grad = None
    return {name: total.sqrt_() for name, total in sums.items()}


@contextmanager
def inputs_observed(layers: Sequence[nn.Module], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `observe(i, x)` is called with each input x of `layers[i]`; removed again on any exit."""
    handles = [
        layer.register_forward_pre_hook(lambda _, args, i=i: observe(i, args[0])) for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
