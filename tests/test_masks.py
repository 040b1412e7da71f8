"""What was pruned stays known: keep-masks of weights, and the numbers of units that went."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import random_tokens, tiny_model
from sweep.models import anatomy, parts
from sweep.pruning import masks as masks_module
from sweep.pruning import methods
from sweep.pruning.families import Head, Layer, Neuron, Weight
from sweep.pruning.masks import Masks
from test_weights import make

PRUNED = {
    "magnitude": ("llama", {}),
    "steps": ("llama", {"criterion": "wanda", "steps": 3}),
    "rebuilt in steps": ("llama", {"criterion": "sparsegpt", "steps": 2}),
    "alps": ("qwen2", {"criterion": "alps"}),
    "pattern": ("llama", {"criterion": "sparsegpt", "pattern": "2:4"}),
    "global": ("opt", {"criterion": "ria", "scope": "global"}),
    "experts": ("qwen3_moe", {"criterion": "wanda"}),
    "experts, rebuilt": ("mixtral", {"criterion": "sparsegpt"}),
    "tied": ("gpt2", {"embeddings": True, "lm_head": True}),
    "tied, by the head": ("gpt2", {"lm_head": True, "criterion": "wanda"}),
    "untied": ("llama", {"embeddings": True, "lm_head": True}),
}


@pytest.mark.parametrize(("family", "asked"), PRUNED.values(), ids=PRUNED)
def test_what_was_pruned_is_zero_again_after_the_weights_have_changed(family: str, asked: dict) -> None:
    model = make(family)
    for matrix in masks_module.matrices(model).values():
        matrix[0, :3] = 0  # zeros of the dense model: whether they are kept says nothing
    dense = masks_module.matrices(copy.deepcopy(model))
    pruned = methods.prune(model, Weight("weight", **asked), 0.5, random_tokens())
    masks, weights = pruned.masks, masks_module.matrices(model)
    assert masks.count() == pruned.removed and sum(keep.numel() for keep in masks.values()) == pruned.targets
    assert masks.nbytes <= pruned.targets / 8 + len(masks)
    for name, keep in masks.items():
        assert keep.shape == weights[name].shape and keep.dtype == torch.bool
        was = dense[name] != 0
        assert torch.equal(keep[was], weights[name][was] != 0), name

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0 + parameter.abs())  # nothing is zero any more
    changed = copy.deepcopy(model)
    masks.apply(model)
    places = {tensor.data_ptr() for name, tensor in weights.items() if name in masks}
    for name, weight in masks_module.matrices(model).items():
        before = masks_module.matrices(changed)[name]
        if name in masks:
            keep = masks[name]
            assert not weight[~keep].any() and torch.equal(weight[keep], before[keep]), name
        elif weight.data_ptr() not in places:
            assert torch.equal(weight, before), name
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert zeros == masks.count()  # biases, norms and routers among what is left alone


def test_masks_are_packed_and_unpacked_as_they_were() -> None:
    drawn = torch.Generator().manual_seed(0)
    shapes = {"odd": (3, 7), "one": (1, 1), "a row": (1, 9), "even": (8, 16)}
    weights = {name: torch.rand(shape, generator=drawn).round() for name, shape in shapes.items()}
    masks = Masks.of(weights | {"turned": weights["even"].t()})
    for name, weight in weights.items():
        assert torch.equal(masks[name], weight != 0)
    assert torch.equal(masks["turned"], weights["even"].t() != 0)
    assert masks.count() == sum(int((weight == 0).sum()) for weight in weights.values()) + masks[
        "turned"
    ].numel() - int(masks["turned"].sum())
    assert masks.nbytes == 3 + 1 + 2 + 16 + 16
    masks["one"] = torch.ones(1, 1, dtype=torch.bool)
    assert masks["one"].item() and not Masks()


def test_masks_of_another_model_are_refused_before_anything_changes() -> None:
    masks = methods.prune(make("llama"), Weight("weight"), 0.5, None).masks
    model = make("llama")
    methods.prune(model, Neuron(criterion="l2"), 0.5, None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"the mask of .*gate_proj is of shape \(24, 16\), and the model's .* \(15, 16\)"
    ):
        masks.apply(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    methods.prune(model, Layer(criterion="random"), 0.5, None)
    with pytest.raises(ValueError, match="model.layers.1.* not there|is of shape"):
        masks.apply(model)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "method",
    [
        Neuron(criterion="l2"),
        Neuron(criterion="l2", blocks=(1,)),
        Head(criterion="l2"),
        Head(criterion="l2", unit="query"),
    ],
)
def test_units_that_went_are_told_by_their_numbers_in_the_unpruned_model(method: Neuron | Head, steps: int) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    pruned = methods.prune(model, replace(method, steps=steps), 0.5, None)
    left = methods.count_units(model, method)[0]
    assert pruned.units_removed == methods.count_units(dense, method)[0] - left > 0
    assert not pruned.masks
    assert len(np.unique(pruned.gone, axis=0)) == len(pruned.gone)
    wide = parts.ffns if isinstance(method, Neuron) else parts.attentions
    for block, (was, now) in enumerate(zip(wide(dense), wide(model), strict=True)):
        units = pruned.gone[pruned.gone[:, 0] == block][:, 1]
        old = anatomy.weight(was.output)
        size = 1 if isinstance(method, Neuron) else was.head_dim * (2 if method.unit == "group" else 1)
        stay = np.setdiff1d(np.arange(old.shape[1] // size), units)
        columns = (stay[:, None] * size + np.arange(size)).flatten()
        assert torch.equal(old[:, columns], anatomy.weight(now.output))


def test_blocks_that_went_are_told_by_their_numbers() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    pruned = methods.prune(model, Layer(criterion="random"), 0.5, None, seed=3)
    (gone,) = pruned.gone
    (left,) = anatomy.blocks(model)
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, anatomy.blocks(dense)[1 - gone].state_dict()[name])
