"""Requests for unit pruning that no model of this shape can meet, told before anything is loaded. No torch."""

from __future__ import annotations

from typing import Any

from sweep import sources
from sweep.config import Cell, Head, Layer, Neuron, RequestError


def check(cell: Cell) -> None:
    """Refuse a cell that would leave a block without a unit, or names blocks that are not there.

    Raises RequestError. What the model's configuration does not tell is left to the surgery.
    """
    method = cell.method
    if not isinstance(method, Neuron | Head | Layer):
        return
    shape = sources.shape(cell.model)
    depth = _first(shape, "num_hidden_layers", "n_layer")
    if not depth:
        return
    if method.blocks is not None:
        wrong = [block for block in method.blocks if not 0 <= block < depth]
        if wrong or not method.blocks:
            raise RequestError(f"method.blocks must be block numbers of 0 to {depth - 1}, each once; got "
                               f"{list(method.blocks)}")  # fmt: skip
    blocks = depth if method.blocks is None else len(set(method.blocks))
    if isinstance(method, Layer):
        _check(cell, "the model without a layer", 1 if blocks == depth else 0, blocks, "layers")
        return
    if isinstance(method, Neuron):
        width = _first(shape, "intermediate_size", "ffn_dim", "n_inner")
        if width:
            bundle = max(method.multiple_of, method.group)
            if bundle > width:
                raise RequestError(f"method.multiple_of and method.group must be at most {width}, the neurons of a "
                                   f"block; got {bundle}")  # fmt: skip
            _check_parts(cell, method.scope, "a block without a neuron", blocks, width, bundle, "neurons")
        return
    heads = _first(shape, "num_attention_heads", "n_head")
    groups = _first(shape, "num_key_value_heads") or heads
    if heads and method.unit == "group":
        _check_parts(cell, method.scope, "a block without a head", blocks, groups, 1, "key-value groups")
    elif heads and method.sparsity_of == "units":
        _check_parts(cell, method.scope, "a key-value group without a head", blocks, heads, groups, "heads")


def _check_parts(cell: Cell, scope: str, left: str, blocks: int, units: int, bundle: int, noun: str) -> None:
    """Every block must keep a bundle: of the units of all blocks together, or of each block alone."""
    if scope == "layer":
        blocks = 1
    _check(cell, left, blocks * bundle, blocks * units, noun)


def _check(cell: Cell, left: str, needed: int, units: int, noun: str) -> None:
    kept = units - round(cell.sparsity * units)
    if kept < needed:
        raise RequestError(f"sparsity={cell.sparsity:g} leaves {left} ({kept} of {units} {noun} kept, "
                           f"{needed} needed): use at most {1 - needed / units:.4f}")  # fmt: skip


def _first(shape: dict[str, Any], *names: str) -> int:
    """The first of these that is there; 0 when none is."""
    return next((int(shape[name]) for name in names if shape.get(name)), 0)
