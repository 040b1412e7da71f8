"""Quantisation: values against formulas written out, zeros that stay zero, one pass with SparseGPT, and the cells of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sweep
from conftest import GATED, random_tokens
from sweep import config, identity, plan, run, solver
from sweep.config import Calibration, Cell, Efficiency
from sweep.models import anatomy
from sweep.pruning import families, weights
from sweep.pruning.families import Dense, Neuron, Weight
from sweep.quantization import fitting, forms, quantise, rounding
from sweep.quantization.forms import FORMS, Quantize
from sweep.settings import RequestError
from test_weights import literal_sparsegpt, problem

ROOT = Path(__file__).resolve().parents[1]
WIDE = {**GATED, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
SIZES = {
    "llama": WIDE,
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 96, "n_positions": 64},
    "mixtral": {**WIDE, "num_local_experts": 3, "num_experts_per_tok": 2},
}
DENSE = Dense()
ASKED = [Quantize(form) for form in FORMS] + [
    Quantize("int8", "gptq"),
    Quantize("int4", "gptq"),
    Quantize("q5_0", "gptq"),
]


@cache
def _made(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **SIZES[family], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(made, dtype=dtype).eval()


def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return copy.deepcopy(_made(family, dtype))


def full(setting: Quantize, method: families.Method = DENSE) -> Quantize:
    return forms.normalised(setting, method)


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    return anatomy.all_matrices(model, embeddings=True, head=True)


# ---- to the nearest ----


def literal_nearest(name: str, group: int | None, weight: np.ndarray) -> np.ndarray:
    """Symmetric rounding to whole multiples of a scale in bfloat16, one value after the other."""
    most = {"int8": 127, "int4": 7}[name]
    found = np.empty_like(weight)
    for i, row in enumerate(weight):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            scale = float(torch.tensor(np.abs(part).max() / most).bfloat16())
            for j, value in enumerate(part):
                code = min(max(round(float(value) / scale), -most), most) if scale else 0
                found[i, start + j] = code * scale
    return found


@pytest.mark.parametrize(("name", "group"), [("int8", None), ("int4", 32), ("int4", 64)])
def test_whole_numbers_are_the_nearest_multiples_of_a_scale(name: str, group: int | None) -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).pow(3)
    weight[1, :64], weight[2] = 0, 1e-30  # a group of zeros, a row of next to none
    values, grid = rounding.nearest(FORMS[name], group, weight)
    np.testing.assert_allclose(values, literal_nearest(name, group, weight.numpy()), rtol=1e-6, atol=0)
    assert grid.holds(values) and grid.group == group and grid.bits == FORMS[name].bits
    assert (grid.codes(weight).abs().amax(1)[[0, 3, 4]] == grid.range[1]).all()


@pytest.mark.parametrize("name", [form.name for form in FORMS.values() if form.gguf])
def test_forms_of_gguf_are_byte_for_byte_what_gguf_makes(name: str) -> None:
    form = FORMS[name]
    kind = gguf.GGMLQuantizationType[form.gguf]
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).pow(3)
    weight[0, :32], weight[1, ::2] = 0, 0
    packed = quants.quantize(weight.numpy(), kind)
    values, grid = rounding.nearest(form, 32, weight)
    assert np.array_equal(values.numpy(), quants.dequantize(packed, kind))
    assert grid.holds(values) and not values[weight == 0].any()
    blocks = packed.reshape(6, 3, -1)
    assert np.array_equal(grid.scales.half().numpy().view(np.uint8).reshape(6, 3, 2), blocks[:, :, :2])
    codes = grid.codes(values).numpy().reshape(6, 3, 32)
    codes[np.broadcast_to(grid.scales.numpy()[:, :, None] == 0, codes.shape)] = 0
    if name == "q8_0":
        assert np.array_equal(codes.view(np.uint8), blocks[:, :, 2:])
    if name == "q4_0":  # the first half of a block in the low four bits; a block of zeros holds the code of zero too
        shifted = (codes + 8).astype(np.uint8)
        assert np.array_equal(shifted[:, :, :16] | (shifted[:, :, 16:] << 4), blocks[:, :, 2:])
    half = rounding.nearest(form, 32, weight.bfloat16())  # what a model in bfloat16 holds gives the codes back
    assert half[1].holds(half[0])


def test_a_matrix_that_the_groups_do_not_divide_is_refused() -> None:
    for form in (FORMS["int4"], FORMS["q8_0"]):
        with pytest.raises(ValueError, match="its 48 columns are no multiple of the 32 that share a scale"):
            rounding.nearest(form, 32, torch.ones(2, 48))


# ---- column by column ----


def literal_gptq(
    weight: Tensor, hessian: Tensor, name: str, group: int | None, gone: Tensor, chosen: int | None = None
) -> Tensor:
    """GPTQ's steps with an explicit inverse for each column, float64: arXiv:2210.17323, equations 2 and 3.

    gone    weights that become zero when it is their turn, as in SparseGPT's paper
    chosen  columns from a group's first on of which that is known when the group gets its scale; None: all
    """
    weight, columns = weight.clone(), weight.shape[1]
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    form = FORMS[name]
    lowest = -(2 ** (form.bits - 1) - 1) if form.lowest is None else form.lowest
    for j in range(columns):
        if j % (group or columns) == 0:
            known = gone[:, j : j + (group or columns)].clone()
            known[:, slice(chosen, None) if chosen else slice(0)] = False
            ahead = weight[:, j : j + (group or columns)].masked_fill(known, 0)
            largest = ahead.gather(1, ahead.abs().argmax(1, keepdim=True))
            scale = largest.abs() / -lowest if form.lowest is None else largest / lowest
            scale = scale.to(torch.float16 if form.gguf else torch.bfloat16).double()
        code = (weight[:, j : j + 1] / scale).round().clamp(lowest, 2 ** (form.bits - 1) - 1)
        value = torch.where(gone[:, j : j + 1], 0.0, code * scale)[:, 0]
        inverse = torch.linalg.inv(h[j:, j:])
        error = (weight[:, j] - value) / inverse[0, 0]
        weight[:, j:] -= torch.outer(error, inverse[0])
        weight[:, j] = value
    return weight


@pytest.mark.parametrize(("name", "group"), [("int8", None), ("int4", 32), ("int4", 128), ("q4_0", 32), ("q5_0", 32)])
@pytest.mark.parametrize("pruned", [False, True])
def test_gptq_agrees_with_a_literal_dense_algebra_reference(name: str, group: int | None, pruned: bool) -> None:
    weight, hessian = problem(6, 256)
    if pruned:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
    expected = literal_gptq(weight, hessian, name, group, weight == 0)
    rounder = rounding.Rounder(FORMS[name], group)
    # in float32, as a scale is made of what is left in float32: a code at the border of two may be the other one
    ((values, keep),), _ = solver.by_column([weight.float()], hessian.float(), 0.01, rounder=rounder)
    (grid,) = rounder.grids([6])
    assert grid.holds(values.contiguous()) and torch.equal(keep, weight != 0) and not values[weight == 0].any()
    _check_near(values, expected, weight, hessian)


def _check_near(values: Tensor, expected: Tensor, weight: Tensor, hessian: Tensor) -> None:
    """Nearly all values are equal, and together they are worth the same."""
    same = (values.double() - expected).abs() < 1e-4 * expected.abs().max()
    assert same.double().mean() > 0.97
    assert _error(values, weight, hessian) == pytest.approx(_error(expected, weight, hessian), rel=0.02)


def _error(values: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """||(W' - W) X||^2."""
    change = values.double() - weight
    return float((change @ hessian * change).sum())


@pytest.mark.parametrize(("name", "group"), [("int8", None), ("int4", 32), ("q8_0", 32), ("q5_0", 32), ("q4_0", 32)])
def test_gptq_leaves_less_error_than_the_nearest_values(name: str, group: int | None) -> None:
    weight, hessian = problem(16, 128)
    weight[:, ::3] = 0
    nearest, _ = rounding.nearest(FORMS[name], group, weight.float())
    rounder = rounding.Rounder(FORMS[name], group)
    ((values, _),), _ = solver.by_column([weight.float()], hessian.float(), 0.01, rounder=rounder)
    assert _error(values, weight, hessian) < 0.9 * _error(nearest, weight, hessian)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_one_pass_prunes_and_quantises_as_the_paper_says(pattern: str | None) -> None:
    """A weight that goes is lost whole, one that stays by its rounding, and what follows makes good for both."""
    weight, hessian = problem(32, 64)
    pair, m = ((2, 4), 4) if pattern else (None, 1)
    choose = weights._choose(Weight("weight", pattern=pattern), 1024)

    def as_asked(rounder: solver.Rounder | None) -> tuple[Tensor, Tensor]:
        ((values, keep),), _ = solver.by_column(
            [weight.float()], hessian.float(), 0.01, choose=[choose], m=m, rounder=rounder
        )
        return values, keep

    class Exact:
        """Rounds to what is there: then quantisation loses nothing, and the pass is SparseGPT's."""

        def __call__(self, column: int, left: Tensor, goes: Tensor) -> Tensor:
            return left[0].clone()

        def grids(self, sizes: object) -> list:
            return []

    values, keep = as_asked(Exact())
    torch.testing.assert_close(values.double(), literal_sparsegpt(weight, hessian, 0.5, pair), rtol=1e-4, atol=1e-4)
    rounder = rounding.Rounder(FORMS["int4"], 32)
    values, keep = as_asked(rounder)
    assert int((~keep).sum()) == 1024 and not values[~keep].any() and rounder.grids([32])[0].holds(values.contiguous())
    _check_near(values, literal_gptq(weight, hessian, "int4", 32, ~keep, m if pattern else None), weight, hessian)
    if pattern:
        return  # which loses so much that the rest is noise beside it
    after, _ = rounding.nearest(FORMS["int4"], 32, as_asked(None)[0])
    assert _error(values, weight, hessian) < _error(after, weight, hessian)


# ---- a model ----


@pytest.mark.parametrize("setting", ASKED, ids=str)
@pytest.mark.parametrize("family", SIZES)
def test_zeros_stay_zero_and_every_matrix_has_the_values_of_its_grid(family: str, setting: Quantize) -> None:
    model = make(family, torch.bfloat16)
    pruned = weights.prune(model, Weight("weight", criterion="wanda"), 0.5, random_tokens())
    before = {name: weight.clone() for name, weight in matrices(model).items()}
    done = quantise.quantise(model, full(setting), random_tokens())
    assert set(done.grids) == set(anatomy.all_matrices(model))
    for name, weight in anatomy.all_matrices(model).items():
        assert done.grids[name].holds(weight) and not weight[~pruned.masks[name]].any(), name
        assert not torch.equal(weight, before[name])
        assert (weight - before[name]).norm() < 0.25 * before[name].norm()
    outside = set(before) - set(done.grids)
    assert outside and all(torch.equal(matrices(model)[name], before[name]) for name in outside)
    assert (done.calibration_tokens, done.damping is None) == ((72, False) if setting.method == "gptq" else (72, True))


def test_embeddings_head_and_exceptions_are_chosen_by_name() -> None:
    model = make()
    chosen = full(Quantize("int8", head=True, embeddings=True, exclude=("*.0.mlp.*",)))
    done = quantise.quantise(model, chosen)
    assert set(anatomy.all_matrices(make())) - set(done.grids) == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert {"lm_head", "model.embed_tokens"} <= set(done.grids)
    assert done.grids["lm_head"].holds(model.lm_head.weight)
    tied = make("gpt2")
    for only in (Quantize("int8", head=True), Quantize("int8", embeddings=True)):
        done = quantise.quantise(copy.deepcopy(tied), full(only))
        assert done.grids["lm_head"] is done.grids["transformer.wte"]  # one matrix, whichever of the two is asked for
    with pytest.raises(RequestError, match=r"quantize.exclude=\*.nothing matches none of the matrices.*such as model"):
        quantise.quantise(make(), full(Quantize("int8", exclude=("*.nothing",))))


def test_gptq_of_the_head_reads_what_the_quantised_blocks_put_out() -> None:
    model = make()
    done = quantise.quantise(model, full(Quantize("int4", "gptq", head=True, embeddings=True)), random_tokens())
    assert done.grids["lm_head"].holds(model.lm_head.weight)
    nearest, _ = rounding.nearest(FORMS["int4"], 32, make().lm_head.weight)
    assert not torch.equal(nearest, model.lm_head.weight)
    embedded, _ = rounding.nearest(FORMS["int4"], 32, make().model.embed_tokens.weight)
    assert torch.equal(embedded, model.model.embed_tokens.weight)  # which reads no activations


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_in_one_pass_the_grids_come_from_pruning_and_the_rest_follows(family: str) -> None:
    method = Weight("weight", criterion="sparsegpt", exclude=("*.q_proj",))
    setting = full(Quantize("int4", "gptq", exclude=("*.v_proj",)), method)
    cell = Cell(*_plain(method), quantize=setting)
    model = make(family)
    pruned = weights.prune(model, method, 0.5, random_tokens(), rounding=quantise.while_pruning(cell, model))
    names = set(anatomy.all_matrices(model))
    assert set(pruned.grids) == {name for name in names if not name.endswith(("q_proj", "v_proj"))}
    frozen = {name: weight.clone() for name, weight in anatomy.all_matrices(model).items() if name in pruned.grids}
    done = quantise.quantise_as(cell, model, random_tokens(), done=pruned.grids)
    assert set(done.grids) == {name for name in names if name.endswith("q_proj")}
    for name, weight in anatomy.all_matrices(model).items():
        if name in pruned.grids:
            assert pruned.grids[name].holds(weight) and torch.equal(weight, frozen[name])
            assert not weight[~pruned.masks[name]].any()
    assert pruned.removed == round(0.5 * pruned.targets)
    assert quantise.while_pruning(replace(cell, quantize=replace(setting, joint=False)), model)("x") is None


def _plain(method: families.Method, **settings: object) -> tuple:
    return (
        config.Model("tiny", "local"),
        method,
        0.5,
        config.Benchmarks(()),
        Calibration("pydoc", 4, 16),
        Efficiency(repeats=0),
        config.Execution(),
    )


# ---- cells ----


def composed(*words: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(words)), resolve=True)


