"""Perplexity after removing FFN neurons of the embedded model, by criterion: python benchmarks/neuron_criteria.py

Mean over calibration seeds of the perplexity per token on the first tokens of every development page of pydoc: studies
report the test pages, on which nothing is chosen. Arguments name criteria (`taylor_abs+repair` with the repair); none =
all. Two constants are tuned here, each value a line beside the others, about 8 and 15 minutes of one core:

    python benchmarks/neuron_criteria.py taylor_sampled --balance 0.3 0 0.15 0.45 0.6 --dtype bfloat16
    python benchmarks/neuron_criteria.py taylor_sampled+repair --damping 0.3 0.1 1 --seeds 2 --dtype bfloat16

`range` is that over seeds. `gap` is the loss above the first line's, nats a token, with its standard error over pages:
both lines have read the same calibration texts and are evaluated on the same pages.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from unittest.mock import patch

import numpy as np
import torch
from embedded import EMBEDDED
from tabulate import tabulate
from transformers import PreTrainedModel

from sweep import metrics
from sweep.config import Calibration
from sweep.measuring import scorer
from sweep.models import loading, parts
from sweep.pruning import criteria, repair, unit_scores, unit_statistics, units
from sweep.pruning.families import Neuron
from sweep.pruning.unit_scores import Activations
from sweep.texts import embedded, text

PROXIES = [criterion.name for criterion in criteria.declared("unit") if not criterion.measured]
CRITERIA = [*PROXIES, "taylor_abs+repair", "taylor_sampled+repair"]


def losses(model: PreTrainedModel, pages: list[list[int]]) -> np.ndarray:
    """The summed loss of each page in nats; its first token has no context and is not scored."""
    found = scorer.score(model, [(page, len(page) - 1) for page in pages], 4 * scorer.TOKENS_PER_ROW, widest=0)
    return np.array([-scores.log_probs.sum(dtype=np.float64) for scores in found])


def pruned(
    dense: PreTrainedModel,
    method: Neuron,
    sparsity: float,
    seed: int,
    tokens: torch.Tensor,
    read: dict[str, list[Activations]],
    mend: bool,
) -> PreTrainedModel:
    """A copy pruned by what the criterion `read`, as `units.prune` makes it."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(seed)
    parts = units.parts(model, method)
    criterion = criteria.find(method.criterion, "unit")
    seen = [{name: found[i] for name, found in read.items()} for i in range(len(parts))]
    scores = [units.score(criterion, part, s, generator) for part, s in zip(parts, seen, strict=True)]
    keeps = units.choose(parts, scores, method, sparsity, sum(p.weights for p in parts), sum(p.units for p in parts))
    compensation = [s["activations"] if criterion.compensates else None for s in seen]
    units.cut(model, parts, keeps, compensation, tokens if mend else None)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("criteria", nargs="*", default=CRITERIA, help="criteria, `+repair` with the repair")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.3, 0.5])
    parser.add_argument("--balance", type=float, nargs="*", default=[unit_scores.BALANCE])
    parser.add_argument("--damping", type=float, nargs="*", default=[repair.DAMPING])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences of --length tokens")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scope", default="global")
    parser.add_argument("--tokens", type=int, default=128, help="of each page")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    dense, tokenizer = loading.load(EMBEDDED, asked.dtype, "cpu")
    pages = [tokenizer(document["page"]).input_ids[: asked.tokens] for document in embedded.development_documents()]
    counts = np.array([len(page) - 1 for page in pages])
    print(f"dense: {np.exp(losses(dense, pages).sum() / counts.sum()):.2f} on {counts.sum()} tokens", flush=True)
    calibration = [
        text.calibration_tokens(Calibration("pydoc", asked.sequences, asked.length), tokenizer, seed)
        for seed in range(asked.seeds)
    ]
    outputs = [ffn.output for ffn in parts.ffns(dense) if isinstance(ffn, parts.Ffn)]
    bare = {name: name.partition("+")[0] for name in asked.criteria}  # without the repair
    wanted = {name for criterion in bare.values() for name in criteria.find(criterion, "unit").reads}
    wanted = {name for name in wanted if criteria.READABLE["unit"][name].text}
    read = [
        unit_statistics.read(wanted, dense, outputs, [1] * len(outputs), tokens, seed)
        for seed, tokens in enumerate(calibration)
    ]
    print(f"read {calibration[0].numel()} tokens a seed", flush=True)
    lines: list[list[object]] = []
    first: dict[float, np.ndarray] = {}  # by sparsity, the first line's loss of each page
    for name, balance, damping in itertools.product(bare, asked.balance, asked.damping):
        method = Neuron(criterion=bare[name], scope=asked.scope)
        line: list[object] = [name, balance, damping]
        for sparsity in asked.sparsity:
            with patch.object(unit_scores, "BALANCE", balance), patch.object(repair, "DAMPING", damping):
                found = np.array(
                    [  # (seeds, pages)
                        losses(pruned(dense, method, sparsity, seed, tokens, seen, "+" in name), pages)
                        for seed, (tokens, seen) in enumerate(zip(calibration, read, strict=True))
                    ]
                )
            perplexities = np.exp(found.sum(1) / counts.sum())
            page_losses = found.mean(0)
            gap, error = metrics.ratio(page_losses - first.setdefault(sparsity, page_losses), counts)
            line += [f"{perplexities.mean():.2f}", f"{np.ptp(perplexities):.2f}", f"{gap:+.3f} ± {error:.3f}"]
        print(line, flush=True)
        lines.append(line)
    headers = ["criterion", "balance", "damping", *[x for s in asked.sparsity for x in (f"{s:.0%}", "range", "gap")]]
    print(tabulate(lines, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
