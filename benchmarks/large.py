"""Pruning a model larger than memory: peak resident memory, minutes, and bytes a second against reading and writing them once.

    python benchmarks/large.py FOLDER                     a random Llama of 8.1 billion parameters, Wanda at 50 %
    python benchmarks/large.py FOLDER --criterion sparsegpt --blocks 2 --limit 10GiB

FOLDER, on a disk with three times the model's bytes free, receives the model in bfloat16, one file a block, and the pruned
one. Its blocks are those of Llama-2-7B, 202 million parameters each; `--blocks` is how many. The cell is run as a user runs it,
`offload=disk memory_limit=6GiB`, on 16 sequences of 512 tokens. `bar` is embeddings and head, two blocks, the activations of the
text, and 500 MB. `files` is the time that reading the checkpoint and writing it again takes, without the kernel's cache of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from embedded import EMBEDDED
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from sweep import machine, store
from sweep.models import loading

WIDTH, FFN, SEQUENCES, LENGTH, LIMIT = 4096, 11008, 16, 512, "6GiB"
CHUNK = 2**24  # bytes


def make(folder: Path, blocks: int) -> int:
    """Write the model file by file, never held whole. Returns its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = loading.check(EMBEDDED, convert=True)
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    sizes = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=32, max_position_embeddings=4096)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN)}
    norms = ("input_layernorm", "post_attention_layernorm")
    files: dict[str, dict[str, tuple[int, ...]]] = {
        "ends": {"model.embed_tokens": (vocabulary, WIDTH), "lm_head": (vocabulary, WIDTH), "model.norm": (WIDTH,)}
    }
    for i in range(blocks):
        files[f"block-{i}"] = {f"model.layers.{i}.{n}": s for n, s in (shapes | dict.fromkeys(norms, (WIDTH,))).items()}
    places, parameters = {}, 0
    for file, held in files.items():
        tensors = {}
        for name, shape in held.items():
            made = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=draw)
            tensors[f"{name}.weight"] = made.bfloat16()
            places[f"{name}.weight"] = f"{file}.safetensors"
            parameters += made.numel()
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return parameters


def copied(folder: Path, to: Path) -> tuple[int, float]:
    """(bytes, seconds) of reading all files of weights and writing them, from the disk and to it."""
    files = sorted(folder.glob("*.safetensors"))
    _forget(files)
    start = time.perf_counter()
    for file in files:
        with file.open("rb") as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    to.unlink()
    return sum(file.stat().st_size for file in files), seconds


def _forget(files: list[Path]) -> None:
    """Have the kernel keep nothing of them."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--blocks", type=int, default=38)
    parser.add_argument("--limit", default=LIMIT, help=f"memory_limit of the cell (default: {LIMIT})")
    parser.add_argument("--in-memory", action="store_true", help="without offload and limit, to compare with")
    given = parser.parse_args()
    model, results = given.folder / f"llama-{given.blocks}", given.folder / "results"
    parameters = make(model, given.blocks)
    print(
        f"torch {torch.__version__}, {machine.cpu_name()}, {torch.get_num_threads()} threads, {parameters:,} parameters"
    )
    total, once = copied(model, given.folder / "copy")
    _forget(sorted(model.glob("*.safetensors")))
    pruned = given.folder / "pruned"
    shutil.rmtree(pruned, ignore_errors=True)
    command = [sys.executable, "-m", "sweep", "+method=weight", f"method.criterion={given.criterion}", "sparsity=0.5"]
    command += ["model=local", f"model.path={model}", "model.name=llama", "dtype=bfloat16", "execution=dense"]
    command += [
        "benchmarks.tasks=[]",
        "efficiency=none",
        f"calibration.sequences={SEQUENCES}",
        f"calibration.length={LENGTH}",
    ]
    command += [f"results={results}", f"save_model={pruned}", "resume=false"]
    command += [] if given.in_memory else ["offload=disk", f"memory_limit={given.limit}"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    peak = (
        1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    )  # of the cell's process, with all that it mapped
    row = store.load(results).sort_values("started_at").iloc[-1]
    ends = 2 * (parameters - given.blocks * (4 * WIDTH**2 + 3 * WIDTH * FFN + 2 * WIDTH))
    bar = ends + 2 * 2 * (4 * WIDTH**2 + 3 * WIDTH * FFN) + SEQUENCES * LENGTH * WIDTH * 2 + 500e6
    print(
        f"{given.criterion}, {total / 1e9:.1f} GB of weights: peak {peak / 2**30:.2f} GiB resident "
        f"(bar {bar / 2**30:.2f}), {seconds / 60:.1f} min, {2 * total / seconds / 1e6:.0f} MB/s read and written; "
        f"files {once / 60:.1f} min, ratio {seconds / once:.1f}; prune alone {row.prune_seconds / 60:.1f} min"
    )


if __name__ == "__main__":
    main()
