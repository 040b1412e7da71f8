"""Perplexity after removing FFN neurons of the embedded model, by criterion: python benchmarks/neuron_criteria.py

Mean over calibration seeds of the perplexity per token on the first tokens of the held-out pydoc pages, and the bars
that the default criterion is to meet. Arguments name criteria (`taylor_abs+repair` with the repair); none = all.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from embedded import EMBEDDED
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel

from sweep import models, text, unit_statistics, units
from sweep.config import PROXIES, Calibration, Neuron
from sweep.unit_scores import Statistics

CRITERIA = [*PROXIES, "taylor_abs+repair", "taylor_sampled+repair"]
BARS = {0.1: 16.0, 0.3: 21.0, 0.5: 33.0}


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, window: int = 512) -> float:
    """Per token, over windows without overlap; the first token of a window has no context and is not scored."""
    loss, count = 0.0, 0
    for ids in tokens.split(window):
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        loss += float(nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def pruned(
    dense: PreTrainedModel,
    method: Neuron,
    sparsity: float,
    seed: int,
    tokens: torch.Tensor,
    read: list[Statistics],
    mend: bool,
) -> PreTrainedModel:
    """A copy pruned by what the criterion `read`, as `units.prune` makes it."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(seed)
    parts = units.parts(model, method)
    scores = [units.score(method.criterion, part, seen, generator) for part, seen in zip(parts, read, strict=True)]
    keeps = units.choose(parts, scores, method, sparsity, sum(p.weights for p in parts), sum(p.units for p in parts))
    units.cut(
        model, parts, keeps, read if method.criterion == "flap" else [None] * len(parts), tokens if mend else None
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("criteria", nargs="*", default=CRITERIA, help="criteria, `+repair` with the repair")
    parser.add_argument("--sparsity", type=float, nargs="*", default=list(BARS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences of --length tokens")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scope", default="global")
    parser.add_argument("--tokens", type=int, default=2048, help="evaluated")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    dense, tokenizer = models.load(EMBEDDED, asked.dtype, "cpu")
    pages = "\n\n".join(document["page"] for document in text.pydoc_documents())
    evaluated = tokenizer(pages, return_tensors="pt", verbose=False).input_ids[0, : asked.tokens]
    print(f"dense: {perplexity(dense, evaluated):.2f}", flush=True)
    calibration = [
        text.calibration_tokens(Calibration("pydoc", asked.sequences, asked.length), tokenizer, seed)
        for seed in range(asked.seeds)
    ]
    lines = []
    outputs = [ffn.output for ffn in models.ffns(dense)]
    read = [
        unit_statistics.for_criteria(PROXIES, dense, outputs, tokens, seed) for seed, tokens in enumerate(calibration)
    ]
    print(f"read {calibration[0].numel()} tokens a seed", flush=True)
    for name in asked.criteria:
        criterion, _, mend = name.partition("+")
        method = Neuron(criterion=criterion, scope=asked.scope)  # type: ignore[arg-type]
        line: list[object] = [name]
        for sparsity in asked.sparsity:
            found = [
                perplexity(pruned(dense, method, sparsity, seed, tokens, seen[criterion], mend == "repair"), evaluated)
                for seed, (tokens, seen) in enumerate(zip(calibration, read, strict=True))
            ]
            line += [sum(found) / len(found), max(found) - min(found)]
        print(line, flush=True)
        lines.append(line)
    lines.append(["bar", *[x for s in asked.sparsity for x in (BARS.get(s), None)]])
    headers = ["criterion", *[x for s in asked.sparsity for x in (f"{s:.0%}", "range")]]
    print(tabulate(lines, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
