"""Where the experts of a mixture are and what chooses among them: found by watching a text go through, named by no table.

A module is one of experts where it is called with hidden states, the numbers of the experts that each token takes and a
gate for each of these, which is how transformers calls them whatever their matrices look like: in three dimensions, of
either orientation, or in two with the experts' rows one behind the other, with biases or without. What chooses is found by
changing it: a tensor beside the experts with a slice for each of them is the router's if other values of it change what is
chosen or how it is weighed. Shared experts, which every token goes through, are neither, and stay.

T tokens, each of which takes K of E experts; D the width of a hidden state. Where routers rank groups of experts first,
there are G of them, of which a token takes some, each E / G neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from sweep.models import anatomy, watching
from sweep.settings import RequestError

_TOKENS = 48  # of the text that is watched
_FAR = -1e4  # a logit from which no softmax or sigmoid gives anything, and no infinity that would give a NaN
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")
_GROUPS_TAKEN = re.compile(r"topk_groups?")
_OTHER = re.compile(r"shared|per_tok|top_?k|zero")  # in names of numbers of experts that are not how many there are


@dataclass(frozen=True)
class Slices:
    """A parameter or buffer with as many neighbouring entries for each expert along one dimension."""

    module: nn.Module
    name: str
    dim: int
    each: int = 1  # entries an expert

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def experts(self) -> int:
        return self.tensor.shape[self.dim] // self.each

    @property
    def is_matrix(self) -> bool:
        """Whether an expert's slice is a matrix, and not its bias."""
        return self.tensor.ndim > 2 or self.each > 1


@dataclass(frozen=True)
class Count:
    """A number that a module keeps and that follows from how many experts there are: that, or that of a group."""

    module: nn.Module
    name: str
    groups: int = 1


@dataclass(frozen=True)
class Call:
    """How a module was called."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Routed:
    """What a module of experts is called with."""

    hidden: Tensor  # (T, D)
    chosen: Tensor  # (T, K) numbers of experts
    gates: Tensor  # (T, K)


@dataclass(frozen=True)
class Mixture:
    """The experts of one block and what chooses among them."""

    block: int
    name: str  # of `module`, in the whole model
    module: nn.Module  # that has both
    experts: nn.Module
    held: tuple[Slices, ...]  # the experts
    routers: tuple[Slices, ...]
    counts: tuple[Count, ...]
    taken: int  # K
    groups: int  # G
    groups_taken: int
    call: Call = field(repr=False)  # with which the text that was watched came to `module`

    @property
    def number(self) -> int:
        return self.held[0].experts

    @property
    def path(self) -> str:
        """Of the module of experts, in the whole model."""
        return next(f"{self.name}.{name}" for name, module in self.module.named_modules() if module is self.experts)

    @property
    def weights(self) -> int:
        """In the matrices of all experts."""
        return sum(slices.tensor.numel() for slices in self.held if slices.is_matrix)

    @property
    def least(self) -> int:
        """How many experts must stay: those that a token takes, from the groups that it takes, and two of each group,
        by which groups are ranked."""
        if self.groups == 1:
            return self.taken
        return self.groups * max(2, -(-self.taken // self.groups_taken))


def find(model: PreTrainedModel) -> list[Mixture]:
    """The mixtures of experts of all blocks that have one, in order.

    Raises RequestError for a model without any, and for one whose experts are held or chosen as nothing here knows.
    """
    seen = _watched(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for block, (experts, routed, owner, call) in seen:
        name = names[id(experts)]
        held = _held(experts, name)
        if isinstance(routed, str):
            raise RequestError(_refusal(model, f"{name} {routed}"))
        number = held[0].experts
        routers = _routers(owner, experts, call, number)
        groups, groups_taken = _groups(owner, experts, number)
        counts = _counts(owner, routers, number, groups)
        found.append(
            Mixture(
                block,
                names[id(owner)],
                owner,
                experts,
                held,
                routers,
                counts,
                routed.chosen.shape[1],
                groups,
                groups_taken,
                call,
            )
        )
    if not found:
        raise RequestError(_without(model))
    return found


def routed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routed | None:
    """What a module was called with, as experts are; None where they are not called so."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    hidden = next((value for value in tensors if value.is_floating_point() and value.ndim in (2, 3)), None)
    chosen = next((value for value in tensors if value.dtype in (torch.int64, torch.int32) and value.ndim == 2), None)
    if hidden is None or chosen is None:
        return None
    gates = next((v for v in tensors if v is not hidden and v.is_floating_point() and v.shape == chosen.shape), None)
    flat = hidden.flatten(0, -2)
    return None if gates is None or len(flat) != len(chosen) else Routed(flat, chosen, gates)


