"""What a cell is: everything that can be set, and what of it cannot change a number. No torch.

A wrong request is refused here, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

from sweep import sources
from sweep.formats.declared import FORMATS, SHRUNK, ExecutionName, Format, KernelName, Left
from sweep.pruning import families
from sweep.pruning.families import FAMILIES, SHRINKING, Dense, Method
from sweep.quantization import forms
from sweep.quantization.forms import Quantize
from sweep.recovery import kinds
from sweep.recovery.kinds import Recover
from sweep.settings import Named, RequestError, build, byte_size, setting, told
from sweep.sources import Source

_LEAST_MEMORY = 2**30  # bytes


@dataclass(frozen=True)
class Model(Named):
    name: str  # shown in rows; for source=hub the repository that is loaded
    source: Literal["gguf", "hub", "local"]
    path: str | None = None  # the GGUF file or the checkpoint folder
    package: str | None = None  # installed package that carries the GGUF file
    file: str | None = None  # file name within the package
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Benchmarks:
    tasks: tuple[str, ...]  # names, or YAML files
    include_path: str | None = None  # folder of tasks of the user's own
    limit: int | None = setting(None, minimum=1)  # documents a task
    num_fewshot: int | None = setting(None, minimum=0)  # examples before a question; None = as the task says
    fewshot_seed: int = setting(1234, minimum=0)  # of the examples that are drawn; lm-eval's own default
    batch_size: int = setting(4, minimum=1)  # rows of 128 tokens in a forward pass
    max_length: int | None = setting(None, minimum=2)  # tokens; None = the model's positions
    unsafe_code: bool = False  # allow tasks that run code which the model wrote


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of papers: see sweep/measuring/perplexity.py."""

    source: str | None = None  # "wikitext2", "c4" or a text file; None measures none
    seqlen: int = setting(2048, minimum=2)  # tokens a window
    windows: int | None = setting(None, minimum=1)  # how many, from the beginning; None takes all


@dataclass(frozen=True)
class Calibration:
    # "pydoc", "wikitext2", "c4", a text file, a data set as the hub names it with a split; "self", "random", or "mix"
    source: str
    sequences: int = setting(16, minimum=1)
    length: int = setting(256, minimum=2)  # tokens a sequence
    sequential: bool = True  # weight methods: a block reads what the pruned blocks before it put out
    subset: str | None = None  # of a data set of the hub: what it calls a configuration
    split: str | None = None  # of a data set of the hub
    column: str | None = None  # of a data set of the hub, which holds its text; None = text
    packed: bool = True  # documents one after the other; False: a sequence lies within one of them
    temperature: float = setting(1.0, minimum=0.01)  # of source=self
    sources: tuple[Source, ...] = ()  # of source=mix


@dataclass(frozen=True)
class Efficiency(Named):
    prompt_tokens: int = setting(128, minimum=1)
    output_tokens: int = setting(16, minimum=1)
    batch_size: int = setting(1, minimum=1)
    warmup: int = setting(2, minimum=0)  # repeats
    repeats: int = setting(10, minimum=0)  # 0 = nothing is timed; fewer than 6 give no 95 % interval of a median
    # more repeats until the decode speed-up is known to this fraction, or so many seconds are spent; None = no more
    precision: float | None = setting(None, minimum=1e-4, below=1.0)
    seconds: float = setting(60.0, minimum=1)
    engine: Literal["eager", "compiled"] = "eager"  # what runs the models while they are timed
    compile_seconds: float = setting(600.0, minimum=1)  # that compiling both may take


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Execution(Named):
    name: ExecutionName = "dense"  # auto until the machine is known: see machine.resolve
    kernel: KernelName = "auto"  # of formats that have several; auto = the fastest that runs here
    fallback: bool = False  # whether a slow substitute may run where the format cannot
    # how save_model stores packed matrices: as they run, or as plain ones, which transformers loads too; None: as they
    # run where the format was asked for by its name
    saved: Literal["packed", "plain"] | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    def check_saves(self) -> None:
        """Raises RequestError where a checkpoint cannot hold a model in this form."""
        if self.name != "auto" and self.saved != "plain":
            self.format.check_saves()


GROUPS: dict[str, type] = {
    "model": Model,
    "benchmarks": Benchmarks,
    "perplexity": Perplexity,
    "calibration": Calibration,
    "recover": Recover,
    "quantize": Quantize,
    "efficiency": Efficiency,
    "execution": Execution,
}


