"""The criteria by which methods choose what goes, each declared once. No torch.

A criterion is one plain function from what it reads to scores, higher = keep. What it reads is named by the function's
parameters; `READABLE` lists what there is for each kind. What is calibrated, seeded or ranked by row, the legal names,
the tables of docs/methods.md and docs/adding.md and the tests of invariants are made from these records:

    python -m sweep.pruning.criteria docs/methods.md docs/adding.md     writes the tables of the pages anew

A user's own function is one like any other, whether it is named as FILE.py:FUNCTION, offered by an installed package, or
given from Python: what it reads is told by its parameters all the same.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sweep.pruning import own_functions
from sweep.pruning.own_functions import Parameters, Source
from sweep.settings import RequestError, did_you_mean

# what is scored: a weight; a neuron or head; a block or sublayer; a token; an expert
Kind = Literal["weight", "unit", "block", "token", "expert"]
Labels = Literal["text", "model"]  # whose next tokens a gradient is of: the text's own, or ones drawn from the model


@dataclass(frozen=True)
class Readable:
    """What a function may name among its parameters."""

    what: str
    text: bool = False  # is told by calibration text
    labels: Labels | None = None  # with a backward pass from the loss of these next tokens
    draws: bool = False  # depends on the seed, text or not
    corrects: bool = False  # for a criterion that corrects the weights that stay, and no other


READABLE: dict[Kind, dict[str, Readable]] = {
    "weight": {
        "weight": Readable("(out, in) the matrix, in the model's dtype"),
        "input_norm": Readable("(in,) float32, L2 norm of each input feature over the calibration tokens", text=True),
        "hessian": Readable("(in, in) float32, X^T X of the inputs X (tokens, in)", text=True),
        "gradient_norm": Readable(
            "(out, in) float32, root of the summed squares of each sequence's gradient of the loss",
            text=True,
            labels="text",
        ),
        "generator": Readable("torch.Generator on the CPU, seeded by the seed and the matrix's name", draws=True),
        "weights": Readable("the matrices that read one input, each (out, in) float32", corrects=True),
        "choose": Readable("of each matrix, the function from scores of some columns to a keep-mask", corrects=True),
        "damping": Readable("method.damping, a share of the mean of the Hessian's diagonal", corrects=True),
        "m": Readable("columns that are chosen in a group, of an n:m pattern; else 1", corrects=True),
        "gone": Readable("of each matrix, True where an earlier step removed a weight; or None", corrects=True),
        "rounder": Readable(
            "what rounds the weights that stay, where they are quantised at once; or None", corrects=True
        ),
    },
    "unit": {
        "weight": Readable("(out, columns) the matrix that reads the units, `size` columns each, in the model's dtype"),
        "rows": Readable("the matrices that make the units, each (rows, in), as many rows for every unit"),
        "size": Readable("columns of `weight` a unit: 1 for a neuron, head_dim for a head"),
        "units": Readable("how many there are"),
        "activations": Readable("unit_scores.Activations: sums over tokens of what `weight` reads", text=True),
        "gradients": Readable(
            "unit_scores.Gradients: with these, sums of activation times gradient of the text's loss",
            text=True,
            labels="text",
        ),
        "sampled_gradients": Readable(
            "unit_scores.Gradients of the loss of next tokens that are drawn from the model",
            text=True,
            labels="model",
            draws=True,
        ),
        "generator": Readable("torch.Generator on the CPU, seeded by the seed", draws=True),
    },
    "block": {
        "units": Readable("how many there are"),
        "cosine": Readable(
            "(units,) float64, mean over tokens of that between the hidden state before it and after it", text=True
        ),
        "generator": Readable("torch.Generator on the CPU, seeded by the seed", draws=True),
    },
    "token": {
        "units": Readable("how many there are"),
        "counts": Readable("(tokens,) int64, how often each stands in the calibration text", text=True),
        "zipf": Readable(
            "(tokens,) float64, log10 of occurrences in 10^9 words of general text, 0 to 8; -1 for a row of no token"
        ),
        "generator": Readable("torch.Generator on the CPU, seeded by the seed", draws=True),
    },
    "expert": {
        "units": Readable("how many there are in the block"),
        "tensors": Readable("by name, the tensors that hold all experts, along their first dimension"),
        "counts": Readable("(experts,) int64, how many calibration tokens took each", text=True),
        "gate_sum": Readable("(experts,) float64, sum over these of the gate", text=True),
        "norm_sum": Readable("(experts,) float64, sum over these of the L2 norm of what it gives, ungated", text=True),
        "gated_norm_sum": Readable("(experts,) float64, sum over these of gate · that norm", text=True),
        "output_sum": Readable("(experts, hidden) float64, sum over these of what it gives, ungated", text=True),
        "output_square": Readable("(experts,) float64, sum over these of the squared norm", text=True),
        "generator": Readable("torch.Generator on the CPU, seeded by the seed", draws=True),
    },
}


@dataclass(frozen=True)
class Criterion:
    """What the house must know of a criterion without importing its function."""

    name: str
    of: Kind
    score: str  # in words, for the table of criteria
    function: str = ""  # MODULE:NAME, imported on use; empty for one that is measured
    reads: tuple[str, ...] = ()  # the function's parameters
    paper: str = ""
    within: Literal["matrix", "row"] = "matrix"  # what its paper compares weights within
    steady: bool = False  # the scores of what stays do not change as others go: further steps bring nothing
    # The function chooses within a matrix and corrects the weights that stay; where matrices are compared with each
    # other, the criterion of this name scores.
    corrects_after: str = ""
    compensates: bool = False  # what went gives on average stays: of columns as a bias, of an expert as a vector
    measured: bool = False  # what removing it costs is measured, as method.metric and method.task say
    source: Source | None = None  # of a function from outside the package

    def given(self) -> list[Readable]:
        return [READABLE[self.of][name] for name in self.reads]

    @property
    def reads_text(self) -> bool:
        return any(readable.text for readable in self.given())

    @property
    def draws(self) -> bool:
        return any(readable.draws for readable in self.given())

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        if self.name in _GIVEN:
            return _GIVEN[self.name]
        if self.source is not None:
            return own_functions.load(self.name, self.source)
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of the function: of what is given by name, what it reads."""
        return {what: given[what] for what in self.reads}


_MOLCHANOV = "Molchanov et al. 2019, arXiv:1906.10771"
_AN = "An et al. 2023, arXiv:2312.11983"

CRITERIA = (
    Criterion(
        "magnitude",
        "weight",
        "abs(W_ij)",
        "sweep.pruning.scores:magnitude",
        reads=("weight",),
        paper="Han et al. 2015, arXiv:1506.02626",
        steady=True,
    ),
    Criterion(
        "random",
        "weight",
        "uniform noise: the baseline that others must beat",
        "sweep.pruning.scores:random",
        reads=("weight", "generator"),
        steady=True,
    ),
    Criterion(
        "wanda",
        "weight",
        "abs(W_ij) · norm(x_j), compared within a row",
        "sweep.pruning.scores:wanda",
        reads=("weight", "input_norm"),
        within="row",
        paper="Sun et al. 2023, arXiv:2306.11695",
    ),
    Criterion(
        "ria",
        "weight",
        "(abs(W_ij) / row sum + abs(W_ij) / column sum) · sqrt(norm(x_j))",
        "sweep.pruning.scores:ria",
        reads=("weight", "input_norm"),
        paper="Zhang et al. 2024, Plug-and-Play (ICLR)",
    ),
    Criterion(
        "gradient",
        "weight",
        "abs(W_ij) · norm(g_ij) over the calibration sequences, compared within a row",
        "sweep.pruning.scores:gradient",
        reads=("weight", "gradient_norm"),
        within="row",
        paper="Das et al. 2023, arXiv:2311.04902",
    ),
    Criterion(
        "sparsegpt",
        "weight",
        "W_ij² / [H⁻¹]_jj with H = x xᵀ, factored for each matrix; the weights that stay are corrected",
        "sweep.pruning.rebuild:sparsegpt",
        reads=("weights", "hessian", "choose", "damping", "m", "gone", "rounder"),
        corrects_after="wanda",
        paper="Frantar and Alistarh 2023, arXiv:2301.00774",
    ),
    Criterion(
        "alps",
        "weight",
        "the same loss by ADMM, many solves a matrix, then least squares for the weights that stay",
        "sweep.pruning.rebuild:alps",
        reads=("weights", "hessian", "choose", "damping", "gone"),
        corrects_after="wanda",
        paper="Meng et al. 2024, arXiv:2406.07831",
    ),
    Criterion(
        "random",
        "unit",
        "uniform noise",
        "sweep.pruning.unit_scores:random",
        reads=("units", "generator"),
    ),
    Criterion(
        "l2",
        "unit",
        "L2 norm of all its weights",
        "sweep.pruning.unit_scores:l2",
        reads=("rows", "weight", "size"),
    ),
    Criterion(
        "activation",
        "unit",
        "L2 norm of x_u",
        "sweep.pruning.unit_scores:activation",
        reads=("activations", "size"),
    ),
    Criterion(
        "wanda_sp",
        "unit",
        "sum of abs(W_ij) · norm(x_j) over its weights",
        "sweep.pruning.unit_scores:wanda_sp",
        reads=("weight", "activations", "size"),
        paper=f"in {_AN}",
    ),
    Criterion(
        "flap",
        "unit",
        "variance of x_u · squared norm of its column, standardised in the block; the mean goes into a bias",
        "sweep.pruning.unit_scores:flap",
        reads=("weight", "activations", "size"),
        compensates=True,
        paper=_AN,
    ),
    Criterion(
        "taylor",
        "unit",
        "signed sum of x_u g_u: the first-order change of the loss",
        "sweep.pruning.unit_scores:taylor",
        reads=("gradients",),
        paper=_MOLCHANOV,
    ),
    Criterion(
        "taylor_abs",
        "unit",
        "sum over tokens of abs(x_u g_u)",
        "sweep.pruning.unit_scores:taylor_abs",
        reads=("gradients",),
        paper=f"after {_MOLCHANOV}",
    ),
    Criterion(
        "taylor_norms",
        "unit",
        "L1 norm · L2 norm of x_u g_u over tokens; ranks as their geometric mean",
        "sweep.pruning.unit_scores:taylor_norms",
        reads=("gradients",),
    ),
    Criterion(
        "taylor_balanced",
        "unit",
        "geometric mean of these two norms, over its mean in the block to the power 0.3",
        "sweep.pruning.unit_scores:taylor_balanced",
        reads=("gradients",),
        paper="normalised by block after Molchanov et al. 2017, arXiv:1611.06440",
    ),
    Criterion(
        "taylor_sampled",
        "unit",
        "the same, of the loss of next tokens that are drawn from the model in place of the text's own",
        "sweep.pruning.unit_scores:taylor_sampled",
        reads=("sampled_gradients",),
        paper="true and empirical Fisher information: Kunstner et al. 2019, arXiv:1905.12558",
    ),
    Criterion(
        "fisher",
        "unit",
        "sum over sequences of the squared sum of x_u g_u",
        "sweep.pruning.unit_scores:fisher",
        reads=("gradients",),
        paper="Theis et al. 2018, arXiv:1801.05787",
    ),
    Criterion("drop", "unit", "what a metric loses when the unit is removed, measured", measured=True),
    Criterion(
        "random",
        "block",
        "uniform noise",
        "sweep.pruning.unit_scores:random",
        reads=("units", "generator"),
    ),
    Criterion(
        "block_influence",
        "block",
        "1 - mean cosine between its input and output",
        "sweep.pruning.unit_scores:block_influence",
        reads=("cosine",),
        paper="Men et al. 2024, arXiv:2403.03853",
    ),
    Criterion("drop", "block", "what a metric loses without it, measured", measured=True),
    Criterion(
        "random",
        "token",
        "uniform noise",
        "sweep.pruning.unit_scores:random",
        reads=("units", "generator"),
    ),
    Criterion(
        "frequency",
        "token",
        "its count in the calibration text; rows that no token has, as in a padded embedding, go first",
        "sweep.pruning.unit_scores:frequency",
        reads=("counts", "zipf"),
    ),
    Criterion(
        "random",
        "expert",
        "uniform noise",
        "sweep.pruning.unit_scores:random",
        reads=("units", "generator"),
    ),
    Criterion(
        "frequency",
        "expert",
        "how many tokens take it",
        "sweep.pruning.expert_scores:frequency",
        reads=("counts",),
    ),
    Criterion(
        "mean_norm",
        "expert",
        "mean norm of what it gives, over the tokens that take it",
        "sweep.pruning.expert_scores:mean_norm",
        reads=("counts", "norm_sum"),
    ),
    Criterion(
        "reap",
        "expert",
        "mean of gate · norm of what it gives, over the tokens that take it",
        "sweep.pruning.expert_scores:reap",
        reads=("counts", "gated_norm_sum"),
        paper="arXiv:2510.13999",
    ),
    Criterion(
        "mone",
        "expert",
        "share of tokens that take it · variance of what it gives; its mean stays in its place",
        "sweep.pruning.expert_scores:mone",
        reads=("counts", "output_sum", "output_square"),
        compensates=True,
        paper="after arXiv:2507.00390",
    ),
    Criterion("drop", "expert", "what a metric loses without it, measured", measured=True),
)

