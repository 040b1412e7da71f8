"""What memory a cell needs, told from its configuration alone: parameters, bytes, and the peak of each of its stages.

The shapes of its tensors stand in the headers of its files, or follow from its configuration; what a stage holds beside them
follows from what it reads and keeps. These are estimates, within a fifth of what was measured of Llamas, for one purpose: a
cell that cannot fit is refused before anything is loaded, with the setting that would make it fit.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sweep import cache, machine
from sweep.config import Cell, Efficiency, Model
from sweep.models import headers, origin
from sweep.pruning import criteria, families
from sweep.pruning.families import Head, Neuron, Weight
from sweep.quantization import forms
from sweep.recovery import kinds
from sweep.recovery.kinds import Recover
from sweep.settings import RequestError

LIBRARIES = 550e6  # bytes of a process that has loaded what a cell runs on
_MAPPED = 2**29  # bytes of weights that are resident at most where they lie on the disk: see models/scratch.py
_CUDA = 500e6  # bytes that CUDA itself takes of a device
_FLOAT = 4
_BATCH = 4  # sequences that calibration takes through the model at a time
_ROW = 128  # tokens: `benchmarks.batch_size` counts rows of so many
_LOGITS = 2**23  # that are held at once; see models/logits.py
_WORKED_ON = 10  # copies of these, while they become probabilities
_KEPT = 1.3  # what an allocator holds, of what is asked of it
_SCORES = 4  # float32 copies of a matrix while its scores are ranked
_FACTORS = 8  # float32 copies of a Hessian while it is factored, inverted and used
_STORED_TYPES = {"float64": 8, "float32": _FLOAT, "float16": 2, "bfloat16": 2}
_BLOCK = re.compile(r"(?P<list>[^0-9]*?)\.\d+\.")

Shapes = Mapping[str, tuple[int, ...]]  # of a model's tensors, by name


@dataclass(frozen=True)
class Size:
    """What a model consists of, counted in parameters."""

    parameters: int
    outside: int  # of embeddings, head and whatever else is in no block
    blocks: int
    block: int  # of the largest
    hidden: int
    matrix: int  # the largest of a block's
    reads: tuple[int, ...]  # in the largest block, the width of what matrices of one module read in common
    writes: int  # what all matrices of a block put out for one token


@dataclass(frozen=True)
class Need:
    """The expected peak of a stage."""

    stage: str
    memory: int  # bytes, of the process and of its device
    device: str  # where it lies

    def __str__(self) -> str:
        return f"{self.stage} {gib(self.memory)}"


@dataclass(frozen=True)
class Machine:
    """What a cell may take, in bytes; None where it is not known."""

    memory: int | None
    device_memory: int | None = None

    def of(self, device: str) -> int | None:
        return self.memory if device == "cpu" else self.device_memory


def size(model: Model) -> Size | None:
    """The model's size, told by the headers of its files or, before these are here, by its configuration; None without both."""
    shapes = _stored_shapes(model) or _built_shapes(model)
    return None if shapes is None else _of(shapes)


def _stored_shapes(model: Model) -> Shapes | None:
    folder = headers.folder_of(model)
    if model.source == "gguf":
        folder = cache.folder() / "models" / origin.conversion_key(origin.gguf_file(model))
    if folder is None or not headers.is_whole(folder):
        return None
    files = headers.weight_files(folder)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    return {name: tensor.shape for file in files for name, tensor in headers.tensors(file).items()}


def _built_shapes(model: Model) -> Shapes | None:
    from sweep.models import loading  # brings torch, which who has the files does without

    skeleton = loading.skeleton(model)
    return None if skeleton is None else {name: tuple(p.shape) for name, p in skeleton.named_parameters()}


