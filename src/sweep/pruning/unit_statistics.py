"""What calibration text tells of units: sums of activations and of activation * gradient, gathered by hooks.

T tokens; a part is one block's output matrix with its units (see units.Part).
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.calibrate import exact_device, inputs_observed
from sweep.models import products, trial
from sweep.models.candidates import Experts
from sweep.models.logits import Tail, descend, given
from sweep.pruning.criteria import READABLE, Labels
from sweep.pruning.unit_scores import Activations, Gradients

BATCH = 4  # sequences in one forward pass


def gather(
    model: PreTrainedModel,
    outputs: Sequence[nn.Module | Experts],
    sizes: Sequence[int],
    tokens: Tensor,
    *,
    labels: Labels | None,
    seed: int = 0,
) -> list[Activations]:
    """Statistics of the inputs of `outputs` while the model reads `tokens`.

    outputs    the output matrix of each part; or fused experts, each of which sees the tokens that are routed to it
    sizes      columns a unit, of each part
    tokens     (sequences, length)
    labels     the loss is the summed cross-entropy of these next tokens: the text's own, or ones drawn from the model at
               every position, which gives `Gradients`; None spares the backward pass
    seed       of the draws
    """
    draw = torch.Generator(model.device).manual_seed(seed)
    found: list[Activations] = []
    read: dict[tuple[int, int], int] = {}  # tokens, by part and first column of what reads them together
    sequences = 0  # in the batch that is being read
    for output, size in zip(outputs, sizes, strict=True):
        columns = _columns(output)
        lengths = [columns, columns] if labels is None else [columns, columns, *[columns // size] * 4]
        zeros = [torch.zeros(n, dtype=torch.float64, device=exact_device(model.device)) for n in lengths]
        read_ = torch.zeros_like(zeros[0]) if isinstance(output, Experts) else tokens.numel()
        found.append((Activations if labels is None else Gradients)(read_, *zeros))

    def observe(part: int, x: Tensor, first: int) -> None:
        value, size = x.detach(), sizes[part]  # a hook that held x would keep its graph
        seen = _within(found[part], first, value.shape[-1], size) if isinstance(outputs[part], Experts) else found[part]
        _add_moments(seen, value.flatten(0, -2).float(), read.get((part, first), 0))
        read[part, first] = read.get((part, first), 0) + value.numel() // value.shape[-1]
        if isinstance(seen.tokens, Tensor):
            seen.tokens.fill_(read[part, first])

        def on_gradient(gradient: Tensor) -> None:
            assert isinstance(seen, Gradients)
            product = (value.float() * gradient.float()).unflatten(-1, (-1, size)).sum(-1)  # (…, units)
            per_sequence = product.reshape(sequences, -1, product.shape[-1]).sum(1)  # OPT joins sequences and tokens
            seen.product += per_sequence.sum(0).to(seen.product)
            seen.product_abs += product.abs().flatten(0, -2).sum(0).to(seen.product)
            seen.product_energy += product.square().flatten(0, -2).sum(0).to(seen.product)
            seen.product_square += per_sequence.square().sum(0).to(seen.product)

        if labels is not None and x.requires_grad:
            x.register_hook(on_gradient)

    def drawn(probabilities: Tensor, _: slice) -> Tensor:
        return torch.multinomial(probabilities, 1, generator=draw).squeeze(1)

    tail = Tail(model)
    with (
        _observed(outputs, observe),
        activations_differentiable(model) if labels is not None else torch.no_grad(),
    ):
        # Of which sequences the tokens of an expert are, nothing tells but that there is one.
        at_once = 1 if labels is not None and any(isinstance(output, Experts) for output in outputs) else BATCH
        for batch in tqdm(tokens.split(at_once), desc="calibrating", unit="batch", leave=False):
            batch, sequences = batch.to(model.device), len(batch)
            if labels is None:
                tail.states(input_ids=batch)
                continue
            wanted = drawn if labels == "model" else given(batch[:, 1:].flatten())
            descend(tail, tail.states(input_ids=batch)[:, :-1].flatten(0, 1), wanted)
    return found


@contextmanager
def _observed(outputs: Sequence[nn.Module | Experts], observe: Callable[[int, Tensor, int], None]) -> Iterator[None]:
    """While open, `observe(i, x, first)` is called with each input of `outputs[i]`, whose first column is `first`."""
    linears = {i: output for i, output in enumerate(outputs) if isinstance(output, nn.Module)}
    places = list(linears)
    with ExitStack() as restore:
        restore.enter_context(inputs_observed(list(linears.values()), lambda i, x: observe(places[i], x, 0)))
        for i, output in enumerate(outputs):
            if isinstance(output, Experts):
                down, neurons = output.slices[-1], output.neurons
                seen = functools.partial(_of_expert, observe, i, neurons)
                restore.enter_context(products.read_by(output.module, down.parameter, seen))
        yield


def _of_expert(observe: Callable[[int, Tensor, int], None], part: int, neurons: int, expert: int, x: Tensor) -> None:
    if x.numel():
        observe(part, x, expert * neurons)


def _within(seen: Activations, first: int, columns: int, size: int) -> Activations:
    """Views of the sums of some columns."""
    sums = {}
    for name, value in vars(seen).items():
        if isinstance(value, Tensor):
            step = 1 if value.shape == seen.input_sum.shape else size
            sums[name] = value[first // step : (first + columns) // step]
    return type(seen)(**sums)


def _add_moments(seen: Activations, rows: Tensor, before: int) -> None:
    """Add the rows, (tokens, columns) float32, to the sum and the scatter of `before` earlier ones.

    Deviations are taken from the mean of these rows and scatters joined by Chan et al. 1979, since the square of a sum is
    as large as the sum of squares where a mean is large: in float32 their difference can lose all digits.
    """
    count, centre = len(rows), rows.mean(0)
    apart = rows - centre
    rest = apart.sum(0).to(seen.input_sum)  # what rounding has left in the mean
    total = count * centre.to(rest) + rest
    scatter = apart.square_().sum(0).to(rest) - rest.square() / count
    if before:
        scatter += (total / count - seen.input_sum / before).square() * (before * count / (before + count))
    seen.input_sum += total
    seen.input_scatter += scatter.clamp_min_(0)


def read(
    names: Iterable[str],
    model: PreTrainedModel,
    outputs: Sequence[nn.Module | Experts],
    sizes: Sequence[int],
    tokens: Tensor,
    seed: int = 0,
) -> dict[str, list[Activations]]:
    """What a function of units may read of calibration text, by the names in `READABLE`, of each part.

    The text is read once for each kind of labels, and activations come with any.
    """
    labels = {name: READABLE["unit"][name].labels for name in names}
    backward = [kind for kind in typing.get_args(Labels) if kind in labels.values()]
    found: dict[Labels | None, list[Activations]] = {
        kind: gather(model, outputs, sizes, tokens, labels=kind, seed=seed) for kind in backward or [None]
    }
    return {name: found[kind if kind in found else backward[0]] for name, kind in labels.items()}


Around = Callable[
    [nn.Module, tuple, dict], tuple[Tensor, Tensor]
]  # block and its arguments: hidden state before, after


def block_cosines(blocks: Sequence[nn.Module], model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean over tokens of the cosine between what enters a block and what leaves it: (blocks,) float64."""
    return cosines([(block, None) for block in blocks], model, tokens)


