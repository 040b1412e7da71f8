"""Every format as it is declared: what it refuses, what its layers hold and multiply, and what a checkpoint says of them."""

from __future__ import annotations

import io
import json
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sweep
import tiny_models
from conftest import FAMILIES, packed_request, random_tokens, tiny_model
from sweep import execution, machine, saving
from sweep.config import Cell, Execution, parse
from sweep.formats import bitmap, compiled, declared, semi_structured, stand_in
from sweep.formats.declared import FORMATS, Format, Kernel
from sweep.formats.grid import Grid
from sweep.formats.packing import DenseMatrix, PackedLinear, packed
from sweep.measuring import counting
from sweep.models import anatomy
from sweep.pruning import methods
from sweep.pruning.families import Head, Method, Neuron, Weight
from sweep.settings import RequestError, build

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
PACKED = [form for form in FORMATS.values() if form.module]
HERE = [form for form in PACKED if "cpu" in form.devices]  # can be tried on any machine


def each(forms: list[Format]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms, ids=lambda form: form.name)


def asked(form: Format, **changes: object) -> dict[str, object]:
    """A request that the format can serve, but for the changes."""
    method = {"family": "neuron", "criterion": "random"} if form.holds == "cut" else {"family": "weight"}
    method |= {"pattern": form.patterns[0]} if form.patterns else {}
    quantize = {"name": f"int{form.bits}" if form.bits else "none"}
    request = packed_request(method=method, execution={"name": form.name}, device=form.devices[0], quantize=quantize)
    return request | changes


def cell(form: Format, **changes: object) -> Cell:
    return parse(asked(form, **changes))[0]


def matrix(rows: int, columns: int, dtype: str, sparsity: float = 0.6) -> Tensor:
    draw = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=draw)
    return weight.masked_fill(torch.rand(rows, columns, generator=draw) < sparsity, 0).to(getattr(torch, dtype))


def rounded(form: Format, weight: Tensor) -> tuple[Tensor, Grid | None]:
    """(the matrix as the format can hold it, its grid): a format of codes holds a quantised one."""
    if form.bits is None:
        return weight, None
    group = 32 if form.bits == 4 and weight.shape[1] % 32 == 0 else None
    largest = weight.float().unflatten(1, (-1, group or weight.shape[1])).abs().amax(2)
    grid = Grid(form.bits, (largest / (2 ** (form.bits - 1) - 1)).bfloat16().float(), group)
    return grid.values(grid.codes(weight), weight.dtype), grid


def packs(form: Format, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    weight, grid = rounded(form, weight)
    return form.packing("auto", weight.dtype).make(weight, bias, grid)


def run_in(form: Format, model: PreTrainedModel) -> PreTrainedModel:
    """The model as it runs in this form, for which its matrices are rounded first where they must."""
    return execution.prepare(model, Execution(form.name, fallback=True), quantised(form, model))[0]


@torch.no_grad()
def quantised(form: Format, model: PreTrainedModel) -> dict[str, Grid]:
    grids = {}
    for name, block in zip(anatomy.block_names(model), anatomy.blocks(model), strict=True):
        for matrix_name, weight in anatomy.matrices(block, name).items():
            values, grid = rounded(form, weight)
            weight.copy_(values)
            grids |= {matrix_name: grid} if grid is not None else {}
    return grids


def prepared(form: Format, family: str = "qwen2", sparsity: float = 0.9, dtype: str | None = None) -> PreTrainedModel:
    """A tiny model with biases, pruned and packed on the CPU."""
    model = tiny_model(family).to(getattr(torch, dtype or form.only_dtype("auto") or "float32"))
    methods.prune(model, Weight("weight"), sparsity, None)
    return run_in(form, model)


def saved(model: PreTrainedModel, folder: Path, tokenizer: Path) -> Path:
    saving.save(model, AutoTokenizer.from_pretrained(tokenizer), folder, {"method": {}})
    return folder


# ---- what is declared ----


def test_what_can_be_typed_is_what_is_declared() -> None:
    assert set(typing.get_args(declared.FormatName)) == set(FORMATS)
    kernels = {name for form in FORMATS.values() for name in form.kernels}
    assert set(typing.get_args(declared.KernelName)) == {"auto"} | kernels
    options = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob("conf/execution/*.yaml")}
    assert set(typing.get_args(declared.ExecutionName)) == {"auto", *FORMATS}
    assert options.pop("auto") == {"name": "auto", "saved": None}
    assert set(options) == {form.name for form in FORMATS.values() if form.holds != "cut"}  # which the method chooses
    for name, settings in options.items():
        read = {
            "name",
            *(["saved"] if FORMATS[name].module else []),
            *(["kernel"] if FORMATS[name].kernels else []),
            *(["fallback"] if FORMATS[name].fallback else []),
        }
        assert settings.pop("name") == name and set(settings) == read - {"name"}