@dataclass(frozen=True)
class Cell(Named):
    """One fully resolved configuration; gives one row."""

    model: Model
    method: Method
    sparsity: float = field(metadata=told(minimum=0.0, below=1.0))
    benchmarks: Benchmarks
    calibration: Calibration | None  # None for methods that read no text
    efficiency: Efficiency
    execution: Execution
    perplexity: Perplexity = field(default=Perplexity())
    seed: int = setting(0, minimum=0)
    dtype: Dtype = "auto"
    device: str = "auto"
    threads: int | None = setting(None, minimum=1)
    data_root: str | None = None
    quantize: Quantize = field(default=Quantize())
    recover: Recover = field(default=Recover())
    offload: Literal["none", "disk"] = "none"  # disk: weights lie in mapped files, and in memory is what is worked on

    def dense(self) -> Cell:
        """The unpruned model measured with this cell's settings: what the cell is compared with."""
        unchanged = {stage.group: stage.unused for stage in STAGES}
        return _normalised(replace(self, **unchanged))

    def left(self, dtype: Any) -> Left:
        """What its stages leave in the matrices of the blocks, in the dtype that is known by now."""
        cut = self.method.removes_units
        pattern = getattr(self.method, "pattern", None)
        codes = None if self.quantize.name == forms.NONE else self.quantize.form.bits
        zeros = 0.0 if cut else self.sparsity
        return Left(dtype, zeros, pattern, cut, codes, self.quantize.columns)

    def stages(self) -> list[Stage]:
        """Those that change its model, in order; none for a dense model."""
        return [stage for stage in STAGES if getattr(self, stage.group) != stage.unused]

    def label(self) -> str:
        """The words by which a person recognises the cell in a list."""
        criterion = families.criterion_shown(self.method)
        words = [self.method.family, criterion, f"{self.sparsity:g}" if criterion else None]
        words += [str(getattr(self, stage.group)) for stage in self.stages() if stage.group != "method"]
        read = self.calibration and self.calibration.source
        words += [f"on {read}" if read and read != "pydoc" else None, f"seed {self.seed}" if self.seed else None]
        return " ".join([word for word in words if word] + [f"({self.model.name})"])


class Declared(Protocol):
    """What the settings of a stage ask for: functions of the module that declares them, without torch."""

    def reads_text(self, asked: Any, /) -> bool:
        """Whether the numbers depend on the calibration text."""

    def draws(self, asked: Any, /) -> bool:
        """Whether numbers are drawn, text or not."""


@dataclass(frozen=True)
class Stage:
    """What may change a model between loading and measuring, as all but run.py need to know it."""

    name: str  # of its columns of cost, such as prune_seconds
    group: str  # of a cell's settings: what is asked of it
    unused: Any  # the settings with which it does nothing, the default of its group
    declared: Declared
    column: str  # of a row: which of its kinds it was
    nothing: str  # what stands there where it did nothing
    version: int = 1  # raise when it does something else under the same settings; hashed where it is used, from 2 on


STAGES: tuple[Stage, ...] = (
    Stage("prune", "method", Dense(), families, "method", "dense"),
    Stage("recovery", "recover", Recover(), kinds, "recovery", kinds.NONE),
    Stage("quantize", "quantize", Quantize(), forms, "quantize", forms.NONE),
)  # in the order in which they change the model


@dataclass(frozen=True)
class Options(Named):
    """How a sweep is run; nothing here changes a number, so nothing here is part of a cell's identity."""

    results: str = "results"
    resume: bool = True
    retry: Literal["all", "failed", "out_of_memory", "crashed", "timeout", "none"] = "all"  # cells that are not ok
    on_failure: Literal["continue", "stop"] = "continue"
    timeout: float | None = setting(None, minimum=1)  # seconds a cell
    save_model: str | None = None  # folder; {cell} in it stands for the cell's name
    memory_limit: str | None = None  # resident memory a cell: 12GiB, 800MB, or bytes
    plan: bool = False
    max_cells: int = setting(1000, minimum=1)
    baseline: bool = False
    planned: str | None = None  # of a job of a launcher: its cell

    def of_sweep(self) -> Options:
        """The options of one among many cells: each saves its model to a folder of its own."""
        if self.save_model is None or "{cell}" in self.save_model:
            return self
        return replace(self, save_model=f"{self.save_model}/{{cell}}")

    def checkpoint(self, cell: Cell, name: str) -> str | None:
        """The folder that the model of the cell of this name is saved to, if any; a dense one lies where it came from."""
        if self.save_model is None or not cell.stages():
            return None
        return self.save_model.replace("{cell}", name)


