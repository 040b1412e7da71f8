"""What may be the FFNs and the attention of each block: found in how entries flow from matrix to matrix (`flow`).

What is found needs no name and no record of a family, whether matrices are separate or fused, and however a fused one is
laid out:

  FFN        a linear layer whose every column is made of entries of its own token alone, some of each matrix before it
  attention  one whose columns fall into heads: an entry that speaks for its own token alone (of a query) reaches one head
  experts    the three-dimensional parameters of a module that holds many FFNs

Shapes: of attention, H query heads share G key-value groups (H = G without grouped-query attention). Query head h belongs
to group h // (H / G) and owns as many columns of the output matrix as any other. An entry of a matrix that several heads
read goes when the last of them goes, which is all that grouped queries, shared keys and latent projections are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.models import anatomy, transformers_private
from sweep.models.anatomy import Linear, weight
from sweep.models.flow import Pass, touched

KEPT = -1  # the owner of an entry that no unit owns, or all do


@dataclass(frozen=True)
class Slice:
    """Which units each entry of a parameter belongs to, along one of its axes.

    owners  (length,) int64, a row of `sets`, or a unit where there are none; KEPT for what stays whatever goes. Of fused
            experts (experts, length)
    sets    (rows, units) bool: an entry stays as long as one of its units does
    """

    module: nn.Module
    name: str
    axis: int
    owners: Tensor
    sets: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    def stays(self, keep: Tensor) -> Tensor:
        """Which entries stay when the units do for which `keep`, (units,), is True: bool, of the shape of `owners`."""
        rows = keep if self.sets is None else (self.sets & keep).any(1)
        return (self.owners == KEPT) | rows[self.owners.clamp_min(0)]

    def cut(self, keep: Tensor) -> Slice:
        """The same of what stays, when the units do for which `keep` is True; they are numbered anew."""
        stays = self.stays(keep)
        left = self.owners[stays] if stays.ndim == 1 else self.owners[stays].view(len(stays), -1)
        if self.sets is not None:
            return replace(self, owners=left, sets=self.sets[:, keep])
        number = keep.cumsum(0) - 1
        return replace(self, owners=torch.where(left == KEPT, KEPT, number[left.clamp_min(0)]))

    def of(self, unit_of: Tensor) -> Tensor:
        """(length,) the unit whose removal takes each entry along, KEPT where that of no single unit does.

        unit_of  (heads,) int64, where several heads make a unit
        """
        if self.sets is None:
            return self.owners
        unit = torch.full((len(self.sets),), KEPT)
        for row, members in enumerate(self.sets):
            its = unit_of[members].unique()
            if len(its) == 1:
                unit[row] = its[0]
        return torch.where(self.owners == KEPT, KEPT, unit[self.owners.clamp_min(0)])


@dataclass(frozen=True)
class Ffn:
    """A feed-forward network of a block: neuron i is column i of `output`, and what `slices` say of what makes it.

    rescaled  its slices of norms average over all neurons, and are scaled so that those that are left read as they did
    """

    block: int
    module: nn.Module  # the innermost that has all of it inside
    inputs: tuple[Linear, ...]
    output: Linear
    slices: tuple[Slice, ...]
    width: int
    rescaled: bool = False


@dataclass(frozen=True)
class Experts:
    """The FFNs of a block's fused experts: neuron i of expert e is unit e * (neurons of one) + i.

    slices  the last is the matrices that read the neurons
    """

    block: int
    name: str  # of the module, in the whole model
    module: nn.Module
    slices: tuple[Slice, ...]
    rescaled: bool = False

    @property
    def experts(self) -> int:
        return len(self.slices[-1].parameter)

    @property
    def neurons(self) -> int:
        """Of one expert."""
        return self.slices[-1].owners.shape[1]

    @property
    def width(self) -> int:
        return self.experts * self.neurons


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    inputs   those with queries first
    slices   of `inputs`, and of what the module keeps by head, such as norms over all heads and sinks
    rescaled as of an FFN
    own_config  the module asks its configuration for its head counts, and is to have one of its own
    own_widths  it keeps the width of all heads together, under a name that elsewhere is the hidden state's
    """

    block: int
    name: str  # of the module, in the whole model
    module: nn.Module
    inputs: tuple[Linear, ...]
    output: Linear
    slices: tuple[Slice, ...]
    heads: int
    groups: int
    head_dim: int  # columns of the output matrix that belong to a head
    rescaled: bool = False
    own_config: bool = False
    own_widths: bool = False

    @property
    def columns(self) -> int:
        return weight(self.output).shape[1]

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups


Part = Ffn | Experts | Attention


def cut(part: Part, keep: Tensor) -> Part:
    """What a part is after the units were removed for which `keep`, (units,), is False."""
    slices = tuple(each.cut(keep) for each in part.slices)
    if isinstance(part, Attention):
        groups = int(keep.view(part.groups, -1).any(1).sum())
        return replace(part, slices=slices, heads=int(keep.sum()), groups=groups)
    return (
        replace(part, slices=slices)
        if isinstance(part, Experts)
        else replace(part, slices=slices, width=int(keep.sum()))
    )


def ffns(model: PreTrainedModel, seen: Pass) -> list[Ffn]:
    """In order of their blocks."""
    blocks = anatomy.blocks(model)
    found = (_ffn(seen, block, blocks[block], output) for block in seen.entering for output in seen.linears(block))
    return [ffn for ffn in found if ffn is not None]


def attentions(model: PreTrainedModel, seen: Pass) -> list[Attention]:
    """In order of their blocks. Attention whose keys another block reads is left out, and so is that block's."""
    names = {id(module): name for name, module in model.named_modules()}
    sizes = set(_integers(model.config.get_text_config().to_dict()))
    found, lent = [], set[Linear]()
    for index, block in enumerate(anatomy.blocks(model)):
        for output in seen.linears(index) if index in seen.entering else ():
            sources = _sources(seen, index, output)
            lent |= {each for each in sources if seen.block_of[each] != index}
            if not sources or lent & set(sources):
                continue
            module = _around(block, [output, *sources])
            attention = _attention(seen, index, output, sources, module, names[id(module)], sizes)
            if attention is not None:
                found.append(attention)
    return [each for each in found if not lent & set(each.inputs)]


def experts(model: PreTrainedModel) -> list[Experts]:
    """In order of their blocks."""
    found = []
    for index, (prefix, block) in enumerate(zip(anatomy.block_names(model), anatomy.blocks(model), strict=True)):
        for name, module in block.named_modules(prefix=prefix):
            layout = transformers_private.fused_ffn(module)
            if layout:
                found.append(Experts(index, name, module, tuple(Slice(module, *each) for each in layout)))
    return found


# ---- how they are told ----


def _sources(seen: Pass, block: int, output: Linear) -> list[Linear]:
    """The layers whose entries `output` reads through no other.

    None where it reads the block's stream itself, or where what it gives does not go into that stream.
    """
    x, entering, leaving = seen.read[output], seen.entering[block], seen.leaving[block]
    if not x.requires_grad or not leaving.requires_grad:
        return []
    layers = [linear for linear in seen.put if linear is not output]
    *gradients, stream = seen.gradients(x, _cotangent(x), [*(seen.put[each] for each in layers), entering])
    (out,) = seen.gradients(leaving, _cotangent(leaving), [seen.put[output]])
    if (stream is not None and bool(stream.any())) or out is None or not out.any():
        return []
    return [each for each, gradient in zip(layers, gradients, strict=True) if gradient is not None and gradient.any()]


def _ffn(seen: Pass, block: int, module: nn.Module, output: Linear) -> Ffn | None:
    sources = _sources(seen, block, output)
    if not sources or any(seen.block_of[each] != block for each in sources):
        return None
    x, columns = seen.read[output], seen.read[output].shape[-1]
    leaves = [seen.put[each] for each in sources]
    if _mixes(seen, x, leaves) is not False or _passes_on(seen, x, leaves):
        return None
    beside = _beside(seen, block, output)
    owners = _owners(seen, x, [*leaves, *(parameter for _, _, parameter in beside)])
    if owners is None or not all(_evenly(each, columns) for each in owners[: len(leaves)]):
        return None
    slices = [Slice(linear, "weight", _rows(linear), o) for linear, o in zip(sources, owners, strict=False)]
    slices += [
        Slice(module, name, 0, o)
        for (module, name, parameter), o in zip(beside, owners[len(leaves) :], strict=True)
        if parameter.ndim == 1 and _evenly(o, columns)
    ]
    return Ffn(block, _around(module, [output, *sources]), tuple(sources), output, tuple(slices), columns)