def test_the_table_of_executions_is_made_from_the_declarations() -> None:
    assert declared.table() in (ROOT / "README.md").read_text(), "stale: python -m sweep.formats.declared prints it"


@each(list(FORMATS.values()))
def test_a_declaration_agrees_with_itself(form: Format) -> None:
    assert bool(form.elsewhere) == (set(form.devices) != {"cpu", "cuda", "mps"})
    assert set(form.dtypes) <= set(typing.get_args(declared.Dtype)) and form.meant_for in (None, *form.dtypes)
    assert form.only_dtype("auto") or {"bfloat16", "float32"} <= set(form.dtypes)  # what a machine chooses from
    assert all(set(kernel.dtypes) <= set(form.dtypes) for kernel in form.kernels.values())
    assert not form.kernels or {d for kernel in form.kernels.values() for d in kernel.dtypes} == set(form.dtypes)
    if form.fallback == "kernel":
        assert not all(kernel.compiled for kernel in form.kernels.values())
    versions = [other.stored.version for other in FORMATS.values() if other.stored]
    assert (
        len(set(versions)) == len(versions) and min(versions) > 1
    )  # or an older sweep would read what it does not know


# ---- what is refused, before anything is loaded ----


@each(list(FORMATS.values()))
def test_a_dtype_that_a_format_does_not_multiply_is_refused(form: Format) -> None:
    for dtype in typing.get_args(declared.Dtype):
        if dtype in form.dtypes:
            assert cell(form, dtype=dtype).dtype == dtype
        else:
            with pytest.raises(
                RequestError, match=f"execution={form.name} multiplies .*, got dtype={dtype}: set dtype="
            ):
                parse(asked(form, dtype=dtype))


@each(PACKED)
def test_a_device_that_a_format_does_not_run_on_is_refused(form: Format) -> None:
    with_compiler = {"name": form.name, "fallback": form.fallback == "kernel"}  # whether there is one or not
    for device in ("cpu", "cuda", "cuda:1", "mps"):
        tried = cell(form, device=device, execution=with_compiler)
        if device.partition(":")[0] in form.devices:
            machine.check_execution(tried)
        else:
            with pytest.raises(
                RequestError, match=f"execution={form.name} runs on .* got device={device}: {form.elsewhere}"
            ):
                machine.check_execution(tried)
            if form.fallback == "dense":
                machine.check_execution(cell(form, device=device, execution={"name": form.name, "fallback": True}))


@each(PACKED)
def test_a_format_that_no_checkpoint_holds_is_not_saved(form: Format, tmp_path: Path, tiny_checkpoint: Path) -> None:
    if form.saves:
        assert parse(asked(form, save_model="a"))[1].save_model == "a"
        return
    with pytest.raises(
        RequestError, match=f"save_model: safetensors holds no {form.name} matrices: use execution=dense or"
    ):
        parse(asked(form, save_model="a"))
    if form in HERE:
        with pytest.raises(RequestError, match=f"safetensors holds no {form.name} matrices"):
            saved(prepared(form), tmp_path / "saved", tiny_checkpoint)