def routing(mixture: Mixture) -> Routed:
    """What is routed of the text that was watched."""
    return _routing(mixture.module, mixture.experts, mixture.call)


def outputs(experts: nn.Module, hidden: Tensor, chosen: Tensor) -> Tensor:
    """(T, K, D) what each of the chosen experts gives of a token before any gate weighs it."""
    rows = hidden.repeat_interleave(chosen.shape[1], 0)
    ones = torch.ones(len(rows), 1, dtype=hidden.dtype, device=hidden.device)
    given = experts.forward(rows, chosen.reshape(-1, 1), ones)
    return given.reshape(*chosen.shape, -1)


def weighed(mixture: Mixture, given: Routed) -> Tensor:
    """(T, D) what the experts give together of what is routed so."""
    return mixture.experts.forward(given.hidden, given.chosen, given.gates).reshape(len(given.hidden), -1)


@contextmanager
def observed(mixtures: list[Mixture], see: Callable[[int, Routed], None]) -> Iterator[None]:
    """While open, `see` is told of each call of a mixture's experts: of which, and what was routed."""
    with ExitStack() as restore:
        for number, mixture in enumerate(mixtures):

            def hook(_: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                given = routed(args, kwargs)
                assert given is not None
                see(number, given)

            restore.callback(mixture.experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def masked(mixture: Mixture, gone: list[int]) -> Iterator[None]:
    """While open, no token chooses these experts: their logits are so low that the others' share theirs, as the model does.

    Raises RequestError on leaving when the router's matrix multiplied nothing.
    """
    lowered = [slices for slices in mixture.routers if slices.tensor.numel() == mixture.number]
    before = [slices.tensor.detach().clone() for slices in lowered]
    weights = [slices.tensor for slices in mixture.routers if slices.tensor.numel() > mixture.number]
    mode = _Masking(weights, gone)
    with torch.no_grad():
        for slices in lowered:
            slices.tensor.data.index_fill_(slices.dim, torch.tensor(gone, device=slices.tensor.device), _FAR)
        try:
            with mode:
                yield
        finally:
            for slices, was in zip(lowered, before, strict=True):
                slices.tensor.data.copy_(was)
    if not mode.met:
        raise RequestError("no product with the router's matrix was seen")


class _Masking(TorchFunctionMode):
    """Lowers the logits of some experts in each product with one of the routers' matrices, (E, D)."""

    def __init__(self, weights: list[Tensor], gone: list[int]) -> None:
        super().__init__()
        self.weights, self.gone, self.met = weights, gone, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        multiplies = getattr(func, "__name__", "") in ("linear", "matmul", "__matmul__") and len(args) > 1
        if multiplies and any(self._is(args[1], weight) for weight in self.weights):
            self.met = True
            result = result.clone()
            result[..., self.gone] = _FAR
        return result

    @staticmethod
    def _is(given: Any, weight: Tensor) -> bool:
        if not isinstance(given, Tensor) or given.numel() != weight.numel():
            return False
        flat = given if given.shape == weight.shape else given.t()
        return flat.shape == weight.shape and torch.equal(flat.to(weight.dtype), weight)


def describe(model: PreTrainedModel, before: int, now: int) -> None:
    """Have the configuration say how many experts every mixture has now, wherever it said how many each had before."""

    def tell(holder: Any) -> None:
        for name, value in list(vars(holder).items()):
            if isinstance(value, PreTrainedConfig):
                tell(value)
            elif "expert" in name and not _OTHER.search(name) and type(value) is int and value == before:
                setattr(holder, name, now)

    for module in model.modules():  # the model itself, for its loss while it is trained
        tell(module)
    tell(model.config)


# ---- what stays of experts that went ----


class Novices:
    """Mixed into the class of a module of experts some of which are gone: each of these answers with a vector of its own.

    Routing stays as it was, and what stays of an expert multiplies nothing (arXiv:2507.00390).
    novices  (gone, D)
    places   (E,) of each expert its number among those that are left, or -1 - its number among those that went
    """

    novices: Tensor
    places: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = routed(args, kwargs)
        assert given is not None
        place = self.places[given.chosen]
        stays = place >= 0
        constant = self.novices[(-1 - place).clamp_min(0)].to(given.hidden.dtype)
        gates = given.gates.to(given.hidden.dtype)
        result = (constant * gates.masked_fill(stays, 0)[..., None]).sum(1)
        token, slot = stays.nonzero(as_tuple=True)
        if len(token):
            own = super().forward(given.hidden[token], place[token, slot][:, None], given.gates[token, slot][:, None])  # type: ignore[misc]
            result = result.index_add(0, token, own.reshape(len(token), -1).to(result.dtype))
        shape = next(value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return result.view(shape)


def _with_novices(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Novices, kind), {"__module__": kind.__module__})


def give_novices(experts: nn.Module, places: Tensor, novices: Tensor) -> None:
    """Have experts that are gone from a module of them, cut already, answer with vectors: see `Novices`. In place."""
    experts.__class__ = _with_novices(type(experts))
    experts.register_parameter("novices", nn.Parameter(novices, requires_grad=False))
    experts.register_buffer("places", places)


# ---- looking ----


def _watched(model: PreTrainedModel) -> list[tuple[int, tuple[nn.Module, Routed | str, nn.Module, Call]]]:
    """Of each block that calls experts: these, what they were called with, the module around them and how it was called.

    What the experts were called with is said in words where it cannot be read.
    """
    inside = [{id(module): module for module in block.modules()} for block in anatomy.blocks(model)]
    names = {id(module): name for name, module in model.named_modules()}
    by_name = dict(model.named_modules())
    calls: dict[int, Call] = {}
    found: list[tuple[int, tuple[nn.Module, Routed | str, nn.Module, Call]]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[id(module)] = Call(args, dict(kwargs))
        block = next((number for number, modules in enumerate(inside) if id(module) in modules), None)
        if block is None or id(module) not in names or any(module is entry[1][0] for entry in found):
            return
        given = routed(args, kwargs)
        if given is None and not _may_hold_experts(module):
            return
        if any(id(module) in {id(m) for m in entry[1][0].modules()} for entry in found):
            return  # inside experts
        owner = by_name[names[id(module)].rpartition(".")[0]]
        if id(owner) in calls:
            found.append((block, (module, given or "is called in a way of its own", owner, calls[id(owner)])))

    with ExitStack() as restore, torch.no_grad():
        for module in model.modules():
            restore.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        rows = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, rows, (2, _TOKENS // 2), generator=torch.Generator().manual_seed(0))
        restore.enter_context(watching.aside())
        model(input_ids=ids.to(model.device), use_cache=False)
    return found


def _may_hold_experts(module: nn.Module) -> bool:
    """Whether a module that is not called as experts are has parameters of its own in three dimensions, as they have."""
    own = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    return bool(own) and not isinstance(module, nn.Conv1d) and "xpert" in type(module).__name__


def _held(experts: nn.Module, name: str) -> tuple[Slices, ...]:
    """The tensors of the experts. Raises RequestError where they are not of one number of experts."""
    tensors = [
        (module, own, tensor)
        for module in experts.modules()
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if not (isinstance(module, Novices) and own in Novices.__annotations__)
    ]
    numbers = {tensor.shape[0] for _, _, tensor in tensors if tensor.ndim == 3}
    if not numbers:  # the experts' rows lie one behind the other
        numbers = {
            value
            for own, value in vars(experts).items()
            if "expert" in own and type(value) is int and not _OTHER.search(own)
        }
    if len(numbers) != 1:
        raise RequestError(
            f"{name} ({type(experts).__name__}) holds matrices of {' and '.join(map(str, sorted(numbers))) or 'an unknown number of'} "
            "experts: choose another method, such as +method=weight"
        )
    (number,) = numbers
    return tuple(
        Slices(module, own, 0, tensor.shape[0] // number)
        for module, own, tensor in tensors
        if tensor.ndim and tensor.shape[0] and tensor.shape[0] % number == 0
    )


def _routers(owner: nn.Module, experts: nn.Module, call: Call, number: int) -> tuple[Slices, ...]:
    """The tensors beside the experts, with a slice for each, whose values change what is routed."""
    inside = {id(module) for module in experts.modules()}
    before = _routing(owner, experts, call)
    found = []
    for module in owner.modules():
        if id(module) in inside:
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            dim = next((dim for dim, size in enumerate(tensor.shape) if size == number), None)
            if dim is None or not tensor.is_floating_point():
                continue
            was = tensor.detach().clone()
            noise = torch.randn(was.shape, generator=torch.Generator().manual_seed(1))
            tensor.data.add_((noise * (1 + was.float().abs().mean().item())).to(was))
            try:
                after = _routing(owner, experts, call)
            finally:
                tensor.data.copy_(was)
            if not torch.equal(before.chosen, after.chosen) or not torch.equal(before.gates, after.gates):
                found.append(Slices(module, name, dim))
    return tuple(found)


@torch.no_grad()
def _routing(owner: nn.Module, experts: nn.Module, call: Call) -> Routed:
    """What the experts are called with when the module around them is called so."""
    seen: list[Routed | None] = []
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(routed(args, kwargs)), with_kwargs=True
    )
    try:
        run(owner, call)
    finally:
        handle.remove()
    assert seen[0] is not None
    return seen[0]


@torch.no_grad()
def run(module: nn.Module, call: Call) -> Tensor:
    """What the module gives, the first tensor of several. The call stays as it was, whatever the module writes to."""

    def fresh(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    given = module(*map(fresh, call.args), **{name: fresh(value) for name, value in call.kwargs.items()})
    return given[0] if isinstance(given, tuple) else given


def _groups(owner: nn.Module, experts: nn.Module, number: int) -> tuple[int, int]:
    """(G, how many of them a token takes)."""
    groups = taken = 1
    for module in owner.modules():
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and number % value == 0:
                groups = value if _GROUPS.fullmatch(name) else groups
                taken = value if _GROUPS_TAKEN.fullmatch(name) else taken
    return groups, min(taken, groups)


def _counts(owner: nn.Module, routers: tuple[Slices, ...], number: int, groups: int) -> tuple[Count, ...]:
    found = []
    for module in owner.modules():
        of_router = any(slices.module is module for slices in routers)
        for name, value in vars(module).items():
            if type(value) is not int or _OTHER.search(name):
                continue
            if value == number and ("expert" in name or (of_router and name == "out_features")):
                found.append(Count(module, name))
            elif groups > 1 and value == number // groups and "per_group" in name:
                found.append(Count(module, name, groups))
    return tuple(found)


def _without(model: PreTrainedModel) -> str:
    return (
        f"method=expert: no block of {type(model).__name__} calls experts, so there are none to remove: use +method=neuron, "
        "+method=head, +method=layer or +method=weight"
    )


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return f"method=expert: {reason} in {type(model).__name__}: use +method=weight or +method=layer"