def _of(shapes: Shapes) -> Size:
    """What tensors of these names come to; blocks are what names number first, the longest such list of them."""
    lists: dict[str, Counter[str]] = {}
    for name, shape in shapes.items():
        if found := _BLOCK.match(name):
            lists.setdefault(found["list"], Counter())[found[0]] += math.prod(shape)
    counts = max(lists.values(), key=len, default=Counter())
    largest = max(counts, key=counts.__getitem__, default="")
    matrices = {n: s for n, s in shapes.items() if largest and n.startswith(largest) and len(s) > 1}
    reads: dict[tuple[str, int], int] = {}  # of experts that lie in one tensor, each its own
    for name, shape in matrices.items():
        reads[name.rpartition(".")[0].rpartition(".")[0], shape[-1]] = math.prod(shape[:-2])
    whole = sum(map(math.prod, shapes.values()))
    tables = [shape for name, shape in shapes.items() if len(shape) == 2 and not _BLOCK.match(name)]
    return Size(
        whole,
        whole - sum(counts.values()),
        len(counts),
        max(counts.values(), default=0),
        min((shape[-1] for shape in tables), default=0),
        max((math.prod(shape[-2:]) for shape in matrices.values()), default=0),
        tuple(sorted(width for (_, width), often in reads.items() for _ in range(often))),
        sum(math.prod(shape[:-1]) for shape in matrices.values()),
    )


def needs(cell: Cell, of: Size, *, saves: bool = False) -> list[Need]:
    """The expected peak of each stage of a cell whose device and dtype are decided, in order.

    saves  the model is written to a folder, and read again
    """
    item = _STORED_TYPES[cell.dtype]
    whole = of.parameters * item if cell.offload == "none" else min(of.parameters * item, _MAPPED)
    beside: dict[str, float] = {"load": 0}
    for stage in cell.stages():
        beside[stage.name] = _STAGES[stage.name](cell, of, item)
    if saves and cell.stages():
        beside["save"] = 0 if cell.offload == "disk" else whole
    if cell.benchmarks.tasks or cell.perplexity.source:
        beside["evaluate"] = _evaluation(cell, of, item)
    if cell.efficiency.repeats:
        another = whole if cell.stages() and cell.offload == "none" else 0
        beside["time"] = another + _generation(cell.efficiency, of, item)
    base = LIBRARIES if cell.device == "cpu" else _CUDA
    return [Need(name, int(base + whole + _KEPT * more), cell.device) for name, more in beside.items()]


def _text(asked: Cell, of: Size, item: int) -> float:
    """A calibration text on its way through the model, and what a batch of it makes of a block."""
    if asked.calibration is None:
        return 0
    length = asked.calibration.length
    return asked.calibration.sequences * length * of.hidden * item + _BATCH * length * of.writes * (item + _FLOAT)


def _graph(tokens: int, of: Size, item: int) -> float:
    """What a backward pass needs of the forward pass of some tokens."""
    return tokens * of.blocks * (2 * of.writes + 4 * of.hidden) * item


def _hessians(of: Size) -> float:
    """Those of a block, one of them being factored, and its matrices in float32."""
    widest = max(of.reads, default=0)
    return _FLOAT * (sum(width**2 for width in of.reads) + _FACTORS * widest**2 + _SCORES * of.matrix)


def _pruning(cell: Cell, of: Size, item: int) -> float:
    method = cell.method
    criterion = families.criterion_of(method)
    if criterion is None:
        return 0
    if criterion.measured:  # in float32
        copied = of.parameters * _FLOAT if item < _FLOAT else 0
        return copied + _text(cell, of, _FLOAT)
    beside = _text(cell, of, item)
    reads = set(criterion.reads) | ({"hessian"} if criterion.corrects_after else set())
    if isinstance(method, Weight):
        masks = 0 if cell.offload == "disk" else of.parameters / 8  # a bit a weight
        beside += _SCORES * _FLOAT * of.matrix + masks
        if "gradient_norm" in reads and cell.calibration is not None:
            together = cell.calibration.sequential and not reads & {"input_norm", "hessian"}
            held = of.parameters * item / 2 if together else of.parameters * _FLOAT
            beside += held * (1 + item / _FLOAT) + _graph(cell.calibration.length, of, item)
        return beside + (_hessians(of) if "hessian" in reads else 0)
    if isinstance(method, Neuron | Head) and cell.calibration is not None:
        gradients = any("gradient" in name for name in criteria.find(method.criterion, method.of).reads)
        beside += _graph(_BATCH * cell.calibration.length, of, item) if gradients else 0
        beside += _hessians(of) if method.repair else 0
    return beside