@each([form for form in PACKED if form.patterns])
def test_a_format_of_one_pattern_needs_it(form: Format) -> None:
    for pattern in (None, "4:8", "1:2"):
        with pytest.raises(
            RequestError, match=f"{form.matrices}: set method.pattern={form.patterns[0]} sparsity=0.5, or"
        ):
            parse(asked(form, method={"family": "weight", "pattern": pattern}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "execution=bitmap multiplies bfloat16 or float32, got dtype=float16"),
        (
            {"dtype": "float32", "execution": {"name": "bitmap", "kernel": "avx512_bf16"}},
            "kernel=avx512_bf16 multiplies bfloat16, got dtype=float32: use execution.kernel=avx512",
        ),
        (
            {"execution": {"name": "csr"}, "dtype": "bfloat16"},
            "execution=csr multiplies float32 only, got dtype=bfloat16: set dtype=float32",
        ),
        ({"execution": {"name": "bitmap", "kernel": "sse"}}, "execution.kernel must be one of auto"),
        ({"execution": {"name": "semi_structured"}}, "hold two weights at most: set method.pattern=2:4 sparsity=0.5"),
        (
            {
                "execution": {"name": "semi_structured"},
                "method": {"family": "weight", "pattern": "2:4"},
                "dtype": "float32",
            },
            "multiplies bfloat16 or float16, got dtype=float32",
        ),
        ({"execution": {"name": "csr"}, "save_model": "a"}, "holds no csr matrices: use execution=dense or bitmap"),
    ],
)
def test_wrong_requests_are_told_before_anything_runs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse(packed_request(**changes))


def test_a_kernel_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "csr", replace(declared.CSR, kernels={"portable": Kernel(("float32",))}))
    with pytest.raises(RequestError, match="kernel must be one of auto, portable with execution=csr; got 'avx2'"):
        parse(packed_request(execution={"name": "csr", "kernel": "avx2"}))
    assert parse(packed_request(execution={"name": "csr", "kernel": "portable"}))[0].execution.kernel == "portable"


def test_removal_of_units_leaves_its_own_form_unless_a_format_holds_that_too(monkeypatch: pytest.MonkeyPatch) -> None:
    neuron = {"family": "neuron", "criterion": "l2"}
    assert parse(packed_request(method=neuron))[0].execution == Execution("shrunk")
    monkeypatch.setitem(FORMATS, "csr", replace(declared.CSR, holds="any"))
    for method in (neuron, {"family": "weight"}):
        assert parse(packed_request(method=method, execution={"name": "csr"}))[0].execution == Execution(
            "csr", saved="packed"
        )


@each(list(FORMATS.values()))
def test_an_execution_ignores_what_its_format_does_not_read(form: Format) -> None:
    kernel = "portable" if form.kernels else "avx2"
    execution = cell(form, execution={"name": form.name, "kernel": kernel, "fallback": True}).execution
    assert execution.kernel == ("portable" if form.kernels else "auto")
    assert execution.fallback is bool(form.fallback)
    assert cell(form).dense().execution == Execution("dense")


def test_an_execution_that_multiplies_one_dtype_decides_it_for_its_baseline_too() -> None:
    def dtype(baseline: bool, **execution: str) -> str:
        return parse(packed_request(execution=execution, baseline=baseline))[0].dtype

    for baseline in (False, True):
        assert dtype(baseline, name="csr") == "float32"
        assert dtype(baseline, name="bitmap", kernel="avx512_bf16") == "bfloat16"
        assert dtype(baseline, name="bitmap") == dtype(baseline, name="dense", kernel="avx512_bf16") == "auto"
    assert cell(declared.SEMI_STRUCTURED).dtype == "bfloat16"
    assert build(Execution, {"name": "bitmap"}, "execution").kernel == "auto"


# ---- what the layers hold ----


