"""Local recovery: matrix by matrix, the kept weights that give most nearly what the dense model gives at that place.

Of a matrix W with the inputs X that it reads in the recovered model and the output Y wanted of it, the kept weights that
minimise |X W^T - Y|^2 + ridge * mean(diag X^T X) * |W - W0|^2 are found, where W0 are those that pruning has left: a masked
least squares for each row, solved by conjugate gradients, all rows at once. Blocks are taken in order, and in each the
matrices with a common input together, so that every X comes of what is recovered already (arXiv:2510.14444 trains blocks so
by gradients; SparseGPT and ALPS, arXiv:2406.07831, solve the same for the inputs of the pruned model alone).

Y is what the dense matrix gives of what it reads in the dense model. A matrix whose product is added to the hidden state is
also asked for what the hidden state lacks so far; the last such one of a block for all that the block's output lacks of the
dense one, whatever it comes of: the error of all that came before is made good there. Which those are is tried: without it,
the block's output lacks its product and nothing else. Before a gap of removed blocks the last one is asked for what the dense
model has after the gap. Matrices that read some of the tokens, those of experts, are asked for what the dense matrix gives
of the same: the dense model may have sent others there.

X (tokens, in), Y (tokens, out), W (out, in); h hidden state (tokens, hidden size).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sweep import calibrate
from sweep.calibrate import Inputs, Text
from sweep.models import anatomy, surgery, watching
from sweep.recovery.given import Given, Trained
from sweep.recovery.stopped import State
from sweep.settings import RequestError

log = logging.getLogger(__name__)

Matrices = Mapping[str, Tensor]  # of a block, by their names within it
Read = Mapping[str, Tensor]  # (tokens, in) what matrices read of a batch, by their names


@torch.no_grad()
def local(given: Given) -> Trained:
    """Recover the blocks of the model one after the other. Raises RequestError where a text does not go block by block."""
    model, dense = given.model, given.dense()
    blocks, dense_blocks = list(anatomy.blocks(model)), list(anatomy.blocks(dense))
    partners = [*_partners(blocks, dense_blocks), len(dense_blocks)]
    names = anatomy.block_names(model)
    ours, its = calibrate.enter(model, given.tokens), calibrate.enter(dense, given.tokens)
    for index in range(partners[0]):
        calibrate.through(its, index, dense_blocks[index], advance=True)
    state = State(given.state)
    done, trained = _resumed(state, blocks, (ours, its))
    rest = range(done, len(blocks))
    for index in tqdm(rest, "recovering", len(blocks), initial=done, unit="block", leave=False):
        place = _Place(index, blocks[index], names[index], partners[index], dense_blocks[partners[index]])
        trained += _recover_block(given, place, ours, its, dense_blocks[: partners[index + 1]])
        if index + 1 < len(blocks):
            state.write(lambda: _held(blocks[: index + 1], trained, (ours, its)))  # noqa: B023 (called at once)
    every = sum(len(anatomy.matrices(block)) for block in blocks)
    if not trained:
        raise RequestError("recover=local found no matrix that it can train: use recover=distill")
    if left := every - trained:
        log.warning(
            "recover=local left %d matrices as they are: it cannot tell what they were in the dense model, or the text did "
            "not reach them",
            left,
        )
    state.forget()
    what = f"{trained} of {every} matrices" if left else "matrices"
    return Trained(given.tokens.numel(), trained * given.steps, what)


@dataclass(frozen=True)
class _Place:
    index: int
    block: nn.Module
    name: str
    dense_index: int
    dense: nn.Module

    @property
    def matrices(self) -> Matrices:
        return anatomy.matrices(self.block)

    @property
    def wanted(self) -> Matrices:
        return anatomy.matrices(self.dense)

    def bias(self, name: str, rows: Tensor) -> Tensor | None:
        """(out,) by how much the dense matrix's bias is more; None where neither has one."""
        its, mine = _bias(self.dense, name), _bias(self.block, name)
        if its is None:
            return None if mine is None else -mine
        return its[rows] if mine is None else its[rows] - mine


