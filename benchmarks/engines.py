"""What compiling brings: decode and prefill of a model in Python and compiled, dense and pruned, in turns.

    python benchmarks/engines.py                      the embedded model and a random Llama of 1.1B parameters
    python benchmarks/engines.py --models small       one of them; --threads, --forms, --phases, ... as wanted

Every line is a model pruned at random, in one form. `in Python` is dense over this model, both in Python; `compiled` the same
with both compiled; `for itself` is this model in Python over itself compiled. A ratio is the median over pairs
that were timed in turn, with its 95 % interval. Dense is bfloat16. Compiling is not timed: it takes half a minute to
some minutes, once a machine and shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from execution import large, paired, pruned, small
from tabulate import tabulate
from transformers import PreTrainedModel

from sweep import machine
from sweep.formats.declared import FORMATS
from sweep.measuring import engine

PROMPT, STEPS = 32, 4  # tokens that are read first, and decoded together in one reading of the clock
MAKERS = {"small": small, "large": large}


def readings(model: PreTrainedModel, compiled: bool) -> dict[str, Callable[[], float]]:
    """Functions that prefill or decode once, and return the seconds that a prompt or a token took."""
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    token = prompt[:, :1]
    with torch.inference_mode():
        made = engine.compiled(model, prompt, STEPS) if compiled else engine.eager(model)

    @torch.inference_mode()
    def prefill() -> float:
        made.reset()
        start = time.perf_counter()
        made.prefill(prompt)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode() -> float:
        made.reset()
        made.prefill(prompt)
        start = time.perf_counter()
        for _ in range(STEPS):
            made.decode(token)
        return (time.perf_counter() - start) / STEPS

    return {"decode": decode, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--forms", nargs="+", default=["int8", "bitmap", "bitmap_int8"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--phases", nargs="+", choices=["decode", "prefill"], default=["decode", "prefill"])
    parser.add_argument("--repeats", type=int, default=11)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {machine.cpu_name()}, {given.sparsity:.0%} of the weights zero")
    for name in given.models:
        for threads in given.threads:
            torch.set_num_threads(threads)
            torch.compiler.reset()
            lines = compare(MAKERS[name], given)
            print(f"\n{name}, {threads} threads\n{tabulate(lines, headers='keys')}", flush=True)


def compare(make: Callable[[torch.dtype], PreTrainedModel], given: argparse.Namespace) -> list[dict[str, str]]:
    """A line for dense and for each form, and each of prefill and decode."""
    dense = make(torch.bfloat16)
    plain, fast = readings(dense, False), readings(dense, True)
    lines = []
    for form in ["dense", *given.forms]:
        if form == "dense":
            own = plain, fast
        else:
            model = pruned(make, given.sparsity, FORMATS[form])[0]
            own = readings(model, False), readings(model, True)
        for phase in given.phases:
            pairs = {"in Python": (plain, own[0]), "compiled": (fast, own[1]), "for itself": own}
            line = {"form": form, "phase": phase}
            for column, (first, second) in pairs.items():
                ms, low, ratio, high = paired(first[phase], second[phase], given.repeats)
                line |= {f"{column} ms": f"{1000 * ms / ratio:.1f}", column: f"{ratio:.2f}x ({low:.2f} to {high:.2f})"}
            lines.append(line)
    return lines


if __name__ == "__main__":
    main()