@each(HERE)
def test_a_layer_holds_its_matrix_and_multiplies_it(form: Format) -> None:
    for dtype in form.dtypes:
        for rows, columns in ((1, 1), (7, 15), (64, 64), (33, 130)):
            (weight, _), bias = (
                rounded(form, matrix(rows, columns, dtype)),
                torch.linspace(-1, 1, rows).to(getattr(torch, dtype)),
            )
            x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
            for added in (None, bias):
                layer = packs(form, matrix(rows, columns, dtype), added)
                assert (layer.format, layer.out_features, layer.in_features) == (form, rows, columns)
                assert torch.equal(layer.dense(), weight) and layer.nonzeros == int((weight != 0).sum())
                wide = None if added is None else added.double()
                expected = torch.nn.functional.linear(x.double(), weight.double(), wide)
                with torch.no_grad():
                    got = layer(x)
                assert got.dtype == weight.dtype and got.shape == expected.shape
                scale = (x.double().abs() @ weight.double().abs().t()).clamp(min=1)
                assert ((got.double() - expected).abs() / scale).max() < TOLERANCE[dtype]
        suits = form.packing("auto", weight.dtype).suits
        assert suits(*rounded(form, matrix(9, 65, dtype)))
        assert not suits(torch.ones(9, 64, dtype=weight.dtype), None)


@each(HERE)
def test_bytes_are_those_that_a_file_of_the_layer_takes(form: Format) -> None:
    def file_bytes(layer: PackedLinear) -> int:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        return file.getbuffer().nbytes

    for dtype in form.dtypes:
        small, large = (packs(form, matrix(rows, 256, dtype)) for rows in (64, 1024))
        assert file_bytes(large) - file_bytes(small) == pytest.approx(large.held_bytes - small.held_bytes, abs=1024)
        assert large.held_bytes > 12 * small.held_bytes


