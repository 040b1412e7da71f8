"""What each linear layer of a block reads of what others put out, entry by entry: told by gradients.

Every linear layer is made to put out random numbers of its own, so that the graph of a pass through the model falls into
pieces, each from what some layers put out to what one other reads. A gradient within a piece is zero exactly where
nothing is read. No weight of a matrix takes part: what is found is how the code is written, whatever it is called and
however its matrices are laid out, and costs no product of matrices.

T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sweep.models import anatomy, watching
from sweep.models.anatomy import Linear
from sweep.settings import RequestError

TOKENS = 16  # a neuron of ReLU that no random number wakes is missed once in 2^16, and the pass is made twice
_SMALL = 2**20  # entries of a parameter beside the matrices, such as of a norm or a sink

Entry = tuple[nn.Module, str]  # a parameter beside the matrices: the module that keeps it, and its name there


@dataclass
class Pass:
    """One pass through the model with random numbers in place of products."""

    block_of: dict[Linear, int]
    read: dict[Linear, Tensor] = field(default_factory=dict)  # (…, in) what each layer read, with its graph
    put: dict[Linear, Tensor] = field(default_factory=dict)  # (…, out) leaves
    entering: dict[int, Tensor] = field(default_factory=dict)  # what entered each block: leaves too
    leaving: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)  # how each block was called
    beside: dict[int, dict[Entry, nn.Parameter]] = field(default_factory=dict)  # small parameters of each block

    def linears(self, block: int) -> list[Linear]:
        """The layers of a block that ran, in the order of its modules."""
        return [linear for linear, number in self.block_of.items() if number == block and linear in self.read]

    def gradients(self, of: Tensor, cotangent: Tensor, sources: Sequence[Tensor]) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(of, list(sources), cotangent.to(of.dtype), retain_graph=True, allow_unused=True)
        )


@contextmanager
def passed(model: PreTrainedModel, seed: int = 0) -> Iterator[Pass]:
    """A pass whose gradients can be asked for until this is closed; the model is then as it was.

    Raises RequestError for a model that cannot be run so.
    """
    blocks = anatomy.blocks(model)
    found = Pass({m: i for i, block in enumerate(blocks) for m in block.modules() if isinstance(m, Linear)})
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # such as a recurrent state
    kept = [(held, dict(held)) for m in model.modules() for held in (vars(m), vars(m)["_buffers"])]
    training = {module: module.training for module in model.modules()}
    random, generator = torch.get_rng_state(), torch.Generator().manual_seed(seed)
    try:
        torch.manual_seed(seed)
        model.eval().requires_grad_(False)
        embedding = model.get_input_embeddings().weight
        ids = torch.randint(len(embedding), (1, TOKENS), generator=generator).to(embedding.device)
        try:
            with ExitStack() as restore, torch.enable_grad():
                for index, block in enumerate(blocks):
                    _watch(restore, found, index, block, generator)
                _run(model, ids)
        finally:
            for held, before in kept:
                held.update(
                    (k, before.get(k)) for k, v in list(held.items()) if isinstance(v, Tensor) and not v.is_leaf
                )
        yield found
    finally:
        torch.set_rng_state(random)
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        for module, value in training.items():
            module.training = value


@watching.aside()
def _run(model: PreTrainedModel, ids: Tensor) -> None:
    try:
        model(input_ids=ids, use_cache=False)
    except Exception as error:  # whatever the model's own code says
        raise RequestError(
            f"the units of {type(model).__name__} are found by running it with other numbers in place of what its "
            f"matrices give, and it does not run so ({type(error).__name__}: {error}): use +method=weight or "
            "+method=layer, which need no units"
        ) from error


def _watch(restore: ExitStack, found: Pass, index: int, block: nn.Module, generator: torch.Generator) -> None:
    """Have a block's linear layers put out random numbers, its norms pass them on, and itself begin a graph of its own."""

    def randomly(linear: Linear) -> Callable[..., Any]:
        own, its = linear.forward, type(linear).forward not in (nn.Linear.forward, Conv1D.forward)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if its and not isinstance(out := own(x, *args, **kwargs), Tensor):
                return out  # of a router, which gives a choice too
            shape = (*x.shape[:-1], anatomy.weight(linear).shape[0])
            leaf = torch.randn(shape, generator=generator).to(x.device, linear.weight.dtype).requires_grad_()
            found.read[linear], found.put[linear] = x, leaf
            return leaf.clone()  # which the caller may change in place

        return forward

    found.beside[index] = {}
    for module in block.modules():
        if isinstance(module, Linear):
            anatomy.replace_forward(restore, module, randomly(module))
            continue
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if parameter.ndim <= 2 and parameter.numel() <= _SMALL and parameter.is_floating_point():
                parameter.requires_grad_()
                found.beside[index][module, name] = parameter
        if own and not list(module.children()):
            anatomy.replace_forward(restore, module, _elementwise(module.forward))
    forward = block.forward

    def entered(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        leaf = hidden.detach().clone().requires_grad_()
        found.calls[index], found.entering[index] = (args, kwargs), leaf
        if args:
            out = forward(leaf.clone(), *args[1:], **kwargs)
        else:
            out = forward(**{**kwargs, "hidden_states": leaf.clone()})
        found.leaving[index] = out[0] if isinstance(out, tuple | list) else out
        return out

    anatomy.replace_forward(restore, block, entered)


def _elementwise(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A norm whose statistic is no function of what it reads, so that each entry it gives depends on one that it reads.

    Values are the norm's own, and so are gradients of its parameters.
    """

    def norm(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return forward(*args, **kwargs)
        (x,) = args
        out = forward(x.detach())
        if not isinstance(out, Tensor) or out.shape != x.shape:
            return forward(x)
        passed = x * (out.detach() / x.detach()).nan_to_num(1.0).to(x.dtype)
        return out + (passed - passed.detach()).to(out.dtype)

    return norm


def touched(gradients: Sequence[Tensor | None], sources: Sequence[Tensor]) -> list[Tensor]:
    """Where each gradient is not zero: bool, of the source's shape."""
    return [
        torch.zeros(source.shape, dtype=torch.bool) if gradient is None else (gradient != 0).cpu()
        for gradient, source in zip(gradients, sources, strict=True)
    ]