def _recovery(cell: Cell, of: Size, item: int) -> float:
    asked = cell.recover
    tokens = asked.text.length * (asked.text.sequences or kinds.KINDS[asked.name].sequences or 0)
    if asked.name == "local":  # the dense model beside it, both texts, and what the dense matrices of a block read
        texts = 2 * tokens * of.hidden * (item + _FLOAT) + tokens * sum(of.reads) * _FLOAT
        dense = 0 if cell.offload == "disk" else of.parameters * item
        return dense + texts + _FLOAT * (3 * max(of.reads, default=0) ** 2 + _SCORES * of.matrix)
    in_float32 = of.parameters * _FLOAT if item < _FLOAT else 0
    if asked.name == "lora":  # adapters, small beside all else
        return in_float32 + _graph(asked.text.length, of, _FLOAT)
    return in_float32 + 3 * of.parameters * _FLOAT + _graph(asked.text.length, of, _FLOAT)  # gradients, two moments


def _quantising(cell: Cell, of: Size, item: int) -> float:
    reads = forms.reads_text(cell.quantize)
    return (_text(cell, of, item) + _hessians(of)) if reads else _SCORES * _FLOAT * of.matrix


def _evaluation(cell: Cell, of: Size, item: int) -> float:
    rows = cell.benchmarks.batch_size * _ROW
    tokens = max(rows, cell.perplexity.seqlen) if cell.perplexity.source else rows
    return tokens * (of.writes + 4 * of.hidden) * item + _WORKED_ON * _FLOAT * _LOGITS


def _generation(asked: Efficiency, of: Size, item: int) -> float:
    tokens = asked.batch_size * (asked.prompt_tokens + asked.output_tokens)
    cached = 2 * tokens * of.blocks * of.hidden * item  # at most: fewer where heads share their keys
    return 2 * cached + tokens * of.writes * item


_STAGES: dict[str, Callable[[Cell, Size, int], float]] = {
    "prune": _pruning,
    "recovery": _recovery,
    "quantize": _quantising,
}


# ---- what fits ----


def of_machine(memory_limit: int | None, device: str) -> Machine:
    """What a cell on this device may take. Starts CUDA where that is the device."""
    if not device.startswith("cuda"):
        return Machine(machine.memory(memory_limit))
    import torch

    there = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    return Machine(machine.memory(memory_limit), there)


def on_disk(cell: Cell, of: Size, *, saves: bool = False) -> int:
    """Bytes of the disk that a cell takes at most whose weights lie there: its model, the dense one beside it, what it saves."""
    if cell.offload == "none":
        return 0
    beside = cell.recover.name != kinds.NONE or cell.efficiency.repeats > 0
    models = 1 + (beside + saves if cell.stages() else 0)
    return models * of.parameters * _STORED_TYPES[cell.dtype]


