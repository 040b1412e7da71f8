"""Local recovery: matrix by matrix, the kept weights that give most nearly what the dense model gives at that place.

Of a matrix W with the inputs X that it reads in the recovered model and the output Y wanted of it, the kept weights that
minimise |X W^T - Y|^2 + ridge * mean(diag X^T X) * |W - W0|^2 are found, where W0 are those that pruning has left: a masked
least squares for each row, solved by conjugate gradients, all rows at once. Blocks are taken in order, and in each the
matrices with a common input together, so that every X comes of what is recovered already (arXiv:2510.14444 trains blocks so
by gradients; SparseGPT and ALPS, arXiv:2406.07831, solve the same for the inputs of the pruned model alone).

Y is what the dense matrix gives of what it reads in the dense model. A matrix whose product is added to the hidden state is
also asked for what the hidden state lacks so far: the error of all that came before is made good there. Which those are is
tried: without it, the block's output lacks its product and nothing else. After removed blocks, the last of them in the block
before the gap is asked for what the dense model has after the gap.

X (tokens, in), Y (tokens, out), W (out, in); h hidden state (tokens, hidden size).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sweep import calibrate
from sweep.calibrate import Text
from sweep.models import anatomy, surgery, watching
from sweep.recovery.given import Given, Trained
from sweep.settings import RequestError

log = logging.getLogger(__name__)

Matrices = Mapping[str, Tensor]  # of a block, by their names within it


@torch.no_grad()
def local(given: Given) -> Trained:
    """Recover the blocks of the model one after the other. Raises RequestError where a text does not go block by block."""
    model, dense = given.model, given.dense()
    blocks, dense_blocks = list(anatomy.blocks(model)), list(anatomy.blocks(dense))
    partners = _partners(blocks, dense_blocks)
    names = anatomy.block_names(model)
    ours, its = calibrate.enter(model, given.tokens), calibrate.enter(dense, given.tokens)
    for index in range(partners[0]):
        calibrate.through(its, index, dense_blocks[index], advance=True)
    trained = left = 0
    for index, block in enumerate(tqdm(blocks, desc="recovering", unit="block", leave=False)):
        upto = partners[index + 1] if index + 1 < len(blocks) else len(dense_blocks)
        place = _Place(index, block, names[index], partners[index], dense_blocks[partners[index]])
        done = _recover_block(given, place, ours, its, dense_blocks, upto)
        trained, left = trained + done, left + len(anatomy.matrices(block)) - done
    if not trained:
        raise RequestError("recover=local found no matrix that reads all tokens of the text: use recover=none")
    if left:
        log.warning(
            "recover=local left %d matrices as they are, such as those of experts, which read some tokens only", left
        )
    return Trained(given.tokens.numel(), trained * given.steps, "matrices")


@dataclass(frozen=True)
class _Place:
    index: int
    block: nn.Module
    name: str
    dense_index: int
    dense_block: nn.Module


def _partners(blocks: Sequence[nn.Module], dense: Sequence[nn.Module]) -> list[int]:
    """Which block of the dense model each was: the same one, or where some are gone, the next that has its weights."""
    if len(blocks) == len(dense):
        return list(range(len(dense)))
    found: list[int] = []
    for block in blocks:
        start = found[-1] + 1 if found else 0
        found.append(next(index for index in range(start, len(dense)) if _equal(block, dense[index])))
    return found


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, its = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


class _Reads(watching.Products):
    """While open, keeps what each matrix of a block reads of a batch: float32 (tokens, in), one for those that share it."""

    def __init__(self, matrices: Matrices, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, self._note)
        self._places = [(name, self.owner(m), watching.Piece.of(m)) for name, m in matrices.items()]
        self.read: dict[str, Tensor] = {}
        self.often: set[str] = set()  # that read more than once
        self._latest: dict[tuple, tuple[Tensor, Tensor]] = {}

    def _note(self, parameter: Tensor, piece: watching.Piece, x: Tensor) -> None:
        key = (watching.place(x), x.storage_offset(), x.shape, x.stride(), x._version)
        for name, owner, its in self._places:
            if owner is parameter and piece.meets(its):
                if name in self.read:
                    self.often.add(name)
                if key not in self._latest:
                    self._latest[key] = x, x.detach().flatten(0, -2).to(torch.float32, copy=True)
                self.read[name] = self._latest[key][1]


def _reads(text: Text, batch: int, index: int, block: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """(what each matrix of the block reads of one batch, in the order of reading; what the block puts out)."""
    one = Text([text.hidden[batch]], [text.calls[batch]], text.kinds)
    with _Reads(anatomy.matrices(block), block.parameters()) as reads:
        calibrate.through(one, index, block, advance=True)
    tokens = text.hidden[batch].shape[0] * text.hidden[batch].shape[1]
    whole = {name: x for name, x in reads.read.items() if len(x) == tokens and name not in reads.often}
    return whole, one.hidden[0]


def _recover_block(
    given: Given, at: _Place, ours: Text, its: Text, dense_blocks: Sequence[nn.Module], upto: int
) -> int:
    """Recover a block and take both texts through; how many matrices were trained.

    upto  which block of the dense model reads next
    """
    mine, wanted = anatomy.matrices(at.block), anatomy.matrices(at.dense_block)
    first, _ = _reads(ours, 0, at.index, at.block)
    writers = _writers(ours, at.index, at.block, first)
    lacks = [(d - o).float().flatten(0, -2) for d, o in zip(its.hidden, ours.hidden, strict=True)]
    dense_reads = []
    for batch in range(len(its.hidden)):
        read, its.hidden[batch] = _reads(its, batch, at.dense_index, at.dense_block)
        dense_reads.append(read)
    gap = [-h.float().flatten(0, -2) for h in its.hidden]
    for index in range(at.dense_index + 1, upto):
        calibrate.through(its, index, dense_blocks[index], advance=True)
    gap = [g + h.float().flatten(0, -2) for g, h in zip(gap, its.hidden, strict=True)]
    trained = 0
    for group in _by_input(first):
        names = [name for name in group if name in wanted and name in dense_reads[0]]
        fitted = [(name, rows) for name in names if (rows := _rows(mine[name], wanted[name])) is not None]
        if not fitted:
            continue
        gram = torch.zeros(())
        moments = {name: torch.zeros(()) for name, _ in fitted}
        after: list[dict[str, Tensor]] = []
        for batch in range(len(ours.hidden)):
            read, _ = _reads(ours, batch, at.index, at.block)
            x = read[fitted[0][0]]
            gram = gram + x.t() @ x
            for name, rows in fitted:
                y = dense_reads[batch][name] @ wanted[name].float()[rows].t()
                if name in writers:
                    y = y + lacks[batch]
                    if name == writers[-1]:
                        y = y + gap[batch]
                moments[name] = moments[name] + y.t() @ x
            after.append({name: read[name] for name in names if name in writers})
        for name, _ in fitted:
            keep = given.masks.get(f"{at.name}.{name}")
            keep = None if keep is None else keep.to(mine[name].device)
            solved = solve(gram, moments[name], mine[name].float(), keep, given.steps, given.asked.ridge)
            if not torch.isfinite(solved).all():
                raise FloatingPointError(f"{at.name}.{name}: the recovered weights are not finite; raise recover.ridge")
            surgery.write_weights(mine[name], solved)
            trained += 1
        for batch, read in enumerate(after):
            for name, x in read.items():
                lacks[batch] += dense_reads[batch][name] @ wanted[name].float().t() - x @ mine[name].float().t()
    calibrate.through(ours, at.index, at.block, advance=True)
    return trained


def _by_input(read: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of matrices in the order of reading, those with a common input together."""
    groups: dict[int, list[str]] = {}
    for name, x in read.items():
        groups.setdefault(id(x), []).append(name)
    return list(groups.values())


