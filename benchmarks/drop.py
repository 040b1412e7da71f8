"""What each trick brings to the measured drop, on the embedded model in float32: python benchmarks/drop.py PART

    agreement   100 random neurons: resumed and batched against plain zeroing, in nats of the loss
    speed       CPU seconds a neuron: a full forward pass with the head at all tokens; resumed; batched; the head
                spared, its preparation spread over all neurons; with few scored tokens; all blocks' mean
    screening   one block measured in full and with screening: the share of the removed set that is the same, and CPU

Times are of the processor, not the clock, and of interleaved runs. What was measured is kept in the cache: a part that
is interrupted goes on.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from neuron_criteria import EMBEDDED
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel

from sweep.config import Calibration
from sweep.models import anatomy, loading
from sweep.pruning import drop, units
from sweep.pruning.families import Drop, Neuron
from sweep.texts import text

BARS = "bars: 1e-3 nats; twice less CPU for all units; with screening ten times less, 99 % of the removed set the same"


def cpu(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.inference_mode()
def plain_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """One full forward pass: what a drop costs when the neuron is zeroed and the model run again."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))


def ablate(run: drop.Resumed, ablation: drop.Ablation, count: int) -> None:
    """Leave out the first so many neurons, one at a time."""
    for _ in run.ablated(ablation, range(count)):
        pass


