"""What a model consists of, counted: the counted columns of a row, and the table `layers`.

Stock is taken of the dense model before it is pruned, and of the model that is measured, in the form in which it runs.
Whatever has changed it in between is not asked what it did.

Removed is what was cut out of a tensor, and what is zero and was not: zeros of the dense model are no removal, so that
its own sparsity is 0. A sparsity is of all entries that there were, those zeros included: where the dense model has many
of them, less can be left to remove than was asked, and the columns say so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from sweep.formats.grid import Grid
from sweep.formats.packing import matrix_name, packed
from sweep.models import anatomy


@dataclass(frozen=True)
class Piece:
    """One tensor of a model, or one expert's matrix; a packed matrix counts as the one that it stands for."""

    size: int  # entries, zeros included
    nonzeros: int
    held_bytes: int  # as it lies in memory
    multiplies: bool = False  # whether a token's hidden state is multiplied by it
    share: float = 1.0  # what a token meets of it: of a lookup one row, of experts those that it goes through

    @property
    def zeros(self) -> int:
        return self.size - self.nonzeros


Pieces = dict[str, Piece]  # by the names of `anatomy.tensors`; a tied tensor once
_ABSENT = Piece(0, 0, 0)


@dataclass(frozen=True)
class Stock:
    """What a model consists of at one time. It keeps no block in memory that is removed later."""

    pieces: Pieces
    blocks: list[tuple[str, weakref.ref[nn.Module]]]  # name and module, in order
    stored_bytes: int  # of the tensors that a checkpoint of it holds
    left: dict[str, str]  # parameters of the blocks that are no matrices to prune, by the names of pieces, and why


def stock(model: PreTrainedModel) -> Stock:
    """What the model consists of now."""
    blocks = [(name, weakref.ref(block)) for name, block in anatomy.all_blocks(model).items()]
    left = {name.removesuffix(".weight"): reason for name, reason in anatomy.left(model).items()}
    return Stock(_pieces(model), blocks, _stored_bytes(model), left)


def size(now: Stock) -> dict[str, int]:
    """Parameters, bytes and multiply-accumulates of one token, as columns.

    Tied weights count once as parameters and bytes, and where they multiply: an embedding is a lookup, the head a
    product. Of experts a token meets its share, of the non-zeros that of the average expert. Routers and attention scores,
    whose cost depends on the context and not on the weights, are left out.
    """
    pieces = now.pieces.values()
    met = [piece for piece in pieces if piece.multiplies]
    return {
        "parameters": sum(piece.size for piece in pieces),
        "nonzero_parameters": sum(piece.nonzeros for piece in pieces),
        "active_parameters": round(sum(piece.size * (piece.share if piece.multiplies else 1) for piece in pieces)),
        "weights_bytes": sum(piece.held_bytes for piece in pieces),
        "stored_bytes": now.stored_bytes,
        "macs_per_token": round(sum(piece.share * piece.size for piece in met)),
        "nonzero_macs_per_token": round(sum(piece.share * piece.nonzeros for piece in met)),
    }