def cell(*words: str) -> Cell:
    return config.parse(composed(*words))[0]


def test_a_cell_that_quantises_nothing_has_the_name_that_it_had() -> None:
    wanda = cell("+method=wanda")
    assert "quantize" not in identity._content(wanda)
    assert cell("+method=wanda", "quantize.method=gptq", "quantize.group=64", "quantize.head=true") == wanda
    names = {
        identity.cell_name(cell("+method=wanda", *words))
        for words in (
            (),
            ("quantize=int8",),
            ("quantize=int4",),
            ("quantize=int4", "quantize.group=64"),
            ("quantize=int8", "quantize.method=gptq"),
            ("quantize=int8", "quantize.head=true"),
        )
    }
    assert len(names) == 6


def test_what_is_not_read_makes_no_other_cell() -> None:
    assert cell("+method=wanda", "quantize=int8", "quantize.damping=0.1", "quantize.group=64") == cell(
        "+method=wanda", "quantize=int8"
    )
    assert cell("+method=wanda", "quantize=q8_0", "quantize.group=64").quantize.group == 32
    assert (
        cell("+method=dense", "quantize=int4").quantize
        == cell("+method=dense", "quantize=int4", "quantize.group=32").quantize
    )
    one_pass = cell("+method=sparsegpt", "quantize=int4", "quantize.method=gptq")
    assert forms.jointly(one_pass.quantize, one_pass.method)
    assert cell("+method=sparsegpt", "quantize=int4", "quantize.method=gptq", "quantize.joint=true") == one_pass
    after = cell("+method=sparsegpt", "quantize=int4", "quantize.method=gptq", "quantize.joint=false")
    assert after != one_pass and not forms.jointly(after.quantize, after.method)