def _writers(text: Text, index: int, block: nn.Module, read: Mapping[str, Tensor]) -> list[str]:
    """The matrices whose products are added to the hidden state, in the order of reading.

    Tried from the last on: with it at zero, and those after it that are such ones, the block's output lacks its product.
    """
    matrices, found = anatomy.matrices(block), []
    width = text.hidden[0].shape[-1]
    kept: dict[str, Tensor] = {}

    def out() -> Tensor:
        return _reads(text, 0, index, block)[1].float().flatten(0, -2)

    with_all = out()
    for name in reversed(list(read)):
        if len(matrices[name]) != width:
            continue
        weight = matrices[name].clone()
        matrices[name].zero_()
        without, product = out(), read[name] @ weight.float().t()
        rough = 1e-3 if weight.dtype == torch.float32 else 5e-2
        if torch.allclose(with_all - without, product, rtol=rough, atol=rough * float(product.abs().max())):
            found.append(name)
            kept[name], with_all = weight, without
        else:
            matrices[name].copy_(weight)
    for name, weight in kept.items():
        matrices[name].copy_(weight)
    return found[::-1]


def _rows(mine: Tensor, dense: Tensor) -> Tensor | None:
    """Which rows of the dense matrix the rows of one that is left were; None where that cannot be told.

    A matrix that has lost rows has kept the others as they were.
    """
    if len(mine) == len(dense):
        return torch.arange(len(dense), device=dense.device)
    if mine.shape[1] != dense.shape[1]:
        return None
    left, every = _bytes(mine), _bytes(dense)
    found: list[int] = []
    for index, row in enumerate(every):
        if len(found) < len(left) and row == left[len(found)]:
            found.append(index)
    return torch.tensor(found, device=dense.device) if len(found) == len(left) else None


def _bytes(matrix: Tensor) -> list[bytes]:
    """The rows of a matrix, fetched at once from where it lies."""
    return [row.tobytes() for row in matrix.contiguous().view(torch.uint8).cpu().numpy()]


def solve(gram: Tensor, moment: Tensor, start: Tensor, keep: Tensor | None, steps: int, ridge: float) -> Tensor:
    """The kept weights W that minimise |X W^T - Y|^2 + ridge * mean(diag X^T X) * |W - start|^2, (out, in).

    gram    (in, in) X^T X
    moment  (out, in) Y^T X
    keep    (out, in) True where a weight is kept; None keeps all
    steps   of conjugate gradients with a diagonal preconditioner, at most: a row that is solved stays
    """
    mask = torch.ones_like(start) if keep is None else keep.to(start.dtype)
    diagonal = gram.diagonal()
    pull = ridge * diagonal.mean()
    scale = (diagonal + pull).clamp_min(torch.finfo(gram.dtype).tiny)
    w = start * mask
    residual = (moment - w @ gram) * mask
    step = residual / scale
    size = (residual * step).sum(1, keepdim=True)
    direction = step.clone()
    for _ in range(steps):
        curved = (direction @ gram + pull * direction) * mask
        along = (direction * curved).sum(1, keepdim=True)
        rate = torch.where(along > 0, size / along.clamp_min(torch.finfo(gram.dtype).tiny), 0)
        w += rate * direction
        residual -= rate * curved
        step = residual / scale
        next_size = (residual * step).sum(1, keepdim=True)
        direction = step + direction * torch.where(
            size > 0, next_size / size.clamp_min(torch.finfo(gram.dtype).tiny), 0
        )
        size = next_size
    return w
