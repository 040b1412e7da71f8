"""What pruning takes of memory where the vocabulary is large: python benchmarks/vocabulary_memory.py

A random bfloat16 model in the shape of one of 270 million parameters with a vocabulary of 262,144 is pruned, each time in a
process of its own. `taken` is the most that was resident (VmHWM) above what the libraries take, the model included. The bar
is the model, one block in float32, and the activations that the calibration text leaves for a backward pass; `of a batch`
are those of the sequences that are read at once, which is what can be held at any one time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from tabulate import tabulate
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sweep import cost
from sweep.models import anatomy, logits
from sweep.pruning import methods, unit_statistics
from sweep.pruning.families import Head, Layer, Method, Neuron, Weight

METHODS: dict[str, Method] = {
    "neuron": Neuron(),
    "head": Head(),
    "layer": Layer(),
    "flap": Neuron(criterion="flap"),
    "wanda": Weight("weight", criterion="wanda"),
}
MIB = 2**20


def make(layers: int, vocabulary: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def activations(model: PreTrainedModel, batch: torch.Tensor) -> int:
    """Bytes that a forward pass over the batch keeps for a backward one, head left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tail = logits.Tail(model)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with unit_statistics.activations_differentiable(model), hooks:
        tail.states(input_ids=batch)
    return sum(kept.values())


def pruned(name: str, asked: argparse.Namespace) -> dict[str, float]:
    """Seconds, and bytes, of one pruning in this process."""
    with cost.PeakMemory("cpu") as libraries:
        pass
    torch.manual_seed(0)
    model = make(asked.layers, asked.vocabulary)
    tokens = torch.randint(asked.vocabulary, (asked.sequences, asked.length))
    blocks = anatomy.blocks(model)
    size = {
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "block": max(4 * sum(p.numel() for p in block.parameters()) for block in blocks),
    }
    start = time.perf_counter()
    with cost.PeakMemory("cpu") as memory:
        methods.prune(model, METHODS[name], 0.5, tokens)
    seconds = time.perf_counter() - start
    assert memory.peak is not None and libraries.base is not None
    of_batch = activations(make(asked.layers, 512), tokens[: unit_statistics.BATCH] % 512)
    batches = -(-len(tokens) // unit_statistics.BATCH)
    return {
        "seconds": seconds,
        "taken": memory.peak - libraries.base,
        "batch": of_batch,
        "text": batches * of_batch,
        **size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--here", action="store_true", help="prune in this process and print what it took as JSON")
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(pruned(asked.names[0], asked)))
        return
    lines = []
    for name in asked.names:
        command = [
            sys.executable,
            __file__,
            name,
            "--here",
            *(f"--{key}={getattr(asked, key)}" for key in ("layers", "vocabulary", "sequences", "length")),
        ]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        bar, least = (found["model"] + found["block"] + found[key] for key in ("text", "batch"))
        lines.append(
            (
                name,
                found["seconds"],
                *(found[key] / MIB for key in ("model", "block", "taken")),
                bar / MIB,
                least / MIB,
                "yes" if found["taken"] <= bar else "no",
            )
        )
    print(
        tabulate(
            lines,
            floatfmt=".0f",
            headers=[
                "method",
                "seconds",
                "model MiB",
                "block in float32",
                "taken",
                "bar",
                "of a batch",
                "within the bar",
            ],
        )
    )


if __name__ == "__main__":
    main()
