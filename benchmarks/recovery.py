"""What recovery gives back of the embedded model, and what it takes: python benchmarks/recovery.py

Perplexity per token of whole pages of pydoc after pruning and recovery, mean over seeds, with the CPU seconds of both on
one thread. Recovery's constants are chosen on the development pages, `--pages test` are those that studies report:

    python benchmarks/recovery.py wanda:0.5 --recover local local,ridge=0.1 local,ridge=0.001
    python benchmarks/recovery.py wanda:0.5 magnitude:0.5 neuron:0.3 layer:0.2 --pages test --seeds 3

`won back` is the share of the loss, in nats a token, that pruning has added. One recovery takes 4 to 12 minutes of a core, and
the pages half a minute.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from statistics import fmean
from typing import Any

import torch
import yaml
from embedded import EMBEDDED
from tabulate import tabulate
from transformers import PreTrainedModel

import sweep
from sweep.measuring import scorer
from sweep.models import loading
from sweep.recovery import kinds
from sweep.texts import embedded

PAGES = {"development": embedded.development_documents, "test": embedded.pydoc_documents}


def loss(model: PreTrainedModel, pages: list[list[int]]) -> float:
    """Nats a token, of which the first of a page, that begins every text, is given."""
    found = scorer.score(model, [(page, len(page) - 1) for page in pages], 4 * scorer.TOKENS_PER_ROW, widest=0)
    return -sum(float(scores.log_probs.sum()) for scores in found) / sum(len(page) - 1 for page in pages)


def settings(words: str) -> dict[str, Any]:
    """Of `local,ridge=0.1,text.sequences=24`, what `sweep.prune` takes as `recover`."""
    name, *values = words.split(",")
    found: dict[str, Any] = {"name": name, "text": {}}
    for key, value in (word.split("=") for word in values):
        place = found["text"] if key.startswith("text.") else found
        place[key.removeprefix("text.")] = yaml.safe_load(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=["wanda:0.5"], help="METHOD:SPARSITY")
    parser.add_argument("--recover", nargs="*", default=list(kinds.KINDS), help="KIND,KEY=VALUE,...")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pages", choices=PAGES, default="development")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dense, tokenizer = loading.load(EMBEDDED, asked.dtype, "cpu")
    pages = [[tokenizer.bos_token_id, *tokenizer(page["page"]).input_ids] for page in PAGES[asked.pages]()]
    whole = loss(dense, pages)
    lines: list[tuple[str, str, float | None, float, float | None, float | None]]
    lines = [("dense", "", None, math.exp(whole), None, None)]
    for words in asked.methods:
        method, _, sparsity = words.partition(":")
        pruned = math.nan
        for kind in (kinds.NONE, *asked.recover):
            losses, seconds = [], []
            for seed in range(asked.seeds):
                model, started = copy.deepcopy(dense), time.process_time()
                recover = settings(kind)
                sweep.prune(model, tokenizer, method=method, sparsity=float(sparsity), seed=seed, recover=recover)
                seconds.append(time.process_time() - started)
                losses.append(loss(model, pages))
                print(words, kind, f"seed {seed}: {math.exp(losses[-1]):.2f}, {seconds[-1]:.0f} s", flush=True)
            pruned = fmean(losses) if kind == kinds.NONE else pruned
            spread = max(map(math.exp, losses)) - min(map(math.exp, losses))
            won = None if kind == kinds.NONE else (pruned - fmean(losses)) / (pruned - whole)
            lines.append((words, kind, fmean(seconds), fmean(map(math.exp, losses)), spread, won))
    headers = ["method", "recover", "CPU seconds", "perplexity", "range", "won back"]
    print(tabulate(lines, headers, floatfmt=("", "", ".0f", ".2f", ".2f", ".2f"), missingval="-"))


if __name__ == "__main__":
    main()
