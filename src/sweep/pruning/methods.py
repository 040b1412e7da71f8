"""Every family of methods as one record: how it changes a model in place, of what a sparsity is a fraction, its units.

A new family is its settings in families.py, what no model can meet of them in checks.py, a module of its own, and a record
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.config import Cell
from sweep.models import anatomy, token_ids
from sweep.models import experts as mixtures
from sweep.pruning import depth, experts, recipe, sharing, units, vocabulary, weights
from sweep.pruning.families import Dense, Expert, Head, Layer, Method, Neuron, Vocab, Weight
from sweep.pruning.masks import Masks
from sweep.pruning.pruned import Given, Pruned
from sweep.pruning.recipe import Recipe
from sweep.settings import plain
from sweep.solver import Rounding, no_rounding


@dataclass(frozen=True)
class Family:
    prune: Callable[[PreTrainedModel, Any, float, Given], Pruned]
    targets: Callable[[PreTrainedModel, Any], Iterable[Tensor]]  # what an unpruned model may lose
    units: Callable[[PreTrainedModel, Any], Sequence[int]] = lambda model, method: ()  # how many each block has
    replay: Callable[[PreTrainedModel, Any, Recipe, Given], Pruned] | None = None  # removes what a recipe says


def prune(
    model: PreTrainedModel,
    method: Method,
    sparsity: float,
    tokens: Tensor | None,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequential: bool = True,
    memo: sharing.Memo = sharing.unshared,
    device: torch.device | str | None = None,
    rounding: Rounding = no_rounding,
) -> Pruned:
    """Prune the model in place and report what was removed.

    tokens     (sequences, length) calibration text for methods that read one, else None
    seed       of criteria that draw numbers
    tokenizer  for methods that change the vocabulary or measure on a task
    sequential weight methods calibrate a block on what the pruned blocks before it put out
    memo       where statistics of the unpruned model come from: by default they are measured
    device     where a weight method works, one block at a time; None = where the model lies
    rounding   what quantises matrices in the pass that prunes them, for a criterion that reads it
    Raises RuntimeError when the removed count is not the requested one, RequestError when the text has a token that the
    model has no row for, and for a recipe of a model of another shape.
    """
    if tokens is not None and tokenizer is not None:
        token_ids.refuse(tokens[tokens >= token_ids.embedded(model)].cpu().numpy(), tokenizer)
    given = Given(tokens, seed, tokenizer, sequential, memo, device, rounding)
    family = WORK[type(method)]
    if isinstance(method, Dense):
        return family.prune(model, method, sparsity, given)
    shapes, counts = _shapes(model, method), tuple(family.units(model, method))
    if method.replay is None:
        pruned = family.prune(model, method, sparsity, given)
    else:
        asked = recipe.read(method.replay)
        asked.check(shapes, counts)
        assert family.replay is not None
        pruned = family.replay(model, method, asked, given)
    settings = {name: value for name, value in plain(method).items() if name != "replay"}
    return replace(pruned, recipe=Recipe(settings, sparsity, seed, shapes, counts, pruned.gone, pruned.masks.packed))


def prune_as(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor | None,
    *,
    memo: sharing.Memo = sharing.unshared,
    device: torch.device | str | None = None,
    rounding: Rounding = no_rounding,
) -> Pruned:
    """`prune`, as a cell asks for it: from the command line and from Python alike."""
    return prune(
        model,
        cell.method,
        cell.sparsity,
        tokens,
        seed=cell.seed,
        tokenizer=tokenizer,
        sequential=cell.calibration is None or cell.calibration.sequential,
        memo=memo,
        device=device,
        rounding=rounding,
    )


def _shapes(model: PreTrainedModel, method: Method) -> dict[str, recipe.Shape]:
    """Of what the method may remove, by name."""
    tensors = anatomy.tensors(model)
    return {name: tuple(tensors[name].shape) for name in sorted(targets(model, method))}


def targets(model: PreTrainedModel, method: Method) -> frozenset[str]:
    """What of an unpruned model the method may remove, by the names of `anatomy.tensors`: of what a sparsity is a fraction.

    Of blocks that go as a whole, all that is in them; else matrices, without the biases that go with their rows.
    """
    places = {tensor.data_ptr(): name for name, tensor in anatomy.tensors(model).items()}
    return frozenset(places[tensor.data_ptr()] for tensor in WORK[type(method)].targets(model, method))


def count_units(model: PreTrainedModel, method: Method) -> tuple[int, int]:
    """(units of the method's kind that the model has, those of an unpruned one that it may remove); 0 where it has none."""
    of_block = WORK[type(method)].units(model, method)
    return sum(of_block), sum(count for number, count in enumerate(of_block) if _chosen(method, number))


def _chosen(method: Method, block: int) -> bool:
    blocks = getattr(method, "blocks", None)
    return blocks is None or block in blocks


# ---- the families ----


def _nothing(model: PreTrainedModel, method: Dense, sparsity: float, given: Given) -> Pruned:
    return Pruned(targets=sum(matrix.numel() for matrix in _matrices(model, method)), removed=0)


def _matrices(model: PreTrainedModel, method: Dense) -> list[Tensor]:
    return list(anatomy.all_matrices(model).values())


def _weights(model: PreTrainedModel, method: Weight, sparsity: float, given: Given) -> Pruned:
    return weights.prune(
        model,
        method,
        sparsity,
        given.tokens,
        seed=given.seed,
        sequential=given.sequential,
        device=given.device,
        memo=given.memo,
        rounding=given.rounding,
    )


def _units(model: PreTrainedModel, method: Neuron | Head, sparsity: float, given: Given) -> Pruned:
    return units.prune(model, method, sparsity, given.tokens, given.seed, given.tokenizer, given.memo)


def _of_parts(model: PreTrainedModel, method: Neuron | Head) -> list[Tensor]:
    return [matrix for part in units.parts(model, method) for matrix in part.matrices]


def _of_blocks(model: PreTrainedModel, method: Layer) -> list[Tensor]:
    names = anatomy.block_names(model)
    gone = {
        f"{names[unit.block]}.{part}".removesuffix(".")
        for unit in depth.units(model, method)
        for part in (unit.modules or ("",))
        if _chosen(method, unit.block)
    }
    inside = tuple(f"{name}." for name in gone)
    return [tensor for name, tensor in anatomy.tensors(model).items() if name in gone or name.startswith(inside)]


def _of_each_block(model: PreTrainedModel, method: Layer) -> list[int]:
    counts = Counter(unit.block for unit in depth.units(model, method))
    return [counts[block] for block in range(len(anatomy.blocks(model)))]


def _tokens(model: PreTrainedModel, method: Vocab, sparsity: float, given: Given) -> Pruned:
    assert given.tokenizer is not None
    return vocabulary.prune(model, given.tokenizer, method, sparsity, given.tokens, given.seed)


def _rows(model: PreTrainedModel, method: Vocab) -> list[Tensor]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _of_experts(model: PreTrainedModel, method: Expert) -> list[Tensor]:
    """The matrices of the experts; the router's rows and biases go with them."""
    every = anatomy.tensors(model)
    found = []
    for mixture in experts.chosen(mixtures.find(model), method):
        beside = {slices.tensor.data_ptr() for slices in mixture.held if not slices.is_matrix}
        inside = {name: tensor for name, tensor in every.items() if name.startswith(f"{mixture.path}.")}
        found += [tensor for tensor in inside.values() if tensor.data_ptr() not in beside]
    return found


def _experts_of_blocks(model: PreTrainedModel, method: Expert) -> list[int]:
    numbers = {mixture.block: mixture.number for mixture in mixtures.find(model)}
    return [numbers.get(block, 0) for block in range(len(anatomy.blocks(model)))]


def _weights_again(model: PreTrainedModel, method: Weight, asked: Recipe, given: Given) -> Pruned:
    return weights.replay(model, method, Masks.of_packed(asked.masks))


def _units_again(model: PreTrainedModel, method: Neuron | Head, asked: Recipe, given: Given) -> Pruned:
    return units.replay(model, method, asked.gone)


def _layers_again(model: PreTrainedModel, method: Layer, asked: Recipe, given: Given) -> Pruned:
    return depth.replay(model, method, asked.gone)


def _experts_again(model: PreTrainedModel, method: Expert, asked: Recipe, given: Given) -> Pruned:
    return experts.replay(model, method, asked.gone)


def _tokens_again(model: PreTrainedModel, method: Vocab, asked: Recipe, given: Given) -> Pruned:
    assert given.tokenizer is not None
    return vocabulary.replay(model, given.tokenizer, asked.gone, given.seed)


WORK: dict[type, Family] = {
    Dense: Family(_nothing, _matrices),
    Weight: Family(_weights, lambda model, method: weights.targets(model, method).values(), replay=_weights_again),
    Neuron: Family(_units, _of_parts, units.counts, _units_again),
    Head: Family(_units, _of_parts, units.counts, _units_again),
    Layer: Family(depth.prune, _of_blocks, _of_each_block, _layers_again),
    Expert: Family(experts.prune, _of_experts, _experts_of_blocks, _experts_again),
    Vocab: Family(  # of no block
        _tokens, _rows, lambda model, method: [len(model.get_input_embeddings().weight)], _tokens_again
    ),
}
