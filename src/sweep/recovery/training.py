"""Trains some parameters of a model on text, whatever they are and whatever the loss: the loop that lora and distill share.

Weights that pruning has removed stay zero at every step: their gradients are, so that the optimiser's moments are, and they
are zeroed again after each step. The model trains in float32, whatever its dtype, and is put back in it. Dropout is off,
sequences go through the model one by one, and their order is the seed's, so that the same is done twice alike. On CUDA
attention is computed step by step: its fused kernels sum their gradients in whichever order threads come.

A run that was stopped goes on from the state that it has last written: parameters, optimiser, schedule and step, from
which all else follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from sweep.models import logits
from sweep.models.logits import Tail
from sweep.recovery.given import Trained
from sweep.recovery.kinds import Recover
from sweep.recovery.stopped import State
from sweep.settings import RequestError

BETAS = (0.9, 0.95)  # of AdamW: a few dozen steps are fewer than the thousand over which 0.999 averages
LARGEST_NORM = 1.0  # of all gradients together: a longer one is shortened to it

Loss = Callable[[Tensor, slice], Tensor]  # from logits (n, V) float32 of some positions and their slice: summed, nats
Objective = Callable[[int], Loss]  # the loss of a sequence, by its number


@dataclass(frozen=True)
class Budget:
    """How much is trained, and how fast."""

    steps: int
    batch: int  # sequences a step
    learning_rate: float  # the highest, after the warm-up
    schedule: str = "cosine"  # as transformers calls it
    warmup: float = 0.1  # share of the steps

    def trained(self, tokens: Tensor, what: str) -> Trained:
        """What the stage says of it; tokens (sequences, length)."""
        return Trained(self.steps * self.batch * tokens.shape[1], self.steps, what)


def budget(asked: Recover) -> Budget:
    """The budget in the settings, once they are normalised."""
    assert asked.steps is not None and asked.learning_rate is not None
    return Budget(asked.steps, asked.batch, asked.learning_rate)


def train(
    model: PreTrainedModel,
    tail: Tail,
    parameters: Mapping[str, nn.Parameter],
    tokens: Tensor,
    objective: Objective,
    budget: Budget,
    *,
    keep: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    state: Path | None = None,
) -> list[float]:
    """Train parameters of a model in place; the others stay as they are. The mean loss of each step, in nats a position.

    tail    of the model, made before anything was put into it
    tokens  (sequences, length)
    keep    by the names of parameters, bool of their shape: where False, an entry is zero and stays so
    state   the file from which a stopped run goes on, and that is gone at the end; None writes none
    Raises RequestError when the loss is no number.
    """
    keep = keep or {}
    optimiser = torch.optim.AdamW(parameters.values(), lr=budget.learning_rate, betas=BETAS, weight_decay=0.0)
    warmup = round(budget.warmup * budget.steps)
    schedule = get_scheduler(budget.schedule, optimiser, warmup, budget.steps)
    stopped = State(state)
    losses = _resumed(stopped, parameters, optimiser, schedule)
    sequences = order(len(tokens), budget.steps * budget.batch, seed)
    steps = range(len(losses), budget.steps)
    with _training_only(model, parameters):
        for step in tqdm(steps, "recovering", budget.steps, initial=len(losses), unit="step", leave=False):
            loss = _backward(tail, tokens, sequences[step * budget.batch : (step + 1) * budget.batch], objective)
            if not math.isfinite(loss):
                raise _diverged(f"the loss is {loss} at step {step + 1} of {budget.steps}", budget, stopped)
            for name, mask in keep.items():
                _zero(parameters[name].grad, mask)
            torch.nn.utils.clip_grad_norm_(parameters.values(), LARGEST_NORM)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            for name, mask in keep.items():
                _zero(parameters[name].detach(), mask)
            losses.append(loss)
            if len(losses) < budget.steps:
                stopped.write(lambda: _held(parameters, optimiser, schedule, losses))
    if not all(torch.isfinite(parameter).all() for parameter in parameters.values()):
        raise _diverged("a weight is no number after the last step", budget, stopped)
    stopped.forget()
    return losses


def _diverged(what: str, budget: Budget, stopped: State) -> RequestError:
    stopped.forget()  # from it the same would come again
    return RequestError(
        f"recover: {what}, and nothing is saved: lower recover.learning_rate, which is {budget.learning_rate:g}"
    )


def order(sequences: int, needed: int, seed: int) -> list[int]:
    """The numbers of the sequences that are read, one after the other: all of them, shuffled, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < needed:
        found += torch.randperm(sequences, generator=generator).tolist()
    return found[:needed]


def _backward(tail: Tail, tokens: Tensor, sequences: list[int], objective: Objective) -> float:
    """Backpropagate the mean loss of a step; its value in nats a position."""
    positions = len(sequences) * (tokens.shape[1] - 1)
    total = 0.0
    for number in sequences:
        with torch.enable_grad():
            ids = tokens[number : number + 1].to(tail.model.device)
            states = tail.states(input_ids=ids)[0, :-1]
        total += logits.backpropagate(tail, states, _mean(objective(number), positions))
    return total


def _mean(loss: Loss, positions: int) -> Loss:
    return lambda z, some: loss(z, some) / positions


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: Tensor, objective: Objective, tail: Tail | None = None) -> float:
    """Nats a position of sequences (sequences, length), without training."""
    tail = tail or Tail(model)
    total = 0.0
    for number, ids in enumerate(tokens.split(1)):
        states = tail.states(input_ids=ids.to(model.device))[0, :-1]
        total += sum(float(objective(number)(tail.logits(states[p]).float(), p)) for p in tail.pieces(states))
    return total / (len(tokens) * (tokens.shape[1] - 1))


def next_token(tokens: Tensor) -> Objective:
    """Cross-entropy of each next token of sequences (sequences, length)."""

    def of(number: int) -> Loss:
        wanted = tokens[number, 1:]
        return lambda z, some: nn.functional.cross_entropy(z, wanted[some].to(z.device), reduction="sum")

    return of


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """While open, all that the model consists of is float32; what came of it is rounded to the dtypes that it had."""
    had = [(tensor, tensor.dtype) for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    for tensor, _ in had:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in had:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _training_only(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While open, these parameters alone take gradients; the model stays in evaluation mode, and attention repeatable."""
    had = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters.values()}
    was_training = model.training
    model.eval()
    try:
        for parameter, _ in had:
            parameter.requires_grad_(id(parameter) in chosen)
        with sdpa_kernel(SDPBackend.MATH) if model.device.type == "cuda" else nullcontext():
            yield
    finally:
        model.train(was_training)
        for parameter, required in had:
            parameter.requires_grad_(required)
            parameter.grad = None


def _zero(tensor: Tensor | None, mask: Tensor) -> None:
    if tensor is not None:
        tensor.masked_fill_(~mask, 0)


# ---- the state of a stopped run ----


def _held(
    parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, schedule: Any, losses: list[float]
) -> dict[str, Any]:
    return {
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
    }


def _resumed(
    stopped: State, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, schedule: Any
) -> list[float]:
    """Take up a state where there is one: the losses of the steps that it has behind it."""
    held = stopped.last()
    if held is None:
        return []
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(held["parameters"][name])
    optimiser.load_state_dict(held["optimiser"])
    schedule.load_state_dict(held["schedule"])
    return list(held["losses"])
