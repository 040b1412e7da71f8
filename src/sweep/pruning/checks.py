"""Requests for pruning that no model of this shape can meet, told before anything is loaded. No torch.

What contradicts itself whatever the model is told where settings are declared: families.normalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sweep.config import Cell
from sweep.models import decoders
from sweep.pruning import families
from sweep.pruning.families import Expert, Head, Layer, Neuron, Weight
from sweep.settings import RequestError
from sweep.texts.embedded import EMBEDDED, QUESTIONS

QUERY = "method.unit=query, which removes a query head of every key-value group"
HIGHER_IS_WORSE = {"loss", "perplexity"}  # of the metrics whose drop is measured


def check(cell: Cell, shape: Mapping[str, Any]) -> None:
    """Refuse a method that no model of this shape can meet.

    shape  of the model, as its configuration says it
    Raises RequestError. What the model's configuration does not tell is left to the pruning.
    """
    match cell.method:
        case Weight():
            _check_matrices(cell.method, shape)
        case Expert():
            if families.measures_drops(cell.method):
                check_drop(cell.method)
            _check_numbers(cell.method, decoders.size(shape, "blocks"))
        case Neuron() | Head() | Layer():
            if families.measures_drops(cell.method):
                check_drop(cell.method)
            if decoders.size(shape, "blocks"):
                _check_blocks(cell, cell.method, shape)


def _check_matrices(method: Weight, shape: Mapping[str, Any]) -> None:
    """Refuse a pattern that the matrices' sizes are no multiple of, and an allocation for another number of blocks."""
    if method.pattern is not None:
        _, m = families.groups(method.pattern)
        for what in ("hidden", "neurons", "expert_neurons"):
            size = decoders.size(shape, what)
            if size % m and not method.exclude:
                raise RequestError(
                    f"method.pattern={method.pattern} needs input dimensions divisible by {m}, and the "
                    f"model's {decoders.key(shape, what)} is {size}: choose another pattern, or method.exclude=[...] the "
                    "matrices that read it"
                )
    blocks = decoders.size(shape, "blocks")
    if isinstance(method.allocation, tuple) and blocks and len(method.allocation) != blocks:
        raise RequestError(
            f"method.allocation lists {len(method.allocation)} sparsities; the model has {blocks} blocks: give one for each"
        )


def _check_blocks(cell: Cell, method: Neuron | Head | Layer, shape: Mapping[str, Any]) -> None:
    """Refuse blocks that are not there, and a sparsity that leaves one of them without a unit."""
    depth = decoders.size(shape, "blocks")
    _check_numbers(method, depth)
    blocks = depth if method.blocks is None else len(set(method.blocks))
    match method:
        case Neuron():
            _check_neurons(cell, method, blocks, decoders.size(shape, "neurons"))
        case Head():
            heads = decoders.size(shape, "heads")
            _check_heads(cell, method, blocks, heads, decoders.size(shape, "groups") or heads)
        case Layer() if method.unit == "block":  # how many sublayers there are shows when they are looked for
            _check(cell, "the model without a layer", 1 if blocks == depth else 0, blocks, "layers")


def _check_numbers(method: Neuron | Head | Layer | Expert, depth: int) -> None:
    """Refuse blocks that are not there, where it is known how many are."""
    if method.blocks is None or not depth:
        return
    if not method.blocks or any(not 0 <= block < depth for block in method.blocks):
        raise RequestError(
            f"method.blocks must be block numbers of 0 to {depth - 1}, each once; got {list(method.blocks)}"
        )


def _check_neurons(cell: Cell, method: Neuron, blocks: int, width: int) -> None:
    if not width:
        return
    bundle = max(method.multiple_of, method.group)
    if bundle > width:
        raise RequestError(
            f"method.multiple_of and method.group must be at most {width}, the neurons of a block; got {bundle}"
        )
    _check_parts(cell, method.scope, "a block without a neuron", blocks, width, bundle, "neurons")


def _check_heads(cell: Cell, method: Head, blocks: int, heads: int, groups: int) -> None:
    if not heads:
        return
    if method.unit == "group" or groups == heads:
        instead = QUERY if heads > groups else None
        _check_parts(cell, method.scope, "a block without a head", blocks, groups, 1, "key-value groups", instead)
    elif method.sparsity_of == "units":
        _check_parts(cell, method.scope, "a key-value group without a head", blocks, heads, groups, "heads")


def check_drop(method: Neuron | Head | Layer | Expert) -> None:
    """Refuse a metric that a task does not have, and too few documents. Needs no model. Raises RequestError."""
    known, asked = ", ".join(QUESTIONS), method.drop
    if isinstance(method, Layer | Expert) and asked.screen != "none":
        raise RequestError(
            f"method.screen={asked.screen} is for neurons and heads: {method.family}s are few, and each is "
            "measured. Leave method.screen out"
        )
    if asked.task is None:
        if asked.metric not in HIGHER_IS_WORSE:
            raise RequestError(
                f"method.metric={asked.metric} needs classes, and the calibration text has none: set "
                f"method.task to one of {known}, or method.metric to loss or perplexity"
            )
        return
    if asked.task not in QUESTIONS:
        reason = "has no classes" if asked.task in EMBEDDED else "is not embedded"
        raise RequestError(
            f"method.task={asked.task} {reason}, so that no drop can be measured on it: use one of "
            f"{known}, or null for the calibration text"
        )
    available = EMBEDDED[asked.task]()
    if asked.documents is not None and asked.documents > len(available):
        raise RequestError(
            f"method.documents={asked.documents} is more than the {len(available)} of {asked.task}: "
            "use fewer, or null for all"
        )
    check_classes(asked.task, [QUESTIONS[asked.task](d)[2] for d in available[-(asked.documents or 0) :]])


def check_classes(task: str, truth: Sequence[int]) -> None:
    """Raises RequestError when the documents are all of one class."""
    if len(set(truth)) < 2:
        raise RequestError(
            f"method.documents: the {len(truth)} documents of {task} are all of one class, whose "
            "accuracy any constant answer reaches: raise method.documents"
        )


def at_most(sparsity: float) -> str:
    """The advice to use no more than a sparsity, in four digits that are no more either."""
    return f"use at most {math.floor(sparsity * 10_000 + 1e-6) / 10_000:.4f}"


def _check_parts(
    cell: Cell, scope: str, left: str, blocks: int, units: int, bundle: int, noun: str, instead: str | None = None
) -> None:
    """Every block must keep a bundle: of the units of all blocks together, or of each block alone."""
    if scope == "layer":
        blocks = 1
    _check(cell, left, blocks * bundle, blocks * units, noun, instead)


def _check(cell: Cell, left: str, needed: int, units: int, noun: str, instead: str | None = None) -> None:
    """Refuse to leave fewer units than are needed. `instead` is another way out than less sparsity."""
    kept = units - round(cell.sparsity * units)
    if kept < needed:
        ways = [at_most(1 - needed / units) if needed < units else "choose another method", instead]
        raise RequestError(
            f"sparsity={cell.sparsity:g} leaves {left} ({kept} of {units} {noun} kept, {needed} needed): "
            + ", or ".join(way for way in ways if way)
        )