def _bias(block: nn.Module, name: str) -> Tensor | None:
    """(out,) beside a matrix of the block; None where there is none, as beside those of fused experts."""
    bias = getattr(dict(block.named_modules()).get(name), "bias", None)
    return None if bias is None else bias.detach().float()


def _partners(blocks: Sequence[nn.Module], dense: Sequence[nn.Module]) -> list[int]:
    """Which block of the dense model each was: the same one, or where some are gone, the next that has its weights.

    Raises RequestError where none has.
    """
    if len(blocks) == len(dense):
        return list(range(len(dense)))
    found: list[int] = []
    for number, block in enumerate(blocks):
        start = found[-1] + 1 if found else 0
        same = next((index for index in range(start, len(dense)) if _equal(block, dense[index])), None)
        if same is None:
            raise RequestError(
                f"recover=local cannot tell which block of the dense model block {number} of {len(blocks)} was: none has its "
                "weights. Use recover=distill"
            )
        found.append(same)
    return found


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, its = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def _held(blocks: Sequence[nn.Module], trained: int, texts: Sequence[Text]) -> dict[str, object]:
    """What a run that was stopped needs to go on after these blocks."""
    return {
        "matrices": [dict(anatomy.matrices(block)) for block in blocks],
        "trained": trained,
        "hidden": [text.hidden for text in texts],
    }


def _resumed(state: State, blocks: Sequence[nn.Module], texts: Sequence[Text]) -> tuple[int, int]:
    """(blocks that are recovered, matrices that were trained in them) by a run that was stopped, taken up from there."""
    held = state.last()
    if held is None:
        return 0, 0
    for block, values in zip(blocks, held["matrices"], strict=False):
        for name, matrix in anatomy.matrices(block).items():
            surgery.write_weights(matrix, values[name].to(matrix.device))
    for text, hidden in zip(texts, held["hidden"], strict=True):
        text.hidden = [new.to(old.device) for old, new in zip(text.hidden, hidden, strict=True)]
    return len(held["matrices"]), held["trained"]


# ---- what is read ----


class _Reads(watching.Products):
    """While open, keeps what each matrix of a block reads of a batch, (tokens, in), one tensor for those that share it.

    upto  the block is left when these have read
    """

    def __init__(self, matrices: Matrices, parameters: Iterable[Tensor], upto: Collection[str] = ()) -> None:
        super().__init__(parameters, self._note)
        self._places = [(name, self.owner(m), watching.Piece.of(m)) for name, m in matrices.items()]
        self._waiting = set(upto)
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
                    self._latest[key] = x, x.detach().flatten(0, -2).clone()
                self.read[name] = self._latest[key][1]
                if name in self._waiting:
                    self._waiting.remove(name)
                    if not self._waiting:
                        raise calibrate.Noted


