"""What a sweep will do, decided before it does any of it: checked cells, each once, without those already done."""

from __future__ import annotations

import base64
import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sweep import config, identity, machine, saving, settings, store
from sweep.config import Cell, Options
from sweep.measuring import catalogue, perplexity
from sweep.models import decoders, headers, origin
from sweep.pruning import checks
from sweep.pruning.families import Vocab, Weight
from sweep.quantization import fitting
from sweep.settings import RequestError
from sweep.texts import text

_ENOUGH = 2000  # rows that expectations are drawn from


@dataclass(frozen=True)
class Step:
    """One cell to run, and the command line words that compose it."""

    name: str
    cell: Cell
    overrides: tuple[str, ...]

    def words(self) -> list[str]:
        """Words for a job of a launcher, of which `received` makes this very cell again, whatever its machine would decide.

        In base64, since names and paths may hold what Hydra's grammar of values does not.
        """
        decided = [f"{key}={getattr(self.cell, key) or 'null'}" for key in ("device", "dtype", "threads")]
        planned = json.dumps({"name": self.name, "cell": asdict(self.cell)}).encode()
        return [*self.overrides, *decided, f"planned={base64.urlsafe_b64encode(planned).decode().rstrip('=')}"]


@dataclass(frozen=True)
class Expectation:
    """What cells like these took before."""

    seconds: float  # of all cells to run, one after the other, those without a like row counted as the others' mean
    known: int  # cells with a like row
    peak_memory: int  # bytes, of the largest like row

    def __str__(self) -> str:
        return f"about {in_words(self.seconds)} of work and up to {self.peak_memory / 2**30:.1f} GiB a cell"


@dataclass(frozen=True)
class Plan:
    todo: list[Step]  # baselines first
    done: list[Step]
    left: list[Step]  # not ok, and not among those that `retry` runs again
    repeated: int  # cells asked for that are equal to another
    unreadable: list[str]  # cells whose file is no row
    expected: Expectation | None = None

    def __str__(self) -> str:
        total = len(self.todo) + len(self.done) + len(self.left)
        words = [f"{total} cell{'s' if total != 1 else ''} (dense baselines included)"]
        words += [f"{self.repeated} equal to another"] if self.repeated else []
        words += [f"{len(self.done)} already done"]
        words += [f"{len(self.left)} not ok and not to be retried"] if self.left else []
        words += [f"{len(self.todo)} to run"]
        lines = [", ".join(words)]
        if self.todo and self.expected:
            lines.append(f"expected: {self.expected} (from rows like {self.expected.known} of the {len(self.todo)})")
        return "\n".join(lines)


def received(composed: Mapping[str, Any], words: Iterable[str]) -> tuple[Step, Options]:
    """The step that a job has been handed over as `Step.words`, and the options.

    Raises RequestError when this machine does not offer what the cell needs, or would measure another cell.
    """
    options = config.options(composed)
    assert options.planned is not None
    planned = json.loads(base64.urlsafe_b64decode(options.planned + "=" * (-len(options.planned) % 4)))
    cell = settings.build(Cell, planned["cell"], "")
    machine.resolve(cell)
    step = Step(planned["name"], cell, tuple(word for word in words if not word.startswith("planned=")))
    here = identity.cell_name(cell)
    if here != step.name:
        raise RequestError(
            f"cell {step.name} would be {here} on {platform.node()}: the model, the data or the packages there "
            "are not those of the machine that planned the sweep"
        )
    return step, options


def prepare(composed: Mapping[str, Any], placement: machine.Placement = machine.Placement()) -> tuple[Cell, Options]:  # noqa: B008
    """The composed configuration as a checked cell with its device and threads decided, and the options.

    Raises RequestError for everything that can be told to be wrong before a model is loaded.
    """
    cell, options = config.parse(composed)
    cell = machine.resolve(cell, placement)
    machine.check_execution(cell)
    if options.save_model is not None:
        cell.execution.check_saves()
    origin.fingerprint(cell.model)  # raises when the model is not there
    headers.check(cell.model)
    shape = origin.shape(cell.model)
    positions = decoders.size(shape, "positions") or None
    catalogue.check(cell.benchmarks, cell.data_root, positions)
    perplexity.check(cell.perplexity, cell.data_root, cell.model)
    check_method(cell, shape)
    config.fits(cell.efficiency, positions)
    _check_targets(cell)
    return cell, options


def check_method(cell: Cell, shape: Mapping[str, Any]) -> None:
    """Refuse a method and a calibration text that no model of this shape can meet. Raises RequestError.

    shape  what the model's configuration says; what it does not say is told once the model is loaded
    """
    positions = decoders.size(shape, "positions") or None
    if cell.calibration is not None:
        text.check(cell.calibration, cell.data_root, "calibration", positions)
    if (recovery := text.of_recovery(cell)) is not None:
        text.check(recovery, cell.data_root, "recover.text", positions)
    checks.check(cell, shape)
    fitting.check(cell, shape)


def check_models(cells: Sequence[Cell], *, convert: bool = False) -> None:
    """Refuse models that the cells would fail on, as far as their files' headers tell. Needs torch.

    convert  GGUF files that were never converted are converted, where cells run that would do it
    Raises RequestError.
    """
    from sweep.models import cut_tokenizer, loading, requirements
    from sweep.texts import written

    loading.quiet()
    tokenizers = {model: loading.check(model, convert=convert) for model in dict.fromkeys(cell.model for cell in cells)}
    for cell in cells:
        if (tokenizer := tokenizers[cell.model]) is not None:
            if cell.benchmarks.tasks:
                requirements.check_tokenizer(tokenizer, cell.model.path or cell.model.name)
            if text.is_written(cell):
                written.beginning(tokenizer)
            if isinstance(cell.method, Vocab):
                cut_tokenizer.unknown_id(tokenizer, origin.shape(cell.model).get("vocab_size") or len(tokenizer))


