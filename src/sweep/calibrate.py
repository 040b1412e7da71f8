"""What calibration text tells of a model: statistics of activations, gathered by hooks while it reads.

T tokens.

Statistics of linear layers are streamed: the text goes through the model one block at a time, so that what is held is
the text's hidden state, (T, hidden), and the statistics of one block, however many blocks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.models import anatomy, transformers_private
from sweep.models.logits import Tail, descend, given
from sweep.settings import RequestError

BATCH = 4  # sequences in one forward pass
_NO_FLOAT64 = {"mps"}  # kinds of devices
_STRIP = 256  # columns of a Hessian that are summed by one product, at least


def exact_device(device: torch.device | str) -> torch.device:
    """Where sums in float64 of what a device computes are kept: on itself, or on the CPU where it has no such type."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in _NO_FLOAT64 else device


@dataclass
class Text:
    """Calibration text on its way through the model: what the next block reads, batch by batch.

    hidden  (batch, length, hidden size) each
    calls   what the model passes to each block beside it: calls[batch][block] = (arguments, keyword arguments)
    """

    hidden: list[Tensor]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]


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
        """X^T X, (in, in) float32."""
        return None if self.lower is None else self.lower.tril() + self.lower.tril(-1).t()

    @property
    def norm(self) -> Tensor:
        """||x_j||_2 of each feature, (in,) float32; ones for a layer that read nothing, such as an expert never chosen."""
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


