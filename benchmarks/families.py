"""Every operation on every type of causal language model: python benchmarks/families.py

Each type is a tiny random model of `tests/tiny_models.py`, pruned, saved and reloaded through sweep's public doors, and
checked here by means that know nothing of how sweep finds the parts of a model:

    weights     zeros are counted in every matrix, by a list of what is a matrix that is written down here; nothing else
                changed
    units       what became smaller is found by comparing numbers, and the same is zeroed by hand in the dense model, or its
                block skipped: the logits must be equal
    all         saved and reloaded: equal logits; text generated with a cache is that generated without

An outcome is `right`, `refused` (with a message for the user), `crashed` (any other error) or `WRONG` (a check failed).
Name types to try those alone, `--only` operations. `--markdown` writes docs/families.md. Each type has a process of its
own, so that one that dies takes no other with it; all of them took seven minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import sweep
from sweep import api, execution  # noqa: F401 - here, so that the processes of the types need not import them each
from sweep.config import Execution
from sweep.formats.packing import packed
from sweep.settings import RequestError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_models

PAGE = Path(__file__).resolve().parents[1] / "docs/families.md"
TIMEOUT = 240  # seconds a type
TEXT = {"sequences": 4, "length": 32}
SPARSITY = 0.5  # of weights
OUTCOMES = ("right", "refused", "crashed", "WRONG")


class Wrong(Exception):
    """What sweep did is not what was asked."""


@dataclass(frozen=True)
class Line:
    kind: str
    operation: str
    outcome: str
    why: str = ""


# ---- what a matrix is, written down ----

# Parameters that multiply activations as matrices and are of no linear layer, by the ends of their names.
BARE = re.compile(
    r"""(
        experts\.(gate_up_proj|gate_proj|up_proj|down_proj)     # in three dimensions
      | experts\.mlp\.(w1|v1|w2)                                # dbrx: all experts' rows behind each other
      | (input|output)_linear\.weight                           # jetmoe
      | mamba\.(x_proj|dt_proj)_weight                          # zamba: one for each head
      | rg_lru\.(input|recurrent)_gate_weight                   # recurrent_gemma: one for each head
      | rel_attn\.[qkvor]                                       # xlnet: (width, heads, head)
      | rel_logits_proj\.proj                                   # inkling
      | (attn|ffn)_hc\.fn                                       # deepseek_v4, hy_v4: the mixing of residual streams
    )$""",
    re.VERBOSE,
)
# Linear layers that choose or weigh experts, by a part of their names.
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate|modality_router)\.")


def blocks_of(model: PreTrainedModel) -> list[str]:
    """The names of the blocks that read text: entries of lists that are inside no other and run."""
    ran = set()
    with hooks(model.modules(), lambda module: ran.add(module)):
        read(model, tokens(1, 8))
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in found)):
            holds = any(isinstance(inner, nn.Linear | Conv1D) for block in module for inner in block.modules())
            if any(block in ran for block in module) and holds and not isinstance(module[0], nn.Linear):
                found[name] = [f"{name}.{number}" for number in range(len(module))]
    return [block for blocks in found.values() for block in blocks]


def matrices_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that weight pruning is to prune."""
    inside = tuple(f"{name}." for name in blocks_of(model))
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith(inside) and parameter.ndim > 1 and not ROUTER.search(name):
            linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D)
            if BARE.search(name) or (linear and min(parameter.shape) > 1):
                found[name] = parameter
    return found


# ---- helpers ----


