"""The forms in which matrices can be held and multiplied: what a cell's `execution` may name. No torch.

What each needs of a cell and of a machine, which settings it reads, and whether a checkpoint holds it stands here, and is
asked here by everyone else, and by what `execution=auto` chooses. Its layers are made in its own module, imported on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sweep.settings import RequestError

if TYPE_CHECKING:
    import torch

    from sweep.formats.packing import Packing

FormatName = Literal["dense", "shrunk", "int8", "int4", "bitmap", "bitmap_int8", "csr", "semi_structured"]
KernelName = Literal["auto", "avx512_vnni", "avx512_bf16", "avx512", "avx2", "portable", "torch"]
ExecutionName = Literal["auto", FormatName]
Dtype = Literal["bfloat16", "float16", "float32"]
BITS: Mapping[str, int] = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True)
class Kernel:
    """One of several ways to multiply by the matrices of a format."""

    dtypes: tuple[Dtype, ...]
    compiled: bool = True  # by a C++ compiler, when first used


@dataclass(frozen=True)
class Stored:
    """How a checkpoint holds the layers of a format: their tensors, and in sweep.json what these do not tell."""

    version: int  # the format of sweep.json that brought it: versions that do not know it refuse the folder
    key: str  # in sweep.json: the `facts` of each layer, by its name
    words: str  # what is stored of a pruned matrix, for the model's card


@dataclass(frozen=True)
class Left:
    """What the stages of a cell leave in the matrices of the blocks, as far as its settings tell."""

    dtype: Dtype
    zeros: float = 0.0  # the fraction of their weights
    pattern: str | None = None  # of the zeros, as method.pattern has it
    cut: bool = False  # removal of units has made them smaller
    codes: int | None = None  # bits of the codes that they were quantised to
    group: int | None = None  # columns that share a scale; None: a row does

    @property
    def bits(self) -> int:
        """Of a weight that is held as it is."""
        return BITS[self.dtype]

    @property
    def scales(self) -> float:
        """Bits of scales a weight, of two bytes each; one a row counts for nothing."""
        return 16 / self.group if self.group else 0.0


@dataclass(frozen=True)
class Format:
    """One form. A field left at its default says that it needs nothing, or that anything will do."""

    name: FormatName
    what: str  # words for the table of executions
    module: str | None = None  # has `packing(form, kernel, dtype)`; None: the model runs as pruning has left it
    # what it is for: matrices with zeros in them, those that removal of units has made smaller, or both
    holds: Literal["zeros", "cut", "any"] = "zeros"
    bits: int | None = (
        None  # of the codes that it holds, to which weights must be quantised; None: it holds any weights
    )
    patterns: tuple[str, ...] = ()  # of method.pattern, one of which it needs
    matrices: str = ""  # what these patterns are
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")  # that it multiplies
    meant_for: Dtype | None = None  # what dtype=auto becomes, where it multiplies several
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")
    where: str = "anywhere"  # these devices in words
    elsewhere: str = ""  # what to do on another device
    # what execution.kernel may name beside auto, fastest first
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    # what execution.fallback=true runs where it cannot: a kernel that needs no compiler, or the zeros in dense matrices
    fallback: Literal["kernel", "dense"] | None = None
    stored: Stored | None = None
    # bits a weight of such matrices: execution=auto runs what takes the fewest. None: it is chosen by its name alone, since
    # fewer bytes do not make it faster
    weighs: Callable[[Left], float] | None = None

    @property
    def saves(self) -> bool:
        """Whether a checkpoint holds a model in this form."""
        return self.module is None or self.stored is not None

    def check_saves(self) -> None:
        """Raises RequestError where a checkpoint cannot hold a model in this form."""
        if not self.saves:
            others = " or ".join(
                other.name for other in FORMATS.values() if other.saves and other.holds != "cut" and not other.bits
            )
            raise RequestError(
                f"save_model: safetensors holds no {self.name} matrices: use execution={others}, or set "
                "execution.saved=plain to store what they stand for"
            )

    def check_dtype(self, dtype: str, kernel: str = "auto") -> None:
        """Raises RequestError for a dtype that the format, or the kernel asked for, does not multiply."""
        if dtype not in self.dtypes:
            only = " only" if len(self.dtypes) == 1 else ""
            raise RequestError(
                f"execution={self.name} multiplies {' or '.join(self.dtypes)}{only}, got dtype={dtype}: set "
                f"dtype={self.dtypes[0]}, or use another execution"
            )
        if kernel in self.kernels and dtype not in self.kernels[kernel].dtypes:
            another = next(name for name, other in self.kernels.items() if dtype in other.dtypes)
            raise RequestError(
                f"execution.kernel={kernel} multiplies {' or '.join(self.kernels[kernel].dtypes)}, got dtype={dtype}: "
                f"use execution.kernel={another}"
            )

    def only_dtype(self, kernel: str) -> Dtype | None:
        """The dtype that it alone multiplies with this kernel, or that it is meant for; None where it is the machine's choice."""
        dtypes = self.kernels[kernel].dtypes if kernel in self.kernels else self.dtypes
        return dtypes[0] if len(dtypes) == 1 else self.meant_for

    def takes(self, left: Left, device: str) -> bool:
        """Whether it holds such matrices, and multiplies them on this device."""
        return (
            (self.holds == "any" or (self.holds == "cut") == left.cut)
            and (not self.patterns or left.pattern in self.patterns)
            and (self.bits is None or (left.codes is not None and left.codes <= self.bits))
            and left.dtype in self.dtypes
            and device.partition(":")[0] in self.devices
        )

    def compiles(self, kernel: str) -> bool:
        """Whether this kernel, or the fastest, which is `auto`, is compiled when first used."""
        return any(each.compiled for name, each in self.kernels.items() if kernel in (name, "auto"))

    def packing(self, kernel: str, dtype: torch.dtype) -> Packing:
        """How matrices of this dtype are packed on this machine, to be multiplied by this kernel."""
        assert self.module is not None
        return importlib.import_module(self.module).packing(self, kernel, dtype)


