"""One cell as a plain script does it, for sweep_cost.py: python benchmarks/plain_cell.py GGUF CRITERION SPARSITY SEED DTYPE

Loads the model, prunes it by magnitude or by Wanda (block by block, as the paper's code does), and evaluates it with
lm-eval's own model and defaults (a batch of one). Only the texts come from sweep. DTYPE auto is the library's choice.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from sweep.config import Calibration
from sweep.texts import text


@torch.no_grad()
def wanda(model, tokens, sparsity: float) -> None:
    """|W| * ||x|| per row. Each block reads what the pruned ones before it give, and is read again once it is pruned."""
    hidden, arguments = [], {}

    class Caught(Exception):
        pass

    def catch(_, args, kwargs) -> None:
        hidden.append(args[0])
        arguments.update(kwargs)
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in tokens.split(1):
        with contextlib.suppress(Caught):
            model(sequence, use_cache=False)
    handle.remove()
    for block in model.model.layers:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        squares = {m: torch.zeros(m.in_features) for m in linears}

        def add(m, args, squares=squares) -> None:
            squares[m] += args[0].float().flatten(0, -2).square().sum(0)

        hooks = [m.register_forward_pre_hook(add) for m in linears]
        for entering in hidden:
            block(entering, **arguments)
        for hook in hooks:
            hook.remove()
        for m in linears:
            score = m.weight.float().abs() * squares[m].sqrt()
            m.weight.scatter_(1, score.argsort(dim=1)[:, : round(sparsity * m.in_features)], 0)
        hidden = [block(entering, **arguments) for entering in hidden]


@torch.no_grad()
def magnitude(model, sparsity: float) -> None:
    for block in model.model.layers:
        for m in block.modules():
            if isinstance(m, torch.nn.Linear):
                order = m.weight.abs().flatten().argsort()
                m.weight.view(-1)[order[: round(sparsity * m.weight.numel())]] = 0


def main() -> None:
    gguf, criterion, sparsity, seed = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    dtype = sys.argv[5]
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if criterion == "wanda":
        wanda(model, text.calibration_tokens(Calibration("pydoc"), tokenizer, seed), sparsity)
    else:
        magnitude(model, sparsity)
    manager = TaskManager(include_path=str(Path(sweep.__file__).parent / "tasks"))
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, max_length=2048),
        limit=100,
        tasks=["pydoc", "capitals"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    print(
        {task: {k: v for k, v in values.items() if isinstance(v, float)} for task, values in found["results"].items()}
    )


if __name__ == "__main__":
    main()
