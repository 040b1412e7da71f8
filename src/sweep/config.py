"""What a cell is: frozen dataclasses with units and allowed ranges, built from the composed configuration.

A wrong request is refused here, before anything is loaded. Messages name the key, what is allowed, and what came.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

T = TypeVar("T")

_LEAST_MEMORY = 2**30  # bytes


class RequestError(ValueError):
    """A mistake in what the user asked for; shown as its message alone, without a traceback."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def _at_least(minimum: float, **kwargs: Any) -> Any:
    return field(metadata={"minimum": minimum}, **kwargs)


class _Named:
    """Settings whose names are among the declared ones however they are made: whoever dispatches on one need not ask."""

    def __post_init__(self) -> None:
        for name, choices in _choices(type(self)).items():  # type: ignore[arg-type]  # a class can be hashed
            value = getattr(self, name)
            if isinstance(value, str) and value not in choices:
                raise RequestError(_not_among(name, value, choices))


_hints = functools.cache(typing.get_type_hints)  # which takes longer than all else in building a cell


@functools.cache
def _choices(cls: type) -> dict[str, tuple[str, ...]]:
    """The names that each field may have; fields that may be any text are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for name, hint in _hints(cls).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        choices = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
        if choices and str not in kinds:
            (found[name],) = choices
    return found


def _not_among(where: str, value: Any, choices: Iterable[Any]) -> str:
    allowed = [str(choice) for choice in choices]
    return f"{where} must be one of {', '.join(allowed)}; got {value!r}.{did_you_mean(str(value), allowed)}"


@dataclass(frozen=True)
class Model(_Named):
    name: str  # shown in rows; for source=hub the repository that is loaded
    source: Literal["gguf", "hub", "local"]
    path: str | None = None  # the GGUF file or the checkpoint folder
    package: str | None = None  # installed package that carries the GGUF file
    file: str | None = None  # file name within the package
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Dense(_Named):
    family: Literal["dense"] = "dense"


WeightCriterion = Literal["magnitude", "random", "wanda", "ria", "gradient", "sparsegpt", "alps"]
WEIGHT_CRITERIA: tuple[str, ...] = typing.get_args(WeightCriterion)


@dataclass(frozen=True)
class Weight(_Named):
    family: Literal["weight"]
    criterion: WeightCriterion = "magnitude"
    scope: Literal["matrix", "row", "global"] | None = None  # what weights compete within; None = as in the paper
    pattern: str | None = None  # "2:4": at most 2 of each 4 along the input stay; instead of a scope
    allocation: Literal["uniform", "global", "owl"] | tuple[float, ...] = "uniform"  # sparsity over blocks
    targets: Literal["all", "attention", "ffn"] = "all"
    embeddings: bool = False
    head: bool = False
    exclude: tuple[str, ...] = ()  # names of matrices; * stands for any characters
    steps: int = _at_least(1, default=1)
    damping: float = _at_least(0, default=0.01)  # of a Hessian, share of the mean of its diagonal
    outlier_ratio: float = _at_least(0, default=5.0)  # of allocation=owl: an outlier is so many times the mean score
    outlier_range: float = _at_least(0, default=0.08)  # of allocation=owl: blocks' sparsities differ by twice this
    among_smallest: float = _at_least(0, default=1.0)  # of a matrix: only so many, smallest in magnitude, may go
    skip_lowest: float = _at_least(0, default=0.0)  # of a matrix: so many, lowest in score among these, stay


UnitCriterion = Literal[
    "random",
    "l2",
    "activation",
    "wanda_sp",
    "flap",
    "taylor",
    "taylor_abs",
    "taylor_norms",
    "taylor_balanced",
    "taylor_sampled",
    "fisher",
    "drop",
]
PROXIES = tuple(name for name in typing.get_args(UnitCriterion) if name != "drop")  # scores that measure no drop
Metric = Literal["loss", "perplexity", "accuracy", "precision", "recall", "f1"]


@dataclass(frozen=True)
class Drop(_Named):
    """How criterion=drop measures: what a metric loses when a unit is removed. Read by no other criterion."""

    metric: Metric = "loss"
    task: str | None = None  # None = the calibration text
    documents: int | None = _at_least(2, default=None)  # of the task; None = all
    screen: Literal["none", "taylor"] = "none"
    screen_margin: float = field(default=0.1, metadata={"minimum": 0.0, "below": 1.0})  # of the units, each side


@dataclass(frozen=True)
class Neuron(Drop):
    family: Literal["neuron"] = "neuron"
    criterion: UnitCriterion = "taylor_sampled"
    scope: Literal["global", "layer"] = "global"
    steps: int = _at_least(1, default=1)  # rounds of measuring and removing
    repair: bool = False
    multiple_of: int = _at_least(1, default=1)  # neurons that a block keeps
    group: int = _at_least(1, default=1)  # neurons that criterion=drop measures and removes together
    sparsity_of: Literal["parameters", "units"] = "parameters"
    blocks: tuple[int, ...] | None = None  # blocks that are pruned, from 0; None = all


@dataclass(frozen=True)
class Head(Drop):
    family: Literal["head"] = "head"
    criterion: UnitCriterion = "taylor_abs"
    scope: Literal["global", "layer"] = "global"
    unit: Literal["group", "query"] = "group"  # a key-value group, or one query head of every group of a block
    steps: int = _at_least(1, default=1)
    repair: bool = False
    sparsity_of: Literal["parameters", "units"] = "parameters"
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layer(Drop):
    family: Literal["layer"] = "layer"
    criterion: Literal["random", "block_influence", "drop"] = "block_influence"
    steps: int = _at_least(1, default=1)
    sparsity_of: Literal["parameters", "units"] = "parameters"
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Vocab(_Named):
    family: Literal["vocab"] = "vocab"
    criterion: Literal["random", "frequency"] = "frequency"


Method = Dense | Weight | Neuron | Head | Layer | Vocab
FAMILIES: dict[str, type[Dense] | type[Weight] | type[Neuron] | type[Head] | type[Layer] | type[Vocab]] = {
    "dense": Dense,
    "weight": Weight,
    "neuron": Neuron,
    "head": Head,
    "layer": Layer,
    "vocab": Vocab,
}
ALIASES = {"importance": "criterion"}  # what a neuron's score is called in its literature
# criteria that need a backward pass over the text, and whose next tokens it is of: the text's own, or the model's
LABELS: dict[str, Literal["text", "model"]] = {
    **dict.fromkeys(("taylor", "taylor_abs", "taylor_norms", "taylor_balanced", "fisher"), "text"),
    "taylor_sampled": "model",
}
REBUILDING = {"sparsegpt", "alps"}  # criteria that also correct the weights that stay
BY_ROW = {"wanda", "gradient"}  # criteria whose papers compare weights within a row, and not within a matrix
CALIBRATED = (
    LABELS.keys()
    | REBUILDING
    | {"activation", "wanda_sp", "flap", "block_influence", "frequency", "wanda", "ria", "gradient"}
)  # that read text
SEEDED = {"random"}  # criteria that draw numbers, text or not
SHRINKING = {"neuron", "head", "layer", "vocab"}  # families whose matrices become smaller


@dataclass(frozen=True)
class Benchmarks:
    tasks: tuple[str, ...]  # names, or YAML files
    include_path: str | None = None  # folder of tasks of the user's own
    limit: int | None = _at_least(1, default=None)  # documents a task
    num_fewshot: int | None = _at_least(0, default=None)  # examples before a question; None = as the task says
    fewshot_seed: int = _at_least(0, default=1234)  # of the examples that are drawn; lm-eval's own default
    batch_size: int = _at_least(1, default=4)  # rows of 128 tokens in a forward pass
    max_length: int | None = _at_least(2, default=None)  # tokens; None = the model's positions
    unsafe_code: bool = False  # allow tasks that run code which the model wrote


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of papers: see sweep/measuring/perplexity.py."""

    source: str | None = None  # "wikitext2", "c4" or a text file; None measures none
    seqlen: int = _at_least(2, default=2048)  # tokens a window
    windows: int | None = _at_least(1, default=None)  # how many, from the beginning; None takes all