def test_only_gptq_reads_calibration_text_and_its_seed() -> None:
    dense = cell("+method=dense", "quantize=int8", "seed=3")
    assert (dense.calibration, dense.seed, dense.sparsity) == (None, 0, 0.0)
    solved = cell("+method=dense", "quantize=int8", "quantize.method=gptq", "seed=3", "calibration.sequential=false")
    assert solved.calibration is not None and solved.seed == 3 and not solved.calibration.sequential
    assert [stage.name for stage in dense.stages()] == ["quantize"] and dense.dense().stages() == []
    without = {**composed("+method=dense", "quantize=int8", "quantize.method=gptq"), "calibration": None}
    with pytest.raises(RequestError, match="what is asked of quantize reads calibration text, and there is none"):
        config.parse(without)


def test_a_cell_says_in_words_how_it_quantises() -> None:
    assert cell("+method=dense", "quantize=int8").label().startswith("dense int8 (")
    words = cell("+method=wanda", "quantize=int4", "quantize.group=64", "quantize.method=gptq", "seed=1").label()
    assert words.startswith("weight wanda 0.5 int4 g64 gptq seed 1 (")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantize.name=q4_1"], "quantize.name must be one of none, int8.*q4_1, q5_1 .* would come back.*got 'q4_1'"),
        (["quantize=int4", "quantize.group=48"], "quantize.group must be one of 32, 64, 128, 256; got 48"),
        (["quantize=int4", "quantize.method=awq"], "quantize.method must be one of rtn, gptq; got 'awq'"),
        (
            ["quantize=int4", "quantize.method=gptq", "quantize.joint=true"],
            "quantize.joint=true .* wanda makes none: leave it out, and what is left is quantised after it",
        ),
        (["quantize=int8", "quantize.grop=3"], "grop"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        cell("+method=wanda", *words)


def test_gptq_cannot_follow_a_cut_vocabulary() -> None:
    with pytest.raises(RequestError, match="quantize.method=gptq cannot follow method=vocab.*use quantize.method=rtn"):
        cell("+method=vocab", "quantize=int8", "quantize.method=gptq")
    assert cell("+method=vocab", "quantize=int8").quantize.name == "int8"


def test_a_group_that_does_not_divide_is_told_before_the_model_is_loaded() -> None:
    shape = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    wide = replace(cell("+method=dense", "quantize=int4"), quantize=full(Quantize("int4", group=128)))
    with pytest.raises(
        RequestError, match="gives 128 columns a scale, and the model's hidden_size is 576.*group=32 or"
    ):
        fitting.check(wide, shape)
    fitting.check(replace(wide, quantize=full(Quantize("int4", group=64))), shape)
    neurons = replace(wide, method=Neuron("neuron"), sparsity=0.3, quantize=full(Quantize("q8_0")))
    with pytest.raises(RequestError, match="method=neuron leaves any number of neurons.*set method.multiple_of=32"):
        fitting.check(neurons, shape)
    fitting.check(replace(neurons, method=Neuron("neuron", multiple_of=64)), shape)
    fitting.check(replace(neurons, quantize=full(Quantize("int8"))), shape)
    with pytest.raises(RequestError, match="model.layers.0.self_attn.q_proj has 64.*set quantize.group to 32 or 64"):
        quantise.targets(make(), full(Quantize("int4", group=128)))


def test_the_plan_refuses_what_the_model_does_not_have(tiny_checkpoint: Path) -> None:
    words = ("+method=dense", "model=local", f"model.path={tiny_checkpoint}")
    with pytest.raises(RequestError, match=r"quantize.exclude=\*.nothing matches none of the matrices"):
        plan.prepare(composed(*words, "quantize=int8", "quantize.exclude=['*.nothing']"))
    with pytest.raises(RequestError, match="gives 32 columns a scale, and the model's hidden_size is 16"):
        plan.prepare(composed(*words, "quantize=q8_0"))


def test_a_row_says_what_was_quantised_and_what_it_would_take(
    tiny_checkpoint: Path, cache_folder: Path, tmp_path: Path
) -> None:
    rows = {}
    for name in ("none", "int8"):
        for method, sparsity in ((Weight("weight", criterion="wanda", scope="row"), 0.5), (Dense(), 0.0)):
            one = Cell(*_plain(method), dtype="bfloat16", device="cpu", quantize=full(Quantize(name)))
            one = replace(one, model=config.Model("tiny", "local", str(tiny_checkpoint)), sparsity=sparsity)
            rows[name, method.family], _ = run.run_cell(one, str(tmp_path / f"{name}-{method.family}"))
    scales = 16 * (2 * (16 + 8 + 8 + 16 + 24 + 24 + 16))  # a scale a row of seven matrices in two blocks
    size = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24)
    bits = {key: row["bits_per_weight"] for key, row in rows.items()}
    assert bits["none", "dense"] == 16 and bits["int8", "dense"] == pytest.approx(8 + scales / size)
    assert bits["none", "weight"] == pytest.approx(1 + 8)
    small = rows["int8", "weight"]
    assert bits["int8", "weight"] == pytest.approx(1 + 8 * (1 - small["sparsity_achieved"]) + scales / size)
    assert small["quantize_seconds"] > 0 and small["quantize_forward_passes"] is None
    assert small["sparsity_achieved"] >= 0.5  # counted after the last stage
    less = rows["none", "dense"]["coded_bytes"] - rows["int8", "dense"]["coded_bytes"]
    assert less == pytest.approx((8 * size - scales) / 8, abs=1)
    card = (tmp_path / "int8-weight" / "README.md").read_text()
    assert "pruned and quantised" in card and "| quantised | name int8, method rtn" in card
    assert ", quantised" in (tmp_path / "int8-dense" / "README.md").read_text()
    again, _ = sweep.load_model(tmp_path / "int8-weight", dtype="bfloat16")
    assert sum(int((w == 0).sum()) for w in anatomy.all_matrices(again).values()) >= 0.5 * size