DENSE = Format("dense", "zeros in a dense matrix", weighs=lambda left: left.bits)
SHRUNK = Format(
    "shrunk",
    "what removal of neurons, heads, layers, experts or vocabulary leaves; chosen by the method",
    holds="cut",
    weighs=lambda left: left.bits,
)
BITMAP = Format(
    "bitmap",
    "one bit a weight and the packed non-zeros, bfloat16 or float32; products by our own kernel (AVX-512, AVX2, portable: "
    "the processor decides), many tokens by expanding panels for the dense product",
    module="sweep.formats.bitmap",
    dtypes=("bfloat16", "float32"),
    devices=("cpu",),
    where="the CPU",
    elsewhere="set device=cpu",
    kernels={
        "avx512_bf16": Kernel(("bfloat16",)),
        "avx512": Kernel(("bfloat16", "float32")),
        "avx2": Kernel(("bfloat16", "float32")),
        "portable": Kernel(("bfloat16", "float32")),
        "torch": Kernel(("bfloat16", "float32"), compiled=False),
    },
    fallback="kernel",
    stored=Stored(2, "bitmap_columns", "one bit a weight and their non-zeros"),
    weighs=lambda left: (1 - left.zeros) * left.bits + 1,
)
_CODED: dict[str, Any] = {  # what the formats of codes have in common
    "holds": "any",
    "module": "sweep.formats.codes",
    "dtypes": ("bfloat16", "float32"),
    "devices": ("cpu",),
    "where": "the CPU",
    "elsewhere": "set device=cpu, or use execution=dense, which runs the quantised values",
    "fallback": "kernel",
}
_CODED_KERNELS = {
    "avx512": Kernel(("bfloat16", "float32")),
    "avx2": Kernel(("bfloat16", "float32")),
    "portable": Kernel(("bfloat16", "float32")),
    "torch": Kernel(("bfloat16", "float32"), compiled=False),
}
_BYTE_KERNELS = {"avx512_vnni": Kernel(("bfloat16", "float32"))} | _CODED_KERNELS
INT8 = Format(
    "int8",
    "matrices quantised with `quantize=`, a byte a weight and the scales; inputs stay bfloat16 or float32. Products by our "
    "own kernel (AVX-512 VNNI, AVX-512, AVX2, portable), many tokens by expanding panels for the dense product",
    bits=8,
    kernels=_BYTE_KERNELS,
    stored=Stored(3, "int8_columns", "codes of a byte and their scales"),
    weighs=lambda left: 8 + left.scales,
    **_CODED,
)
INT4 = Format(
    "int4",
    "the same in half a byte, for `quantize=int4` or `q4_0`",
    bits=4,
    kernels=_CODED_KERNELS,
    stored=Stored(4, "int4_columns", "codes of half a byte and their scales"),
    weighs=lambda left: 4 + left.scales,
    **_CODED,
)
BITMAP_INT8 = Format(
    "bitmap_int8",
    "pruned and quantised: one bit a weight, a byte for each that is not zero, and the scales; 5 bits a weight at 50 %. "
    "Products as for `int8`",
    bits=8,
    kernels=_BYTE_KERNELS,
    stored=Stored(5, "bitmap_int8_columns", "one bit a weight, codes of a byte for the non-zeros, and their scales"),
    weighs=lambda left: 8 * (1 - left.zeros) + 1 + left.scales,
    **_CODED,
)
CSR = Format(
    "csr",
    "torch's compressed sparse rows, float32",
    module="sweep.formats.csr",
    dtypes=("float32",),
    devices=("cpu",),
    where="the CPU",
    elsewhere="set device=cpu",
)
SEMI_STRUCTURED = Format(
    "semi_structured",
    "torch's 2:4 form of matrices pruned with `method.pattern=2:4`, bfloat16 or float16. Chosen by its name alone: it needs "
    "0.56 of the bytes, and one token takes longer (0.15 of the dense model's speed in eager mode on an H200)",
    module="sweep.formats.semi_structured",
    patterns=("2:4", "1:4"),
    matrices="of which each four neighbours hold two weights at most",
    dtypes=("bfloat16", "float16"),
    meant_for="bfloat16",
    devices=("cuda",),
    where="a CUDA device of the Ampere generation or later",
    elsewhere="use execution=bitmap",
    fallback="dense",
)

FORMATS: dict[str, Format] = {
    form.name: form for form in (DENSE, SHRUNK, INT8, INT4, BITMAP, BITMAP_INT8, CSR, SEMI_STRUCTURED)
}


def automatic(left: Left, device: str, *, compiler: bool = True) -> Format:
    """The form that `execution=auto` runs: of those that take what is left here, the one of the fewest bits a weight.

    compiler  whether kernels can be built. Bytes decide because decoding reads all of them for each token, and because
              they can be told before anything runs; of equal forms the one that is declared first
    """
    offered = [form for form in FORMATS.values() if form.weighs is not None and form.takes(left, device)]
    offered = [form for form in offered if compiler or not form.compiles("auto")]
    return min(offered, key=lambda form: form.weighs(left) if form.weighs else 0)


def table() -> str:
    """The executions as a table in Markdown."""
    lines = ["| execution | what it is | where |", "|---|---|---|"]
    lines.append(
        "| `auto` | the one of these that holds what is left of the weights in the fewest bytes here | anywhere |"
    )
    for form in FORMATS.values():
        compiler = ", with a C++ compiler when first used" if form.compiles("auto") else ""
        lines.append(f"| `{form.name}` | {form.what} | {form.where}{compiler} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
