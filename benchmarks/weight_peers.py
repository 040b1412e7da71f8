"""Weight pruning beside llm-compressor 0.14, on the embedded model: python benchmarks/weight_peers.py

Both tools prune the same checkpoint in the same dtype, calibrated on the same 16 sequences of 256 tokens (4,096) in the
same batches, with the same number of threads, each in a process of its own (one_pruning.py). What they save is loaded
and evaluated here: perplexity a token of the task `pydoc`. The other tool is installed, in the versions of
peer_constraints.txt, into an environment of its own: once, in sweep's cache or in --env FOLDER.

    --methods wanda,wanda+once,sparsegpt,alps   --sparsity 0.5 (or 2:4)   --seeds 3   --threads 2   --dtype float32
    --blocks 2 --limit 4   a model of its first blocks and a few documents: to see that everything runs

`wanda+once` reads the text with the unpruned model alone (calibration.sequential=false), which a sweep does once for all
sparsities. Each seed is another calibration text, pruned by both tools in turn. Seconds are medians of the pruning call
alone, perplexities means over the seeds; memory is the highest resident memory during the call, and what of it is above
that of the process before it loaded the model: in MB, and as a multiple of the model's bytes and one block's Hessians,
of which sweep is to take 1.5 at most. The last line is what no method that reads the text can go below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from embedded import EMBEDDED
from tabulate import tabulate

from sweep import cache
from sweep.config import Benchmarks, Calibration, Model
from sweep.measuring import counting, quality
from sweep.models import anatomy, loading
from sweep.texts import text

HERE = Path(__file__).parent
PEER = "llm-compressor"
OF_PEER = ("wanda", "sparsegpt")  # what it has of ours
CONSTRAINTS = HERE / "peer_constraints.txt"
FASTER = {"wanda": 5.0, "sparsegpt": 3.0}  # bars
BEST = 0.9  # bar: our best perplexity over its SparseGPT's


def environment(folder: Path | None) -> Path:
    """The Python of the peer's environment, which is made when it is not there."""

    def make(place: Path) -> None:
        print(f"installing {PEER} into an environment of its own", flush=True)
        venv.create(place, with_pip=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*pip, "torch"], check=True)  # first and pinned, as in the Makefile
        subprocess.run([*pip, "llmcompressor"], check=True)

    if folder is None:
        folder = cache.entry("peers", text.fingerprint([CONSTRAINTS.read_text(), sys.version]), make)
    elif not (folder / "bin" / "python").exists():
        make(folder)
    return folder / "bin" / "python"


def export(folder: Path, dtype: str, blocks: int | None) -> int:
    """Write the embedded model as a checkpoint, all of it or its first blocks.

    Returns its bytes with those of one block's Hessians, one for each input that its matrices read: what pruning must
    hold at least.
    """
    model, tokenizer = loading.load(EMBEDDED, dtype, "cpu")
    if blocks is not None:
        del model.model.layers[blocks:]
        model.config.num_hidden_layers = blocks
        model.config.layer_types = None  # made anew
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    block = anatomy.matrices(anatomy.blocks(model)[0])
    inputs = [block[name].shape[1] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]
    return counting.size(counting.stock(model))["weights_bytes"] + 4 * sum(width**2 for width in inputs)


def evaluated(folder: Path, dtype: str, limit: int | None) -> tuple[float, float]:
    """(perplexity a token, share of zeros in the blocks' matrices) of a checkpoint."""
    model, tokenizer = loading.load(Model(folder.name, "local", path=str(folder)), dtype, "cpu")
    found, _ = quality.evaluate(model, tokenizer, Benchmarks(("pydoc",), limit=limit), None)
    matrices = [weight for block in anatomy.blocks(model) for weight in anatomy.matrices(block).values()]
    kept = sum(int(torch.count_nonzero(weight)) for weight in matrices)
    perplexity = found["pydoc/token_perplexity"]
    assert perplexity is not None
    return perplexity, 1 - kept / sum(weight.numel() for weight in matrices)


