"""Every version of the kernel against torch, on matrices chosen to break it; the layer in models of every family."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from conftest import packed_request, random_tokens, tiny_model
from sweep import execution, machine, saving
from sweep.config import Execution, parse
from sweep.formats import bitmap, compiled, declared
from sweep.formats.packing import packed
from sweep.measuring import counting
from sweep.models import anatomy
from sweep.pruning import methods
from sweep.pruning.families import Weight
from sweep.settings import RequestError
from test_cli import QUICK, run

SHAPES = [(1, 1), (1, 63), (3, 64), (5, 65), (7, 15), (2, 129), (33, 31), (64, 576), (17, 200), (130, 97)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def matrix(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=draw)
    return weight.masked_fill(torch.rand(rows, columns, generator=draw) < sparsity, 0).to(dtype)


def adversarial(dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices whose rows end and begin where a wide load or a mask word does."""
    rows = matrix(9, 193, 0.5, dtype)
    rows[::2] = 0
    first, last, middle = (torch.zeros(6, 130, dtype=dtype) for _ in range(3))
    first[:, 0], last[:, -1], middle[:, 63:65] = 1, 2, 3
    full_row = torch.zeros(5, 256, dtype=dtype)
    full_row[3] = 1
    extremes = matrix(4, 70, 0.3, dtype)
    extremes[0, :3] = torch.tensor([torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny, 1e30], dtype=dtype)
    staircase = torch.tril(torch.ones(97, 97, dtype=dtype))  # every count of weights a row, thus every alignment
    return {
        "empty rows": rows,
        "first": first,
        "last": last,
        "word boundary": middle,
        "one full row": full_row,
        "extremes": extremes,
        "staircase": staircase,
    }


def layer(weight: Tensor, kernel: str, bias: Tensor | None = None) -> bitmap.BitmapLinear:
    return bitmap.BitmapLinear(*bitmap.compress(weight), columns=weight.shape[1], bias=bias, kernel=kernel)


def assert_multiplies(weight: Tensor, kernel: str, tokens: int = 1) -> None:
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    bias = torch.linspace(-1, 1, weight.shape[0]).to(weight.dtype)
    with torch.no_grad():
        for added in (None, bias):
            got = layer(weight, kernel, added)(x)
            expected = torch.nn.functional.linear(
                x.double(), weight.double(), None if added is None else added.double()
            )
            assert got.dtype == weight.dtype and got.shape == expected.shape
            scale = (x.double().abs() @ weight.double().abs().t()).clamp(min=1)
            assert ((got.double() - expected).abs() / scale).max() < TOLERANCE[weight.dtype]