def coded(now: Stock, grids: Mapping[str, Grid], itemsize: int, scale_bits: int) -> dict[str, float | None]:
    """What the weights would take in a form that fits, as columns: so that all are compared, whatever form runs them.

    grids       of the matrices that were quantised, by name
    itemsize    bytes of a weight that was not
    scale_bits  of each scale of a grid

    A matrix of a block, and any that was quantised, takes the fewer bits of two: all its codes or weights, or one bit for
    each of them and the non-zeros alone; its scales beside them.
    """
    blocks = tuple(f"{name}." for name, _ in now.blocks)
    total = of_blocks = inside = 0
    for name, piece in now.pieces.items():
        grid, inner = grids.get(name), piece.multiplies and name.startswith(blocks)
        bits = 8 * piece.held_bytes
        if inner or grid is not None:
            each, scales = (8 * itemsize, 0) if grid is None else (grid.bits, scale_bits * grid.scales.numel())
            bits = min(each * piece.size, piece.size + each * piece.nonzeros) + scales
        total += bits
        if inner:
            of_blocks, inside = of_blocks + bits, inside + piece.size
    return {"bits_per_weight": of_blocks / inside if inside else None, "coded_bytes": -(-total // 8)}


def removed(before: Stock, now: Stock, targets: Iterable[str]) -> dict[str, float]:
    """The fractions removed, as columns: of these pieces of the model before, of its blocks, and of all that it was."""
    were, are = before.pieces, _by_old_names(before, now)
    blocks = tuple(f"{name}." for name, _ in before.blocks)
    return {
        "sparsity_achieved": _fraction(were, are, targets),
        "sparsity_block_parameters": _fraction(were, are, [name for name in were | are if name.startswith(blocks)]),
        "sparsity_all_parameters": _fraction(were, are, were | are),
    }


def read_bytes(now: Stock, batch_size: int = 1) -> float:
    """Bytes of weights that one step of decoding reads, a token of each of `batch_size` texts.

    Of a lookup that is not the head's matrix too it reads a row a token, and of experts those that any of the tokens goes
    through: on average, if each token is as likely to take any as any other.
    """
    return sum((1 - (1 - piece.share) ** batch_size) * piece.held_bytes for piece in now.pieces.values())


def matrices(before: Stock, now: Stock) -> pd.DataFrame:
    """One line a matrix of a block: block (its number in the unpruned model), matrix, weights, zeros, left.

    zeros  weights that are zero or not there any more, those of removed neurons, heads and blocks among them
    left   why it is none that weight methods prune, such as a router or a convolution; null for those that they do
    """
    are = _by_old_names(before, now)
    lines = [
        (
            number,
            name.removeprefix(f"{block}."),
            piece.size,
            piece.size - are.get(name, _ABSENT).nonzeros,
            before.left.get(name),
        )
        for number, (block, _) in enumerate(before.blocks)
        for name, piece in before.pieces.items()
        if (piece.multiplies or name in before.left) and name.startswith(f"{block}.")
    ]
    return pd.DataFrame(lines, columns=["block", "matrix", "weights", "zeros", "left"])


def _pieces(model: PreTrainedModel) -> Pieces:
    products = {id(parameter) for parameter in anatomy.products(model)}
    rows = {id(module.weight): len(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts = anatomy.experts(model)
    found = {}
    for name, tensor in anatomy.tensors(model).items():
        multiplies = id(tensor) in products or name in experts
        share = experts.get(name, 1.0) if multiplies else 1 / rows.get(id(tensor), 1)
        found[name] = Piece(tensor.numel(), int(torch.count_nonzero(tensor)), tensor.nbytes, multiplies, share)
    for path, layer in packed(model).items():
        name = matrix_name(path)
        found[name] = Piece(
            layer.out_features * layer.in_features, layer.nonzeros, layer.held_bytes, True, experts.get(name, 1.0)
        )
    return found


def _stored_bytes(model: PreTrainedModel) -> int:
    """Tensors that share their memory once; the matrices of packed layers as they are held, stored or not."""
    layers = packed(model)
    matrices = {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_buffers()}
    state = {tensor.data_ptr(): tensor for name, tensor in model.state_dict().items() if name not in matrices}
    return sum(tensor.nbytes for tensor in state.values()) + sum(layer.held_bytes for layer in layers.values())


def _by_old_names(before: Stock, now: Stock) -> Pieces:
    """The pieces by the names that they had: after some blocks have gone, the others are renumbered."""
    old = {id(module()): name for name, module in before.blocks}
    became = {f"{name}.": f"{old[id(module())]}." for name, module in now.blocks}
    found = {}
    for name, piece in now.pieces.items():
        block = next((block for block in became if name.startswith(block)), "")
        found[became.get(block, "") + name.removeprefix(block)] = piece
    return found


def _fraction(were: Pieces, are: Pieces, names: Iterable[str]) -> float:
    """The fraction removed of these pieces, net of tensors that were added, such as a bias in place of what went."""
    whole = gone = 0
    for name in names:
        was, is_ = were.get(name, _ABSENT), are.get(name, _ABSENT)
        whole += was.size
        gone += was.size - is_.size + max(0, is_.zeros - was.zeros)
    return gone / whole if whole else 0.0
