"""Decode, prefill and bytes of the executions of a model pruned at random, each against the best dense execution.

    python benchmarks/execution.py                    the embedded model and a random Llama of 1.1B parameters
    python benchmarks/execution.py --models small     one of them; --sparsity, --threads, --phases, --repeats as wanted
    python benchmarks/execution.py --forms int8 int4 bitmap_int8 --against int8

Every line compares two models that are alive together and timed in turn, token by token of the same length of context:
the dense model, unpruned, in the faster of torch's bfloat16 and float32 on that number of threads (both are timed
first), and the pruned one in bfloat16 and each of `--forms`: `bitmap`, or quantised in `int8`, `int4` (groups of 32) and
`bitmap_int8`. With `--against int8` the first is the unpruned model in that form instead. A ratio is the median over pairs with its 95 % interval. The dense
model has no zeros, the pruned one has them in every linear layer of its blocks; embeddings and head stay dense.
`bytes` are those of these layers, held, relative to dense bfloat16; `all` is the same with embeddings and head.
The line `limit` is the dense model with layers that cost nothing: what no execution of the pruned layers can exceed,
since embeddings, head, attention and the library's own work for each layer remain.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from embedded import EMBEDDED
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sweep import config, execution, machine
from sweep.formats import compiled
from sweep.formats.declared import FORMATS, Format
from sweep.formats.grid import Grid
from sweep.formats.packing import packed
from sweep.measuring import efficiency
from sweep.models import anatomy, loading

CONTEXT, STEPS, PROMPT = 32, 2, 256  # tokens: before the timed ones, timed together, in a prefill
CLEAR = 3  # a first pair this far apart is not timed again: a prefill in bfloat16 may take minutes
POOL = 2**22 + 1  # random numbers
DTYPES = (torch.bfloat16, torch.float32)


def large(dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama with the shapes of TinyLlama 1.1B, made in its dtype without a float32 copy."""
    shape = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
    return _filled(AutoConfig.for_model("llama", **shape), dtype)


def small(dtype: torch.dtype) -> PreTrainedModel:
    """The embedded model: its own weights."""
    return loading.load(EMBEDDED, str(dtype).removeprefix("torch."), "cpu")[0]