def _reads(
    text: Text, batch: int, index: int, block: nn.Module, upto: Collection[str] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """(what each matrix of the block reads of one batch, in the order of reading; what the block puts out)."""
    one = Text([text.hidden[batch]], [text.calls[batch]], text.kinds)
    with _Reads(anatomy.matrices(block), block.parameters(), upto) as reads:
        calibrate.through(one, index, block, advance=True)
    return {name: x for name, x in reads.read.items() if name not in reads.often}, one.hidden[0]


def _take_through(text: Text, index: int, block: nn.Module) -> list[dict[str, Tensor]]:
    """Take a text through a block; what each matrix that reads all tokens reads, batch by batch."""
    found = []
    for batch, hidden in enumerate(text.hidden):
        read, text.hidden[batch] = _reads(text, batch, index, block)
        found.append({name: x for name, x in read.items() if len(x) == _tokens(hidden)})
    return found


def _tokens(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def _groups(read: Read, every: Iterable[str], tokens: int) -> list[list[str]]:
    """The names of matrices in the order of reading: those with a common input together, and those of all experts.

    read  of one batch, of whose tokens an expert may get none
    """
    groups: dict[object, list[str]] = {}
    for name, x in read.items():
        groups.setdefault(id(x) if len(x) == tokens else _of_experts(name), []).append(name)
    for name in every:
        if name not in read and _of_experts(name) in groups:
            groups[_of_experts(name)].append(name)
    return list(groups.values())


def _of_experts(name: str) -> str:
    """The same for the same matrix of all experts."""
    return re.sub(r"\d+", "*", name)


def _writers(text: Text, at: _Place, read: Read) -> tuple[list[str], str | None]:
    """The matrices whose products are added to the hidden state, in the order of reading; which of them is the last.

    Tried from the last on: with it at zero, and those after it that are such ones, the block's output lacks its product.
    What experts add is at zero meanwhile, too, and then none is the last.
    """
    matrices, found = at.matrices, []
    width, tokens = text.hidden[0].shape[-1], _tokens(text.hidden[0])
    experts = [name for name in read if len(read[name]) != tokens and len(matrices[name]) == width]
    kinds = {_of_experts(name) for name in experts}
    kept = {name: matrix.clone() for name, matrix in matrices.items() if _of_experts(name) in kinds}
    for name in kept:
        matrices[name].zero_()

    def out() -> Tensor:
        return _rows_of(_reads(text, 0, at.index, at.block)[1])

    with_all = out()
    for name in reversed(list(read)):
        if len(matrices[name]) != width or len(read[name]) != tokens:
            continue
        weight = matrices[name].clone()
        matrices[name].zero_()
        without, product = out(), read[name].float() @ weight.float().t()
        rough = 1e-3 if weight.dtype == torch.float32 else 5e-2
        if torch.allclose(with_all - without, product, rtol=rough, atol=rough * float(product.abs().max())):
            found.append(name)
            kept[name], with_all = weight, without
        else:
            matrices[name].copy_(weight)
    for name, weight in kept.items():
        matrices[name].copy_(weight)
    return found[::-1], found[0] if found and not experts else None


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


# ---- a block ----


def _recover_block(given: Given, at: _Place, ours: Text, its: Text, upto: Sequence[nn.Module]) -> int:
    """Recover a block and take both texts through; how many matrices were trained.

    upto  the blocks of the dense model before the one that reads next
    """
    first, _ = _reads(ours, 0, at.index, at.block)
    tokens = _tokens(ours.hidden[0])
    writers, last = _writers(ours, at, first)
    lacks = [_rows_of(d) - _rows_of(o) for d, o in zip(its.hidden, ours.hidden, strict=True)]
    dense_reads = _take_through(its, at.dense_index, at.dense)
    for index in range(at.dense_index + 1, len(upto)):
        calibrate.through(its, index, upto[index], advance=True)
    trained = 0
    for group in _groups(first, at.matrices, tokens):
        if len(first[group[0]]) == tokens:
            names = [name for name in group if name != last]
            trained += _recover_alike(given, at, ours, names, dense_reads, writers, lacks)
        else:
            trained += _recover_experts(given, at, ours, group)
    if last is None:
        calibrate.through(ours, at.index, at.block, advance=True)
        return trained
    _recover_last(given, at, ours, last, its.hidden)
    return trained + 1


def _recover_alike(
    given: Given,
    at: _Place,
    text: Text,
    names: Sequence[str],
    dense_reads: Sequence[Read],
    writers: Sequence[str],
    lacks: list[Tensor],
) -> int:
    """Recover matrices that read the same, all tokens of it; how many.

    lacks  (tokens, hidden size) of the hidden state, batch by batch; what these make good is taken from it
    """
    mine, wanted = at.matrices, at.wanted
    rows = {name: _rows(mine[name], wanted[name]) for name in names if name in wanted and name in dense_reads[0]}
    asked = {name: those for name, those in rows.items() if those is not None}
    if not asked:
        return 0
    leaders = {id(dense_reads[0][name]): name for name in asked}  # one of those that share what they read
    leader = {name: leaders[id(dense_reads[0][name])] for name in asked}
    seen = _inputs(mine[next(iter(asked))])
    total = torch.zeros(())  # of x, for biases
    crossed = dict.fromkeys(leaders.values(), torch.zeros(()))
    lacking = {name: torch.zeros(()) for name in asked if name in writers}
    held: list[Tensor] = []
    for batch, dense_read in enumerate(dense_reads):
        read, _ = _reads(text, batch, at.index, at.block, asked)
        x = read[next(iter(asked))].float()
        seen.add(x)
        total = total + x.sum(0)
        crossed = {name: of + dense_read[name].float().t() @ x for name, of in crossed.items()}
        lacking = {name: of + lacks[batch].t() @ x for name, of in lacking.items()}
        held += [x] if lacking else []
    for name, those in asked.items():
        moment = wanted[name].float()[those] @ crossed[leader[name]] + lacking.get(name, 0)
        if (bias := at.bias(name, those)) is not None:
            moment += torch.outer(bias, total)
        _solve(given, at, name, seen, moment)
    for name in lacking:
        bias = at.bias(name, asked[name])
        for batch, x in enumerate(held):
            lacks[batch] += dense_reads[batch][name].float() @ wanted[name].float().t() - x @ mine[name].float().t()
            lacks[batch] += 0 if bias is None else bias
    return len(asked)


def _recover_experts(given: Given, at: _Place, text: Text, names: Sequence[str]) -> int:
    """Recover matrices that read some of the tokens each, towards what the dense ones give of the same; how many.

    None where experts are gone, since another has its number now.
    """
    mine, wanted = at.matrices, at.wanted
    asked = [name for name in names if mine.keys() == wanted.keys() and mine[name].shape == wanted[name].shape]
    seen = {name: _inputs(mine[name]) for name in asked}
    for batch in range(len(text.hidden) if asked else 0):
        read, _ = _reads(text, batch, at.index, at.block, asked)
        for name in asked:
            if name in read:
                seen[name].add(read[name])
    reached = [name for name in asked if seen[name].tokens]
    for name in reached:
        gram = seen[name].hessian
        assert gram is not None
        _solve(given, at, name, seen[name], wanted[name].float() @ gram)
    return len(reached)


def _recover_last(given: Given, at: _Place, text: Text, name: str, after: Sequence[Tensor]) -> None:
    """Recover the matrix that adds to the hidden state at last, and take the text through.

    after  the dense model's hidden state where the next block reads, batch by batch
    """
    matrix, held = at.matrices[name], []
    before, seen, moment = matrix.float().clone(), _inputs(matrix), torch.zeros(())
    for batch, wanted in enumerate(after):
        read, out = _reads(text, batch, at.index, at.block)
        seen.add(read[name])
        moment = moment + (_rows_of(wanted) - _rows_of(out)).t() @ read[name].float()
        held.append((read[name], out))
    gram = seen.hessian
    assert gram is not None
    _solve(given, at, name, seen, moment + before @ gram)
    change = matrix.float() - before
    for batch, (x, out) in enumerate(held):
        text.hidden[batch] = (out.float() + (x.float() @ change.t()).view(out.shape)).to(out.dtype)


def _inputs(matrix: Tensor) -> Inputs:
    return Inputs.none(matrix.shape[1], matrix.device, hessian=True)


def _rows_of(hidden: Tensor) -> Tensor:
    return hidden.float().flatten(0, -2)


def _solve(given: Given, at: _Place, name: str, seen: Inputs, moment: Tensor) -> None:
    """Give a matrix of the block its recovered weights. Raises FloatingPointError where they are not finite."""
    matrix, keep, gram = at.matrices[name], given.masks.get(f"{at.name}.{name}"), seen.hessian
    assert gram is not None
    keep = None if keep is None else keep.to(matrix.device)
    solved = solve(gram, moment, matrix.float(), keep, given.steps, given.asked.ridge)
    if not torch.isfinite(solved).all():
        raise FloatingPointError(f"{at.name}.{name}: the recovered weights are not finite; raise recover.ridge")
    surgery.write_weights(matrix, solved)


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