def options(composed: Mapping[str, Any]) -> Options:
    """The options in a composed configuration. Raises RequestError for a value out of range or of the wrong type."""
    found = build(Options, {f.name: composed[f.name] for f in fields(Options) if f.name in composed}, "")
    memory_bytes(found.memory_limit)  # raises when it is none
    return found


def parse(composed: Mapping[str, Any]) -> tuple[Cell, Options]:
    """The composed configuration, as plain containers, made into a checked cell and its options.

    Raises RequestError for an unknown key, a value out of range or of the wrong type, or a missing method.
    """
    asked = options(composed)
    names = [f.name for f in fields(Options)]
    composed = {key: value for key, value in composed.items() if key not in names}
    method = composed.get("method")
    if method in (None, "???"):
        raise RequestError(f"no method given: add +method=NAME, with NAME one of {', '.join(FAMILIES)}")
    if not isinstance(method, Mapping):
        raise RequestError(f"method={method} replaces the whole group: write +method={method}, with the plus")
    cell = build(Cell, composed, "", also=names)
    if cell.dtype == "auto" and cell.execution.name != "auto":  # the baseline, too, is measured in what it multiplies
        cell = replace(cell, dtype=cell.execution.format.only_dtype(cell.execution.kernel) or "auto")
    if asked.baseline:
        cell = cell.dense()
    cell = _normalised(cell)
    if asked.save_model is not None:
        cell.execution.check_saves()
    return cell, asked


def memory_bytes(limit: str | None) -> int | None:
    """`12GiB`, `800MB` or a number of bytes as bytes.

    Raises RequestError for what is no size, and for less than a process takes that has only loaded torch.
    """
    if limit is None:
        return None
    size = byte_size("memory_limit", limit)
    if size < _LEAST_MEMORY:
        raise RequestError(
            f"memory_limit must be at least 1GiB, which a process takes that has only loaded its libraries; "
            f"got {limit!r}"
        )
    return size


def _normalised(cell: Cell) -> Cell:
    """Settings that cannot change this cell's numbers are set to one value, so that equal cells are equal."""
    method = cell.method
    cell = replace(cell, efficiency=_checked_timing(cell.efficiency))
    if cell.perplexity.source is None:
        cell = replace(cell, perplexity=Perplexity())
    cell = replace(cell, recover=_checked_recovery(cell))
    recovers = cell.recover.name != kinds.NONE
    cell = replace(cell, quantize=forms.normalised(cell.quantize, method, recovers=recovers))
    if cell.offload == "disk" and recovers and kinds.KINDS[cell.recover.name].descends:
        able = [name for name, kind in kinds.KINDS.items() if not kind.descends]
        raise RequestError(
            f"offload=disk holds a part of the model in memory at a time, and recover={cell.recover.name} trains all of it "
            f"at once: use recover={' or '.join(able)}"
        )
    used = cell.stages()
    if not used:
        return replace(cell, sparsity=0.0, seed=0, calibration=None, execution=Execution())
    sparsity = 0.0 if isinstance(method, Dense) else round(cell.sparsity, 6)  # range() yields 0.30000000000000004
    cell = replace(cell, sparsity=sparsity, method=families.normalised(method, sparsity))
    method = cell.method
    readers = [stage for stage in used if stage.declared.reads_text(getattr(cell, stage.group))]
    drawn = [stage for stage in used if stage.declared.draws(getattr(cell, stage.group))]
    if readers and cell.calibration is None:
        named = " and ".join(stage.group for stage in readers)
        raise RequestError(f"what is asked of {named} reads calibration text, and there is none: set calibration=pydoc")
    calibration = cell.calibration if readers else None
    whole = families.reads_all_text(method) and len(readers) == 1
    seed = cell.seed if drawn or (readers and not whole) else 0
    if calibration is not None:
        if whole:
            if calibration.source in (*sources.MADE, sources.MIX):
                raise RequestError(
                    f"method={method.family} counts the tokens of a whole text, and calibration.source="
                    f"{calibration.source} has none: name a text, such as calibration=pydoc"
                )
            defaults = {name: getattr(Calibration, name) for name in ("sequences", "length", "packed")}
            calibration = replace(calibration, **defaults)
        if not (families.reads_in_order(method) or forms.reads_text(cell.quantize)):
            calibration = replace(calibration, sequential=True)
        calibration = sources.normalised(calibration, "calibration")
    cell = replace(cell, calibration=calibration, seed=seed)
    if cell.execution.name == "auto":
        return replace(cell, execution=Execution("auto", saved=cell.execution.saved))
    if method.removes_units and cell.execution.format.holds == "zeros":
        cell = replace(cell, execution=Execution(SHRUNK.name))
    return replace(cell, execution=_checked_execution(cell))


