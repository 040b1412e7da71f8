"""The only code that changes a model's tensors: write zeros or new weights, cut units. Nothing here decides what goes.

True in a keep-mask = stays. `describe_shape` makes the configuration say what the matrices have become.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.models import anatomy, experts, layers, trial, watching
from sweep.models.candidates import Attention, Experts, Ffn, Part, Slice
from sweep.settings import RequestError

# What names the id of a token, or of several, and of those the ones that may be unset; models compare with the others.
_ID = re.compile(r"(^|_)token_(ids?|index)$|^padding_idx$")
_UNSET = re.compile(r"^padding_idx$|^(forced_)?(bos|eos|pad|sep|cls|mask|unk|decoder_start)_")
NO_TOKEN = -1  # of a removed token that models compare with those of a text: it is none of them


@torch.no_grad()
def zero_weights(weight: Tensor, keep: Tensor) -> None:
    """Set a weight, a view that writes through, to zero where `keep`, of its shape, is False. In place."""
    weight.masked_fill_(~keep, 0)


@torch.no_grad()
def write_weights(weight: Tensor, values: Tensor) -> None:
    """Give a weight, a view that writes through, other values, rounded to its dtype. In place."""
    weight.copy_(values)


@torch.no_grad()
def set_weights(linear: anatomy.Linear, weight: Tensor) -> None:
    """Replace the matrix of a linear layer by `weight`, (out, in), rounded to the layer's dtype."""
    anatomy.weight(linear).copy_(weight)


@torch.no_grad()
def add_bias(linear: anatomy.Linear, bias: Tensor) -> None:
    """Add to the bias of a linear layer, which gets one when it has none."""
    if linear.bias is None:
        linear.bias = nn.Parameter(torch.zeros_like(bias, dtype=linear.weight.dtype), requires_grad=False)
    linear.bias.add_(bias.to(linear.bias.dtype))


_WIDTH = r"inter|inner|ffn|d_ff|expert_(dim|size)"  # what modules call their number of neurons