def _owners(seen: Pass, x: Tensor, sources: Sequence[Tensor]) -> list[Tensor] | None:
    """The one column of x, (…, n), that each entry of each source reaches, KEPT where it reaches none: (entries,) int64.

    None where an entry of the first source reaches several. Columns are told apart by the digits of their numbers, so
    that 2 log2(n) passes back are enough.
    """
    n = x.shape[-1]
    number = torch.arange(n)
    found = [torch.zeros(source.shape[-1], dtype=torch.long) for source in sources]
    any_ = [torch.zeros(source.shape[-1], dtype=torch.bool) for source in sources]
    several = [torch.zeros(source.shape[-1], dtype=torch.bool) for source in sources]
    for digit in range(max(1, math.ceil(math.log2(n)))):
        hits = []
        for value in (0, 1):
            chosen = ((number >> digit) & 1) == value
            gradients = seen.gradients(x, chosen.to(x.device).expand(x.shape) * _cotangent(x), sources)
            hits.append([_entries(each) for each in touched(gradients, sources)])
        for i, (zero, one) in enumerate(zip(*hits, strict=True)):
            found[i] += one.long() << digit
            any_[i] |= zero | one
            several[i] |= zero & one
        if several[0].any():
            return None
    return [torch.where(a & ~s, owner, KEPT) for owner, a, s in zip(found, any_, several, strict=True)]