@dataclass(frozen=True)
class Calibration:
    source: str  # "pydoc", "wikitext2", "c4", a text file, or, with a split, a data set as the hub names it
    sequences: int = _at_least(1, default=16)
    length: int = _at_least(2, default=256)  # tokens a sequence
    sequential: bool = True  # weight methods: a block reads what the pruned blocks before it put out
    subset: str | None = None  # of a data set of the hub: what it calls a configuration
    split: str | None = None  # of a data set of the hub
    column: str | None = None  # of a data set of the hub, which holds its text; None = text


@dataclass(frozen=True)
class Efficiency:
    prompt_tokens: int = _at_least(1, default=128)
    output_tokens: int = _at_least(1, default=16)
    batch_size: int = _at_least(1, default=1)
    warmup: int = _at_least(0, default=2)  # repeats
    repeats: int = _at_least(0, default=10)  # 0 = nothing is timed; fewer than 6 give no 95 % interval of a median
    # more repeats until the decode speed-up is known to this fraction, or so many seconds are spent; None = no more
    precision: float | None = field(default=None, metadata={"minimum": 1e-4, "below": 1.0})
    seconds: float = _at_least(1, default=60.0)


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Execution(_Named):
    name: Literal["dense", "shrunk", "bitmap", "csr", "semi_structured"] = "dense"
    kernel: Literal["auto", "avx512_bf16", "avx512", "avx2", "portable", "torch"] = "auto"  # of bitmap
    fallback: bool = False  # of bitmap and semi_structured: whether a slow substitute may run where they cannot