@torch.no_grad()
def enter(model: PreTrainedModel, tokens: Tensor) -> Text:
    """The text before the first block, and what the model will pass to every block.

    tokens  (sequences, length)

    The model itself runs, with blocks that only note how they are called: whatever an architecture makes per layer
    (masks of sliding windows, rotary embeddings, positions) is what it would be.
    """
    text = Text([], [])
    blocks = list(anatomy.blocks(model))

    def noting(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            if index == 0:
                text.hidden.append(hidden)
                text.calls.append([])
            text.calls[-1].append((args, kwargs))
            if index == len(blocks) - 1:
                raise _Noted
            return hidden

        return note

    with ExitStack() as restore:
        for index, block in enumerate(blocks):
            anatomy.replace_forward(restore, block, noting(index, block.forward))
        for batch in tokens.split(BATCH):
            try:
                model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
            except _Noted:
                continue
    for calls in text.calls:
        if len(calls) != len(blocks):
            raise RequestError(
                f"{type(model).__name__} ran {len(calls)} of its {len(blocks)} blocks: its text cannot be "
                "streamed block by block; use a criterion that reads no text, such as magnitude"
            )
    return text


class _Noted(Exception):
    """All that was to be seen has been: what remains of a model, or of a block, need not run."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(the hidden state, the other arguments, the other keyword arguments) of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


@torch.no_grad()
def through(text: Text, index: int, block: nn.Module, *, advance: bool) -> None:
    """Run the text through block `index`; with `advance`, what comes out is what the next block reads.

    The block may lie on another device than the text: each batch goes there and comes back.
    """
    device = next(block.parameters()).device
    for number, hidden in enumerate(text.hidden):
        args, kwargs = _to(text.calls[number][index], device)
        try:
            out = block(hidden.to(device), *args, **kwargs)
        except _Noted:
            continue
        if advance:
            text.hidden[number] = (out[0] if isinstance(out, tuple) else out).to(hidden.device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return value


def inputs_of(
    text: Text, index: int, block: nn.Module, prefix: str, *, hessian: bool, advance: bool
) -> dict[str, Inputs]:
    """What each matrix of block `index` reads of the text, by the matrix's name, as `anatomy.matrices` names it.

    Unless the text is to advance, a block is left when its last layer has read its input, since nobody needs the
    product. Which is the last, the first batch tells; where layers did not read once each, every batch runs to its end.
    Raises ValueError that names the layer whose input is not finite.
    """
    found: dict[str, Inputs] = {}
    latest: dict[int, tuple[Tensor, Inputs]] = {}  # within one batch; holding the tensor keeps its id its own
    layers: dict[str, nn.Module] = {}
    met: list[str] = []  # the layers in the order in which they read

    def add(names: Sequence[str], x: Tensor) -> None:
        if id(x) in latest and names[0] not in found:  # a second layer that reads the same tensor
            found.update(dict.fromkeys(names, latest[id(x)][1]))
        if names[0] not in found:
            found.update(dict.fromkeys(names, Inputs.none(x.shape[-1], x.device, hessian=hessian)))
        inputs = found[names[0]]
        if id(x) in latest and latest[id(x)][1] is inputs:
            return  # counted when the first layer read it
        inputs.add(x)
        latest[id(x)] = (x, inputs)

    def observe_experts(module: Any, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        for expert in range(len(module.down_proj)):
            x = hidden.flatten(0, -2)[(chosen == expert).flatten(0, -2).any(-1)]
            add([f"{path}.{expert}.gate_proj", f"{path}.{expert}.up_proj"], x)
            add([f"{path}.{expert}.down_proj"], transformers_private.expert_neurons(module, expert, x))

    def stop(*_: Any) -> None:
        raise _Noted

    with ExitStack() as hooks:

        def stop_at_last(*_: Any) -> None:
            if sorted(met) == sorted(layers):
                hooks.callback(layers[met[-1]].register_forward_pre_hook(stop).remove)

        for path, module in block.named_modules(prefix=prefix):
            if isinstance(module, anatomy.Linear):
                handle = module.register_forward_pre_hook(lambda _, args, path=path: add([path], args[0]))
            elif anatomy.fused(module):
                _check_experts(module, path)
                handle = module.register_forward_pre_hook(
                    lambda module, args, kwargs, path=path: observe_experts(module, path, args, kwargs),
                    with_kwargs=True,
                )
            else:
                continue
            hooks.callback(handle.remove)
            layers[path] = module
            hooks.callback(module.register_forward_pre_hook(lambda *_, path=path: met.append(path)).remove)
        hooks.callback(latest.clear)
        # ids are of one batch: the next batch's tensors may be given the same
        hooks.callback(block.register_forward_pre_hook(lambda *_: latest.clear()).remove)
        if not advance:
            hooks.callback(block.register_forward_hook(stop_at_last).remove)
        through(text, index, block, advance=advance)
    for name, inputs in found.items():
        if not torch.isfinite(inputs.squares).all():
            raise ValueError(f"{name}: the calibration activations that it reads are not finite")
    return found


def _check_experts(module: nn.Module, path: str) -> None:
    if not transformers_private.tells_neurons(module):
        raise RequestError(
            f"{path} ({type(module).__name__}) keeps its experts in a form whose inputs sweep cannot "
            "observe; use a criterion that reads no text, such as magnitude, or exclude it"
        )


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

    Embedding and head come as blocks named "": the embedding, which reads no activations, has no inputs.
    Raises RequestError for a matrix that read nothing of the text.
    """
    blocks, head = anatomy.block_names(model), model.get_output_embeddings()
    inside = tuple(f"{name}." for name in blocks)
    outside = [name for name in names if not name.startswith(inside)]
    last = [name for name in outside if model.get_submodule(name) is head]
    for name in outside:
        if name not in last:
            yield "", {name: anatomy.weight(model.get_submodule(name)).detach()}, {}
    text = enter(model, tokens)
    for index, (name, block) in enumerate(
        zip(tqdm(blocks, desc=words, unit="block", leave=False), anatomy.blocks(model), strict=True)
    ):
        home = next(block.parameters()).device
        block.to(device or home)
        read_on = index + 1 < len(blocks) or bool(last)  # somebody reads what the block puts out
        inputs = inputs_of(text, index, block, name, hessian=hessian, advance=read_on and not sequential)
        weights = {n: weight for n, weight in anatomy.matrices(block, name).items() if n in names}
        missing = [n for n in weights if n not in inputs]
        if missing:
            raise RequestError(
                f"{missing[0]} read nothing of the calibration text: exclude it, or use a criterion that "
                "reads no text, such as magnitude, and quantize.method=rtn"
            )
        yield name, weights, inputs
        del inputs
        if sequential and read_on:
            through(text, index, block, advance=True)
        del weights
        block.to(home)
    for name in last:
        yield "", {name: anatomy.weight(head).detach()}, {name: head_inputs(model, text, hessian=hessian)}


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
    blocks, head = list(anatomy.blocks(model)), model.get_output_embeddings()
    width, device = anatomy.weight(head).shape[1], anatomy.weight(head).device
    inputs = Inputs.none(width, device, hessian=hessian)

    def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.add(args[0])
        raise _Noted  # its product, a score for every word, is not needed

    with ExitStack() as restore:
        waiting = iter(text.hidden)
        for index, block in enumerate(blocks):
            last = index == len(blocks) - 1
            anatomy.replace_forward(
                restore,
                block,
                lambda hidden, *_, last=last, **__: next(waiting).to(hidden.device) if last else hidden,
            )
        restore.callback(head.register_forward_pre_hook(observe).remove)
        for hidden in text.hidden:
            try:
                model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=device), use_cache=False)
            except _Noted:
                continue
    return inputs


def gradient_norms(model: PreTrainedModel, tokens: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """||g||_2 of each weight over the calibration sequences, (out, in) float32, by the names of `weights`.

    weights  views of the model's parameters, as `anatomy.matrices` gives them
    Only the parameters that these are views of take part in the backward pass.
    """
    owners = {name: _owner(view, model) for name, view in weights.items()}
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


def _owner(view: Tensor, model: PreTrainedModel) -> nn.Parameter:
    """The parameter that a matrix is a view of."""
    place = view.data_ptr()
    return next(p for p in model.parameters() if p.data_ptr() <= place < p.data_ptr() + p.numel() * p.element_size())


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