def _check_targets(cell: Cell) -> None:
    """Refuse names and patterns that none of the model's matrices meet, as far as it can be told without its weights."""
    method, named = cell.method, cell.quantize.exclude
    pruned = method if isinstance(method, Weight) and (method.exclude or method.pattern is not None) else None
    quantises = cell.quantize.columns is not None or named
    adapts = cell.recover.name == "lora"
    if pruned is None and not quantises and not adapts:
        return
    from sweep.models import loading
    from sweep.pruning import weights  # bring torch, which other requests do not need here
    from sweep.quantization import quantise
    from sweep.recovery import adapters

    skeleton = loading.skeleton(cell.model)
    if skeleton is None:
        return
    if pruned is not None:
        weights.targets(skeleton, pruned)
    if adapts:
        adapters.check_rank(skeleton, cell.recover.rank)
    if quantises and not method.removes_units:  # else the stage is told by what is left
        quantise.targets(skeleton, cell.quantize)


def same_options(all_options: Iterable[Options]) -> Options:
    """The options of the sweep. Raises RequestError when they differ from cell to cell."""
    first, *rest = all_options
    for f in fields(Options):
        values = list(dict.fromkeys(getattr(options, f.name) for options in (first, *rest)))
        if len(values) > 1:
            raise RequestError(
                f"{f.name} says how the whole sweep is run and cannot be swept over; got {', '.join(map(str, values))}"
            )
    return first


def make(asked: Iterable[tuple[Cell, Iterable[str]]], options: Options) -> Plan:
    """The plan for the cells asked for: with their dense baselines, without repetition, without what is done."""
    steps: dict[str, Step] = {}
    baselines: dict[str, Step] = {}
    repeated = 0
    for cell, words in asked:
        step = Step(identity.cell_name(cell), cell, tuple(words))
        repeated += step.name in steps
        steps.setdefault(step.name, step)
        dense = cell.dense()
        name = identity.cell_name(dense)
        baselines.setdefault(name, Step(name, dense, (*step.overrides, "baseline=true")))
    ordered = [*baselines.values(), *(step for name, step in steps.items() if name not in baselines)]
    store.check_version(options.results)
    status = store.statuses(options.results, [step.name for step in ordered])
    todo: list[Step] = []
    done: list[Step] = []
    left: list[Step] = []
    for step in ordered:
        found = status.get(step.name) if options.resume else None
        folder = options.checkpoint(step.cell, step.name)
        if found == "ok" and folder is not None and not saving.holds(folder, step.name):
            found = None  # it has its row and lacks its saved model
        to_run = found in (None, store.UNREADABLE) or (found != "ok" and options.retry in ("all", found))
        if to_run and folder is not None:
            saving.check_place(folder, step.name, saving.guarded(step.cell.model, options.results))
        (todo if to_run else done if found == "ok" else left).append(step)
    unreadable = [name for name, found in status.items() if found == store.UNREADABLE]
    return Plan(todo, done, left, repeated, unreadable, expectation(todo, options.results))


def expectation(steps: list[Step], results: str) -> Expectation | None:
    """What the steps will take, from rows of like cells; None when there is no like row.

    Like is a row of the same model, method, later stages, benchmarks, timing, device, threads and dtype, whatever its
    sparsity or seed; failing that, of any method: recovery takes many times what most methods do.
    """
    wanted = ["status", "config", "model_fingerprint", "cell_seconds", "peak_memory_bytes"]
    rows = store.read_some(results, wanted) if steps else None
    if rows is None or rows.empty:
        return None
    rows = rows[(rows.status == "ok") & rows.cell_seconds.notna()].tail(_ENOUGH)
    by_kind: dict[str, list[tuple[float, int]]] = {}
    for row in rows.itertuples():
        for kind in _kinds(json.loads(row.config), row.model_fingerprint):
            by_kind.setdefault(kind, []).append((row.cell_seconds, row.peak_memory_bytes))
    kinds = [_kinds(asdict(step.cell), origin.fingerprint(step.cell.model)) for step in steps]
    like = [next((by_kind[kind] for kind in of_step if kind in by_kind), None) for of_step in kinds]
    seconds = [statistics.median(second for second, _ in found) for found in like if found]
    if not seconds:
        return None
    peak = max(
        (int(memory) for found in like if found for _, memory in found if memory == memory), default=0
    )  # not NaN
    return Expectation(statistics.fmean(seconds) * len(steps), len(seconds), peak)


def _kinds(cell: Mapping[str, Any], model: str | None) -> list[str]:
    """What makes two cells alike in cost, the closer kind first."""
    setting = {"model": model} | {
        key: cell.get(key) for key in ("benchmarks", "efficiency", "device", "threads", "dtype")
    }
    method = cell.get("method") or {}
    for stage in config.STAGES:
        asked, unused = (json.dumps(of, sort_keys=True) for of in (cell.get(stage.group), asdict(stage.unused)))
        if stage.group != "method" and asked not in ("null", unused):
            setting[stage.group] = cell[stage.group]
    exact = setting | {"method": [method.get("family"), method.get("criterion")]}
    return [json.dumps(kind, sort_keys=True) for kind in (exact, setting)]


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
