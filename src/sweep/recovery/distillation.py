"""What the dense model says next, as what a pruned one is trained towards; and the training of all weights that are left.

Kept of the dense model are, at every position, its likeliest tokens with their log-probabilities; all others are one outcome,
as where divergence is measured. So a position takes half a kilobyte, and not the 200 KB of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.models import anatomy
from sweep.models.logits import Tail
from sweep.pruning import masks as pruned
from sweep.pruning.masks import Masks
from sweep.recovery import training
from sweep.recovery.given import Given, Trained
from sweep.recovery.training import Budget, Loss, Objective

TOP = 64  # tokens that are kept of a distribution


@dataclass(frozen=True)
class Teacher:
    """The dense model's next-token distributions, of S sequences of L tokens, at a temperature."""

    ids: Tensor  # (S, L - 1, TOP) int32
    log_probs: Tensor  # (S, L - 1, TOP) float32

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a cache keeps them: Teacher(**tensors) is the same again."""
        return {"ids": self.ids, "log_probs": self.log_probs}


@torch.no_grad()
def distributions(model: PreTrainedModel, tokens: Tensor, temperature: float = 1.0) -> Teacher:
    """What a dense model says next at every position of sequences (S, L) but the last, softmax(logits / temperature)."""
    tail, ids, log_probs = Tail(model), [], []
    for sequence in tqdm(tokens.split(1), desc="asking the dense model", unit="sequence", leave=False):
        states = tail.states(input_ids=sequence.to(model.device))[0, :-1]
        found = []
        for some in tail.pieces(states):
            each = (tail.logits(states[some]).float() / temperature).log_softmax(-1)
            found.append(each.topk(min(TOP, each.shape[-1])))
        log_probs.append(torch.cat([top.values for top in found]).cpu())
        ids.append(torch.cat([top.indices for top in found]).to("cpu", torch.int32))
    return Teacher(torch.stack(ids), torch.stack(log_probs))


def towards(teacher: Teacher, temperature: float = 1.0) -> Objective:
    """KL(dense || model) over the likeliest tokens and the rest as one outcome, times temperature^2.

    A temperature above 1 flattens both, so that unlikely tokens count for more; the square keeps the gradients as large
    (Hinton et al. 2015, arXiv:1503.02531). At 1 it is the divergence that rows report.
    """

    def of(number: int) -> Loss:
        return lambda z, some: (
            temperature**2
            * _kl(
                teacher.ids[number, some].long().to(z.device),
                teacher.log_probs[number, some].to(z.device),
                z / temperature,
            )
        )

    return of


def _kl(ids: Tensor, log_p: Tensor, scores: Tensor) -> Tensor:
    """Summed over positions, nats; ids and log_p (n, TOP) of the dense model, scores (n, V) of the other's tokens."""
    whole = scores.logsumexp(-1, keepdim=True)
    log_q = scores.gather(-1, ids) - whole
    of_top = (log_p.exp() * (log_p - log_q)).sum()
    if ids.shape[-1] == scores.shape[-1]:
        return of_top
    rest_p = (1 - log_p.exp().sum(-1)).clamp_min(1e-7)  # rounding may leave less than nothing
    rest_q = scores.scatter(-1, ids, -torch.inf).logsumexp(-1) - whole[:, 0]
    return of_top + (rest_p * (rest_p.log() - rest_q)).sum()


def objective(given: Given) -> Objective:
    """What the settings ask for: towards the dense model's distributions, which other cells may have asked for, or the text."""
    asked = given.asked
    if asked.objective == "next_token":
        return training.next_token(given.tokens)
    kept = given.memo(
        f"distributions {TOP} {asked.temperature:g}",
        lambda: distributions(given.dense(), given.tokens, asked.temperature).tensors(),
    )
    return towards(Teacher(**kept), asked.temperature)


# ---- all weights that are left ----


def distill(given: Given) -> Trained:
    """The kind `distill`."""
    asked, budget = given.asked, training.budget(given.asked)
    beside = {name: getattr(asked, name) for name in ("embeddings", "norms", "biases")}
    train_weights(
        given.model,
        given.tokens,
        objective(given),
        budget,
        given.masks,
        **beside,
        seed=given.seed,
        state=given.state,
    )
    return budget.trained(given.tokens, ", ".join(["matrices", *(name for name, also in beside.items() if also)]))


def train_weights(
    model: PreTrainedModel,
    tokens: Tensor,
    objective: Objective,
    budget: Budget,
    masks: Masks | None = None,
    *,
    embeddings: bool = False,
    norms: bool = False,
    biases: bool = False,
    seed: int = 0,
    state: Path | None = None,
) -> list[float]:
    """Train what pruning has left of the matrices of the blocks, and what else is asked for. In place.

    tokens  (sequences, length)
    masks   of what pruning has removed, which stays zero
    """
    tail = Tail(model)
    parameters = trainable(model, embeddings=embeddings, norms=norms, biases=biases)
    keep = {name: mask for name, mask in kept(model, masks or Masks()).items() if name in parameters}
    with training.in_float32(model):
        return training.train(model, tail, parameters, tokens, objective, budget, keep=keep, seed=seed, state=state)


def trainable(
    model: PreTrainedModel, *, embeddings: bool = False, norms: bool = False, biases: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their full names: those that hold the blocks' matrices, and those asked for.

    embeddings  those that token ids go into, and the head
    norms       the scales and shifts of norms, in the blocks and after them
    biases      of linear layers in the blocks
    """
    every = dict(model.named_parameters())
    wanted = {id(parameter) for parameter in anatomy.owners(model, anatomy.all_matrices(model)).values()}
    if embeddings:
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        wanted |= {id(module.weight) for module in modules if module is not None}
    inside = {id(module) for module in anatomy.linears(model).values()}
    for module in anatomy.decoder(model).modules():
        linear = isinstance(module, anatomy.Linear)
        own = dict(module.named_parameters(recurse=False))
        if biases and id(module) in inside and "bias" in own:
            wanted.add(id(own["bias"]))
        if norms and not linear and "norm" in type(module).__name__.lower():
            wanted |= {id(parameter) for parameter in own.values()}
    return {name: parameter for name, parameter in every.items() if id(parameter) in wanted}


def kept(model: PreTrainedModel, masks: Masks) -> Mapping[str, Tensor]:
    """Of each parameter that has masked matrices, by its full name, bool of its shape: False where it stays zero."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    views = pruned.matrices(model)
    found: dict[str, Tensor] = {}
    for matrix, owner in anatomy.owners(model, {name: views[name] for name in masks}).items():
        whole = found.setdefault(names[id(owner)], torch.ones(owner.shape, dtype=torch.bool, device=owner.device))
        view = views[matrix]
        place = whole.as_strided(view.shape, view.stride(), view.storage_offset() - owner.storage_offset())
        place.logical_and_(masks[matrix].to(place.device))  # of tied embeddings there are two
    return found