def _checked_recovery(cell: Cell) -> Recover:
    """The recovery with its text told, where it is that of calibration. Raises RequestError where there is no text."""
    asked = kinds.normalised(cell.recover, cell.method)
    if asked.name == kinds.NONE:
        return asked
    if round(cell.sparsity, 6) == 0:
        raise RequestError(
            f"recover={asked.name} mends what pruning has done, and sparsity=0 removes nothing: raise it"
        )
    if asked.text.source is not None:
        return replace(asked, text=sources.normalised(asked.text, "recover.text"))
    if (given := cell.calibration) is None:
        raise RequestError(f"recover={asked.name} reads text, and there is none: set recover.text.source=pydoc")
    same = {name: getattr(given, name) for name in (*sources.PLACE, "packed", "sources")}
    return replace(asked, text=sources.normalised(replace(asked.text, **same), "calibration"))


def fits(asked: Efficiency, positions: int | None) -> bool:
    """Whether the prompt and what is generated after it fit into a model's positions; True where these are unknown.

    Raises RequestError when they do not fit and are to be timed.
    """
    tokens = asked.prompt_tokens + asked.output_tokens
    if positions is None or tokens <= positions:
        return True
    if asked.repeats:
        raise RequestError(
            f"efficiency.prompt_tokens={asked.prompt_tokens} and .output_tokens={asked.output_tokens} are "
            f"{tokens} tokens together, and the model has {positions} positions: lower one of them, or set "
            "efficiency=none"
        )
    return False


def _checked_timing(asked: Efficiency) -> Efficiency:
    if 0 < asked.repeats < 6:
        raise RequestError(f"efficiency.repeats must be at least 6, or 0 to time nothing; got {asked.repeats}")
    if asked.repeats == 0:
        asked = replace(asked, warmup=0, precision=None, engine=Efficiency.engine)
    if asked.engine == "eager":
        asked = replace(asked, compile_seconds=Efficiency.compile_seconds)
    return asked if asked.precision is not None else replace(asked, seconds=Efficiency.seconds)


def _checked_execution(cell: Cell) -> Execution:
    """The execution with what its format does not read set to one value.

    Raises RequestError where the format does not hold or multiply what the cell asks for.
    """
    asked, form, method = cell.execution, cell.execution.format, cell.method
    if form.holds == "cut" and not method.removes_units:
        raise RequestError(
            f"execution={form.name} needs a method that removes units ({', '.join(sorted(SHRINKING))}); "
            f"method={method.family} leaves the matrices their size: use execution=dense"
        )
    if form.patterns and getattr(method, "pattern", None) not in form.patterns:
        n, m = families.groups(form.patterns[0])
        raise RequestError(
            f"execution={form.name} multiplies matrices {form.matrices}: set method.pattern={n}:{m} "
            f"sparsity={1 - n / m:g}, or use another execution"
        )
    if form.bits is not None and (cell.quantize.name == forms.NONE or cell.quantize.form.bits > form.bits):
        able = [name for name, each in forms.FORMS.items() if each.bits <= form.bits]
        raise RequestError(
            f"execution={form.name} multiplies codes of up to {form.bits} bits: set quantize={' or '.join(able)}, got "
            f"quantize={cell.quantize.name}, or use another execution"
        )
    if form.kernels and asked.kernel not in ("auto", *form.kernels):
        raise RequestError(
            f"execution.kernel must be one of auto, {', '.join(form.kernels)} with execution={form.name}; got "
            f"{asked.kernel!r}"
        )
    if cell.dtype != "auto":
        form.check_dtype(cell.dtype, asked.kernel)
    return Execution(
        asked.name,
        kernel=asked.kernel if form.kernels else "auto",
        fallback=asked.fallback and form.fallback is not None,
        saved=(asked.saved or "packed") if form.module else None,
    )