def check(cell: Cell, here: Machine, *, saves: bool = False) -> list[Need]:
    """The cell's needs; none where its model's size is not known yet.

    Raises RequestError where a stage cannot fit, with the settings that would let it, as far as there are some; and where
    the disk has no room for what is to lie there.
    """
    of = size(cell.model)
    if of is None:
        return []
    if (lies := on_disk(cell, of, saves=saves)) > (free := shutil.disk_usage(cache.folder()).free):
        raise RequestError(
            f"{cell.label()}: offload=disk takes {gib(lies)} of the disk of {cache.folder()}, which has {gib(free)}: set "
            "SWEEP_CACHE to a folder of another disk"
        )
    found = needs(cell, of, saves=saves)
    worst = _worst(found)
    available = here.of(worst.device)
    if available is None or worst.memory <= available:
        return found
    ways = [words for words, other in _ways(cell) if _fits(other, of, here, saves=saves)]
    advice = f"set {', or '.join(ways)}" if ways else "give it a machine with more memory"
    raise RequestError(
        f"{cell.label()}: {of.parameters:,} parameters as {cell.dtype} are {gib(of.parameters * _STORED_TYPES[cell.dtype])}, "
        f"and {worst.stage} is expected to take {gib(worst.memory)} on {worst.device}, where there are {gib(available)}: {advice}"
    )


def _worst(found: Sequence[Need]) -> Need:
    return max(found, key=lambda need: need.memory)


def _fits(cell: Cell, of: Size, here: Machine, *, saves: bool) -> bool:
    worst = _worst(needs(cell, of, saves=saves))
    available = here.of(worst.device)
    return available is None or worst.memory <= available


def _ways(cell: Cell) -> list[tuple[str, Cell]]:
    """Settings that take less memory, in the words that set them, and the cell that they make: first what changes least."""
    untimed = replace(cell, efficiency=replace(cell.efficiency, repeats=0))
    narrow = [("dtype=bfloat16", replace(cell, dtype="bfloat16"))] if cell.dtype == "float32" else []
    fewer = []
    if cell.calibration is not None and cell.calibration.sequences > 1:
        fewer = [("calibration.sequences=1", replace(cell, calibration=replace(cell.calibration, sequences=1)))]
    plain = [("recover=none", replace(cell, recover=Recover()))] if cell.recover.name != kinds.NONE else []
    timed = [("efficiency=none", untimed)] if cell.efficiency.repeats else []
    both = [("dtype=bfloat16 efficiency=none", replace(untimed, dtype="bfloat16"))] if narrow and timed else []
    descends = cell.recover.name != kinds.NONE and kinds.KINDS[cell.recover.name].descends
    in_memory = cell.device != "cpu" or descends  # what offload=disk refuses
    mapped = [] if in_memory else [("offload=disk", replace(cell, offload="disk"))]
    return [*timed, *narrow, *both, *plain, *fewer, *mapped]


def told(cells: Sequence[Cell], memory_limit: int | None, *, saves: bool = False, elsewhere: bool = False) -> list[str]:
    """Lines that say what the cells need: of each model its size, and of each cell the peaks of its stages.

    elsewhere  they run on other machines, of which this one knows the limit alone
    Raises RequestError for a cell that cannot fit.
    """
    lines: list[str] = []
    devices = {cell.device for cell in cells}
    machines = {d: Machine(memory_limit) if elsewhere else of_machine(memory_limit, d) for d in devices}
    for model in dict.fromkeys((cell.model, cell.dtype) for cell in cells):
        of = size(model[0])
        if of is None:
            lines.append(f"{model[0].name}: its size is told once its files are here")
            continue
        weights = gib(of.parameters * _STORED_TYPES[model[1]])
        lines.append(
            f"{model[0].name}: {of.parameters:,} parameters in {of.blocks} blocks, {weights} as {model[1]}, expected to take"
        )
        of_model = [cell for cell in cells if (cell.model, cell.dtype) == model]
        found = {cell.label(): check(cell, machines[cell.device], saves=saves) for cell in of_model}
        disk = {cell.label(): on_disk(cell, of, saves=saves) for cell in of_model}
        lines += [f"  {label}: {_words(stages, disk[label])}" for label, stages in found.items()]
    return lines


def _words(found: Sequence[Need], disk: int) -> str:
    lies = f", and {gib(disk)} on the disk of {cache.folder()}" if disk else ""
    return f"{', '.join(map(str, found))}, on {found[0].device}{lies}"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