def _filled(configuration: object, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    rotary = type(model.model.rotary_emb)(configuration)  # its frequencies are computed, not stored
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    pool = 0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(_drawn(pool, parameter.shape)) if parameter.dim() > 1 else parameter.fill_(1)
    return model.eval()


def _drawn(pool: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Numbers for a tensor, drawn once and used again and again: what they are does not change what they cost."""
    return pool.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].view(shape)


@torch.no_grad()
def quantised(weight: torch.Tensor, bits: int) -> Grid:
    """The grid to which the matrix is rounded in place: 8 bits a scale a row, 4 bits one for 32 columns."""
    group = 32 if bits == 4 else None
    largest = weight.float().unflatten(1, (-1, group or weight.shape[1])).abs().amax(2)
    grid = Grid(bits, (largest / (2 ** (bits - 1) - 1)).bfloat16().float(), group)
    weight.copy_(grid.values(grid.codes(weight), weight.dtype))
    return grid


def pruned(
    make: Callable[[torch.dtype], PreTrainedModel], sparsity: float, form: Format
) -> tuple[PreTrainedModel, float, float]:
    """(the model in this form, bytes of its packed layers and of the whole relative to dense bfloat16)."""
    model = make(torch.bfloat16)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    pool = torch.rand(POOL, generator=torch.Generator().manual_seed(0))
    grids = {}
    for name, layer in anatomy.linears(model).items():
        drop = _drawn(pool, layer.weight.shape) < sparsity
        drop[0, 0] = True  # at 0 % too, a layer must hold one zero to be compressed
        layer.weight.data.masked_fill_(drop, 0)
        if form.bits is not None:
            grids[name] = quantised(layer.weight.data, form.bits)
    model, kernel = execution.prepare(model, config.Execution(form.name), grids)
    assert kernel != f"{form.name} torch"
    layers = packed(model).values()
    dense = sum(2 * layer.in_features * layer.out_features for layer in layers)
    held = sum(layer.held_bytes for layer in layers)
    return model, held / dense, (whole - dense + held) / whole


class Nothing(torch.nn.Module):
    """A linear layer whose product takes no time."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)


def limit(make: Callable[[torch.dtype], PreTrainedModel]) -> PreTrainedModel:
    """The model with nothing left to compute in the layers that pruning targets."""
    model = make(torch.bfloat16)
    for name, layer in anatomy.linears(model).items():
        model.set_submodule(name, Nothing(layer))
    return model


@torch.inference_mode()
def decode(model: PreTrainedModel) -> Callable[[], float]:
    """A function that decodes STEPS tokens after CONTEXT others, read once, and returns the seconds of one."""
    token = torch.ones((1, 1), dtype=torch.long)
    cache = model(input_ids=token.expand(1, CONTEXT), use_cache=True, logits_to_keep=1).past_key_values

    def run() -> float:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True)
            start = time.perf_counter()
            for _ in range(STEPS):
                model(input_ids=token, past_key_values=cache, use_cache=True)
            seconds = (time.perf_counter() - start) / STEPS
            cache.crop(-1 - STEPS)
            return seconds

    return run


def prefill(model: PreTrainedModel) -> Callable[[], float]:
    """A function that reads PROMPT tokens and returns the seconds it takes."""
    prompt = torch.ones((1, PROMPT), dtype=torch.long)

    def run() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

    return run


def paired(dense: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float, float, float]:
    """(median seconds of the dense one, ratio dense / other with its interval: low, median, high)."""
    dense(), other()
    times = [(dense(), other()) if i % 2 else (other(), dense())[::-1] for i in range(repeats)]
    low, median, high = efficiency.median_interval(pd.Series([a / b for a, b in times]))
    return statistics.median(a for a, _ in times), low, median, high


def fastest_dense(make: Callable[[torch.dtype], PreTrainedModel], kind: Callable, repeats: int) -> torch.dtype:
    """The dtype in which the dense model is faster: float32 is no less accurate than bfloat16."""
    first, second = (kind(make(dtype)) for dtype in DTYPES)
    ratio = first() / second()
    if 1 / CLEAR < ratio < CLEAR:
        _, low, ratio, high = paired(first, second, repeats)
        words = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    else:
        words = f"{ratio:.2g} in a single pair"
    print(f"    dense {kind.__name__}: bfloat16 / float32 {words}", flush=True)
    return DTYPES[1] if ratio > 1 else DTYPES[0]


PHASES = {"decode": decode, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["small", "large"], default=["small", "large"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}, reverse=True))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--forms", nargs="+", choices=["bitmap", "int8", "int4", "bitmap_int8"], default=["bitmap"])
    parser.add_argument("--against", choices=["dense", "int8"], default="dense")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    given = parser.parse_args()
    [PHASES[name] for name in given.phases]
    print(f"torch {torch.__version__}, {machine.cpu_name()}, kernels {', '.join(compiled.available())}")
    for name in given.models:
        make = {"small": small, "large": large}[name]
        for threads in given.threads:
            torch.set_num_threads(threads)
            print(f"{name}, {threads} threads", flush=True)
            compare(make, given)


def compare(make: Callable[[torch.dtype], PreTrainedModel], given: argparse.Namespace) -> None:
    """A line for each form and sparsity, on the number of threads that is set."""
    phases = [PHASES[name] for name in given.phases]
    if given.against == "dense":
        dtype = {kind: fastest_dense(make, kind, max(6, given.repeats // 2)) for kind in phases}
        models = {each: make(each) for each in set(dtype.values())}
        first = {kind: models[dtype[kind]] for kind in phases}
    else:
        first = dict.fromkeys(phases, pruned(make, 0, FORMATS[given.against])[0])
    heads = [f" | {f'{given.against} {name} ms':>16} {'ratio':>22}" for name in given.phases]
    print(f"{'form':>11} {'sparsity':>8} {'bytes':>6} {'all':>6}", *heads, sep="")
    for form, sparsity in [*itertools.product(given.forms, given.sparsity), (None, None)]:
        if form is None:
            model, line = limit(make), f"{'limit':>11} {'':8} {'':6} {'':6}"
        elif form in ("int8", "int4") and sparsity != given.sparsity[0]:
            continue  # a zero takes as many bytes there as any weight
        else:
            model, layers, whole = pruned(make, sparsity, FORMATS[form])
            line = f"{form:>11} {sparsity:8.0%} {layers:6.3f} {whole:6.3f}"
        for kind in phases:
            ms, low, ratio, high = paired(kind(first[kind]), kind(model), given.repeats)
            line += f" | {1000 * ms:16.1f} {ratio:5.2f}x ({low:5.2f} to {high:5.2f})"
        print(line, flush=True)
        del model


if __name__ == "__main__":
    main()