def cosines(places: Sequence[tuple[nn.Module, Around | None]], model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean over tokens of the cosine between two hidden states: (places,) float64.

    places  block, and which states of it: None = what enters and what leaves it
    """
    totals = torch.zeros(len(places), dtype=torch.float64)

    def observe(place: int, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        around = places[place][1]
        if around is None:
            before, after = first_tensor(args, kwargs), first_tensor((output,), {})
        else:
            before, after = around(block, args, kwargs)
        totals[place] += nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).sum().to(totals)

    tail = Tail(model)
    handles = [
        block.register_forward_hook(lambda *call, place=place: observe(place, *call), with_kwargs=True)
        for place, (block, _) in enumerate(places)
    ]
    try:
        with torch.no_grad():
            for batch in tqdm(tokens.split(BATCH), desc="calibrating", unit="batch", leave=False):
                tail.states(input_ids=batch.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return totals / tokens.numel()


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    """The hidden state among a block's arguments, or in its output, which some families wrap in a tuple."""
    value = args[0] if args else trial.hidden_state(args, kwargs)
    return value[0] if isinstance(value, tuple | list) else value


def _columns(output: nn.Module | Experts) -> int:
    if isinstance(output, Experts):
        return output.width
    weight = output.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] if isinstance(output, nn.Linear) else weight.shape[0]  # Conv1D stores (in, out)


@contextmanager
def activations_differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow to activations and not to weights, which halves the cost of a backward pass."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_().clone())
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, value in required.items():
            parameter.requires_grad_(value)