def pruned(python: Path, tool: str, method: str, asked: argparse.Namespace, place: Path, seed: int) -> dict[str, Any]:
    """One pruning in a process of its own, and what came of it."""
    command = [
        python,
        HERE / "one_pruning.py",
        tool,
        method,
        asked.sparsity,
        place / "model",
        place / f"{seed}.npy",
        place / "out",
        "--dtype",
        asked.dtype,
        "--threads",
        asked.threads,
    ]
    surroundings = os.environ | {
        "OMP_NUM_THREADS": str(asked.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(list(map(str, command)), env=surroundings, capture_output=True, text=True, cwd=place)
    if done.returncode:
        sys.exit(f"{tool} {method} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["perplexity"], found["zeros"] = evaluated(place / "out", asked.dtype, asked.limit)
    print(
        f"{method} by {tool}, seed {seed}: {found['seconds']:.1f} s, perplexity {found['perplexity']:.2f} "
        f"(torch {found['torch']})",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="wanda,wanda+once,sparsegpt,alps")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--env", type=Path)
    asked = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    python = environment(asked.env)
    torch.set_num_threads(asked.threads)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        least = export(place / "model", asked.dtype, asked.blocks)
        _, tokenizer = loading.load(EMBEDDED, asked.dtype, "cpu")
        dense, _ = evaluated(place / "model", asked.dtype, asked.limit)
        print(f"dense: perplexity {dense:.2f}", flush=True)
        for seed in range(asked.seeds):
            np.save(place / f"{seed}.npy", text.calibration_tokens(Calibration("pydoc"), tokenizer, seed).numpy())
            for method in asked.methods.split(","):
                if method in OF_PEER:
                    runs[method, PEER].append(pruned(python, PEER, method, asked, place, seed))
                runs[method, "sweep"].append(pruned(Path(sys.executable), "sweep", method, asked, place, seed))
    report(runs, dense, asked.sparsity, least)


def report(runs: dict[tuple[str, str], list[dict[str, Any]]], dense: float, sparsity: str, least: int) -> None:
    seconds = {key: statistics.median(run["seconds"] for run in found) for key, found in runs.items()}
    perplexity = {key: statistics.fmean(run["perplexity"] for run in found) for key, found in runs.items()}
    lines: list[list[Any]] = [["dense", "", None, dense, None, None, None, 0.0]]
    for key, found in runs.items():
        peak, above = (max(run["peak_bytes"] - base * run["before_bytes"] for run in found) / 1e6 for base in (0, 1))
        lines.append([*key, seconds[key], perplexity[key], peak, above, above * 1e6 / least, found[0]["zeros"]])
    headers = ["method", "tool", "prune s", "perplexity", "peak MB", "above start MB", "of the least", "zeros"]
    formats = ("", "", ".1f", ".2f", ".0f", ".0f", ".2f", ".4f")
    print(tabulate(lines, headers=headers, floatfmt=formats, missingval=""))
    ours = {method: value for (method, tool), value in perplexity.items() if tool == "sweep"}
    for method in ours:
        peer = method.partition("+")[0]
        if (peer, PEER) in runs:
            faster = seconds[peer, PEER] / seconds[method, "sweep"]
            ratio = ours[method] / perplexity[peer, PEER]
            print(
                f"{method} at {sparsity}: {faster:.1f} times as fast as its {peer} (bar {FASTER[peer]:g}), perplexity "
                f"{ratio:.3f} of its (bar 1)"
            )
    once = statistics.median(run["pass_seconds"] for found in runs.values() for run in found)
    print(f"one forward pass of the calibration text through the blocks alone: {once:.1f} s")
    if ("sparsegpt", PEER) in runs:
        best = min(ours, key=lambda method: ours[method])
        print(
            f"our best, {best}: perplexity {ours[best] / perplexity['sparsegpt', PEER]:.3f} of its SparseGPT's "
            f"(bar {BEST:g})"
        )


if __name__ == "__main__":
    main()
