"""What calibration text tells of experts: who takes them, with what gate, and what they give.

Each expert is asked once more for what it gives of the tokens that took it, before any gate weighs it, by the model's own
code: so that no layout of experts need be known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sweep.calibrate import exact_device
from sweep.models import experts
from sweep.models.experts import Mixture, Routed
from sweep.models.logits import Tail

BATCH = 4  # sequences in one forward pass
Sums = dict[str, Tensor]  # by the names in `READABLE`


def gather(model: PreTrainedModel, mixtures: list[Mixture], tokens: Tensor) -> list[Sums]:
    """Of each mixture, sums over `tokens`, (sequences, length), that the model reads: see `READABLE["expert"]`."""
    width = model.get_input_embeddings().weight.shape[1]
    found = [_zeros(mixture.number, width, exact_device(model.device)) for mixture in mixtures]

    def see(number: int, given: Routed) -> None:
        _add(found[number], given, experts.outputs(mixtures[number].experts, given.hidden, given.chosen))

    tail = Tail(model)
    with torch.no_grad(), experts.observed(mixtures, see):
        for batch in tqdm(tokens.split(BATCH), desc="calibrating", unit="batch", leave=False):
            tail.states(input_ids=batch.to(model.device))
    return found


def _zeros(number: int, width: int, device: torch.device | str) -> Sums:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("gate_sum", "norm_sum", "gated_norm_sum", "output_square"), (number,)
    )
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    sums["output_sum"] = torch.zeros(number, width, dtype=torch.float64, device=device)
    sums["counts"] = torch.zeros(number, dtype=torch.int64, device=device)
    return sums


def _add(sums: Sums, given: Routed, outputs: Tensor) -> None:
    """Add what was routed, of (T, K, D) outputs."""
    device = sums["counts"].device
    chosen, gates = given.chosen.flatten().to(device), given.gates.flatten().to(device, torch.float64)
    given_out = outputs.flatten(0, 1).to(device, torch.float64)
    square = given_out.square().sum(1)
    norm = square.sqrt()
    for name, values in (
        ("counts", torch.ones_like(chosen)),
        ("gate_sum", gates),
        ("norm_sum", norm),
        ("gated_norm_sum", gates * norm),
        ("output_square", square),
        ("output_sum", given_out),
    ):
        sums[name].index_add_(0, chosen, values)