def tokens(sequences: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (sequences, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


@contextmanager
def hooks(modules: Iterable[nn.Module], note: Callable[[nn.Module], Any]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(lambda module, _: note(module) and None) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def equal(one: Tensor, other: Tensor, what: str) -> None:
    if one.shape != other.shape:
        raise Wrong(f"{what}: shapes {tuple(one.shape)} and {tuple(other.shape)}")
    difference = float((one - other).abs().max())
    if not difference <= 1e-4 * max(1.0, float(other.abs().max())):
        raise Wrong(f"{what}: logits differ by {difference:.2g}")


@torch.no_grad()
def check_generation(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> None:
    """Text that is generated with a cache is that without, if it is so of the dense model."""

    def both(one: PreTrainedModel) -> list[list[int]]:
        given: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return [one.generate(ids[:1, :9], use_cache=cache, **given)[0].tolist() for cache in (False, True)]

    try:
        if not torch.allclose(read(dense, ids)[:, :9], read(dense, ids[:, :9]), rtol=1e-3, atol=1e-4):
            return  # no decoder: what it says of a token changes with those after it
        without, with_cache = both(dense)
    except Exception:  # of transformers, not of sweep
        return
    if without == with_cache:
        without, with_cache = both(model)
        if without != with_cache:
            raise Wrong("generated with a cache it writes another text than without")


def check_saved(model: PreTrainedModel, tokenizer: Any, dense: PreTrainedModel, ids: Tensor) -> None:
    """Saved and reloaded it says the same."""
    said = read(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        sweep.save(model, tokenizer, Path(folder) / "saved")
        loaded, _ = sweep.load_model(Path(folder) / "saved")
    equal(read(loaded, ids), said, "reloaded")
    if model.get_input_embeddings().weight.shape == dense.get_input_embeddings().weight.shape:
        check_generation(loaded, dense, ids)


# ---- operations ----


def weights(criterion: str, **further: Any) -> Callable[[str], None]:
    def operation(kind: str) -> None:
        model, dense = tiny_models.make(kind), tiny_models.make(kind)
        sweep.prune(model, tiny_models.tokenizer(), method=criterion, sparsity=SPARSITY, **TEXT, **further)
        check_zeros(model, dense, rebuilt=criterion == "sparsegpt")
        said = read(model, tokens())
        if not torch.isfinite(said).all() or torch.equal(said, read(dense, tokens())):
            raise Wrong("the logits are not finite, or as they were")

    return operation


def check_zeros(model: PreTrainedModel, dense: PreTrainedModel, *, rebuilt: bool) -> None:
    wanted, size, zeros = matrices_of(dense), 0, 0
    after = dict(model.named_parameters())
    for name, before in dense.named_parameters():
        now = after[name].detach()
        if name not in wanted:
            if not torch.equal(now, before):
                raise Wrong(f"{name} was changed, and is none of the matrices")
            continue
        gone = int((now == 0).sum() - (before == 0).sum())
        parts = before.shape[0] * 2 if before.ndim == 3 or BARE.search(name) else 1
        if abs(gone - SPARSITY * before.numel()) > parts + 1:
            raise Wrong(f"{name}: {gone} of {before.numel()} are zero")
        if not rebuilt and not torch.equal(now[now != 0], before[now != 0].detach()):
            raise Wrong(f"{name}: weights that stay have changed")
        size, zeros = size + before.numel(), zeros + gone
    if zeros != round(SPARSITY * size):
        raise Wrong(f"{zeros} of {size} weights are zero")


def wanda(kind: str) -> None:
    """As any weight method; and of linear layers that are called, each row loses what |W| * ||x|| of the text ranks lowest."""
    weights("wanda")(kind)
    model, dense = tiny_models.make(kind), tiny_models.make(kind)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    texts: list[Tensor] = []
    original = sweep.texts.text.for_cell

    def note(cell: Any, tokenizer: Any, write: Any = None) -> Any:
        found = original(cell, tokenizer, write)
        assert found is not None
        texts.append(found)
        return found

    sweep.texts.text.for_cell = note
    try:
        sweep.prune(model, tiny_models.tokenizer(), method="wanda", sparsity=SPARSITY, sequential=False, **TEXT)
    finally:
        sweep.texts.text.for_cell = original
    wanted = matrices_of(dense)
    layers = {name: dense.get_submodule(name.rpartition(".")[0]) for name in wanted}
    linear = {name: layer for name, layer in layers.items() if type(layer) in (nn.Linear, Conv1D)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2).double()))
        for name in linear
        for layer in dense.modules()  # one or, where blocks share matrices, several
        if getattr(layer, "weight", None) is wanted[name]
    ]
    read(dense, texts[0])
    for handle in handles:
        handle.remove()
    after = dict(model.named_parameters())
    for name, layer in linear.items():
        if not seen[name]:
            continue
        conv = isinstance(layer, Conv1D)
        before = wanted[name].detach().t() if conv else wanted[name].detach()
        zero = (after[name].t() if conv else after[name]) == 0
        scores = before.abs() * torch.cat(seen[name]).square().sum(0).sqrt().float()
        kept = scores.masked_fill(zero, torch.inf).amin(1)
        lost = scores.masked_fill(~zero, -torch.inf).amax(1)
        if (lost > kept * (1 + 1e-4)).any():
            raise Wrong(f"{name}: a weight went that |W| * ||x|| ranks above one of its row that stayed")


def units(method: str, share: float = 0.25, **further: Any) -> Callable[[str], None]:
    def operation(kind: str) -> None:
        model, dense = tiny_models.make(kind), tiny_models.make(kind)
        tokenizer, ids = tiny_models.tokenizer(), tokens()
        pruned = sweep.prune(model, tokenizer, method=method, sparsity=share, **TEXT, **further)
        if not pruned.removed or sum(p.numel() for p in model.parameters()) >= sum(
            p.numel() for p in dense.parameters()
        ):
            raise Wrong("nothing was removed")
        if method in ("neuron", "head"):
            by_hand = copy.deepcopy(dense)
            cut_by_hand(by_hand, model)
            equal(read(model, ids), read(by_hand, ids), "masked by hand")
        if "unit" in further:
            check_parts(model, dense, ids)
        elif method == "layer":
            check_layers(model, dense, ids)
        if not torch.isfinite(read(model, ids)).all():
            raise Wrong("the logits are not finite")
        check_saved(model, tokenizer, dense, ids)

    return operation


@torch.no_grad()
def cut_by_hand(dense: PreTrainedModel, small: PreTrainedModel) -> None:
    """Zero in the dense model's matrices what the small one lacks: rows and columns whose numbers are not in it."""
    now, cut = dict(small.named_parameters()), 0
    for name, parameter in dense.named_parameters():
        if name not in now or parameter.shape == now[name].shape or parameter.ndim < 2 or name.endswith("bias"):
            continue
        cut += 1
        experts = parameter.ndim == 3 and len(parameter) == len(now[name])  # each has lost others
        for before, after in zip(parameter, now[name], strict=True) if experts else [(parameter, now[name])]:
            left = after.flatten()
            for dim in range(before.ndim):
                if before.shape[dim] == after.shape[dim]:
                    continue
                slices = before.movedim(dim, 0)
                gone = torch.isin(slices.flatten(1), left).float().mean(1) < 0.3  # a few numbers are the same by chance
                if int((~gone).sum()) != after.shape[dim]:
                    raise Wrong(f"{name}: {int((~gone).sum())} of its slices are left, and it has {after.shape[dim]}")
                slices[gone] = 0
    if not cut:
        raise Wrong("no matrix became smaller")


@torch.no_grad()
def check_parts(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> None:
    """The parts of blocks that are gone add nothing: in the dense model their numbers are zero, their norms passed by."""

    def passed(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        alike = args and isinstance(out, Tensor) and args[-1].shape == out.shape
        return args[-1] if alike else out  # the last is the residual, where a module adds it

    left = {stamp(parameter) for parameter in model.parameters()}
    inside = tuple(f"{block}." for block in blocks_of(dense))
    by_hand = copy.deepcopy(dense)
    for path, module in by_hand.named_modules():
        gone = [p for p in module.parameters(recurse=False) if stamp(p) not in left]
        if not path.startswith(inside) or not gone:
            continue
        if re.search("Norm|Residual", type(module).__name__):
            module.register_forward_hook(passed)
        else:
            for parameter in gone:
                parameter.zero_()
    equal(read(model, ids), read(by_hand, ids), "parts zeroed by hand")


def check_layers(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> None:
    """The blocks that are gone, skipped in the dense model: what their numbers are tells which."""
    of = {name: stamps(dense.get_submodule(name)) for name in blocks_of(dense)}
    left = {stamps(model.get_submodule(name)) for name in blocks_of(model)}
    gone = [name for name, its in of.items() if its not in left]
    if not gone:
        raise Wrong("no block is gone")
    kinds: dict[str, Any] = {}
    handles = []
    for name in gone:
        block = dense.get_submodule(name)
        handles.append(block.register_forward_hook(lambda m, a, out, name=name: kinds.update({name: out})))
    read(dense, ids)
    for handle in handles:
        handle.remove()
    for name in gone:

        def skip(*args: Any, name: str = name, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            out = kinds.get(name, hidden)
            return (hidden, *[None] * (len(out) - 1)) if isinstance(out, tuple | list) else hidden

        dense.get_submodule(name).forward = skip
    said = read(dense, ids)
    for name in gone:
        del dense.get_submodule(name).forward
    equal(read(model, ids), said, "blocks skipped by hand")


def stamps(module: nn.Module) -> tuple[float, ...]:
    return tuple(stamp(parameter) for parameter in module.parameters())


def stamp(tensor: Tensor) -> float:
    return round(float(tensor.detach().double().sum()), 6)


def vocabulary(kind: str) -> None:
    model, dense = tiny_models.make(kind), tiny_models.make(kind)
    pruned = sweep.prune(model, tiny_models.tokenizer(), method="vocab", sparsity=0.3, criterion="random", **TEXT)
    gone = set(pruned.gone.tolist())
    kept = [number for number in range(dense.get_input_embeddings().weight.shape[0]) if number not in gone]
    if len(kept) != model.get_input_embeddings().weight.shape[0] or not gone:
        raise Wrong("the rows are not those that are said to be left")
    ids = torch.randint(0, len(kept) - 20, (2, 24), generator=torch.Generator().manual_seed(0))
    of_text = torch.tensor(kept)[ids]
    equal(read(model, ids), read(dense, of_text)[..., kept], "the whole vocabulary")
    check_saved(model, pruned.tokenizer, dense, ids)


def bitmap(kind: str) -> None:
    """Pruned by magnitude, packed, saved, reloaded."""
    model, dense = tiny_models.make(kind), tiny_models.make(kind)
    tokenizer, ids = tiny_models.tokenizer(), tokens()
    sweep.prune(model, tokenizer, method="magnitude", sparsity=SPARSITY)
    said = read(model, ids)
    execution.prepare(model, Execution("bitmap"))
    equal(read(model, ids), said, "packed")
    left = matrices_of(dense).keys() & {name for name, p in model.named_parameters() if (p == 0).float().mean() > 0.4}
    if left or not packed(model):
        raise Wrong(f"{len(left)} pruned matrices are held dense, such as {sorted(left)[:1]}")
    check_saved(model, tokenizer, dense, ids)


OPERATIONS: dict[str, Callable[[str], None]] = {
    "magnitude": weights("magnitude"),
    "wanda": wanda,
    "sparsegpt": weights("sparsegpt"),
    "neuron": units("neuron"),
    "head": units("head", 0.5),  # of two groups a block
    "layer": units("layer", sparsity_of="units"),
    "sublayer": units("layer", unit="sublayer", sparsity_of="units"),
    "expert": units("expert"),
    "vocabulary": vocabulary,
    "bitmap": bitmap,
}


def try_one(kind: str, name: str) -> Line:
    try:
        OPERATIONS[name](kind)
    except Wrong as wrong:
        return Line(kind, name, "WRONG", str(wrong))
    except RequestError as refusal:
        return Line(kind, name, "refused", str(refusal))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Line(
            kind, name, "crashed", f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
        )
    return Line(kind, name, "right")


# ---- all types ----


def _work(kind: str, names: list[str], pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    for name in names:
        pipe.send(try_one(kind, name))
    pipe.close()


def try_type(kind: str, names: list[str]) -> list[Line]:
    """Each operation on one type, in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, names, its))
    process.start()
    its.close()
    lines: list[Line] = []
    end = time.monotonic() + TIMEOUT
    while len(lines) < len(names) and mine.poll(max(0, end - time.monotonic())):
        try:
            lines.append(mine.recv())
        except EOFError:
            break
    if process.is_alive() and len(lines) < len(names):
        process.kill()
    process.join()
    why = f"the process ended with {process.exitcode}, or took longer than {TIMEOUT} seconds"
    return lines + [Line(kind, name, "crashed", why) for name in names[len(lines) :]]


def table(lines: list[Line]) -> str:
    counts = Counter((line.operation, line.outcome) for line in lines)
    head = "| operation | right | refused | crashed | silently wrong |\n|---|---|---|---|---|\n"
    rows = [
        f"| {name} | " + " | ".join(str(counts[name, outcome]) for outcome in OUTCOMES) + " |"
        for name in OPERATIONS
        if any(line.operation == name for line in lines)
    ]
    return head + "\n".join(rows)


def page(lines: list[Line]) -> str:
    """docs/families.md."""
    by_kind: dict[str, dict[str, Line]] = defaultdict(dict)
    for line in lines:
        by_kind[line.kind][line.operation] = line
    names = [name for name in OPERATIONS if any(name in its for its in by_kind.values())]
    marks = {"right": "✓", "refused": "no", "crashed": "crashed", "WRONG": "wrong"}
    grid = [
        f"| {kind} | " + " | ".join(marks[its[name].outcome] if name in its else "" for name in names) + " |"
        for kind, its in by_kind.items()
    ]
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in lines:
        if line.outcome != "right":
            why = re.sub(r"/\S+/\.saved\S+", "FOLDER", line.why)
            why = re.sub(r"\s+", " ", re.sub(r"\b[A-Z]\w+(ForCausalLM|LMHeadModel|Model)\b", "the model", why))
            reasons[line.operation, f"{line.outcome}: {why[:400]}"].append(line.kind)
    told = [f"- {name}, {', '.join(kinds)}: {why}" for (name, why), kinds in reasons.items()]
    left_out = [f"- {kind}: {why}" for kind, why in tiny_models.LEFT_OUT.items()]
    return "\n".join(
        [
            "# Which models",
            "",
            f"Every type of causal language model that transformers {transformers.__version__} has, each as a tiny random",
            "model, pruned through sweep's own doors and checked by other means: `python benchmarks/families.py --markdown`",
            f"wrote this page. {len(by_kind)} types:",
            "",
            table(lines),
            "",
            "✓ right, no: refused with a message that says which check failed and what is possible.",
            "",
            "| type | " + " | ".join(names) + " |",
            "|---|" + "---|" * len(names),
            *grid,
            "",
            "## What was said where it is not right",
            "",
            *told,
            "",
            "## Types without a tiny model",
            "",
            *left_out,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--only", default=",".join(OPERATIONS), help="operations, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help=f"write {PAGE.name}")
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := set(names) - OPERATIONS.keys():
        parser.error(f"no operation is called {', '.join(unknown)}: use {', '.join(OPERATIONS)}")
    lines: list[Line] = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for found in pool.map(lambda kind: try_type(kind, names), asked.types or tiny_models.types()):
            lines += found
            for line in found:
                if line.outcome != "right" or asked.types:
                    print(f"{line.kind:24} {line.operation:11} {line.outcome:8} {line.why[:300]}", flush=True)
    print(f"\n{table(lines)}")
    if asked.markdown:
        PAGE.write_text(page(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