GROUPS: dict[str, type] = {
    "model": Model,
    "benchmarks": Benchmarks,
    "perplexity": Perplexity,
    "calibration": Calibration,
    "efficiency": Efficiency,
    "execution": Execution,
}


@dataclass(frozen=True)
class Cell(_Named):
    """One fully resolved configuration; gives one row."""

    model: Model
    method: Method
    sparsity: float = field(metadata={"minimum": 0.0, "below": 1.0})
    benchmarks: Benchmarks
    calibration: Calibration | None  # None for methods that read no text
    efficiency: Efficiency
    execution: Execution
    perplexity: Perplexity = field(default=Perplexity())
    seed: int = _at_least(0, default=0)
    dtype: Dtype = "auto"
    device: str = "auto"
    threads: int | None = _at_least(1, default=None)
    data_root: str | None = None

    def dense(self) -> Cell:
        """The unpruned model measured with this cell's settings: what the cell is compared with."""
        return _normalised(replace(self, method=Dense()))

    def label(self) -> str:
        """The words by which a person recognises the cell in a list."""
        criterion = getattr(self.method, "criterion", None)
        words = [self.method.family, criterion, f"{self.sparsity:g}" if criterion else None]
        words.append(f"seed {self.seed}" if self.seed else None)
        return " ".join([word for word in words if word] + [f"({self.model.name})"])


@dataclass(frozen=True)
class Options(_Named):
    """How a sweep is run; nothing here changes a number, so nothing here is part of a cell's identity."""

    results: str = "results"
    resume: bool = True
    retry: Literal["all", "failed", "out_of_memory", "crashed", "timeout", "none"] = "all"  # cells that are not ok
    on_failure: Literal["continue", "stop"] = "continue"
    timeout: float | None = _at_least(1, default=None)  # seconds a cell
    save_model: str | None = None  # folder; {cell} in it stands for the cell's name
    memory_limit: str | None = None  # resident memory a cell: 12GiB, 800MB, or bytes
    plan: bool = False
    max_cells: int = _at_least(1, default=1000)
    baseline: bool = False
    planned: str | None = None  # of a job of a launcher: its cell

    def of_sweep(self) -> Options:
        """The options of one among many cells: each saves its model to a folder of its own."""
        if self.save_model is None or "{cell}" in self.save_model:
            return self
        return replace(self, save_model=f"{self.save_model}/{{cell}}")

    def checkpoint(self, method: Method, cell: str) -> str | None:
        """The folder that the pruned model of a cell is saved to, if any; the dense model lies where it came from."""
        if self.save_model is None or isinstance(method, Dense):
            return None
        return self.save_model.replace("{cell}", cell)


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
    if cell.dtype == "auto":  # the baseline, too, is measured in what the execution multiplies
        cell = replace(cell, dtype=_only_dtype(cell.execution))
    if asked.baseline:
        cell = replace(cell, method=Dense())
    cell = _normalised(cell)
    if asked.save_model is not None and cell.execution.name in ("csr", "semi_structured"):
        raise RequestError(
            f"save_model: safetensors holds no {cell.execution.name} matrices: use execution=dense or bitmap"
        )
    return cell, asked