def test_quantised_from_python(tiny_checkpoint: Path, cache_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    for method, sparsity, setting in (
        ("dense", None, "int8"),
        ("wanda", 0.5, {"name": "int8", "method": "gptq", "head": True}),
        ("sparsegpt", 0.5, {"name": "int8", "method": "gptq"}),
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        done = sweep.prune(model, tokenizer, method=method, sparsity=sparsity, quantize=setting, sequences=2, length=16)
        found = anatomy.all_matrices(model, head=method == "wanda")
        assert set(found) <= set(done.grids) and all(done.grids[name].holds(found[name]) for name in found)
        assert done.sparsity == (sparsity or 0.0)
    with pytest.raises(RequestError, match="sparsity is missing"):
        sweep.prune(model, tokenizer, method="wanda")
    before = {name: weight.clone() for name, weight in anatomy.all_matrices(model).items()}
    with pytest.raises(RequestError, match="quantize.exclude=nothing matches none"):
        sweep.prune(model, tokenizer, method="wanda", sparsity=0.7, quantize={"name": "int8", "exclude": ["nothing"]})
    assert all(torch.equal(weight, before[name]) for name, weight in anatomy.all_matrices(model).items())


def test_the_table_of_forms_is_made_from_the_declarations() -> None:
    assert forms.table() in (ROOT / "README.md").read_text(), "stale: python -m sweep.quantization.forms prints it"