def _attention(
    seen: Pass, block: int, output: Linear, sources: list[Linear], module: nn.Module, name: str, sizes: set[int]
) -> Attention | None:
    x = seen.read[output]
    columns, leaves = x.shape[-1], [seen.put[each] for each in sources]
    if _mixes(seen, x, leaves) is not True:
        return None
    if not _asks(seen, x, leaves):
        return None
    known = sizes | set(_integers(vars(module)))
    counts = {size for size in known if 0 < size <= columns and columns % size == 0}
    told = {value for n, value in vars(module).items() if "head" in n and isinstance(value, int)}
    for heads in sorted(counts | {columns // size for size in counts}, reverse=True):
        if heads < columns and (heads > 1 or told & {1, columns}) and _apart(seen, x, leaves, heads):
            break
    else:
        return None
    beside = _beside(seen, block, output, module)
    everything = [*leaves, *(p for _, _, p in beside)]
    hits: list[list[Tensor]] = []
    local = [torch.ones(leaf.shape[-1], dtype=torch.bool) for leaf in leaves]
    for head in range(heads):
        gradients = seen.gradients(x, _of_head(x, head, heads), everything)
        marks = touched(gradients, everything)
        for i in range(len(leaves)):
            local[i] &= ~_entries(marks[i].flatten(0, -2)[:-1])
        hits.append([_entries(m) for m in marks[: len(leaves)]] + [m.flatten() for m in marks[len(leaves) :]])
    reach = [torch.stack([hits[h][i] for h in range(heads)], 1) for i in range(len(everything))]  # (entries, heads)
    mixing = torch.cat([r[~where] for r, where in zip(reach, local, strict=False)])
    groups = _groups(mixing, heads)
    if groups is None:
        return None
    slices = [Slice(linear, "weight", _rows(linear), *_as_sets(r)) for linear, r in zip(sources, reach, strict=False)]
    for (owner, parameter_name, parameter), r in zip(beside, reach[len(leaves) :], strict=True):
        slices += _by_head(owner, parameter_name, parameter, r)
    asks = [bool((r.any(1) & where).any()) for r, where in zip(reach, local, strict=False)]
    ordered = [s for first in (True, False) for s, ask in zip(sources, asks, strict=True) if ask is first]
    return Attention(block, name, module, tuple(ordered), output, tuple(slices), heads, groups, columns // heads)


def _asks(seen: Pass, x: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether an entry that speaks for its own token alone reaches two columns, as a query does and a gate does not."""
    first, second = (
        [_asking(m) for m in touched(seen.gradients(x, _of_columns(x, c, c + 1), leaves), leaves)] for c in (0, 1)
    )
    return any(bool((f & s).any()) for f, s in zip(first, second, strict=True))


def _apart(seen: Pass, x: Tensor, leaves: Sequence[Tensor], heads: int) -> bool:
    """Whether the queries of the first head are none of the second's, when there are so many heads."""
    first, second = (
        [_asking(m) for m in touched(seen.gradients(x, _of_head(x, h, heads), leaves), leaves)]
        for h in (0, min(1, heads - 1))
    )
    if not any(f.any() for f in first):
        return False
    return heads == 1 or not any((f & s).any() for f, s in zip(first, second, strict=True))


def _asking(marks: Tensor) -> Tensor:
    """(entries,) those that reach the last token from itself and from no other."""
    rows = marks.flatten(0, -2)
    return rows[-1] & ~rows[:-1].any(0)


def _groups(mixing: Tensor, heads: int) -> int | None:
    """How many sets of heads there are that share keys and values, one after the other.

    mixing  (entries, heads) which heads the entries reach that speak for other tokens
    """
    sizes = mixing.sum(1)
    if not (sizes > 0).any():
        return None
    size = int(sizes[sizes > 0].min())
    if heads % size:
        return None
    together = mixing[sizes == size].view(-1, heads // size, size)
    return heads // size if bool((together.all(2).sum(1) == 1).all()) else None


def _as_sets(reach: Tensor) -> tuple[Tensor, Tensor]:
    """(owners, sets) of entries that reach some heads: (entries, heads) bool."""
    heads = reach.shape[1]
    sets, owners = reach.unique(dim=0, return_inverse=True)
    count = reach.sum(1)
    owners[(count == 0) | ((count == heads) & (heads > 1))] = KEPT
    return owners, sets


def _by_head(module: nn.Module, name: str, parameter: Tensor, reach: Tensor) -> Iterator[Slice]:
    """The slice of a parameter beside the matrices along the axis in which its entries belong to some heads."""
    owners, sets = _as_sets(reach)
    if bool((owners == KEPT).all()):
        return
    owners = owners.view(parameter.shape)
    for axis in range(parameter.ndim):
        rows = owners.transpose(0, axis).flatten(1) if parameter.ndim > 1 else owners[:, None]
        if bool((rows == rows[:, :1]).all()):
            yield Slice(module, name, axis, rows[:, 0], sets)
            return


def _mixes(seen: Pass, x: Tensor, leaves: Sequence[Tensor]) -> bool | None:
    """Whether what the last token reads depends on what layers put out for others; None where tokens are no rows."""
    gradients = seen.gradients(x, _of_columns(x, 0, x.shape[-1]), leaves)
    rows = x.flatten(0, -2).shape[0]
    if any(leaf.flatten(0, -2).shape[0] != rows for leaf in leaves):
        return None
    return any(bool(m.flatten(0, -2)[:-1].any()) for m in touched(gradients, leaves))


def _of_head(x: Tensor, head: int, heads: int) -> Tensor:
    size = x.shape[-1] // heads
    return _of_columns(x, head * size, (head + 1) * size)


def _of_columns(x: Tensor, first: int, end: int) -> Tensor:
    """Random numbers in some columns of what the last token reads, and zeros elsewhere, in the shape of x."""
    cotangent = torch.zeros(x.flatten(0, -2).shape, device=x.device)
    cotangent[-1, first:end] = 1
    return cotangent.view(x.shape) * _cotangent(x)


def _cotangent(x: Tensor) -> Tensor:
    """Random numbers that are not zero, in the shape of x."""
    return torch.rand(x.shape, device=x.device) + 0.5


def _passes_on(seen: Pass, x: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether x is what layers put out, unchanged: the two matrices of a product of low rank."""
    gradients = seen.gradients(x, torch.ones(x.shape, device=x.device), leaves)
    return all(
        g is not None and bool(((g == 0) | (g == 1)).all()) and bool((g == 1).flatten(0, -2).all(0).any())
        for g in gradients
    )


def _evenly(owners: Tensor, units: int) -> bool:
    """Whether every unit owns some entries, and all as many."""
    counts = owners[owners != KEPT].bincount(minlength=units)
    return len(counts) == units and int(counts.min()) == int(counts.max()) > 0


def _entries(marks: Tensor) -> Tensor:
    """(entries,) whether an entry is marked for any token."""
    return marks.flatten(0, -2).any(0) if marks.ndim > 1 else marks


def _rows(linear: Linear) -> int:
    """The axis of the weight along which a linear layer puts out."""
    return 0 if isinstance(linear, nn.Linear) else 1


def _around(block: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The innermost module of a block that has all of these inside."""
    wanted, found = set(map(id, layers)), block
    for module in block.modules():
        if wanted <= {id(inner) for inner in module.modules()}:
            found = module
    return found


def _beside(
    seen: Pass, block: int, output: Linear, within: nn.Module | None = None
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """What else `output` reads: the parameters beside the matrices, of modules inside one."""
    x, own = seen.read[output], seen.beside[block]
    gradients = seen.gradients(x, _cotangent(x), list(own.values())) if own else []
    inside = None if within is None else set(within.modules())
    return [
        (module, name, parameter)
        for ((module, name), parameter), gradient in zip(own.items(), gradients, strict=True)
        if gradient is not None and bool(gradient.any()) and (inside is None or module in inside)
    ]


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _integers(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _integers(each)