@each(HERE)
def test_a_packed_model_has_the_logits_and_the_counts_of_the_dense_one(form: Format) -> None:
    model = tiny_model("qwen2").to(getattr(torch, form.only_dtype("auto") or "float32"))  # with biases
    methods.prune(model, Weight("weight"), 0.9, None)
    grids = quantised(form, model)
    with torch.no_grad():
        expected = model(input_ids=random_tokens()).logits
        before = counting.size(counting.stock(model))
        model, kernel = execution.prepare(model, Execution(form.name, fallback=True), grids)
        assert kernel != "torch" and len(packed(model)) == len(packed(model.model.layers)) > 0
        torch.testing.assert_close(model(input_ids=random_tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    after = counting.size(counting.stock(model))
    assert {name for name in before if before[name] != after[name]} == {"weights_bytes", "stored_bytes"}
    assert after["weights_bytes"] == after["stored_bytes"]
    changed = sum(layer.held_bytes - 4 * layer.in_features * layer.out_features for layer in packed(model).values())
    assert after["weights_bytes"] - before["weights_bytes"] == changed


def packed_logits(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, PreTrainedModel, Tensor]:
    """(logits, the model with packed matrices, its logits)"""
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model, _ = execution.prepare(model, Execution("csr"))
        return expected, model, model(input_ids=ids, use_cache=False).logits


@each(HERE)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])  # both ways round; with biases
def test_experts_are_packed_one_by_one(form: Format, kind: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_models.make(kind, dtype=getattr(torch, form.only_dtype("auto") or "float32"))
    methods.prune(model, Weight("weight"), 0.7, None)
    grids = quantised(form, model)
    ids, wide = random_tokens(), sum(block.mlp.experts.gate_up_proj.numel() for block in anatomy.blocks(model))
    with torch.no_grad():
        expected, before = model(input_ids=ids).logits, counting.stock(model)
        model, _ = execution.prepare(model, Execution(form.name, fallback=True), grids)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)
    experts = {name: layer for name, layer in packed(model).items() if ".experts." in name}
    assert sum(m.out_features * m.in_features for n, m in experts.items() if "down" not in n) == wide
    assert not any(parameter.ndim == 3 for parameter in model.parameters())
    after = counting.stock(model)
    assert {name: (p.size, p.nonzeros, p.share) for name, p in after.pieces.items()} == {
        name: (p.size, p.nonzeros, p.share) for name, p in before.pieces.items()
    }
    assert all(after.pieces[name].held_bytes == layer.held_bytes for name, layer in experts.items())
    if form.stored:
        again, _ = sweep.load_model(saved(model, tmp_path / "saved", tiny_checkpoint))
        assert packed(again).keys() == packed(model).keys()
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "jetmoe", "llama4_text", "nemotron_h", "granitemoehybrid"])
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_packed_experts_run_in_every_way_that_a_model_can_run_its_own(kind: str, how: str) -> None:
    model = tiny_models.make(kind)
    try:
        model.set_experts_implementation(how)
    except ValueError:
        return  # it reads its experts in one way of its own, which is tried as eager
    methods.prune(model, Weight("weight"), 0.7, None)
    expected, _, got = packed_logits(model, random_tokens())
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_experts_matrices_without_zeros_stay_dense_beside_packed_ones(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = tiny_models.make("qwen3_moe")
    methods.prune(model, Weight("weight", exclude=("*.experts.0.*",)), 0.7, None)
    with torch.no_grad():
        expected = model(input_ids=random_tokens()).logits
        model, _ = execution.prepare(model, Execution("bitmap"))
        torch.testing.assert_close(model(input_ids=random_tokens()).logits, expected, atol=1e-4, rtol=1e-4)
        forms = {
            name.split(".experts.")[1][0]: layer.format.name
            for name, layer in packed(model).items()
            if "expert" in name
        }
        assert forms["0"] == "dense" and forms["1"] == "bitmap"
        again, _ = sweep.load_model(saved(model, tmp_path / "saved", tiny_checkpoint))
        assert torch.equal(again(input_ids=random_tokens()).logits, model(input_ids=random_tokens()).logits)


@each([form for form in HERE if not form.bits])  # of codes: test_codes.py
def test_code_that_reads_the_matrix_itself_gets_what_the_dense_one_gives(form: Format) -> None:
    dtype = form.dtypes[-1]
    packing = form.packing("auto", getattr(torch, dtype))
    weight, bias = matrix(6, 10, dtype), torch.linspace(-1, 1, 6).to(getattr(torch, dtype))
    stands = packing.make(weight, bias, None).weight
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    assert (stands.shape, stands.dtype, stands.dim(), len(stands)) == (weight.shape, weight.dtype, 2, 6)
    functions: list[Callable[[Any], Tensor]] = [
        lambda w: torch.nn.functional.linear(x, w, bias),
        lambda w: x @ w.t(),
        lambda w: torch.matmul(x[0], w.T),
        lambda w: x[0].mm(w.transpose(0, 1)),
        lambda w: w @ x[0].t(),  # and what no product of a packed layer is
        lambda w: torch.einsum("bti,oi->bto", x, w),
        lambda w: w[2:4],
        lambda w: w.float().abs().sum(0),
        lambda w: torch.cat([w, w]),
        lambda w: w * 2 + 1,
        lambda w: w.to(torch.float64),
        lambda w: w.view(3, 20),
    ]
    for function in functions:
        with torch.no_grad():
            torch.testing.assert_close(function(stands), function(weight), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("flipped", [False, True])
def test_a_stack_of_matrices_is_read_as_the_tensor_that_it_stands_for(flipped: bool) -> None:
    dense = torch.stack([matrix(6, 10, "float32", 0.1 * i) for i in range(4)])
    layers = [[DenseMatrix(expert[:2]), DenseMatrix(expert[2:])] for expert in dense]
    stack, whole = stand_in.stacked(layers, flipped=flipped), dense.transpose(1, 2) if flipped else dense
    assert stack.shape == whole.shape and torch.equal(stack.dense(), whole)
    ids, x = torch.tensor([3, 0, 3]), torch.randn(3, 5, whole.shape[1], generator=torch.Generator().manual_seed(0))
    functions: list[Callable[[Any], Tensor]] = [
        lambda w: (w if flipped else w.transpose(-2, -1))[1].t().clone(),
        lambda w: x[0] @ w[torch.tensor(2)],
        lambda w: torch.bmm(x, w[ids]),
        lambda w: torch.bmm(w[ids].mT, x.transpose(1, 2)),
        lambda w: torch.nn.functional.linear(x[0], w.mT[1]),
        lambda w: w[1:3],
        lambda w: w[:, 0],
        lambda w: w[ids == 3] if len(ids) == len(w) else w[torch.tensor([True, False, True, False])],
        lambda w: w.transpose(0, 1),
        lambda w: w.sum((0, 1)),
    ]
    for function in functions:
        got = function(stack)
        torch.testing.assert_close(got.dense() if isinstance(got, stand_in.StandIn) else got, function(whole))


def test_a_matrix_that_a_format_cannot_hold_is_named() -> None:
    with pytest.raises(
        RequestError, match=r"layers.0.self_attn.q_proj cannot be run in this form \(bitmap holds matrices of"
    ):
        prepared(declared.BITMAP, dtype="float16")


# ---- what a checkpoint says of them ----


@each([form for form in HERE if form.stored])
def test_a_checkpoint_says_of_a_packed_layer_what_its_tensors_do_not(
    form: Format, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert form.stored is not None
    model = prepared(form)
    folder = saved(model, tmp_path / "saved", tiny_checkpoint)
    facts = json.loads((folder / "sweep.json").read_text())
    told = {name: layer.facts() for name, layer in packed(model).items()}
    assert facts == {"format": form.stored.version, "kept_token_ids": None, form.stored.key: told, "shapes": {}}
    again, _ = sweep.load_model(folder)
    for name, layer in packed(model).items():
        other = packed(again)[name]
        assert type(other) is type(layer) and torch.equal(other.dense(), layer.dense())
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)

    if wrong := set(typing.get_args(declared.Dtype)) - set(form.dtypes):
        with pytest.raises(RequestError, match=f"execution={form.name} multiplies .*, got dtype={min(wrong)}"):
            sweep.load_model(folder, dtype=min(wrong))
    weights, (name, *_) = load_file(folder / "model.safetensors"), told
    save_file(weights | {f"{name}.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(RequestError, match=f"layer {name} of the checkpoint is damaged: weight is none of its tensors"):
        sweep.load_model(folder)
    part = next(full for full in weights if full.startswith(f"{name}.") and not full.endswith("bias"))
    save_file({full: tensor for full, tensor in weights.items() if full != part}, folder / "model.safetensors")
    with pytest.raises(
        RequestError, match=f"layer {name} of the checkpoint is damaged: it has no tensor '{part.split('.')[-1]}'"
    ):
        sweep.load_model(folder)


@each([form for form in HERE if form.stored])
@pytest.mark.parametrize(
    "method", [Neuron(criterion="l2"), Head(criterion="l2", scope="layer")], ids=lambda m: m.family
)
def test_packed_matrices_that_removal_of_units_has_made_smaller_are_read_again(
    form: Format, method: Method, family: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    model = tiny_model(family)
    methods.prune(model, method, 0.5, random_tokens())
    methods.prune(model, Weight("weight"), 0.5, None)
    model = run_in(form, model)
    again, _ = sweep.load_model(saved(model, tmp_path / "saved", tiny_checkpoint))
    assert packed(again).keys() == packed(model).keys() != set()
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)


def test_a_checkpoint_whose_kernel_cannot_be_built_is_read_and_told(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(prepared(declared.BITMAP), tmp_path / "saved", tiny_checkpoint)

    def none() -> tuple[str, ...]:
        raise compiled.KernelError("there is no C++ compiler")

    monkeypatch.setattr(compiled, "available", none)
    with pytest.warns(UserWarning, match="layers in the format bitmap run slowly: there is no C\\+\\+ compiler"):
        again, _ = sweep.load_model(folder)
    assert {typing.cast(bitmap.BitmapLinear, layer).kernel for layer in packed(again).values()} == {"torch"}


def test_a_checkpoint_of_bitmap_layers_is_written_as_older_versions_read_it(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    model = prepared(declared.BITMAP)
    folder = saved(model, tmp_path / "saved", tiny_checkpoint)
    columns = {name: layer.in_features for name, layer in packed(model).items()}
    assert json.loads((folder / "sweep.json").read_text()) == {
        "format": 2,
        "kept_token_ids": None,
        "bitmap_columns": columns,
        "shapes": {},  # since they are checked, which older versions of sweep do not ask for
    }
    parts = {
        name.rpartition(".")[2]
        for name in load_file(folder / "model.safetensors")
        if name.rpartition(".")[0] in columns
    }
    assert parts == {"mask", "values", "offsets", "bias"}


# ---- codes, to which weights must have been quantised ----


@each([form for form in PACKED if form.bits])
def test_a_format_of_codes_needs_them(form: Format) -> None:
    for name in ["none", *(["int8", "q5_0"] if form.bits == 4 else [])]:
        message = (
            f"execution={form.name} multiplies codes of up to {form.bits} bits: set quantize=int.*got quantize={name}"
        )
        with pytest.raises(RequestError, match=message):
            parse(asked(form, quantize={"name": name}))
    for name in ("int4", "q4_0", *(["int8", "q8_0", "q5_0"] if form.bits == 8 else [])):
        assert cell(form, quantize={"name": name}).execution.format == form


# ---- semi_structured, which runs on CUDA alone ----


def test_semi_structured_needs_its_device() -> None:
    form = declared.SEMI_STRUCTURED
    tried = cell(form, device="cpu")
    with pytest.raises(RequestError, match="runs on a CUDA device .* got device=cpu: use execution=bitmap, or set"):
        machine.check_execution(tried)
    model = tiny_model("llama").to(torch.bfloat16)
    methods.prune(model, tried.method, 0.5, None)
    with pytest.raises(RequestError, match=r"model.layers.0.self_attn.q_proj cannot be run in this form .*CUDA"):
        execution.prepare(model, tried.execution)
    allowed = cell(form, device="cpu", execution={"name": form.name, "fallback": True})
    assert execution.prepare(model, allowed.execution)[1] == "torch"
    assert packed(model) == {}


def test_semi_structured_takes_matrices_of_the_pattern_alone() -> None:
    assert semi_structured.is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not semi_structured.is_two_of_four(torch.tensor([[0.0, 0, 0, 0, 1, 2, 0, 3]]))
    assert not semi_structured.is_two_of_four(torch.zeros(1, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi_structured runs on CUDA alone, and there is none here")
def test_semi_structured_has_the_same_logits_and_half_the_bytes() -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # torch packs matrices from 16 by 16 on
    config = AutoConfig.for_model("qwen2", **FAMILIES["qwen2"] | wide)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to("cuda")
    methods.prune(model, Weight("weight", pattern="2:4"), 0.5, None)
    matrices = {name: anatomy.weight(layer).clone() for name, layer in anatomy.linears(model).items()}
    tokens = random_tokens().cuda()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        before = counting.size(counting.stock(model))
        sparse, ran = execution.prepare(model, Execution("semi_structured"))
        assert ran == "torch 2:4" and packed(sparse)
        torch.testing.assert_close(sparse(input_ids=tokens).logits, expected, atol=2e-2, rtol=2e-2)
    for name, layer in packed(sparse).items():
        assert torch.equal(layer.dense(), matrices[name])
    after = counting.size(counting.stock(sparse))
    assert {name for name in before if before[name] != after[name]} == {"weights_bytes", "stored_bytes"}
    held = sum(layer.held_bytes for layer in packed(sparse).values())
    places = sum(layer.in_features * layer.out_features for layer in packed(sparse).values())
    assert held == pytest.approx(2 * places * 0.5625, rel=0.01)
