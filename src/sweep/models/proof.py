"""Tries on a model itself whether cutting units of a part gives what zeroing them gives.

One block at a time is copied, given random weights and run as the model calls it: what is proved is how its code is
written, and that does not depend on what a matrix holds. Half of the units go, chosen at random, so that a row or a
column that belongs to another unit than was thought changes most of what leaves the block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sweep.models import anatomy, surgery, transformers_private, watching
from sweep.models.anatomy import weight
from sweep.models.candidates import Attention, Experts, Part

ALIKE = 1e-3  # of what the units make: rounding, and no more
Call = tuple[tuple[Any, ...], dict[str, Any]]


def tried(block: nn.Module, part: Part, call: Call, seed: int = 0) -> Part | str:
    """The part as it may be cut, or what went wrong.

    block  that the part is of; it stays as it is
    call   how the model calls the block: arguments, keyword arguments

    Where zeroing columns of the output matrix alone is not what a cut does, since a norm averages over all units, zeroing
    all weights of the units may be.
    """
    failed = ""
    for way in _ways(part):
        why = _fails(block, way, call, seed)
        if why is None:
            return way
        failed = failed or why
    return failed


def _ways(part: Part) -> Iterator[Part]:
    """The ways in which a part may have to be cut, the plainest first."""
    # norms over all heads, unlike what is one number a head
    norms = isinstance(part, Attention) and any(
        not isinstance(s.module, anatomy.Linear)
        and s.parameter.ndim == 1
        and len(s.parameter) >= part.groups * part.head_dim
        for s in part.slices
    )
    for rescaled in (False, True) if norms else (False,):
        way = replace(part, rescaled=rescaled)
        yield way
        if isinstance(way, Attention):
            yield replace(way, own_widths=True)
            yield replace(way, own_config=True)
            yield replace(way, own_widths=True, own_config=True)


@watching.aside()
def _fails(block: nn.Module, part: Part, call: Call, seed: int) -> str | None:
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        own, its = _copied(block, part)
        args, kwargs = _plain(call)

        def run() -> Tensor:
            out = own(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            return (out[0] if isinstance(out, tuple | list) else out).detach()

        keep = _half(its)
        if keep.all():
            return None  # one unit is left, and stays
        with torch.no_grad(), ExitStack() as kernels:
            for module in own.modules():
                kernels.enter_context(transformers_private.experts_one_by_one(module))
            whole = run()
            _zero(its, keep)
            zeroed = run()
            surgery.remove_units(its, keep)
            cut = run()
    except Exception as error:  # whatever the model's own code says to a part that is cut
        return f"{type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}".strip()
    finally:
        torch.set_rng_state(torch_state)
    made = float((whole - zeroed).norm())
    if not made:
        return "its units give nothing"
    off = float((zeroed - cut).norm()) / made
    return None if off <= ALIKE else f"what it gives then differs by {off:.0%} of what those units made"


def _half(part: Part) -> Tensor:
    """(units,) the units that stay: half of those of every expert, else of all, or of the key-value groups."""
    if isinstance(part, Attention):
        if (
            part.rescaled and part.heads_per_group > 1
        ):  # a norm of what shared keys give has no zeros where a query goes
            return torch.cat([_random(part.heads_per_group, part.heads_per_group // 2)] * part.groups)
        if part.groups > 1:
            groups = _random(part.groups, part.groups // 2)
            return groups.repeat_interleave(part.heads_per_group)
        return _random(part.heads, part.heads // 2)
    if isinstance(part, Experts):
        return torch.cat([_random(part.neurons, part.neurons // 2) for _ in range(part.experts)])
    return _random(part.width, part.width // 2)


def _random(count: int, gone: int) -> Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[torch.randperm(count)[: min(gone, count - 1)]] = False
    return keep


@torch.no_grad()
def _zero(part: Part, keep: Tensor) -> None:
    """Zero the columns of the output matrix, or, of a part with a norm over all units, all weights of those that go."""
    if isinstance(part, Experts):
        out = part.slices[-1]
        for expert, stays in zip(out.parameter, out.stays(keep), strict=True):
            expert.index_fill_(out.axis - 1, (~stays).nonzero().squeeze(1), 0)
        return
    columns = keep.repeat_interleave(weight(part.output).shape[1] // len(keep))
    weight(part.output)[:, ~columns] = 0
    if part.rescaled:
        for each in part.slices:
            if isinstance(each.module, anatomy.Linear):
                weight(each.module)[~each.stays(keep)] = 0
                if each.module.bias is not None:
                    each.module.bias[~each.stays(keep)] = 0


def _copied(block: nn.Module, part: Part) -> tuple[nn.Module, Part]:
    """The block in float32 with random weights, and the part within it."""
    memo: dict[int, Any] = {}
    own = copy.deepcopy(block, memo).float().eval()
    its: dict[str, Any] = {"slices": tuple(replace(s, module=memo[id(s.module)]) for s in part.slices)}
    its["module"] = memo[id(part.module)]
    if not isinstance(part, Experts):
        its |= {"output": memo[id(part.output)], "inputs": tuple(memo[id(each)] for each in part.inputs)}
    for module in own.modules():
        if isinstance(module, anatomy.Linear):
            module.weight.data.normal_(std=weight(module).shape[1] ** -0.5)
            if module.bias is not None:
                module.bias.data.normal_(std=0.1)
    for each in its["slices"]:
        if not isinstance(each.module, anatomy.Linear):
            wide = each.parameter.ndim == 3
            each.parameter.data.normal_(mean=0.0 if wide else 1.0, std=0.1 if wide else 0.3)
            for name in ("eps", "variance_epsilon") if part.rescaled else ():
                if hasattr(each.module, name):  # which a rescaled norm adds to a mean over fewer entries
                    setattr(each.module, name, 1e-12)
    return own, replace(part, **its)


def _plain(call: Call) -> Call:
    """Arguments without graphs, in float32."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().clone()
            return value.float() if value.is_floating_point() else value
        if isinstance(value, tuple | list):
            return type(value)(plain(item) for item in value)
        if isinstance(value, MutableMapping):
            own = copy.copy(value)
            own.update({name: plain(item) for name, item in value.items()})
            return own
        return value

    return plain(call)
