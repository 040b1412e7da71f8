"""The families of methods: what a user can set of each, what it falls back to, and what contradicts itself. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from sweep.pruning import criteria, recipe
from sweep.pruning.criteria import Criterion
from sweep.settings import Named, RequestError, build, part, setting


@dataclass(frozen=True)
class Dense(Named):
    removes_units: ClassVar[bool] = False
    family: Literal["dense"] = "dense"


@dataclass(frozen=True)
class Weight(Named):
    of: ClassVar[criteria.Kind] = "weight"
    removes_units: ClassVar[bool] = False
    family: Literal["weight"] = "weight"
    criterion: str = setting("magnitude", names=criteria.Names("weight"), alias="importance")
    scope: Literal["matrix", "row", "global"] | None = None  # what weights compete within; None = as in the paper
    pattern: str | None = None  # "2:4": at most 2 of each 4 along the input stay; instead of a scope
    allocation: Literal["uniform", "global", "owl"] | tuple[float, ...] = "uniform"  # sparsity over blocks
    targets: Literal["all", "attention", "ffn"] = "all"
    embeddings: bool = False
    lm_head: bool = setting(False, was="head")
    exclude: tuple[str, ...] = ()  # names of matrices; * stands for any characters
    steps: int = setting(1, minimum=1)
    damping: float = setting(0.01, minimum=0)  # of a Hessian, share of the mean of its diagonal
    outlier_ratio: float = setting(5.0, minimum=0)  # of allocation=owl: an outlier is so many times the mean score
    outlier_range: float = setting(0.08, minimum=0)  # of allocation=owl: blocks' sparsities differ by twice this
    among_smallest: float = setting(1.0, minimum=0)  # of a matrix: only so many, smallest in magnitude, may go
    skip_lowest: float = setting(0.0, minimum=0)  # of a matrix: so many, lowest in score among these, stay
    replay: str | None = None  # FILE of a recipe: what it says went goes, and nothing is chosen


Metric = Literal["loss", "perplexity", "accuracy", "precision", "recall", "f1"]


@dataclass(frozen=True)
class Drop(Named):
    """How criterion=drop measures: what a metric loses when a unit is removed. A part of the families of units.

    Read by no other criterion.
    """

    metric: Metric = "loss"
    task: str | None = None  # None = the calibration text
    documents: int | None = setting(None, minimum=2)  # of the task; None = all
    screen: Literal["none", "taylor"] = "none"
    screen_margin: float = setting(0.1, minimum=0.0, below=1.0)  # of the units, each side


@dataclass(frozen=True)
class Neuron(Named):
    of: ClassVar[criteria.Kind] = "unit"
    removes_units: ClassVar[bool] = True
    family: Literal["neuron"] = "neuron"
    criterion: str = setting("taylor_sampled", names=criteria.Names("unit"), alias="importance")
    drop: Drop = part(Drop())
    scope: Literal["global", "layer"] = "global"
    steps: int = setting(1, minimum=1)  # rounds of measuring and removing
    repair: bool = False
    multiple_of: int = setting(1, minimum=1)  # neurons that a block keeps
    group: int = setting(1, minimum=1)  # neurons that criterion=drop measures and removes together
    sparsity_of: Literal["parameters", "units"] = "parameters"
    blocks: tuple[int, ...] | None = None  # blocks that are pruned, from 0; None = all
    replay: str | None = None  # FILE of a recipe: what it says went goes, and nothing is chosen


@dataclass(frozen=True)
class Head(Named):
    of: ClassVar[criteria.Kind] = "unit"
    removes_units: ClassVar[bool] = True
    family: Literal["head"] = "head"
    criterion: str = setting("taylor_abs", names=criteria.Names("unit"), alias="importance")
    drop: Drop = part(Drop())
    scope: Literal["global", "layer"] = "global"
    unit: Literal["group", "query"] = "group"  # a key-value group, or one query head of every group of a block
    steps: int = setting(1, minimum=1)
    repair: bool = False
    sparsity_of: Literal["parameters", "units"] = "parameters"
    blocks: tuple[int, ...] | None = None
    replay: str | None = None  # FILE of a recipe: what it says went goes, and nothing is chosen


@dataclass(frozen=True)
class Layer(Named):
    of: ClassVar[criteria.Kind] = "block"
    removes_units: ClassVar[bool] = True
    family: Literal["layer"] = "layer"
    criterion: str = setting("block_influence", names=criteria.Names("block"), alias="importance")
    drop: Drop = part(Drop())
    # what goes: whole blocks; of a block the attention, or what takes its place; the FFN; or whichever of the two
    unit: Literal["block", "attention", "ffn", "sublayer"] = "block"
    steps: int = setting(1, minimum=1)
    sparsity_of: Literal["parameters", "units"] = "parameters"
    blocks: tuple[int, ...] | None = None
    replay: str | None = None  # FILE of a recipe: what it says went goes, and nothing is chosen


@dataclass(frozen=True)
class Vocab(Named):
    of: ClassVar[criteria.Kind] = "token"
    removes_units: ClassVar[bool] = True
    family: Literal["vocab"] = "vocab"
    criterion: str = setting("frequency", names=criteria.Names("token"), alias="importance")
    replay: str | None = None  # FILE of a recipe: what it says went goes, and nothing is chosen


@dataclass(frozen=True)
class Expert(Named):
    of: ClassVar[criteria.Kind] = "expert"
    removes_units: ClassVar[bool] = True
    family: Literal["expert"] = "expert"
    criterion: str = setting("reap", names=criteria.Names("expert"), alias="importance")
    drop: Drop = part(Drop())
    scope: Literal["global", "layer"] = "layer"
    blocks: tuple[int, ...] | None = None
    replay: str | None = None  # FILE of a recipe: what it says went goes, and nothing is chosen


Pruning = Weight | Neuron | Head | Layer | Vocab | Expert
Method = Dense | Pruning

FAMILIES: dict[str, type[Method]] = {
    kind().family: kind for kind in (Dense, Weight, Neuron, Head, Layer, Vocab, Expert)
}

SHRINKING = {name for name, kind in FAMILIES.items() if kind.removes_units}  # families whose matrices become smaller


def criterion_of(method: Method) -> Criterion | None:
    """What declares the criterion by which a method chooses; None for one that chooses nothing: dense, or of a recipe."""
    return None if isinstance(method, Dense) or method.replay else criteria.find(method.criterion, method.of)


def criterion_shown(method: Method) -> str | None:
    """What the criterion is called in rows; of a recipe, which brings no corrected weights, as its replay."""
    if isinstance(method, Dense):
        return None
    name = criteria.shown(method.criterion)
    return f"replay of {name}" if method.replay else name


def normalised(method: Method, sparsity: float) -> Method:
    """The method with what its paper says where it leaves that open, and what it does not read set to one value.

    Raises RequestError for settings that contradict each other.
    """
    match method:
        case Weight() | Neuron() | Head() | Layer() | Vocab() | Expert() if method.replay:
            return _as_in_recipe(method, method.replay, sparsity)
        case Weight():
            return checked_weight(method, sparsity)
        case Neuron() if not measures_drops(method):
            return replace(method, drop=Drop(), group=1)
        case Head() | Layer() | Expert() if not measures_drops(method):
            return replace(method, drop=Drop())
    return method


def _as_in_recipe(method: Pruning, file: str, sparsity: float) -> Pruning:
    """The settings with which a recipe was made, and the file. Raises RequestError where others were asked for."""
    made = recipe.told(file)
    told = dict(made["method"])
    if told.get("family") != method.family:
        raise RequestError(
            f"method.replay={file} is of method={told.get('family')}, not of method={method.family}: name that"
        )
    if told["criterion"] not in criteria.Names(method.of):  # a package's, which is not installed here
        told["criterion"] = method.criterion
    theirs = replace(build(type(method), told, "method"), replay=file)
    for f in fields(method):
        ours, made_with = getattr(method, f.name), getattr(theirs, f.name)
        if ours not in (f.default, made_with):
            raise RequestError(
                f"method.{f.name}={ours} contradicts method.replay={file}, made with {made_with}: leave it out"
            )
    if round(made["sparsity"], 6) != round(sparsity, 6):
        raise RequestError(
            f"method.replay={file} was made at sparsity={made['sparsity']:g}, and what it removes is another fraction than "
            f"sparsity={sparsity:g}: set sparsity={made['sparsity']:g}"
        )
    return theirs


def measures_drops(method: Method) -> bool:
    """Whether what goes is chosen by what a metric loses without it."""
    criterion = criterion_of(method)
    return criterion is not None and criterion.measured


def reads_text(method: Method) -> bool:
    """Whether the numbers of a method depend on the calibration text."""
    criterion = criterion_of(method)
    return criterion is not None and (
        criterion.reads_text
        or getattr(method, "allocation", None) == "owl"
        or getattr(method, "repair", False)
        or (criterion.measured and probe_task(method) is None)
    )


def probe_task(method: Method) -> str | None:
    """The task on which a drop is measured; None where none is, or where it is measured on the calibration text."""
    return method.drop.task if isinstance(method, Neuron | Head | Layer | Expert) else None


def reads_in_order(method: Method) -> bool:
    """Whether it matters that a block reads what the pruned blocks before it put out."""
    return isinstance(method, Weight) and method.allocation != "global"


def reads_all_text(method: Method) -> bool:
    """Whether the method reads a text as a whole, and no sequences that are drawn from it."""
    return isinstance(method, Vocab) and reads_text(method)


def draws(method: Method) -> bool:
    """Whether the method draws numbers, text or not."""
    criterion = criterion_of(method)
    return criterion is not None and criterion.draws


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
    criterion, allocation = criteria.find(method.criterion, method.of), method.allocation
    if method.scope == "global":
        if allocation not in ("uniform", "global"):
            raise RequestError(
                f"method.scope=global decides what each block loses, and so does method.allocation="
                f"{allocation}: use scope=matrix or scope=row with it"
            )
        allocation = "global"
    if allocation == "global" and criterion.reads_text and method.embeddings and not method.lm_head:
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
    _check_band(method, criterion, sparsity)
    scope = method.scope or criterion.within
    if method.pattern is not None or scope == "global":
        scope = "matrix"
    defaults = Weight()
    return replace(
        method,
        scope=scope,
        allocation=allocation,
        steps=1 if criterion.steady else method.steps,
        damping=method.damping if criterion.corrects_after else defaults.damping,
        outlier_ratio=method.outlier_ratio if allocation == "owl" else defaults.outlier_ratio,
        outlier_range=method.outlier_range if allocation == "owl" else defaults.outlier_range,
    )


def _check_band(method: Weight, criterion: Criterion, sparsity: float) -> None:
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
    if method.scope == "global" or criterion.corrects_after:
        word = "scope=global" if method.scope == "global" else f"criterion={method.criterion}"
        raise RequestError(
            f"method.among_smallest and method.skip_lowest choose a band of the weights of each matrix, "
            f"which method.{word} does not rank as a whole: leave one of them out"
        )