def byte_size(name: str, text: str) -> int:
    """`12GiB`, `800MB` or a number of bytes as bytes. Raises RequestError, which names `name`, for what is no size."""
    units = {
        "": 1,
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise RequestError(f"{name} must be a size such as 12GiB, 800MB or a number of bytes; got {text!r}")
    return int(float(found[1]) * units[found[2].upper()])


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
    if isinstance(method, Dense):
        return replace(cell, sparsity=0.0, seed=0, calibration=None, execution=Execution("dense"))
    cell = replace(cell, sparsity=round(cell.sparsity, 6))  # range() yields 0.30000000000000004
    if isinstance(method, Drop) and method.criterion != "drop":
        unread = {f.name: f.default for f in fields(Drop)} | ({"group": 1} if isinstance(method, Neuron) else {})
        method = replace(method, **unread)  # type: ignore[arg-type]
        cell = replace(cell, method=method)
    if isinstance(method, Weight):
        method = checked_weight(method, cell.sparsity)
        cell = replace(cell, method=method)
    if not reads_text(method):
        cell = replace(cell, calibration=None, seed=cell.seed if method.criterion in SEEDED else 0)
    elif isinstance(method, Vocab) and cell.calibration is not None:  # counts the whole text
        cell = replace(cell, calibration=replace(cell.calibration, sequences=16, length=256), seed=0)
    if cell.calibration is not None and not (isinstance(method, Weight) and method.allocation != "global"):
        cell = replace(cell, calibration=replace(cell.calibration, sequential=True))  # not read
    if cell.calibration is not None and cell.calibration.split is not None and cell.calibration.column is None:
        cell = replace(cell, calibration=replace(cell.calibration, column="text"))
    if method.family in SHRINKING:
        cell = replace(cell, execution=Execution("shrunk"))
    elif cell.execution.name == "shrunk":
        raise RequestError(
            f"execution=shrunk needs a method that removes units ({', '.join(sorted(SHRINKING))}); "
            f"method={method.family} leaves the matrices their size: use execution=dense"
        )
    if cell.execution.name == "bitmap":
        _check_bitmap(cell)
    elif cell.execution.name == "semi_structured":
        _check_semi_structured(cell)
        cell = replace(cell, execution=Execution("semi_structured", fallback=cell.execution.fallback))
    else:
        cell = replace(cell, execution=Execution(cell.execution.name))
    if cell.execution.name == "csr" and cell.dtype != "float32":
        raise RequestError(
            f"execution=csr multiplies float32 only, got dtype={cell.dtype}: set dtype=float32, or execution=bitmap"
        )
    return cell


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
        asked = replace(asked, warmup=0, precision=None)
    return asked if asked.precision is not None else replace(asked, seconds=Efficiency.seconds)


def _only_dtype(execution: Execution) -> Dtype:
    """The dtype that an execution alone multiplies, or that it is meant for; `auto` where it is the machine's choice."""
    if execution.name == "csr":
        return "float32"
    return "bfloat16" if execution.name == "semi_structured" or execution.kernel == "avx512_bf16" else "auto"


def _check_bitmap(cell: Cell) -> None:
    if cell.dtype == "float16":
        raise RequestError(f"execution=bitmap holds bfloat16 or float32, got dtype={cell.dtype}: set dtype=bfloat16")
    if cell.execution.kernel == "avx512_bf16" and cell.dtype == "float32":
        raise RequestError(
            f"execution.kernel=avx512_bf16 multiplies bfloat16, got dtype={cell.dtype}: use execution.kernel=avx512"
        )


def _check_semi_structured(cell: Cell) -> None:
    pattern = cell.method.pattern if isinstance(cell.method, Weight) else None
    if pattern not in ("2:4", "1:4"):
        raise RequestError(
            "execution=semi_structured multiplies matrices of which each four neighbours hold two weights at "
            "most: set method.pattern=2:4 sparsity=0.5, or use another execution"
        )
    if cell.dtype == "float32":
        raise RequestError(
            "execution=semi_structured multiplies bfloat16 or float16, got dtype=float32: set dtype=bfloat16"
        )


def reads_text(method: Dense | Weight | Neuron | Head | Layer | Vocab) -> bool:
    """Whether the numbers of a method depend on the calibration text."""
    if isinstance(method, Dense):
        return False
    on_text = method.criterion == "drop" and getattr(method, "task", None) is None
    return (
        method.criterion in CALIBRATED
        or on_text
        or getattr(method, "repair", False)
        or (getattr(method, "allocation", None) == "owl")
    )


def groups(pattern: str) -> tuple[int, int]:
    """(n, m) of an n:m pattern. Raises RequestError."""
    n, _, m = pattern.partition(":")
    if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
        raise RequestError(f"method.pattern must be n:m with 0 < n < m, such as 2:4; got {pattern!r}")
    return int(n), int(m)


def checked_weight(method: Weight, sparsity: float) -> Weight:
    """The method with its paper's scope where none is given, and what it does not read set to one value.

    Raises RequestError for settings that contradict each other.
    """
    if method.pattern is not None:
        n, m = groups(method.pattern)
        if round(1 - n / m, 6) != round(sparsity, 6):
            raise RequestError(
                f"method.pattern={method.pattern} removes exactly {1 - n / m:g}: set sparsity={1 - n / m:g}, "
                f"or another pattern for sparsity={sparsity:g}"
            )
        for name, allowed in (("scope", (None, "matrix")), ("allocation", ("uniform",)), ("steps", (1,))):
            if getattr(method, name) not in allowed:
                raise RequestError(
                    f"method.{name}={getattr(method, name)} has no meaning with method.pattern="
                    f"{method.pattern}, which removes the same of every group: leave it out"
                )
    allocation = method.allocation
    if method.scope == "global":
        if allocation not in ("uniform", "global"):
            raise RequestError(
                f"method.scope=global decides what each block loses, and so does method.allocation="
                f"{allocation}: use scope=matrix or scope=row with it"
            )
        allocation = "global"
    if allocation == "global" and method.criterion in CALIBRATED and method.embeddings and not method.head:
        raise RequestError(
            "method.embeddings=true with a global rank: an embedding reads no activations, and its scores "
            "cannot be compared with the others'; use method.allocation=uniform"
        )
    if isinstance(allocation, tuple):
        if any(not 0 <= share <= 1 for share in allocation):
            raise RequestError(f"method.allocation lists a sparsity for each block, in [0, 1]; got {list(allocation)}")
        mean = sum(allocation) / max(len(allocation), 1)
        if abs(mean - sparsity) > 0.005:
            raise RequestError(
                f"the sparsities of method.allocation have the mean {mean:.4g}: set sparsity={mean:.4g}, "
                "or other sparsities; small differences are spread over the blocks"
            )
    _check_band(method, sparsity)
    scope = method.scope or ("row" if method.criterion in BY_ROW else "matrix")
    if method.pattern is not None or scope == "global":
        scope = "matrix"
    defaults = Weight("weight")
    return replace(
        method,
        scope=scope,
        allocation=allocation,
        steps=1 if method.criterion in ("magnitude", "random") else method.steps,  # their scores do not change
        damping=method.damping if method.criterion in REBUILDING else defaults.damping,
        outlier_ratio=method.outlier_ratio if allocation == "owl" else defaults.outlier_ratio,
        outlier_range=method.outlier_range if allocation == "owl" else defaults.outlier_range,
    )


def _check_band(method: Weight, sparsity: float) -> None:
    """Refuse a band of the weights (`among_smallest`, `skip_lowest`) that is none, or that nothing reads."""
    among, skip = method.among_smallest, method.skip_lowest
    if (among, skip) == (1.0, 0.0):
        return
    if not 0 < among <= 1:
        raise RequestError(
            f"method.among_smallest must be in (0, 1], the share of a matrix that may lose weights; got {among:g}"
        )
    if skip + sparsity > among + 1e-9:
        raise RequestError(
            f"method.skip_lowest={skip:g} and sparsity={sparsity:g} are together more than the share "
            f"method.among_smallest={among:g} of a matrix that may go: lower one of the two"
        )
    for name, allowed in (("pattern", None), ("allocation", "uniform"), ("steps", 1)):
        if getattr(method, name) != allowed:
            raise RequestError(
                f"method.among_smallest and method.skip_lowest choose a band of the weights of each matrix, "
                f"which method.{name}={getattr(method, name)} contradicts: leave one of them out"
            )
    if method.scope == "global" or method.criterion in REBUILDING:
        word = "scope=global" if method.scope == "global" else f"criterion={method.criterion}"
        raise RequestError(
            f"method.among_smallest and method.skip_lowest choose a band of the weights of each matrix, "
            f"which method.{word} does not rank as a whole: leave one of them out"
        )


def as_dict(cell: Cell) -> dict[str, Any]:
    """Every setting of the cell as plain containers, for the row."""
    return asdict(cell)


def stated(settings: Any) -> dict[str, Any]:
    """The settings that are not at their declared default, at any depth, as plain containers, for hashing.

    So a setting that is added with a default that does what was always done renames no recorded row. A family names its
    group: without it, a neuron and a head at their defaults would be the same.
    """
    found: dict[str, Any] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name != "family" and f.default is not MISSING and value == f.default:
            continue
        found[f.name] = stated(value) if is_dataclass(value) else value
    return found


def build(cls: type[T], data: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> T:
    """A dataclass from plain containers; every key, type and range is checked.

    where  the dotted path of `data`, for messages
    also   further keys that are legal beside these fields, for suggestions
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        name = ALIASES.get(key, key)
        full = f"{where}.{key}" if where else key
        if name not in known:
            legal = [*known, *also]
            raise RequestError(f"unknown key '{full}'.{did_you_mean(str(key), legal)} Allowed: {', '.join(legal)}")
        if key in ALIASES and ALIASES[key] in data:
            continue  # conf/ already interpolates the alias into the name that counts
        values[name] = _convert(value, hints[name], full)
        _check_range(values[name], known[name].metadata, full)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RequestError(f"{f'{where}.' if where else ''}{name} is missing")
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if value == "???":
        raise RequestError(f"{where} is missing: set {where}=VALUE")
    if hint == Method:
        family = value.get("family")
        if family not in FAMILIES:
            raise RequestError(
                f"method.family must be one of {', '.join(FAMILIES)}, got {family!r}."
                f"{did_you_mean(str(family), FAMILIES)}"
            )
        return build(FAMILIES[family], value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        hints = [a for a in args if a is not type(None)]
        as_list = isinstance(value, list | tuple)
        (hint,) = hints if len(hints) == 1 else [a for a in hints if (typing.get_origin(a) is tuple) == as_list]
        return _convert(value, hint, where)
    if origin is Literal:
        if value not in args:
            raise RequestError(_not_among(where, value, args))
        return value
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RequestError(f"{where} must be a group of settings, got {value!r}")
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise RequestError(f"{where} must be a list, such as [a,b]; got {value!r}")
        return tuple(_convert(item, args[0], where) for item in items)
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: type, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float):
        return str(value)  # a folder may well be named 2026
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        noun = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint]
        raise RequestError(f"{where} must be {noun}, got {value!r}")
    return value


def _check_range(value: Any, limits: Mapping[str, Any], where: str) -> None:
    if not limits or value is None:
        return
    low, below = limits["minimum"], limits.get("below")
    if not (value >= low and (below is None or value < below)):  # written so that NaN is refused too
        allowed = f"at least {low:g}" if below is None else f"in [{low:g}, {below:g})"
        raise RequestError(f"{where} must be {allowed}, got {value}")