def remove_units(part: Part, keep: Tensor) -> None:
    """Cut an FFN, the FFNs of fused experts or an attention down to the units where `keep`, (units,) bool, is True.

    What the part is afterwards, `candidates.cut` says.

    Units are neurons or query heads; key-value groups without any go too. Raises ValueError where what stays would be no
    legal shape: attention repeats every key and value equally often, and the matrices of experts lie in one tensor.
    """
    if isinstance(part, Attention):
        _check_even(part, keep.view(part.groups, -1).sum(1), "key-value groups", "query heads")
    elif isinstance(part, Experts):
        _check_even(part, keep.view(part.experts, -1).sum(1), "experts", "neurons")
    for each in part.slices:
        if isinstance(each.module, anatomy.Linear):
            narrow(each.module, each.stays(keep), output=True)
        else:
            _narrow_beside(each, each.stays(keep), rescaled=part.rescaled)
    if isinstance(part, Experts):
        _set_numbers(part.module, [(_WIDTH, part.neurons, int(keep.sum()) // part.experts)])
        return
    if isinstance(part, Ffn):
        _set_numbers(part.module, [(_WIDTH, part.width, int(keep.sum()))])
    columns = keep.repeat_interleave(anatomy.weight(part.output).shape[1] // len(keep))
    narrow(part.output, columns, output=False)
    if isinstance(part, Attention):
        set_head_counts(part, int(keep.sum()), int(keep.view(part.groups, -1).any(1).sum()))


def _check_even(part: Part, counts: Tensor, of: str, what: str) -> None:
    sizes = set(counts.tolist()) - ({0} if isinstance(part, Attention) else set())
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            f"block {part.block}: {of} would keep {sorted(sizes)} {what}; "
            f"every {'group' if isinstance(part, Attention) else 'expert'} that stays must keep the same number, at least one"
        )


@torch.no_grad()
def _narrow_beside(of: Slice, stays: Tensor, *, rescaled: bool) -> None:
    """Keep some entries of a parameter beside the linear layers, and have its module's sizes say so.

    rescaled  it is the weight of a norm, which divides by a mean over all entries. Those that go were zero in it: over the
              n' that stay of n the mean is n / n' of what it was, which the weight and the norm's epsilon make up for
    """
    old = of.parameter
    if stays.ndim == 2:  # of fused experts
        pairs = zip(old, stays, strict=True)
        kept = torch.stack([e.index_select(of.axis - 1, s.nonzero().squeeze(1).to(e.device)) for e, s in pairs])
    else:
        kept = old.index_select(of.axis, stays.nonzero().squeeze(1).to(old.device))
        if isinstance(of.module, nn.LayerNorm):
            of.module.normalized_shape = tuple(kept.shape)
        if rescaled and of.name == "weight" and old.ndim == 1:
            share = len(stays) / int(stays.sum())
            kept = kept * share**0.5
            for name in ("eps", "variance_epsilon"):
                if isinstance(getattr(of.module, name, None), float):
                    setattr(of.module, name, getattr(of.module, name) * share)
    setattr(of.module, of.name, nn.Parameter(kept, requires_grad=old.requires_grad))


def set_head_counts(attention: Attention, heads: int, groups: int) -> None:
    """Have the plain numbers that an attention module keeps beside its matrices tell of so many heads and groups.

    attention  as it was found: its numbers are told by what they count there, and by how they are called
    """
    old, size = attention, attention.head_dim
    changes = [
        (r"groups$", old.heads_per_group, heads // groups),
        (r"(key_value|kv)(?!.*(dim|size|rank))", old.groups, groups),
        (r"(kv|key_value).*(dim|size)", old.groups * size, groups * size),
        (r"heads?$", old.heads, heads),
        (
            r"^split_size$" + r"|^(embed|inner|d)_(dim|model)$|all_head_size|^hidden_size$" * old.own_widths,
            old.heads * size,
            heads * size,
        ),
    ]
    for module in attention.module.modules():
        if isinstance(module, anatomy.Linear) or not any(m in attention.inputs for m in module.modules()):
            continue
        _set_numbers(module, changes)
        if attention.own_config and isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config)
            for name, count in (("num_attention_heads", heads), ("num_key_value_heads", groups)):
                if hasattr(module.config, name):
                    setattr(module.config, name, count)


def _set_numbers(module: nn.Module, changes: Sequence[tuple[str, int, int]]) -> None:
    """Change the plain numbers of a module that are called so and have the old value: (pattern, old, new), the first wins."""
    for name, value in list(vars(module).items()):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        for pattern, old, new in changes:
            if re.search(pattern, name):
                if value == old:
                    setattr(module, name, new)
                break


def remove_blocks(model: PreTrainedModel, keep: Sequence[bool]) -> None:
    """Remove the blocks where `keep` is False; the configuration and the numbers that the others keep follow.

    It is tried on a few tokens: what is left must say what the model says while these blocks are passed by, with a cache
    and without. Raises RequestError where it does not, and the model is as it was.
    """
    gone = [number for number, stays in enumerate(keep) if not stays]
    if not gone:
        return
    try:
        _remove_blocks(model, gone)
    except RequestError as error:
        alone = {} if len(gone) == 1 else {number: _whether_removable(model, number) for number in gone}
        told = [f"block {number}: {why}" for number, why in alone.items() if why] or [str(error)]
        raise RequestError(
            f"blocks {', '.join(map(str, gone))} of {type(model).__name__} cannot be removed: {'; '.join(told)}. Choose "
            "among others with method.blocks=[...], or use +method=weight"
        ) from error


def _whether_removable(model: PreTrainedModel, number: int) -> str:
    """Why this block alone cannot be removed; empty where it can. The model stays as it is."""
    with ExitStack() as undo:
        try:
            _remove_blocks(model, [number], undo)
        except RequestError as error:
            return str(error)
    return ""


def _remove_blocks(model: PreTrainedModel, gone: Sequence[int], undo: ExitStack | None = None) -> None:
    """Remove blocks and try what is left.

    undo  closed, it brings the blocks back; without it they are gone for good
    """
    blocks = list(anatomy.blocks(model))
    like = trial.forms(model)
    proof = trial.Proof(model, lambda restore: trial.pass_by(restore, {blocks[n]: like[blocks[n]] for n in gone}))
    with ExitStack() as changes:
        _take_out(model, [number for number in range(len(blocks)) if number not in set(gone)], changes)
        proof.check()
        kept = changes.pop_all()
    if undo is not None:
        undo.push(kept)


def _take_out(model: PreTrainedModel, numbers: Sequence[int], undo: ExitStack) -> None:
    """Leave the blocks of these numbers alone, until `undo` is closed."""
    blocks, config = list(anatomy.blocks(model)), layers.configuration(model)
    places = layers.indices(blocks)
    for table, dimension, rows in layers.tables(model, config, len(blocks), numbers):
        undo.callback(setattr, table, "weight", table.weight)
        weight = table.weight.detach().index_select(dimension, rows.to(table.weight.device))
        table.weight = nn.Parameter(weight, table.weight.requires_grad)
    layers.cut(config, len(blocks), numbers, undo)
    stack = anatomy.blocks(model)
    for number in sorted(set(range(len(blocks))) - set(numbers), reverse=True):
        undo.callback(stack.insert, number, blocks[number])
        del stack[number]
    for new, old in enumerate(numbers):
        for path, attribute in places:
            module = _within(blocks[old], path)
            value = getattr(module, attribute, None)
            if module is not None and value is not None:
                undo.callback(setattr, module, attribute, value)
                setattr(module, attribute, places[path, attribute](new))


def _within(block: nn.Module, path: str) -> nn.Module | None:
    """The module of this name within a block; None where this one has none."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


@torch.no_grad()
def remove_experts(mixture: experts.Mixture, keep: Tensor) -> None:
    """Keep the experts where `keep`, (E,) bool, is True, and of what chooses among them their logits."""
    for slices in (*mixture.held, *mixture.routers):
        _keep_slices(slices, keep)
    set_expert_counts(mixture)
    anatomy.forget(mixture.module)


@torch.no_grad()
def replace_experts(mixture: experts.Mixture, keep: Tensor, means: Tensor) -> None:
    """Keep the experts where `keep`, (E,) bool, is True; in the place of the others stand their rows of `means`, (E, D).

    What chooses among them stays.
    """
    for slices in mixture.held:
        _keep_slices(slices, keep)
    for count in mixture.counts:
        if any(count.module is module for module in mixture.experts.modules()):
            setattr(count.module, count.name, mixture.number // count.groups)
    places = torch.where(keep, keep.cumsum(0) - 1, -(~keep).cumsum(0))
    matrix = next(slices.tensor for slices in mixture.held if slices.is_matrix)
    experts.give_novices(mixture.experts, places.to(matrix.device), means[~keep].to(matrix))
    anatomy.forget(mixture.module)


def set_expert_counts(mixture: experts.Mixture) -> None:
    """Make the numbers that a mixture's modules keep agree with how many experts it has."""
    for count in mixture.counts:
        setattr(count.module, count.name, mixture.number // count.groups)


def _keep_slices(slices: experts.Slices, keep: Tensor) -> None:
    old = slices.tensor
    index = keep.repeat_interleave(slices.each).nonzero().squeeze(1).to(old.device)
    new = old.detach().index_select(slices.dim, index)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(slices.module, slices.name, nn.Parameter(new, old.requires_grad) if is_parameter else new)


@torch.no_grad()
def remove_tokens(model: PreTrainedModel, kept: Tensor) -> Callable[[], None]:
    """Keep of every tensor with a row for each token those of the ids `kept`, ascending; they become ids 0, 1, 2, …

    Of embeddings those are cut that the ids go into; ones of fewer rows, such as those of single layers, keep theirs of these
    ids. Of all else what has as many entries along one dimension as the model's embedding has rows: heads, biases, tables.
    Returns what makes the model as it was. Raises ValueError for a tensor with two such dimensions.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    lookups = _lookups(model)
    others = {m for m in model.modules() if isinstance(m, nn.Embedding)}.difference(lookups)
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    left = {size: kept[kept < size] for size in {rows, *(embedding.num_embeddings for embedding in lookups)}}
    undo: list[Callable[[], None]] = []
    done: dict[int, Tensor] = {}  # by the identity of the tensor that was: tied ones stay so

    def change(holder: Any, name: str, value: Any) -> None:
        undo.append(functools.partial(setattr, holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def restore() -> None:
        for step in reversed(undo):
            step()

    try:
        for module in [module for module in model.modules() if module not in others]:
            size = module.num_embeddings if isinstance(module, nn.Embedding) else rows
            cut = {name: tensor for name, tensor in _own_tensors(module).items() if size in tensor.shape}
            for name, tensor in cut.items():
                if id(tensor) not in done:
                    done[id(tensor)] = _cut(tensor, size, left[size])
                change(module, name, done[id(tensor)])
            for name, value in list(vars(module).items()):
                if cut and value == size and type(value) is int:
                    change(module, name, len(left[size]))
                else:
                    _tell(change, module, name, left, new_id)
        for config in (*_configs(model.config), model.generation_config):
            for name in list(vars(config)) if config is not None else ():
                _tell(change, config, name, left, new_id)
    except Exception:
        restore()
        raise
    return restore


def _tell(
    change: Callable[..., None], holder: Any, name: str, left: Mapping[int, Tensor], new_id: Mapping[int, int]
) -> None:
    """Have an attribute of a module or a configuration follow, where it is a size of the vocabulary or a token's id."""
    value = vars(holder)[name]
    if "vocab" in name and type(value) is int and value in left:
        change(holder, name, len(left[value]))
    elif _ID.search(name) and _new(value, new_id, name) != value:
        change(holder, name, _new(value, new_id, name))


def _lookups(model: PreTrainedModel) -> list[nn.Embedding]:
    """The embeddings that the token ids go into: the model's, and others, found by watching what is looked up."""
    own = model.get_input_embeddings().weight
    every = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    into = {id(own)}
    if any(embedding.weight is not own for embedding in every):
        ids = trial.ids(model)
        with watching.aside(), _Watched(ids.cpu()) as watched:
            model(input_ids=ids, use_cache=False)
        into |= watched.weights
    return [embedding for embedding in every if id(embedding.weight) in into]


class _Watched(TorchFunctionMode):
    """While open, notes in which matrices the ids, as far as these have rows, are looked up."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids, self.weights = ids, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            read, weight = [*args, *kwargs.values()][:2]
            known = self.ids < len(weight)
            if read.shape == self.ids.shape and torch.equal(read.cpu()[known], self.ids[known]):
                self.weights.add(id(weight))
        return func(*args, **kwargs)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])


def _cut(tensor: Tensor, size: int, kept: Tensor) -> Tensor:
    """The tensor with the entries `kept` along the one dimension of this size."""
    if tensor.shape.count(size) > 1:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has a row for each token along two dimensions")
    found = tensor.index_select(tensor.shape.index(size), kept.to(tensor.device))
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _new(old: Any, new_id: Mapping[int, int], name: str) -> Any:
    """What a token's id, or each of a list, has become; of a removed one None, or `NO_TOKEN`."""
    if isinstance(old, list):
        return [new_id[i] for i in old if i in new_id] or None
    if type(old) is not int or old < 0:
        return old
    return new_id.get(old, None if _UNSET.search(name) else NO_TOKEN)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those within it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def describe_shape(model: PreTrainedModel, before: Sequence[Part], after: Sequence[Part]) -> None:
    """Make the configuration state the widths of the model, where its numbers can: in every block the same.

    before, after  the same parts of the model, as its configuration builds them and as they are

    Which numbers those are is found by their values and their names, and tried: a statement stays when a model that is
    built from it has more tensors of the shapes of this one, and all that it had. What no configuration tells, such as blocks of unequal width, it does not tell.
    """
    config = layers.configuration(model)
    became: dict[tuple[Any, ...], dict[tuple[Any, ...], tuple[Part, Part]]] = {}  # of those that were alike
    for was_, is_ in zip(before, after, strict=True):
        became.setdefault(_widths(was_), {})[_widths(is_)] = was_, is_
    alike = [pair for outcomes in became.values() if len(outcomes) == 1 for pair in outcomes.values()]
    statements = [statement for pair in alike for statement in _statements(config, *pair)]
    apart = _apart(model)
    for statement in statements:
        if not apart:
            break
        was = {key: vars(config)[key] for key, _ in statement}
        for key, value in statement:
            setattr(config, key, value)
        left = _apart(model)
        for key, value in was.items():
            setattr(config, key, value)
        if left is not None and left < apart:
            for key, value in statement:
                state(model, key, value)
            apart = _apart(model)
    for module in model.modules():  # which have no need any more of one of their own
        own = getattr(module, "config", None)
        if own is not config and isinstance(own, type(config)) and own.to_dict() == config.to_dict():
            module.config = config


def state(model: PreTrainedModel, key: str, value: int) -> None:
    """Have the configuration say so, and every module that has copied what it said."""
    config = layers.configuration(model)
    before = vars(config).get(key)
    setattr(config, key, value)
    for module in model.modules():
        if before is not None and vars(module).get(key) == before:
            setattr(module, key, value)


def _widths(part: Part) -> tuple[Any, ...]:
    if isinstance(part, Attention):
        return Attention, part.heads, part.groups, part.head_dim
    return (Experts, part.neurons) if isinstance(part, Experts) else (Ffn, part.width)


Statement = tuple[tuple[str, int], ...]  # numbers of a configuration, by key


def _statements(config: PreTrainedConfig, before: Part, after: Part) -> Iterator[Statement]:
    """What the configuration may have to say of a part that was cut, in the order in which it is worth trying."""
    numbers = {key: value for key, value in vars(config).items() if value is None or type(value) is int}
    if isinstance(before, Attention) and isinstance(after, Attention):
        heads = {k: after.heads for k, v in numbers.items() if v == before.heads and re.search(r"head", k)}
        groups = {k: after.groups for k, v in numbers.items() if v == before.groups and re.search(r"key_value|kv", k)}
        sizes = {k: after.head_dim for k, v in numbers.items() if re.search(r"^head_dim$|^kv_channels$|^head_size$", k)}
        yield tuple({**heads, **groups, **sizes}.items())
        yield tuple({**heads, **groups}.items())
        return
    old, new = (
        p.neurons if isinstance(p, Experts) else p.width for p in (before, after) if not isinstance(p, Attention)
    )
    for key, value in numbers.items():
        if value == old or (value is None and re.search(r"inner|inter|ffn", key)):
            yield ((key, new),)


def _apart(model: PreTrainedModel) -> set[str] | None:
    """The parameters whose shapes this model's configuration does not build; None where it builds nothing."""
    try:
        config = copy.deepcopy(model.config)
        type(config).from_dict(config.to_dict())  # which may refuse numbers that do not agree
        with torch.device("meta"):
            built = type(model)(config)
    except Exception:  # whatever its own code says to these numbers
        return None
    shapes = {name: parameter.shape for name, parameter in built.named_parameters()}
    return {name for name, parameter in model.named_parameters() if shapes.get(name) != parameter.shape}


@torch.no_grad()
def narrow(linear: anatomy.Linear, keep: Tensor, *, output: bool) -> None:
    """Keep only some outputs, or some inputs, of a linear layer."""
    index = keep.nonzero().squeeze(1).to(linear.weight.device)
    conv = isinstance(linear, Conv1D)
    linear.weight = nn.Parameter(
        linear.weight.index_select(int(output == conv), index), requires_grad=linear.weight.requires_grad
    )
    if output and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=linear.bias.requires_grad)
    if conv:
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape
