"""Criteria: what is declared of each is what its function says; a user's own is one like any other."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import random_tokens, tiny_model
from sweep import config, identity, provenance, run
from sweep.models import anatomy
from sweep.pruning import criteria, methods, own_functions, scores, select
from sweep.pruning.criteria import CRITERIA, READABLE, Criterion
from sweep.pruning.families import Head, Layer, Method, Neuron, Vocab, Weight
from sweep.report import variants
from sweep.settings import RequestError
from test_config import asked

OWN = """
from __future__ import annotations

import torch


def halved_wanda(weight: torch.Tensor, input_norm: torch.Tensor, power: float = 0.5):
    return weight.abs() * input_norm**power


def signed(weight):
    return -weight  # of the model's own memory, and negative


def of_all(weight, input_norm, gradient_norm, generator):
    noise = torch.rand(weight.shape, generator=generator)
    return weight.abs() * (input_norm + gradient_norm) + 1e-3 * noise


def surgeon(*, weight, hessian):
    inverse = torch.linalg.inv(hessian + hessian.diagonal().mean() * torch.eye(len(hessian)))
    return weight**2 / inverse.diagonal()


def loudest(activations, gradients, size):
    return activations.input_square.view(-1, size).sum(1) * gradients.product_abs


def rows_alone(rows, units):
    return rows[0].float().square().sum(1).view(units, -1).sum(1)


def turn(cosine, units):
    assert len(cosine) == units
    return 1 - cosine


def rare(counts, zipf):
    return 100 * counts + zipf
"""


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: f"{c.of}-{c.name}")
def test_what_a_criterion_reads_is_its_functions_parameters(criterion: Criterion) -> None:
    if criterion.measured:
        assert not criterion.function and not criterion.reads
        return
    assert tuple(inspect.signature(criterion.load()).parameters) == criterion.reads
    assert set(criterion.reads) <= READABLE[criterion.of].keys()
    corrects = any(readable.corrects for readable in criterion.given())
    assert corrects == bool(criterion.corrects_after)
    if corrects:
        deputy = criteria.find(criterion.corrects_after, criterion.of)
        assert not deputy.corrects_after
    if criterion.compensates:
        assert {"activations", "output_sum"} & set(criterion.reads)  # whose mean stays in place of what goes
    if criterion.paper:
        assert "arXiv:" in criterion.paper or "ICLR" in criterion.paper


def test_names_are_told_apart_within_a_kind_and_what_is_readable_is_read() -> None:
    pairs = [(criterion.of, criterion.name) for criterion in CRITERIA]
    assert len(set(pairs)) == len(pairs)
    for of, readable in READABLE.items():
        used = {name for criterion in criteria.declared(of) for name in criterion.reads}
        offered = {"tensors", "gate_sum"} if of == "expert" else set()  # which only criteria of a user's own may read
        assert readable.keys() == used | offered


def test_what_reads_text_and_what_draws_is_told_by_what_is_read() -> None:
    text = {
        "wanda",
        "gradient",
        "sparsegpt",
        "activation",
        "flap",
        "taylor",
        "taylor_sampled",
        "block_influence",
        "frequency",
    }
    none = {"magnitude", "random", "l2", "drop"}
    assert {criterion.name for criterion in CRITERIA if criterion.reads_text} >= text
    assert not {criterion.name for criterion in CRITERIA if criterion.reads_text} & none
    drawing = {criterion.name for criterion in CRITERIA if criterion.draws}
    assert {"random", "taylor_sampled"} <= drawing and not {"magnitude", "wanda", "l2", "taylor", "drop"} & drawing


def test_a_name_of_another_kind_is_no_name() -> None:
    with pytest.raises(
        RequestError,
        match="method.criterion must be one of random, block_influence, drop, or FILE.py:FUNCTION; got 'wanda'",
    ):
        criteria.find("wanda", "block")


def test_declarations_need_no_torch() -> None:
    code = "import sys; from sweep.pruning import criteria, families; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- functions from outside the package ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command is given; it holds a file of one's own."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weight(function: str, **more: object) -> Weight:
    return Weight(criterion=f"mine.py:{function}", **more)  # type: ignore[arg-type]


SELECTIONS = [
    {"scope": "matrix"},
    {"scope": "row"},
    {"scope": "global"},
    {"pattern": "2:4"},
    {"allocation": "owl"},
    {"steps": 3},
    {"embeddings": True, "lm_head": True},
    {"among_smallest": 0.8, "skip_lowest": 0.1},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("function", ["halved_wanda", "signed", "of_all", "surgeon"])
@pytest.mark.parametrize("sequential", [True, False])
def test_ones_own_function_prunes_weights_as_any_criterion(
    folder: Path, function: str, selection: dict, sequential: bool
) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in anatomy.tensors(model).items()}
    pruned = methods.prune(model, weight(function, **selection), 0.5, random_tokens(), sequential=sequential)
    assert pruned.removed == select.count(pruned.targets, 0.5)
    for name, tensor in anatomy.tensors(model).items():
        assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])  # what stays is as it was


def test_the_lowest_by_ones_own_scores_go(folder: Path) -> None:
    for method, scored in (
        (weight("signed"), lambda w: -w),
        (weight("signed", scope="row", allocation="uniform"), lambda w: -w),
    ):
        model = tiny_model("llama")
        name, linear = next(iter(anatomy.linears(model).items()))
        importance = scored(linear.weight.detach().clone())
        methods.prune(model, method, 0.25, None)
        choose = select.lowest_by_row if method.scope == "row" else select.lowest
        keep = choose(importance, select.count(importance.numel(), 0.25))
        assert torch.equal(anatomy.linears(model)[name].weight != 0, keep)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_copy_of_a_declared_criterion_gives_the_same_model(folder: Path, steps: int) -> None:
    (folder / "mine.py").write_text("def wanda(weight, input_norm):\n    return weight.abs() * input_norm\n")
    theirs, mine = tiny_model("llama"), tiny_model("llama")
    methods.prune(theirs, Weight(criterion="wanda", scope="row", steps=steps), 0.5, random_tokens())
    methods.prune(mine, weight("wanda", scope="row", steps=steps), 0.5, random_tokens())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), mine.parameters(), strict=True))


@pytest.mark.parametrize(
    "method",
    [
        Neuron(criterion="mine.py:loudest", steps=2),
        Neuron(criterion="mine.py:rows_alone", scope="layer"),
        Head(criterion="mine.py:loudest", unit="query"),
        Head(criterion="mine.py:rows_alone"),
        Layer(criterion="mine.py:turn"),
    ],
    ids=lambda m: f"{m.family} {m.criterion}",
)
def test_ones_own_function_prunes_units_and_blocks(folder: Path, method: Method) -> None:
    pruned = methods.prune(tiny_model("llama"), method, 0.5, random_tokens())
    assert pruned.sparsity_units == 0.5


def test_ones_own_function_prunes_a_vocabulary(folder: Path, tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = tokenizer("the cat sat on the mat", return_tensors="pt").input_ids
    pruned = methods.prune(model, Vocab(criterion="mine.py:rare"), 0.9, ids, tokenizer=tokenizer)
    assert pruned.tokenizer.decode(pruned.tokenizer("the cat").input_ids) == "the cat"


def test_python_takes_a_file_and_a_function(folder: Path, tiny_checkpoint: Path) -> None:
    def twice(weight, input_norm):
        return 2 * scores.wanda(weight, input_norm)

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    (folder / "mine.py").write_text("def twice(weight, input_norm):\n    return 2 * weight.abs() * input_norm\n")
    models = []
    for criterion in ("wanda", "mine.py:twice", twice):
        models.append(AutoModelForCausalLM.from_pretrained(tiny_checkpoint))
        sweep.prune(
            models[-1],
            tokenizer,
            method="weight",
            criterion=criterion,
            scope="row",
            sparsity=0.5,
            sequences=2,
            length=8,
        )
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))
    with pytest.raises(RequestError, match=r"twice\(\) reads 'input_norm', which is there for a weight"):
        sweep.prune(models[0], tokenizer, method="neuron", criterion=twice, sparsity=0.5)
    with pytest.raises(RequestError, match="must be one of"):  # a name for as long as the pruning lasts
        criteria.find("twice()", "weight")


def cell(criterion: str, family: str = "weight", **more: object) -> config.Cell:
    return config.parse(asked(method={"family": family, "criterion": criterion}, **more))[0]


def test_what_a_function_reads_decides_what_its_cell_is(folder: Path) -> None:
    """And is told without running the file, or loading torch."""
    (folder / "mine.py").write_text("raise SystemExit('it was run')\n" + OWN.replace("from __future__", "# "))
    assert cell("mine.py:signed").calibration is None and cell("mine.py:signed", seed=3).seed == 0
    assert cell("mine.py:halved_wanda").calibration is not None
    assert cell("mine.py:rows_alone", "neuron", seed=3).seed == 0
    assert cell("mine.py:of_all", seed=3).seed == 3
    assert cell("mine.py:signed").method.scope == "matrix" and cell("mine.py:signed").label().startswith(
        "weight mine.py:"
    )
    code = "import sys; from sweep.pruning import criteria; criteria.find('mine.py:signed', 'weight')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, cwd=folder)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("other.py:signed", "method.criterion=other.py:signed: there is no file 'other.py' in "),
        ("mine.py", "mine.py: name one of its functions after a colon. Functions there: halved_wanda, signed"),
        ("mine.py:sined", "mine.py:sined: it has no function 'sined'. Did you mean 'signed'"),
        ("mine.py:rows_alone", "reads 'rows', which is there for a unit. .*it may read, by these names:\n  weight: "),
        ("bad.py:misread", "reads 'input_nrom'. Did you mean 'input_norm'"),
        ("bad.py:corrects", "reads 'weights'. Did you mean 'weight'. Of a weight it may read"),
        ("bad.py:loose", r"reads '\*\*given'"),
        ("bad.py:nameless", "reads 'weight, /'"),
        ("broken.py:f", "broken.py:f: its file is no Python: .*line 2"),
        ("sined", "must be one of magnitude, .*, alps, or FILE.py:FUNCTION; got 'sined'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_is_loaded(
    folder: Path, criterion: str, message: str
) -> None:
    (folder / "broken.py").write_text("def f(weight):\nreturn weight\n")
    (folder / "bad.py").write_text(
        "def misread(weight, input_nrom): ...\ndef corrects(weights, hessian, choose): ...\n"
        "def loose(weight, **given): ...\ndef nameless(weight, /): ...\n"
    )
    with pytest.raises(RequestError, match=f"(?s){message}"):
        cell(criterion)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return weight.sum(1)", r"must return scores of shape \(16, 16\) for model.layers.0.*; it gave shape \(16,\)"),
        ("return weight / 0", "gave .* of 256 scores for model.layers.0.self_attn.q_proj that are NaN or infinite"),
        ("return weight.log()", "gave .* of 256 scores for .* that are NaN or infinite"),
        ("return 3", "must return a tensor of real numbers, one for each it scores; for .* it gave int"),
        ("return None", "it gave NoneType"),
        ("return weight * 1j", "it gave torch.complex64"),
        (
            "return weight @ weight[:3, :5]",
            r"failed for model.layers.0.* RuntimeError: .* \(mine.py, line 2: return weight @ weight\[:3, :5\]\)",
        ),
        ("import nothing_like_it", r"ModuleNotFoundError: .* \(mine.py, line 2: import nothing_like_it\)"),
    ],
)
def test_what_a_function_returns_is_checked(folder: Path, body: str, message: str) -> None:
    (folder / "mine.py").write_text(f"def f(weight):\n    {body}\n")
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    with pytest.raises(RequestError, match=f"method.criterion=mine.py:f .*{message}"):
        methods.prune(model, weight("f"), 0.5, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_file_that_cannot_be_run_is_told(folder: Path) -> None:
    (folder / "mine.py").write_text("import nothing_like_it\n\n\ndef f(weight):\n    return weight\n")
    with pytest.raises(
        RequestError, match=r"its file cannot be run: ModuleNotFoundError: .* \(mine.py, line 1: import"
    ):
        methods.prune(tiny_model("llama"), weight("f"), 0.5, None)


def test_memory_that_runs_out_in_ones_own_function_is_told_as_such(folder: Path) -> None:
    (folder / "mine.py").write_text("def f(weight):\n    raise MemoryError\n")
    with pytest.raises(MemoryError):
        methods.prune(tiny_model("llama"), weight("f"), 0.5, None)


def test_a_file_that_changes_while_a_cell_runs_is_told(folder: Path) -> None:
    (folder / "mine.py").write_text(f"# {folder}\n{OWN}")  # no file that another test has run
    found = criteria.find("mine.py:signed", "weight")
    (folder / "mine.py").write_text(OWN)
    with pytest.raises(RequestError, match="mine.py:signed: its file has changed since the cell began"):
        found.load()


def test_no_row_is_left_by_a_source_that_its_cell_is_not_named_by(folder: Path, tiny_checkpoint: Path) -> None:
    """The next idea is written into the file while a long sweep runs."""
    (folder / "mine.py").write_text(
        "def f(weight):\n    with open('mine.py', 'a') as file:\n        file.write('#')\n    return weight.abs()\n"
    )
    model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
    alone = {"benchmarks": {"tasks": []}, "efficiency": {"repeats": 0}, "dtype": "float32", "device": "cpu"}
    with pytest.raises(RequestError, match="method.criterion=mine.py:f: its file changed while the cell ran"):
        run.run_cell(cell("mine.py:f", model=model, **alone))


@pytest.mark.slow
def test_the_command_line_runs_a_file_of_ones_own(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / "scores").mkdir()
    (folder / "mine.py").rename(folder / "scores" / "mine.py")
    command = ["+method=weight", "method.criterion=scores/mine.py:halved_wanda,magnitude", "sparsity=0.5"]
    quick = [f"model.path={tiny_checkpoint}", "benchmarks=pydoc", "benchmarks.limit=2", "calibration.sequences=2"]
    command += ["model=local", *quick, "calibration.length=16", "efficiency=none", "dtype=float32", "threads=1", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", "sweep", *command], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "weight mine.py:halved_wanda 0.5" in done.stdout
    rows = sweep.load(folder / "results").set_index("criterion")
    assert rows.status["mine.py:halved_wanda"] == "ok" and rows.sparsity_achieved["mine.py:halved_wanda"] == 0.5
    assert rows.calibration_tokens["mine.py:halved_wanda"] == 32


def test_a_cell_is_named_by_the_source_and_not_by_where_it_lies(folder: Path, tiny_checkpoint: Path) -> None:
    model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "mine.py").write_text(OWN)
    whole = str(folder / "elsewhere" / "mine.py")
    names = {
        identity.cell_name(cell(f"{file}:signed", model=model)) for file in ("mine.py", "elsewhere/mine.py", whole)
    }
    assert len(names) == 1
    names.add(identity.cell_name(cell("mine.py:surgeon", model=model)))
    (folder / "mine.py").write_text(OWN.replace("-weight", "-2 * weight"))
    names.add(identity.cell_name(cell("mine.py:signed", model=model)))
    assert len(names) == 3
    columns = provenance.columns(cell(f"{whole}:signed", model=model), "command")
    assert columns["criterion"] == "mine.py:signed"
    assert identity.CRITERION in columns["data_fingerprints"]


def test_two_sources_under_one_name_are_two_variants(folder: Path, tiny_checkpoint: Path) -> None:
    model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
    rows = [provenance.columns(cell("mine.py:signed", model=model, sparsity=s), "command") for s in (0.3, 0.5)]
    (folder / "mine.py").write_text(OWN.replace("-weight", "-2 * weight"))
    rows.append(provenance.columns(cell("mine.py:signed", model=model), "command"))
    shown = variants.with_variant(pd.DataFrame(rows))
    assert shown.variant[0] == shown.variant[1] != shown.variant[2]
    assert shown.variant.str.contains("source=").all()
    alone = variants.with_variant(pd.DataFrame(rows[:2]))
    assert (alone.variant == "").all()


def test_an_installed_package_offers_a_criterion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "site" / "their_scores"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "good.py").write_text(OWN)
    info = folder / "site" / "their_scores-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-scores\nVersion: 1.0\n")
    lines = "theirs = their_scores.inner.good:signed\nlost = not_installed:f\n"
    (info / "entry_points.txt").write_text(f"[{own_functions.GROUP}]\n{lines}")
    monkeypatch.syspath_prepend(folder / "site")
    own_functions.offered.cache_clear()
    try:
        with pytest.raises(
            RequestError, match="alps, theirs, lost, or FILE.py:FUNCTION; got 'thiers'. Did you mean 'theirs'"
        ):
            cell("thiers")
        with pytest.raises(
            RequestError, match="lost is offered by an installed package whose not_installed has no source"
        ):
            cell("lost")
        assert cell("theirs").calibration is None  # read, and not imported
        before = criteria.find("theirs", "weight").source
        assert before == own_functions.source("theirs") and before.fingerprint
        (package / "__init__.py").write_text("")
        theirs, mine = tiny_model("llama"), tiny_model("llama")
        methods.prune(theirs, Weight(criterion="theirs"), 0.5, None)
        methods.prune(mine, weight("signed"), 0.5, None)
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), mine.parameters(), strict=True))
    finally:
        own_functions.offered.cache_clear()
