"""What calibration text tells of a model: statistics of activations, gathered by hooks while it reads.

T tokens, N neurons of one block, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep import models

BATCH = 4  # sequences in one forward pass


@contextmanager
def inputs_observed(layers: Sequence[nn.Module], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `observe(i, x)` is called with each input x of `layers[i]`; removed again on any exit."""
    handles = [layer.register_forward_pre_hook(lambda _, args, i=i: observe(i, args[0]))
               for i, layer in enumerate(layers)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def neuron_taylor_abs(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """Sum over tokens of |activation * gradient of the loss| of every FFN neuron: L tensors of (N,), float32.

    tokens  (sequences, length); the loss is the summed next-token cross-entropy

    The first-order change of the loss if the neuron were silent on that one token (Molchanov et al. 2019,
    arXiv:1906.10771), without cancellation between tokens: a neuron that helps some and harms others is in use.
    """
    ffns = models.ffns(model)
    totals = [torch.zeros(ffn.width, dtype=torch.float32, device=model.device) for ffn in ffns]

    def observe(block: int, activation: Tensor) -> None:
        value = activation.detach()  # a hook that held the activation itself would keep it alive for ever

        def on_gradient(gradient: Tensor) -> None:
            product = (value * gradient).float().abs()
            totals[block] += product.flatten(0, -2).sum(0)

        activation.register_hook(on_gradient)

    with _activations_differentiable(model), inputs_observed([ffn.output for ffn in ffns], observe):
        for batch in _batches(tokens, "calibrating"):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits
            nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten().to(model.device), reduction="sum"
            ).backward()
    return totals


@contextmanager
def _activations_differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow to activations and not to weights, which halves the cost of a backward pass."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, value in required.items():
            parameter.requires_grad_(value)


def _batches(tokens: Tensor, stage: str) -> Iterator[Tensor]:
    yield from tqdm(tokens.split(BATCH), desc=stage, unit="batch", leave=False)