KERNELS = [name for name, kernel in declared.BITMAP.kernels.items() if kernel.compiled]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param not in compiled.available():
        pytest.skip(f"this processor cannot run {request.param}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_and_expansion_equal_torch(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "avx512_bf16" and dtype == torch.float32:
        pytest.skip("multiplies bfloat16")
    cases = [matrix(*shape, sparsity, dtype) for shape in SHAPES for sparsity in (0.0, 0.5, 0.9, 1.0)]
    for weight in [*cases, *adversarial(dtype).values()]:
        parts = bitmap.compress(weight)
        columns = weight.shape[1]
        assert torch.equal(bitmap.expand(*parts, columns), weight)
        assert torch.equal(compiled.extension().bitmap_expand(*parts, columns, compiled.version(kernel)), weight)
        assert_multiplies(weight, kernel)


@pytest.mark.parametrize("tokens", [*range(1, 10), 16, 17, 40])
def test_any_number_of_inputs(kernel: str, tokens: int) -> None:
    assert_multiplies(matrix(40, 130, 0.6, torch.bfloat16), kernel, tokens)
    if kernel != "avx512_bf16":
        assert_multiplies(matrix(40, 130, 0.6, torch.float32), kernel, tokens)


def test_vector_versions_multiply_a_weight_that_is_not_there_as_zero(kernel: str) -> None:
    x = torch.ones(1, 200, dtype=torch.bfloat16)
    x[0, 150] = torch.inf
    with torch.no_grad():
        got = layer(torch.zeros(3, 200, dtype=torch.bfloat16), kernel)(x)
    assert bool(got.isnan().all()) is (kernel != "portable")
    assert bool((got == 0).all()) is (kernel == "portable")


def test_a_matrix_larger_than_a_panel_and_several_threads(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(300, 200, 0.5, torch.bfloat16)
    weight[:120] = 0  # the first half of the rows has none of the bytes
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for panel in (1, 7 * 400, 1 << 20):
                monkeypatch.setattr(compiled, "PANEL_BYTES", panel)
                assert_multiplies(weight, kernel, tokens=1)
                assert_multiplies(weight, kernel, tokens=20)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="other compilers bring no OpenMP")
def test_the_kernel_runs_on_as_many_threads_as_torch_is_set_to() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert compiled.extension().threads() == count
    finally:
        torch.set_num_threads(threads)


def test_inputs_of_other_shapes_and_strides(kernel: str) -> None:
    weight = matrix(12, 70, 0.5, torch.bfloat16)
    x = torch.randn(70, 3, 2).to(torch.bfloat16)
    with torch.no_grad():
        for given in (x.permute(2, 1, 0), x[:, 0, 0], torch.zeros(0, 70, dtype=torch.bfloat16)):
            expected = torch.nn.functional.linear(given, weight)
            torch.testing.assert_close(layer(weight, kernel)(given), expected, atol=0.1, rtol=0.05)


def test_bytes_are_those_of_the_format() -> None:
    for sparsity, bound in ((0.5, 0.57), (0.8, 0.27)):
        weight = torch.ones(1536, 576, dtype=torch.bfloat16)
        weight[:, : round(sparsity * 576)] = 0
        held = layer(weight, "torch").held_bytes
        assert held == 1536 * 576 // 8 + 2 * int(weight.sum(dtype=torch.float64)) + 4 * 1537 + bitmap.PADDING
        assert held <= bound * weight.numel() * 2 + bitmap.PADDING


@pytest.mark.parametrize("kernel", ["auto", "torch", "portable"])
def test_a_bitmap_model_has_the_logits_of_the_masked_dense_model(family: str, kernel: str) -> None:
    model = tiny_model(family)
    methods.prune(model, Weight("weight"), 0.5, None)
    tokens = random_tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        before = counting.size(counting.stock(model))
        compressed, ran = execution.prepare(model, Execution("bitmap", kernel))  # type: ignore[arg-type]
        assert ran.startswith("bitmap ")
        assert not [m for m in anatomy.linears(compressed).values() if (anatomy.weight(m) == 0).any()]
        torch.testing.assert_close(compressed(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)
        last = compressed(input_ids=tokens, logits_to_keep=1).logits
        torch.testing.assert_close(last, expected[:, -1:], atol=1e-4, rtol=1e-4)
        text = compressed.generate(tokens[:1], max_new_tokens=4, do_sample=False)
        assert text.shape == (1, tokens.shape[1] + 4)
    after = counting.size(counting.stock(compressed))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"weights_bytes", "stored_bytes"}
    assert after["weights_bytes"] < before["weights_bytes"]


def test_bfloat16_models_agree_within_their_rounding() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    methods.prune(model, Weight("weight"), 0.5, None)
    with torch.no_grad():
        expected = model(input_ids=random_tokens()).logits
        compressed, _ = execution.prepare(model, Execution("bitmap"))
        torch.testing.assert_close(compressed(input_ids=random_tokens()).logits, expected, atol=2e-2, rtol=2e-2)


def test_what_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(
        ValueError, match="bitmap holds matrices of bfloat16 or float32, got 2 dimensions of torch.float16"
    ):
        bitmap.compress(torch.zeros(2, 2, dtype=torch.float16))
    mask, values, offsets = bitmap.compress(matrix(4, 70, 0.5, torch.float32))
    for damaged in ((mask ^ 1, values, offsets), (mask, values[:-1], offsets), (mask, values, offsets.flip(0))):
        with pytest.raises(ValueError, match="damaged bitmap"):
            bitmap.BitmapLinear(*damaged, columns=70, bias=None, kernel="torch")
    with pytest.raises(ValueError, match="no bitmap of 300 columns"):
        bitmap.check(mask, values, offsets, 300)
    beyond = mask.clone()
    beyond[0, 1] ^= 1 << 40  # a bit past the last column
    with pytest.raises(ValueError, match="damaged bitmap"):
        bitmap.check(beyond, values, offsets, 70)


def test_the_kernels_are_those_that_are_declared() -> None:
    assert set(compiled.VERSIONS) == {name for form in declared.FORMATS.values() for name in form.kernels} - {"torch"}
    for name, dtype in itertools.product(compiled.runs(declared.BITMAP), (torch.bfloat16, torch.float32)):
        if str(dtype).removeprefix("torch.") in declared.BITMAP.kernels[name].dtypes:
            assert_multiplies(matrix(5, 70, 0.5, dtype), name)
            packing = declared.BITMAP.packing(name, dtype)
            assert packing.kernel == f"bitmap {name}" and packing.lacks is None


def test_a_kernel_that_this_processor_lacks_is_replaced_only_when_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "available", lambda: ("portable",))
    with pytest.raises(RequestError, match="execution=bitmap, kernel avx2: this processor runs portable. Install"):
        execution.prepare(tiny_model("llama"), Execution("bitmap", "avx2"))
    assert execution.prepare(tiny_model("llama"), Execution("bitmap", "avx2", fallback=True))[1] == "bitmap torch"


