"""Every kernel of the formats of codes against a product in float64, on matrices chosen to break it; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import random_tokens, tiny_model
from sweep import execution
from sweep.config import Execution
from sweep.formats import codes, compiled, declared
from sweep.formats.codes import CodesLinear
from sweep.formats.declared import Format
from sweep.formats.grid import Grid
from sweep.pruning import methods
from sweep.pruning.families import Weight
from sweep.settings import RequestError
from test_formats import quantised, rounded

FORMS = [form for form in declared.FORMATS.values() if form.bits]
SHAPES = [(1, 1), (1, 63), (3, 64), (5, 65), (7, 15), (2, 129), (33, 31), (64, 576), (17, 200), (130, 97)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
DTYPES = list(TOLERANCE)


@pytest.fixture(
    params=[(form, kernel) for form in FORMS for kernel in form.kernels], ids=lambda p: f"{p[0].name}-{p[1]}"
)
def made_for(request: pytest.FixtureRequest) -> tuple[Format, str]:
    form, kernel = request.param
    if kernel != "torch" and kernel not in compiled.available():
        pytest.skip(f"this processor cannot run {kernel}")
    return form, kernel


def integers(rows: int, columns: int, bits: int, sparsity: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(rows * 1000 + columns + seed)
    most = 2 ** (bits - 1) - 1
    drawn = torch.randint(-most, most + 1, (rows, columns), generator=draw, dtype=torch.int8)
    return drawn.masked_fill(torch.rand(rows, columns, generator=draw) < sparsity, 0)


def grid_of(rows: int, columns: int, bits: int, group: int | None) -> Grid:
    groups = columns // group if group else 1
    scales = 0.01 * (1 + torch.rand(rows, groups, generator=torch.Generator().manual_seed(columns)))
    return Grid(bits, scales.bfloat16().float(), group, -(2 ** (bits - 1)) if bits == 4 else None)


def layer(
    form: Format, kernel: str, whole: Tensor, grid: Grid, dtype: torch.dtype, bias: Tensor | None = None
) -> CodesLinear:
    made = form.packing(kernel, dtype).make(grid.values(whole, dtype), bias, grid)
    assert isinstance(made, CodesLinear)
    return made


def assert_multiplies(
    form: Format, kernel: str, whole: Tensor, grid: Grid, dtype: torch.dtype, tokens: int = 1
) -> None:
    x = torch.randn(tokens, whole.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, len(whole)).to(dtype)
    weight = grid.values(whole, torch.float64) if tokens <= compiled.FEW_TOKENS and kernel != "torch" else None
    weight = grid.values(whole, dtype).double() if weight is None else weight
    made = layer(form, kernel, whole, grid, dtype, bias)
    with torch.no_grad():
        got = made(x)
    expected = torch.nn.functional.linear(x.double(), weight, bias.double())
    scale = (x.double().abs() @ weight.abs().t() + bias.double().abs()).clamp(min=1e-30)
    assert got.dtype == dtype and got.shape == expected.shape
    assert ((got.double() - expected).abs() / scale).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_values_are_those_of_the_codes(made_for: tuple[Format, str], dtype: torch.dtype) -> None:
    form, kernel = made_for
    assert form.bits is not None
    for (rows, columns), sparsity in ((shape, s) for shape in SHAPES for s in (0.0, 0.5, 1.0)):
        whole = integers(rows, columns, form.bits, sparsity)
        whole[::3] = 0
        for group in (None, 32, 96) if columns % 96 == 0 else (None,):
            grid = grid_of(rows, columns, form.bits, group)
            made = layer(form, kernel, whole, grid, dtype)
            assert torch.equal(made.whole_numbers(), whole)
            assert torch.equal(made.dense(), grid.values(whole, dtype))
            if (number := compiled.version(kernel)) is not None:
                parts = (made.codes, made.scales, *made.bits, columns)
                assert torch.equal(compiled.extension().codes_expand(*parts, dtype, number), made.dense())
            assert_multiplies(form, kernel, whole, grid, dtype)


@pytest.mark.parametrize("tokens", [*range(2, 10), 17])
def test_any_number_of_inputs(made_for: tuple[Format, str], tokens: int) -> None:
    form, kernel = made_for
    assert form.bits is not None
    for group, dtype in ((group, dtype) for group in (None, 32) for dtype in DTYPES):
        whole = integers(41, 160, form.bits, 0.6)
        assert_multiplies(form, kernel, whole, grid_of(41, 160, form.bits, group), dtype, tokens)


def test_several_threads_and_panels(made_for: tuple[Format, str], monkeypatch: pytest.MonkeyPatch) -> None:
    form, kernel = made_for
    assert form.bits is not None
    whole = integers(301, 200, form.bits, 0.5)
    whole[:120] = 0
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for panel in (7 * 400, 1 << 20):
                monkeypatch.setattr(compiled, "PANEL_BYTES", panel)
                for tokens in (1, 20):
                    assert_multiplies(form, kernel, whole, grid_of(301, 200, form.bits, None), torch.bfloat16, tokens)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loud_input_drowns_no_others(made_for: tuple[Format, str], dtype: torch.dtype) -> None:
    """Decoders have inputs a thousand times as large as the rest. Where that weight is zero, the others must not suffer."""
    form, kernel = made_for
    assert form.bits is not None
    whole = integers(64, 512, form.bits, 0.5)
    whole[:, 7] = 0
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(2))
    x[0, 7] = 3000
    x = x.to(dtype)
    grid = grid_of(64, 512, form.bits, None)
    with torch.no_grad():
        got = layer(form, kernel, whole, grid, dtype)(x).double()
    weight = grid.values(whole, torch.float64)
    expected = x.double() @ weight.t()
    typical = (x.double().square() @ weight.square().t()).sqrt()
    assert ((got - expected).abs() / typical).max() < {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]


def test_inputs_that_are_not_finite_or_all_zero(made_for: tuple[Format, str]) -> None:
    form, kernel = made_for
    assert form.bits is not None
    whole = integers(3, 200, form.bits, 0.0)
    made = layer(form, kernel, whole, grid_of(3, 200, form.bits, None), torch.bfloat16)
    x = torch.zeros(1, 200, dtype=torch.bfloat16)
    with torch.no_grad():
        assert bool((made(x) == 0).all())
        for loud in (torch.inf, torch.nan):
            x[0, 150] = loud
            assert not made(x).isfinite().any()


def test_scales_are_held_in_16_bits_where_that_loses_nothing() -> None:
    whole = integers(5, 64, 8, 0.5)
    for number, kind in ((0.5, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, torch.float32)):
        for sign in (1, -1):
            grid = Grid(8, torch.full((5, 2), sign * number), 32)
            for kernel in (*compiled.runs(declared.INT8), "torch"):
                made = layer(declared.INT8, kernel, whole, grid, torch.float32)
                assert made.scales.dtype == kind and torch.equal(made.dense(), grid.values(whole, torch.float32))
                assert_multiplies(declared.INT8, kernel, whole, grid, torch.float32)


def test_bytes_are_those_of_the_format() -> None:
    whole = integers(1536, 576, 4, 0.0)
    whole[:, ::2] = 0
    whole[:, 1::2] = whole[:, 1::2].masked_fill(whole[:, 1::2] == 0, 3)
    grid, dense = grid_of(1536, 576, 4, None), 2 * 1536 * 576
    held = {form.name: layer(form, "torch", whole, grid, torch.bfloat16).held_bytes for form in FORMS}
    assert held["int8"] == dense // 2 + 2 * 1536 and held["int4"] == dense // 4 + 2 * 1536
    assert held["bitmap_int8"] == dense // 16 + dense // 4 + 4 * 1537 + 64 + 2 * 1536
    assert held["bitmap_int8"] < 0.33 * dense


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_bfloat16_models_agree_within_their_rounding(form: Format) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    methods.prune(model, Weight("weight"), 0.5, None)
    grids = quantised(form, model)
    with torch.no_grad():
        expected = model(input_ids=random_tokens()).logits
        packed, kernel = execution.prepare(model, Execution(form.name), grids)
        assert kernel.startswith(f"{form.name} ")
        torch.testing.assert_close(packed(input_ids=random_tokens()).logits, expected, atol=2e-2, rtol=2e-2)


def test_what_a_format_cannot_hold_is_refused() -> None:
    weight, grid = rounded(declared.INT8, torch.randn(4, 70))
    assert grid is not None
    with pytest.raises(ValueError, match="int8 holds weights that are quantised, and these are not"):
        declared.INT8.packing("torch", torch.float32).make(weight, None, None)
    with pytest.raises(ValueError, match="int4 holds codes of up to 4 bits, got 8"):
        declared.INT4.packing("torch", torch.float32).make(weight, None, grid)
    with pytest.raises(ValueError, match="values that its quantisation has not: something has changed it since"):
        declared.INT8.packing("torch", torch.float32).make(weight + 1e-3, None, grid)
    with pytest.raises(
        ValueError, match=r"no scales of 70 columns: \(4, 5\) torch.bfloat16; groups are multiples of 32"
    ):
        declared.INT8.packing("torch", torch.float32).make(torch.zeros(4, 70), None, Grid(8, torch.ones(4, 5), 14))


def test_a_model_that_was_changed_since_is_refused_by_name() -> None:
    model = tiny_model("llama")
    grids = quantised(declared.INT8, model)
    methods.prune(model, Weight("weight"), 0.5, None)
    assert execution.prepare(model, Execution("int8"), grids)[1].startswith("int8 ")  # zeros are on every grid
    model = tiny_model("llama")
    with pytest.raises(RequestError, match=r"q_proj cannot be run in this form \(it has values that its quantisation"):
        execution.prepare(model, Execution("int8"), {name: Grid(g.bits, 1.01 * g.scales) for name, g in grids.items()})


def test_damaged_tensors_are_refused() -> None:
    whole, grid = integers(4, 70, 4, 0.5), grid_of(4, 70, 4, None)
    for form in FORMS:
        made = layer(form, "torch", whole, grid, torch.float32)
        parts = dict(made.named_buffers())
        read = form.packing("torch", torch.float32).read
        assert read is not None and torch.equal(read(parts, 70).dense(), made.dense())
        for name, tensor in parts.items():
            with pytest.raises((ValueError, KeyError)):
                read({other: parts[other] for other in parts if other != name}, 70)
            with pytest.raises(ValueError, match="codes|scales|bitmap"):
                read(parts | {name: tensor[:-1]}, 70)
        with pytest.raises(ValueError, match="no scales of 70 columns"):
            read(parts | {"scales": parts["scales"] * torch.nan}, 70)


def test_the_kernel_refuses_other_inputs() -> None:
    made = layer(
        declared.INT8,
        compiled.runs(declared.INT8)[0],
        *(integers(4, 70, 8, 0.5), grid_of(4, 70, 8, None)),
        torch.float32,
    )
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="the input has 64 features, the matrix 70"):
            made(torch.zeros(1, 64))
        with pytest.raises(
            RuntimeError, match="the input is torch.bfloat16, the matrix is multiplied in torch.float32"
        ):
            made(torch.zeros(1, 70, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="no gradient flows through a layer of execution=int8"):
        made(torch.zeros(1, 70, requires_grad=True))
    assert codes.OFFSET == 8
