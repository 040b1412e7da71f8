"""The compiled engine: the tokens that Python would have given, and a reason where it cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch

from conftest import random_tokens, tiny_model
from sweep import config, execution
from sweep.config import Efficiency, Execution
from sweep.measuring import efficiency, engine
from sweep.pruning import methods
from sweep.pruning.families import Weight
from test_config import asked

SETTINGS = Efficiency(prompt_tokens=8, output_tokens=5, warmup=1, repeats=6, engine="compiled")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    torch.compiler.reset()


def greedy(runs: engine.Engine, prompt: torch.Tensor, tokens: int) -> list[int]:
    with torch.inference_mode():
        runs.reset()
        found = [runs.prefill(prompt).argmax(-1)]
        while len(found) < tokens:
            found.append(runs.decode(found[-1]).argmax(-1).clone())
    return [int(token) for token in found]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "bitmap"])
def test_a_compiled_model_gives_the_tokens_of_generate(form: str) -> None:
    model = tiny_model("llama")
    methods.prune(model, Weight("weight"), 0.5, None)
    model, _ = execution.prepare(model, Execution(form))  # type: ignore[arg-type]
    prompt = random_tokens(1, 8)
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 8:].tolist()
    assert greedy(engine.eager(model), prompt, 5) == expected
    runs, _, columns = engine.engines(model, model, SETTINGS, prompt)
    assert columns == {"engine": "compiled", "engine_fallback": None}
    for _ in range(2):  # what an earlier generation has left does not matter
        assert greedy(runs, prompt, 5) == expected


def test_what_cannot_be_compiled_runs_eager_and_the_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    model = tiny_model("llama")
    columns, repeats = efficiency.latency(model, model, SETTINGS)
    assert columns["engine"] == "eager" and columns["engine_fallback"] == "RuntimeError: no C++ compiler"
    assert len(repeats) == 6 * 3 * 2


def test_compiling_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> NoReturn:
        while True:
            pass

    monkeypatch.setattr(engine, "compiled", endless)
    model = tiny_model("llama")
    runs, other, columns = engine.engines(
        model, model, Efficiency(engine="compiled", compile_seconds=1), random_tokens(1, 8)
    )
    assert runs is other and columns["engine"] == "eager"
    assert "TimeoutError: compiling took longer than efficiency.compile_seconds=1" in columns["engine_fallback"]


def test_the_engine_is_part_of_a_cell_that_is_timed_alone() -> None:
    timed, other = (config.parse(asked(efficiency={"engine": name}))[0] for name in ("eager", "compiled"))
    assert timed != other and timed == config.parse(asked())[0]
    untimed = [config.parse(asked(efficiency={"engine": name, "repeats": 0}))[0] for name in ("eager", "compiled")]
    assert untimed[0] == untimed[1]
    limits = [config.parse(asked(efficiency={"compile_seconds": seconds}))[0] for seconds in (9, 600)]
    assert limits[0] == limits[1]  # where nothing is compiled


@pytest.mark.slow
def test_a_limit_that_torch_would_pass_over_without_a_word_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_COMPILED", 1)  # and there are two shapes
    model = tiny_model("llama")
    _, _, columns = engine.engines(model, model, SETTINGS, random_tokens(1, 8))
    assert columns["engine"] == "eager" and "limit" in str(columns["engine_fallback"])
