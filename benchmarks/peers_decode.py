"""The embedded model here and in llama.cpp: bytes of the weights, milliseconds a token, and perplexity, side by side.

    pip install 'sweep-pruning[gguf]'                 llama.cpp's Python package: built, which takes some minutes
    python benchmarks/peers_decode.py                 --threads 1 2, --engine eager or compiled, --tokens as wanted

Here it runs dense in bfloat16, in int8, and half empty by SparseGPT, in bitmap and in bitmap_int8; in llama.cpp as Q8_0 and
Q4_0, in files that `sweep.export gguf` writes and tries. All are alive together and read the same prompt. Then each
decodes the same next token of the text, in turns whose order changes; so do prefills of the whole prompt. A ratio is the median over
turns of dense time over that of the line, with its 95 % interval.
`MB` are all the weights: as held here, and of the file's tensors there. Embedding and head, which are one matrix, stay in
bfloat16 here and are Q8_0 there: `matrices` leaves them out. Perplexity is of the same windows of the pages of `pydoc` in all.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pandas as pd
import torch
from embedded import EMBEDDED
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel

import sweep
from sweep import config, execution, machine
from sweep.export import gguf_file
from sweep.formats.packing import packed
from sweep.measuring import efficiency, engine
from sweep.models import loading
from sweep.texts import embedded

PROMPT = 256  # tokens of a prompt
WINDOW = 512  # tokens of a window of which perplexity is asked
TYPES = ("q8_0", "q4_0")
SPARSITY = 0.5


@dataclass
class Runner:
    """One model in one program."""

    name: str
    bytes: int  # of all weights
    matrices: int  # of those outside of embedding and head
    prefill: Callable[[list[int]], object]
    decode: Callable[[int], object]
    logits: Callable[[list[int]], np.ndarray]  # (tokens, vocabulary) of a window


def ours(name: str, model: PreTrainedModel, prompt: Tensor, tokens: int, kind: str) -> Runner:
    """A model of this program, timed in the engine of this kind."""
    table = model.get_input_embeddings().weight
    layers = packed(model).values()
    held = sum(layer.held_bytes for layer in layers)
    plain = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    whole = held + sum(plain.values())
    run = engine.eager(model) if kind == "eager" else engine.compiled(model, prompt, tokens)

    def prefill(ids: list[int]) -> None:
        run.reset()
        run.prefill(torch.tensor([ids]))

    @torch.inference_mode()
    def logits(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    return Runner(
        name, whole, whole - plain[id(table)], prefill, lambda token: run.decode(torch.tensor([[token]])), logits
    )


def theirs(kind: str, file: Path, threads: int) -> Runner:
    """A file in llama.cpp."""
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
    of_tokens = sum(size for name, size in tensors.items() if name in ("token_embd.weight", "output.weight"))

    def open_(**settings: object) -> llama_cpp.Llama:
        return llama_cpp.Llama(
            str(file),
            n_ctx=2 * WINDOW,
            n_batch=WINDOW,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **settings,
        )

    timed, whole = open_(), open_(logits_all=True)

    def prefill(ids: list[int]) -> None:
        timed.reset()
        timed.eval(ids)

    def logits(ids: list[int]) -> np.ndarray:
        whole.reset()
        whole.eval(ids)
        return np.array(whole.scores[: len(ids)])

    total = sum(tensors.values())
    return Runner(
        f"llama.cpp {kind.upper()}", total, total - of_tokens, prefill, lambda token: timed.eval([token]), logits
    )


def perplexity(runner: Runner, windows: list[list[int]]) -> float:
    losses = []
    for ids in windows:
        logits = torch.from_numpy(runner.logits(ids)[:-1]).log_softmax(-1)
        losses.append(-logits.gather(1, torch.tensor(ids[1:])[:, None]).mean().item())
    return math.exp(statistics.fmean(losses))


@torch.inference_mode()
def turns(runners: list[Runner], ids: list[int], tokens: int, prefills: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each turn by phase and runner: all decode the same token after the same text, in an order that changes."""
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {r.name: [] for r in runners} for phase in ("prefill", "decode")
    }

    def turn(phase: str, at: int, does: Callable[[Runner], object]) -> None:
        shift = at % len(runners)
        order = runners[shift:] + runners[:shift]
        for runner in order[::-1] if at // len(runners) % 2 else order:
            start = time.perf_counter()
            does(runner)
            seconds[phase][runner.name].append(time.perf_counter() - start)

    for runner in runners:  # whatever is made or compiled at the first call
        runner.prefill(ids[:PROMPT])
        runner.decode(ids[PROMPT])
    for at in range(prefills):
        turn("prefill", at, lambda runner: runner.prefill(ids[:PROMPT]))
    for at, token in enumerate(ids[PROMPT : PROMPT + tokens]):
        turn("decode", at, functools.partial(_decode, token=token))
    return seconds