def test_the_kernel_refuses_other_inputs() -> None:
    made = layer(matrix(4, 70, 0.5, torch.float32), compiled.chosen(declared.BITMAP, "auto", torch.float32)[0])
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="the input has 64 features, the matrix 70"):
            made(torch.zeros(1, 64))
        with pytest.raises(RuntimeError, match="the input is BFloat16 on cpu, the matrix Float"):
            made(torch.zeros(1, 70, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="no gradient flows through a layer of execution=bitmap"):
        made(torch.zeros(1, 70, requires_grad=True))


def test_without_a_compiler_nothing_falls_back_in_silence(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.extension.cache_clear()
    try:
        cell, _ = parse(packed_request())
        with pytest.raises(
            RequestError, match="there is no no-such-compiler here: install one .* execution.fallback=true"
        ):
            machine.check_execution(cell)
        with pytest.raises(RequestError, match="there is no C\\+\\+ compiler .* Install a C\\+\\+ compiler"):
            execution.prepare(tiny_model("llama"), Execution("bitmap"))
        allowed, _ = parse(packed_request(execution={"name": "bitmap", "fallback": True}))
        machine.check_execution(allowed)
        assert execution.prepare(tiny_model("llama"), allowed.execution)[1] == "bitmap torch"
        monkeypatch.setenv("CXX", "false")  # a compiler that fails
        compiled.extension.cache_clear()
        with pytest.raises(compiled.KernelError, match="the kernels cannot be built"):
            compiled.extension()
    finally:
        compiled.extension.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bitmap_model_is_saved_small_and_loads_as_it_was(
    family: str, dtype: torch.dtype, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_model(family).config, dtype=dtype).eval()
    methods.prune(model, Weight("weight"), 0.9, None)
    model, kernel = execution.prepare(model, Execution("bitmap"))
    facts = {"method": {"family": "weight"}, "execution": {"name": "bitmap"}}
    saving.save(model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "saved", facts)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(t.nbytes for t in weights.values()) == counting.size(counting.stock(model))["stored_bytes"]
    again, _ = sweep.load_model(tmp_path / "saved")
    assert again.dtype == dtype
    layers = packed(again).values()
    assert layers and {f"bitmap {layer.kernel}" for layer in layers} == {kernel}
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_tokens()).logits, again(input_ids=random_tokens()).logits)
    assert "sweep.load_model(FOLDER)" in (tmp_path / "saved" / "README.md").read_text()

    name = next(name for name in weights if name.endswith(".mask"))
    weights[name] ^= 1
    save_file(weights, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(RequestError, match=f"layer {name.removesuffix('.mask')} of the checkpoint is damaged"):
        sweep.load_model(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernels_pass_the_sanitizers(tmp_path: Path) -> None:
    driver = Path(__file__).parent / "kernels_driver.cpp"
    kernels = Path(bitmap.__file__).parent / "kernels"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{kernels}",
        str(driver),
        "-o",
        str(tmp_path / "driver"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in compiled.available():
        assert f"{name}: " in ran.stdout


def test_the_executions_of_a_sweep_differ_in_bytes_and_not_in_quality(tmp_path: Path, tiny_checkpoint: Path) -> None:
    command = [
        "+method=weight",
        "execution=dense,bitmap",
        "sparsity=0.5,0.9",
        "model=local",
        f"model.path={tiny_checkpoint}",
    ]
    run(*command, *QUICK, "benchmarks=pydoc", "save_model=saved", "-m", cwd=tmp_path)
    rows = sweep.load(tmp_path / "results")
    assert (rows.status == "ok").all() and len(rows) == 5
    for _, pair in rows[rows.method == "weight"].groupby("sparsity"):
        dense, compressed = (pair[pair.execution == name].iloc[0] for name in ("dense", "bitmap"))
        assert dense.kernel == "torch" and compressed.kernel.startswith("bitmap ")
        assert compressed["pydoc/token_perplexity"] == pytest.approx(dense["pydoc/token_perplexity"], rel=1e-4)
        assert compressed.weights_bytes < dense.weights_bytes
        assert compressed.macs_per_token == dense.macs_per_token
        assert compressed.nonzero_parameters == dense.nonzero_parameters
        for row in (dense, compressed):
            assert row.decode_bound in ("memory", "compute") and row.kv_cache_bytes > 0
            assert row.decode_control_low <= row.decode_control <= row.decode_control_high
            assert row.timed_repeats == 6 and row.timing_ended_by == "repeats"
    cell = rows[rows.execution == "bitmap"].cell.iloc[0]
    assert packed(sweep.load_model(tmp_path / "saved" / cell)[0])
