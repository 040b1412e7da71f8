"""One pruning in a process of its own, for weight_peers.py, by sweep or by llm-compressor, in the environment of either.

    python benchmarks/one_pruning.py sweep|llm-compressor METHOD SPARSITY MODEL TOKENS OUT --dtype float32 --threads 2

METHOD is a criterion; with +once (sweep alone) the text is read once, with the model as it was, and not again with each
pruned block (calibration.sequential=false). MODEL is a checkpoint folder, TOKENS an .npy of (sequences, length) token ids, OUT the folder that receives the pruned
model. The last line printed is JSON: seconds of the pruning call alone, and resident bytes: before the model is loaded,
with the tool's own code in memory, and the most during the call. Everything but that call is the same code for both, and
nothing of sweep is imported for the other.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4  # sequences in a forward pass, as in sweep


def by_sweep(name: str, sparsity: str, model, tokenizer, tokens: torch.Tensor) -> Callable[[], object]:
    from sweep.pruning import weights
    from sweep.pruning.families import Weight

    criterion, _, once = name.partition("+")
    pattern = sparsity if ":" in sparsity else None
    method = Weight("weight", criterion=criterion, pattern=pattern)
    return lambda: weights.prune(model, method, share(sparsity), tokens, sequential=not once)


def by_llm_compressor(criterion: str, sparsity: str, model, tokenizer, tokens: torch.Tensor) -> Callable[[], object]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from torch.utils.data import DataLoader

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[criterion]
    n, _, m = sparsity.partition(":")
    structure = f"{int(m) - int(n)}:{m}" if m else "0:0"  # it counts what goes, not what stays
    recipe = [modifier(sparsity=share(sparsity), mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])]
    text = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in tokens.split(BATCH)]
    loader: DataLoader = DataLoader(text, batch_size=None)  # type: ignore[arg-type]  # the batches are made
    return lambda: oneshot(model=model, processor=tokenizer, dataset=loader, recipe=recipe)


TOOLS = {"sweep": by_sweep, "llm-compressor": by_llm_compressor}
CODE = {"sweep": ["sweep.pruning.weights"], "llm-compressor": ["llmcompressor", "llmcompressor.modifiers.pruning"]}


def share(sparsity: str) -> float:
    """0.5 of "0.5", and of "2:4"."""
    n, _, m = sparsity.partition(":")
    return 1 - int(n) / int(m) if m else float(sparsity)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("method")
    parser.add_argument("sparsity")
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokens = torch.from_numpy(np.load(asked.tokens))
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    for name in [*CODE[asked.tool], "transformers.models.llama.modeling_llama"]:
        importlib.import_module(name)
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype)).eval()
    prune = TOOLS[asked.tool](asked.method, asked.sparsity, model, tokenizer, tokens)
    with torch.no_grad():
        model(input_ids=tokens[:1])  # threads and kernels are up
        start = time.perf_counter()
        for batch in tokens.split(BATCH):
            model.base_model(input_ids=batch, use_cache=False)
        pass_seconds = time.perf_counter() - start
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = time.perf_counter()
    prune()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    options = {} if asked.tool == "sweep" else {"save_compressed": False}
    model.save_pretrained(asked.out, **options)
    tokenizer.save_pretrained(asked.out)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "pass_seconds": pass_seconds,
                "peak_bytes": peak,
                "before_bytes": before,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