def agreement(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> None:
    draw = np.random.default_rng(0)
    parts = units.parts(model, Neuron())
    chosen = sorted((int(draw.integers(len(parts))), int(draw.integers(parts[0].units))) for _ in range(count))
    probe = drop.probe_of_text(tokens)
    scheme = drop.Scheme("loss", probe)
    ablations = [
        drop.Ablation(part.block, part.output, [torch.tensor([u]) for block, u in chosen if block == part.block])
        for part in parts
    ]
    measured = [a for a in ablations if a.columns]
    runs = [drop.likelihoods(model, probe, measured, resume=False, spare_head=spare) for spare in (False, True)]
    resumed = np.stack([drop.importance(scheme, base, np.concatenate(found)) for base, found in runs], 1)
    whole, gaps, plain = plain_loss(model, tokens), [], []
    for (block, unit), values in zip(chosen, resumed, strict=True):
        column = anatomy.weight(parts[block].output).data[:, unit]
        saved = column.clone()
        column.zero_()
        plain.append(plain_loss(model, tokens) - whole)
        column.copy_(saved)
        gaps.append(np.abs(plain[-1] - values))
    print(f"{count} random neurons, {tokens.numel()} tokens; drops from {min(plain):.2e} to {max(plain):.2e} nats")
    for name, gap in zip(("the head at all positions", "the head spared"), np.array(gaps).T, strict=True):
        print(f"{name}: largest difference {gap.max():.2e} nats, median {np.median(gap):.2e}")


@torch.inference_mode()
def speed(model: PreTrainedModel, tokens: torch.Tensor, repeats: int) -> None:
    parts = units.parts(model, Neuron())
    depth = len(parts)
    sampled = sorted({int(block) for block in np.linspace(0, depth - 1, 5)})  # sparing the head differs by block
    probe = drop.probe_of_text(tokens)
    prompts, answers = [row[:-1].tolist() for row in tokens], [[[int(row[-1])]] for row in tokens]
    few = drop.probe_of_questions(prompts, answers, [0] * len(tokens))
    batch = max(1, drop.TOKENS_AT_ONCE // tokens.numel())
    spared = "the same, the head spared: what is used"
    runs = {
        "resumed": (drop.Resumed(model, probe), 1),
        "resumed and batched": (drop.Resumed(model, probe), batch),
        spared: (drop.Resumed(model, probe), batch),
        "resumed and batched, one scored token a text": (drop.Resumed(model, few), batch),
    }
    runs["resumed"][0].at_once = 1
    prepared = cpu(runs[spared][0].spare_head) / sum(part.units for part in parts)
    times: dict[str, list[list[float]]] = {name: [[] for _ in sampled] for name in runs}
    full: list[float] = []
    draw = np.random.default_rng(0)
    plain_loss(model, tokens)  # warms up
    for _ in range(repeats):
        full.append(cpu(lambda: plain_loss(model, tokens)))
        for name, (run, at_once) in runs.items():
            for i, block in enumerate(sampled):
                # What a block costs once, however many neurons follow, is taken off.
                neurons = torch.from_numpy(draw.permutation(parts[block].units)[:at_once])
                ablation = drop.Ablation(block, parts[block].output, list(neurons.view(-1, 1)))
                once, batched = (cpu(functools.partial(ablate, run, ablation, n)) for n in (0, at_once))
                times[name][i].append((batched - once) / at_once + (prepared if name == spared else 0))
    whole = statistics.median(full)
    lines: list[list[Any]] = [["full forward pass", whole, 1.0, *[None] * len(sampled)]]
    for name, per_block in times.items():
        medians = [statistics.median(t) for t in per_block]
        mean = float(np.interp(range(depth), sampled, medians).mean())
        lines.append([name, mean, whole / mean, *medians])
    headers = ["CPU seconds a neuron", "all blocks", "times less", *[f"block {b}" for b in sampled]]
    print(tabulate(lines, headers=headers, floatfmt=".3f"))


def screening(model: PreTrainedModel, tokens: torch.Tensor, block: int, sparsity: float, margin: float) -> None:
    probe = drop.probe_of_text(tokens)
    part = units.parts(model, Neuron(blocks=(block,)))[0]
    everything = drop.Ablation(block, part.output, list(torch.arange(part.units).view(-1, 1)))
    base, (found,) = drop.likelihoods(model, probe, [everything])
    exact = torch.from_numpy(drop.importance(drop.Scheme("loss", probe), base, found))
    plain = statistics.median(cpu(lambda: plain_loss(model, tokens)) for _ in range(5))
    method = Neuron(criterion="drop", drop=Drop(screen="taylor", screen_margin=margin), blocks=(block,))
    measured: list[units.Measured] = []
    with tempfile.TemporaryDirectory() as empty:  # nothing that an earlier run has kept makes this one look cheap
        kept = {name: os.environ.get(name) for name in ("SWEEP_CACHE",)}
        os.environ["SWEEP_CACHE"] = empty
        spent = cpu(lambda: measured.append(units.measured_drops(model, method, tokens, None, sparsity)))
        os.environ |= {name: value for name, value in kept.items() if value is not None}
    removed = round(sparsity * part.units)
    sets = [set(scores.argsort(stable=True)[:removed].tolist()) for scores in (exact, measured[0].scores[0])]
    same = len(sets[0] & sets[1]) / removed
    guess = drop.first_order(model, probe, [part.output])[0]
    alone = len(sets[0] & set(guess.argsort(stable=True)[:removed].tolist())) / removed
    print(
        f"block {block}, {part.units} neurons, {removed} removed, {tokens.numel()} tokens: {int(measured[0].table.measured.sum())} measured, "
        f"{same:.2%} of the removed set the same (the estimate alone: {alone:.2%}); {spent:.1f} CPU s, "
        f"a full forward pass for every neuron {plain * part.units:.1f}: "
        f"{plain * part.units / spent:.1f} times less"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["agreement", "speed", "screening"])
    parser.add_argument("--tokens", type=int, default=128, help="of one text")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--units", type=int, default=100, help="of agreement")
    parser.add_argument("--repeats", type=int, default=3, help="of speed")
    parser.add_argument("--block", type=int, default=26, help="of screening")
    parser.add_argument("--sparsity", type=float, default=0.3, help="of screening")
    parser.add_argument("--margin", type=float, default=0.1, help="of screening")
    asked = parser.parse_args()
    model, tokenizer = loading.load(EMBEDDED, "float32", "cpu")
    tokens = text.calibration_tokens(Calibration("pydoc", asked.texts, asked.tokens), tokenizer, 0)
    if asked.part == "agreement":
        agreement(model, tokens, asked.units)
    elif asked.part == "speed":
        speed(model, tokens, asked.repeats)
    else:
        screening(model, tokens, asked.block, asked.sparsity, asked.margin)
    print(BARS)


if __name__ == "__main__":
    main()