def _decode(runner: Runner, token: int) -> None:
    runner.decode(token)


def models(dense: PreTrainedModel, tokenizer: object) -> dict[str, PreTrainedModel]:
    """What is run here, by name: dense, in eight bits, half empty, and both."""
    found = {"dense": dense}
    for form, sparsity, quantize in (
        ("int8", 0.0, "int8"),
        ("bitmap", SPARSITY, "none"),
        ("bitmap_int8", SPARSITY, "int8"),
    ):
        model = copy.deepcopy(dense)
        method = "sparsegpt" if sparsity else "dense"
        done = sweep.prune(model, tokenizer, method=method, sparsity=sparsity or None, quantize=quantize)
        found[form], _ = execution.prepare(model, config.Execution(form), done.grids)  # type: ignore[arg-type]
    return found


def files(folder: Path) -> dict[str, Path]:
    """The unpruned model as files that llama.cpp computes the same by."""
    model, tokenizer = loading.load(EMBEDDED, "float32", "cpu")
    sweep.save(model, tokenizer, folder / "dense")
    for kind in TYPES:
        gguf_file.export(folder / "dense", folder / f"{kind}.gguf", kind)
    return {kind: folder / f"{kind}.gguf" for kind in TYPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--engine", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--tokens", type=int, default=84, help="timed in decoding")
    parser.add_argument("--prefills", type=int, default=12)
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens, for the perplexity")
    given = parser.parse_args()
    loading.quiet()
    print(f"torch {torch.__version__}, llama-cpp-python {llama_cpp.__version__}, {machine.cpu_name()}")
    dense, tokenizer = loading.load(EMBEDDED, "bfloat16", "cpu")
    held = models(dense, tokenizer)
    pages = tokenizer("\n\n".join(page["page"] for page in embedded.pydoc_documents())).input_ids
    windows = [pages[at * WINDOW : (at + 1) * WINDOW] for at in range(given.windows)]
    ids = pages[given.windows * WINDOW :][: PROMPT + given.tokens + 1]
    perplexities: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        exported = files(Path(place))
        for threads in given.threads:
            torch.set_num_threads(threads)
            for kind in given.engine:
                prompt = torch.tensor([ids[:PROMPT]])
                runners = [ours(name, model, prompt, given.tokens, kind) for name, model in held.items()]
                runners += [theirs(of, file, threads) for of, file in exported.items()]
                for runner in runners:
                    if runner.name not in perplexities:
                        perplexities[runner.name] = perplexity(runner, windows)
                report(
                    runners,
                    turns(runners, ids, given.tokens, given.prefills),
                    perplexities,
                    f"{threads} threads, {kind} here",
                )


def report(
    runners: list[Runner], seconds: dict[str, dict[str, list[float]]], perplexities: dict[str, float], title: str
) -> None:
    lines = []
    for runner in runners:
        line: dict[str, object] = {
            title: runner.name,
            "MB": runner.bytes / 1e6,
            "matrices": runner.matrices / 1e6,
            "perplexity": perplexities[runner.name],
        }
        for phase, times in seconds.items():
            ratios = pd.Series(times["dense"]) / pd.Series(times[runner.name])
            low, middle, high = efficiency.median_interval(ratios)
            line[f"{phase} ms"] = 1000 * statistics.median(times[runner.name])
            line[f"{phase} ratio"] = f"{middle:.2f}x ({low:.2f} to {high:.2f})"
        lines.append(line)
    print(tabulate(lines, headers="keys", floatfmt=".4g"), flush=True)


if __name__ == "__main__":
    main()
