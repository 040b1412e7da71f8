"""A model's logits, a few positions at a time, and the gradient of a loss of them: all at once are never held.

With a vocabulary of 262,144 the float32 logits of 1,024 tokens take a gigabyte, and so do their softmax and their
gradient, where the whole model of 270 million parameters takes half of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep.models import anatomy

log = logging.getLogger(__name__)

ENTRIES = 2**23  # logits that are held at once: 32 MiB in float32, and a few times that while they are worked on


class Tail:
    """What a model makes of the states that leave its decoder: head, cap and scale, as its own forward pass has them.

    The forward pass runs with a decoder that only hands over its states. Whether that gives the model's logits is tried;
    where it does not, `states` are the logits themselves, all of them, and `logits` leaves them as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder, self.head = model, anatomy.decoder(model), model.get_output_embeddings()
        self._output: tuple[Any, ...] | dict[str, Any] = {}  # what the decoder gave, without its states
        self.is_split = True  # while it is tried
        self.is_split = self.head is not None and any(map(self._gives_the_logits, (_unchanged, _unchanged_in_a_tuple)))
        if not self.is_split:
            log.info(
                "%s keeps all logits of a batch in memory: they do not follow from what leaves its decoder",
                type(model).__name__,
            )

    def states(self, **arguments: Any) -> Tensor:
        """(B, L, d) what leaves the decoder when the model gets these arguments."""
        if not self.is_split:
            return self.model(**arguments, use_cache=False).logits
        found: list[Tensor] = []

        def note(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, tuple):
                found.append(output[0])
                self._output = output[1:]
            else:
                found.append(output.last_hidden_state)
                self._output = {**output, "last_hidden_state": None}
                self._kind = type(output)

        def one(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # not a slice of what came: in bfloat16 on a CPU the product with it takes a copy of the head for each text
            return (args[0].new_zeros(1, 1, args[0].shape[-1]), *args[1:])

        handles = [self.decoder.register_forward_hook(note), self.head.register_forward_pre_hook(one)]
        try:
            self.model(**arguments, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found[0]

    def logits(self, states: Tensor) -> Tensor:
        """(n, V) the model's logits at states (n, d) of `states`. For all positions of a text, go by `pieces`."""
        if not self.is_split:
            return states
        hidden = states[None]
        output = (
            (hidden, *self._output)
            if isinstance(self._output, tuple)
            else self._kind(**{**self._output, "last_hidden_state": hidden})
        )
        with ExitStack() as restore:
            anatomy.replace_forward(restore, self.decoder, lambda *_, **__: output)
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def pieces(self, states: Tensor) -> Iterator[slice]:
        """Slices of (n, d) states that have `ENTRIES` logits at most."""
        vocabulary = len(self.head.weight) if self.is_split else states.shape[-1]
        step = max(1, ENTRIES // vocabulary)
        return (slice(start, start + step) for start in range(0, len(states), step))

    @torch.no_grad()
    def _gives_the_logits(self, block: Callable[..., Any]) -> bool:
        """Tried on a few tokens with blocks that change nothing, so that a trial is no pass through the model.

        block  what stands in for a block's forward pass: some architectures expect a tensor of it, some a tuple
        """
        ids = torch.arange(4, device=self.model.device)[None] % len(self.model.get_input_embeddings().weight)
        with ExitStack() as restore:
            for module in anatomy.blocks(self.model):
                anatomy.replace_forward(restore, module, block)
            try:
                whole = self.model(input_ids=ids, use_cache=False).logits[0]
                states = self.states(input_ids=ids)[0]
                mine = torch.cat([self.logits(states[:1]), self.logits(states[1:])])  # as many as one likes
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                log.debug("%s cannot be run without its blocks: %s", type(self.model).__name__, error)
                return False
        size = float(whole.float().abs().nan_to_num(0, posinf=0).max())  # what is no number is to be so in both
        return torch.allclose(mine.float(), whole.float(), rtol=1e-2, atol=1e-2 * size, equal_nan=True)


def descend(tail: Tail, states: Tensor, wanted: Callable[[Tensor, slice], Tensor]) -> None:
    """Backpropagate the summed cross-entropy of next tokens at states (n, d), as cross_entropy(logits).backward() would.

    wanted  the next tokens of some of the positions, from the model's probabilities (positions, V) and their slice

    The gradient with respect to the logits is softmax less one at the wanted token; it is taken piece by piece down to the
    states, and from there at once through the graph behind them.
    """
    gradient = torch.empty_like(states)
    for some in tail.pieces(states):
        part = states.detach()[some].requires_grad_()
        with torch.enable_grad():
            logits = tail.logits(part)
        probabilities = logits.detach().softmax(-1, dtype=torch.float32)
        probabilities[torch.arange(len(part), device=part.device), wanted(probabilities, some)] -= 1
        torch.autograd.backward(logits, probabilities.to(logits.dtype))
        assert part.grad is not None
        gradient[some] = part.grad
    if states.requires_grad:  # else nothing but the head itself is asked for
        torch.autograd.backward(states, gradient)


def backpropagate(tail: Tail, states: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> float:
    """Backpropagate a summed loss of the logits at states (n, d), as loss(logits).backward() would; its value.

    loss  a number, from the logits (positions, V) in float32 of some of the positions, and their slice
    """
    gradient, total = torch.empty_like(states), 0.0
    for some in tail.pieces(states):
        part = states.detach()[some].requires_grad_()
        with torch.enable_grad():
            value = loss(tail.logits(part).float(), some)
        value.backward()
        assert part.grad is not None
        gradient[some] = part.grad
        total += float(value.detach())
    if states.requires_grad:  # else nothing but the head itself is asked for
        torch.autograd.backward(states, gradient)
    return total


def given(tokens: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """The `wanted` of `descend` for next tokens that are known, one a position."""
    return lambda _, some: tokens[some]


def _unchanged(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _unchanged_in_a_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (_unchanged(*args, **kwargs),)
