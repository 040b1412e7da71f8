"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by `peft`: merged under the mask, or kept beside the matrices.

Legend: W (out, in) the matrix of a linear layer, A (rank, in) and B (out, rank) its adapter, s its scale, M the mask.

merged  what is trained is W + M * s B A, and that is what W becomes: nothing that pruning removed comes back, and nothing
        that was trained is lost, as when an adapter is trained without its mask and cut by it afterwards. The product with
        the whole matrix costs half as much again as plain adapters do.
apart   what is trained is W + s B A, and A and B stay beside W, in its dtype: they are parameters, bytes and products
        that the model has more.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.models import adapted, anatomy, surgery
from sweep.models.logits import Tail
from sweep.pruning.masks import Masks
from sweep.recovery import distillation, training
from sweep.recovery.given import Given, Trained
from sweep.recovery.training import Budget, Objective
from sweep.settings import RequestError

SCALE = 2  # of B A: peft's lora_alpha is so many times the rank
_NAME = "default"  # peft's of an adapter


def lora(given: Given) -> Trained:
    """The kind `lora`."""
    asked, budget = given.asked, training.budget(given.asked)
    check_rank(given.model, asked.rank)  # before the dense model is asked
    train_adapters(
        given.model,
        given.tokens,
        distillation.objective(given),
        budget,
        given.masks,
        rank=asked.rank,
        merge=asked.merge,
        seed=given.seed,
        state=given.state,
    )
    return budget.trained(given.tokens, f"adapters of rank {asked.rank}, {'merged' if asked.merge else 'kept apart'}")


def linears(model: PreTrainedModel) -> dict[str, anatomy.Linear]:
    """The linear layers that get adapters, by name: all of the blocks that are prunable matrices.

    Raises RequestError where matrices are in no linear layer, such as those of fused experts.
    """
    matrices = anatomy.all_matrices(model)
    found = {name: module for name, module in anatomy.linears(model).items() if name in matrices}
    if rest := [name for name in matrices if name not in found]:
        raise RequestError(
            f"recover=lora adapts linear layers, and {len(rest)} of the {len(matrices)} matrices of "
            f"{type(model).__name__}, such as {rest[0]}, are in none: use recover=distill or recover=local"
        )
    return found


def check_rank(model: PreTrainedModel, rank: int) -> None:
    """Refuse a rank larger than a matrix has. Needs no weights: a model on the meta device will do. Raises RequestError."""
    sizes = {name: min(anatomy.weight(linear).shape) for name, linear in linears(model).items()}
    name = min(sizes, key=sizes.__getitem__)
    if rank > sizes[name]:
        shape = " x ".join(map(str, anatomy.weight(model.get_submodule(name)).shape))
        raise RequestError(
            f"recover.rank={rank} is more than {name} has, which is {shape}: use at most {sizes[name]}, or train the "
            "matrices themselves with recover=distill"
        )


def train_adapters(
    model: PreTrainedModel,
    tokens: Tensor,
    objective: Objective,
    budget: Budget,
    masks: Masks | None = None,
    *,
    rank: int,
    merge: bool = True,
    seed: int = 0,
    state: Path | None = None,
) -> list[float]:
    """Train adapters of all linear layers of the blocks, and merge them or leave them beside these. In place.

    tokens  (sequences, length)
    masks   of what pruning has removed, which stays zero
    Raises RequestError for a rank larger than a matrix, before anything is changed.
    """
    import peft

    check_rank(model, rank)
    names, tail, masks = list(linears(model)), Tail(model), masks or Masks()
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with training.in_float32(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flipped = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names, fan_in_fan_out=flipped)
        tuner = peft.LoraModel(model, config, _NAME)
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        keep = {name: masks[name].to(model.device) for name in names if merge and name in masks}
        try:
            with ExitStack() as restore:
                for name, mask in keep.items():
                    anatomy.replace_forward(restore, layers[name], _masked(layers[name], mask))
                losses = training.train(model, tail, parameters, tokens, objective, budget, seed=seed, state=state)
        finally:
            tuner.unload()
            for parameter, value in required.items():
                parameter.requires_grad_(value)
        if merge:
            for name, layer in layers.items():
                matrix = anatomy.weight(layer.base_layer).detach()
                surgery.write_weights(matrix, _whole(matrix, keep.get(name), *_factors(layer)))
    if not merge:
        for layer in layers.values():
            a, b = _factors(layer)
            adapted.adapt(layer.base_layer, a, SCALE * b)
            anatomy.forget(layer.base_layer)
    return losses


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """(A, B) of a layer of peft's."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


@torch.no_grad()
def _whole(weight: Tensor, mask: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """(out, in) W + M * s B A."""
    changed = torch.addmm(weight, b, a, alpha=SCALE)
    return changed if mask is None else torch.where(mask, changed, weight)


def _masked(layer: Any, mask: Tensor) -> Any:
    """What stands in for the forward pass of a layer of peft's, so that its adapter is trained under the mask."""
    weight, bias = anatomy.weight(layer.base_layer).detach(), layer.base_layer.bias

    def forward(x: Tensor) -> Tensor:
        product = _Masked.apply(x, weight, mask, *_factors(layer))
        return product if bias is None else product + bias

    return forward


class _Masked(torch.autograd.Function):
    """x (W + M * s B A)^T, which keeps no matrix for its gradient: that with respect to B A is s M * (g^T x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask, a, b)
        return F.linear(x, _whole(weight, mask, a, b))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, a, b = ctx.saved_tensors
        of_whole = SCALE * mask * (gradient.flatten(0, -2).t() @ x.flatten(0, -2))
        of_x = gradient @ _whole(weight, mask, a, b) if ctx.needs_input_grad[0] else None
        return of_x, None, None, b.t() @ of_whole, of_whole @ a.t()