_DECLARED = {(criterion.of, criterion.name): criterion for criterion in CRITERIA}


def declared(of: Kind) -> list[Criterion]:
    """The criteria of a kind, in the order in which they are listed."""
    return [criterion for criterion in CRITERIA if criterion.of == of]


def names(of: Kind) -> tuple[str, ...]:
    """Of the criteria of a kind."""
    return tuple(criterion.name for criterion in declared(of))


def find(name: str, of: Kind) -> Criterion:
    """The criterion of a kind that goes by this name. Raises RequestError where there is none: never another."""
    if (of, name) in _DECLARED:
        return _DECLARED[of, name]
    if name not in Names(of):
        raise RequestError(f"method.criterion must be one of {Names(of)}; got {name!r}.{did_you_mean(name, Names(of))}")
    if name in _GIVEN:
        return _own(name, of, own_functions.parameters(_GIVEN[name]), None)
    source = own_functions.source(name)
    return _own(name, of, source.parameters, source)


# ---- functions from outside the package ----

_GIVEN: dict[str, Callable[..., Any]] = {}  # from Python, while a pruning lasts


class Names(Collection[str]):
    """What the criterion of a kind may be called. Those declared here are listed first."""

    def __init__(self, of: Kind) -> None:
        self._declared = names(of)

    def __contains__(self, name: object) -> bool:
        return name in self._declared or (
            isinstance(name, str) and (name in _GIVEN or own_functions.is_file(name) or name in own_functions.offered())
        )

    def __iter__(self) -> Iterator[str]:
        return iter((*self._declared, *(name for name in own_functions.offered() if name not in self._declared)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __str__(self) -> str:
        return f"{', '.join(self)}, or FILE.py:FUNCTION"


@contextmanager
def given(function: Callable[..., Any]) -> Iterator[str]:
    """While open, the name by which a function is a criterion in this process."""
    name = f"{getattr(function, '__name__', type(function).__name__)}()"
    _GIVEN[name] = function
    try:
        yield name
    finally:
        del _GIVEN[name]


def shown(name: str | None) -> str | None:
    """What a criterion is called in rows: of a file its name alone, wherever it lies."""
    if name is None or not own_functions.is_file(name):
        return name
    file, colon, function = name.rpartition(":")
    return f"{Path(file).name}{colon}{function}"


def _own(name: str, of: Kind, parameters: Parameters, source: Source | None) -> Criterion:
    readable = {what: readable for what, readable in READABLE[of].items() if not readable.corrects}
    for parameter, optional in parameters:
        if parameter not in readable and not optional:
            kinds = [kind for kind, things in READABLE.items() if parameter in things and kind != of]
            there = f", which is there for {' or '.join(map(with_article, kinds))}" if kinds else ""
            listed = "".join(f"\n  {what}: {known.what}" for what, known in readable.items())
            raise RequestError(
                f"method.criterion={name} reads {parameter!r}{there}.{did_you_mean(parameter, readable)} Of {with_article(of)} it may "
                f"read, by these names:{listed}"
            )
    reads = tuple(parameter for parameter, _ in parameters if parameter in readable)
    return Criterion(name, of, "a function of one's own", reads=reads, source=source)


def with_article(of: Kind) -> str:
    return f"an {of}" if of == "expert" else f"a {of}"


# ---- the tables of the documentation ----


def table(of: Kind) -> str:
    """The criteria of a kind as a table in Markdown."""
    lines = [f"| criterion | score of {with_article(of)} | reads | from |", "|---|---|---|---|"]
    for criterion in declared(of):
        cells = (f"`{criterion.name}`", criterion.score, _cost(criterion), criterion.paper)
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def readable_table(of: Kind) -> str:
    """What a function of one's own may read, likewise."""
    lines = [f"| read of {with_article(of)} | what it is | costs |", "|---|---|---|"]
    for name, readable in READABLE[of].items():
        if not readable.corrects:
            lines.append(f"| `{name}` | {readable.what} | {_pass(of, [readable])} |")
    return "\n".join(lines) + "\n"


def _cost(criterion: Criterion) -> str:
    """What a criterion costs, in a word."""
    return "a forward pass for each" if criterion.measured else _pass(criterion.of, criterion.given())


def _pass(of: Kind, read: list[Readable]) -> str:
    if any(readable.labels for readable in read):
        return "backward"
    if any(readable.text for readable in read):
        return "text" if of == "token" else "forward"  # tokens are counted, and no model reads them
    return "weights"


def with_tables(page: str) -> str:
    """The page with each of these tables as it is now."""
    for made in (make(of) for of in READABLE for make in (table, readable_table)):
        heading = made.partition("\n")[0]
        before, found, rest = page.partition(heading)
        if found:
            page = before + made + re.sub(r"\A.*\n(\|.*\n)*", "", rest)
    return page


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
