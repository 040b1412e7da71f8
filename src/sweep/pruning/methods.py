"""The seam: every method, as a change of the model in place.

To add a criterion: a function in scores.py, its line in weights.py or units.py, its name in config.py,
a YAML in conf/method, and a row in the test of invariants.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.config import Cell
from sweep.models import anatomy, token_ids
from sweep.pruning import depth, sharing, units, vocabulary, weights
from sweep.pruning.families import Dense, Head, Layer, Method, Neuron, Vocab, Weight
from sweep.pruning.pruned import Pruned


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
) -> Pruned:
    """Prune the model in place and report what was removed.

    tokens     (sequences, length) calibration text for methods that read one, else None
    seed       of criteria that draw numbers
    tokenizer  for methods that change the vocabulary or measure on a task
    sequential weight methods calibrate a block on what the pruned blocks before it put out
    memo       where statistics of the unpruned model come from: by default they are measured
    device     where a weight method works, one block at a time; None = where the model lies
    Raises RuntimeError when the removed count is not the requested one, RequestError when the text has a token that the
    model has no row for.
    """
    if tokens is not None and tokenizer is not None:
        token_ids.refuse(tokens[tokens >= token_ids.embedded(model)].cpu().numpy(), tokenizer)
    match method:
        case Dense():
            return Pruned(
                targets=sum(w.numel() for block in anatomy.blocks(model) for w in anatomy.matrices(block).values()),
                removed=0,
            )
        case Weight():
            return weights.prune(
                model, method, sparsity, tokens, seed=seed, sequential=sequential, device=device, memo=memo
            )
        case Neuron() | Head():
            return units.prune(model, method, sparsity, tokens, seed, tokenizer, memo)
        case Layer():
            return depth.prune(model, method, sparsity, tokens, seed, tokenizer, memo)
        case Vocab():
            assert tokenizer is not None
            return vocabulary.prune(model, tokenizer, method, sparsity, tokens, seed)


def prune_as(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor | None,
    *,
    memo: sharing.Memo = sharing.unshared,
    device: torch.device | str | None = None,
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
    )


def targets(model: PreTrainedModel, method: Method) -> frozenset[str]:
    """What of an unpruned model the method may remove, by the names of `anatomy.tensors`: of what a sparsity is a fraction.

    Of blocks that go as a whole, all that is in them; else matrices, without the biases that go with their rows.
    """
    found: Iterable[Tensor]
    match method:
        case Dense():
            found = [matrix for block in anatomy.blocks(model) for matrix in anatomy.matrices(block).values()]
        case Weight():
            found = weights.targets(model, method).values()
        case Neuron() | Head():
            found = [layer.weight for part in units.parts(model, method) for layer in (*part.inputs, part.output)]
        case Layer():
            gone = tuple(
                f"{name}." for number, name in enumerate(anatomy.block_names(model)) if _chosen(method, number)
            )
            return frozenset(name for name in anatomy.tensors(model) if name.startswith(gone))
        case Vocab():
            rows = [model.get_input_embeddings(), model.get_output_embeddings()]
            found = [parameter for module in rows if module is not None for parameter in module.parameters()]
    places = {tensor.data_ptr(): name for name, tensor in anatomy.tensors(model).items()}
    return frozenset(places[tensor.data_ptr()] for tensor in found)


def count_units(model: PreTrainedModel, method: Method) -> tuple[int, int]:
    """(units of the method's kind that the model has, those of an unpruned one that it may remove); 0 where it has none."""
    match method:
        case Dense() | Weight():
            of_block = []
        case Neuron():
            of_block = [ffn.width for ffn in anatomy.ffns(model)]
        case Head():
            of_block = [a.groups if method.unit == "group" else a.heads for a in anatomy.attentions(model)]
        case Layer():
            of_block = [1] * len(anatomy.blocks(model))
        case Vocab():
            return (len(model.get_input_embeddings().weight),) * 2
    return sum(of_block), sum(count for number, count in enumerate(of_block) if _chosen(method, number))


def _chosen(method: Method, block: int) -> bool:
    blocks = getattr(method, "blocks", None)
    return blocks is None or block in blocks
