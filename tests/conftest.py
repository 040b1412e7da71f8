"""Tiny random models, made on the fly; a local S3 server; which tests are quick."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny_models
from sweep.recovery import stopped

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where other work shares the machine

# What makes a test take seconds: other programs and servers, child processes of cells, notebooks, whole reports.
HEAVY = {"subprocess", "isolate", "runner", "launchers", "ThreadedMotoServer", "NotebookClient", "rendering"}
QUICK_CASES = 3  # of a test with many cases so many are quick, spread evenly


@pytest.hookimpl(tryfirst=True)  # before `-m quick` looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick what neither is slow nor names anything heavy, in the test itself or in a helper or fixture of it."""
    cases = defaultdict(list)
    for item in items:
        assert isinstance(item, pytest.Function)
        functions = [item.function, *(found[-1].func for found in item._fixtureinfo.name2fixturedefs.values())]
        heavy = any(HEAVY & set(_names(function, set())) for function in functions)
        if not heavy and not any(map(item.get_closest_marker, ("slow", "data"))):
            cases[item.module, item.originalname].append(item)
    for found in cases.values():
        for place in {i * len(found) // QUICK_CASES for i in range(QUICK_CASES)}:
            found[place].add_marker("quick")


def _names(function: Any, seen: set[Any]) -> Iterator[str]:
    """The names that a function reads, and those of the functions of the tests' files that it calls."""
    seen.add(function)
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        yield from code.co_names
        for called in (function.__globals__.get(name) for name in code.co_names):
            own = getattr(called, "__code__", None)
            if own is not None and called not in seen and Path(own.co_filename).parent == Path(__file__).parent:
                yield from _names(called, seen)


TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {**TINY, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
FAMILIES: dict[str, dict] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "phi": {**TINY, "intermediate_size": 24},
    "opt": {**TINY, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24},
    "gpt_neox": {**TINY, "intermediate_size": 24},
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of two blocks, 24 FFN neurons each."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **FAMILIES[family], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def packed_request(**changes: object) -> dict[str, object]:
    """A composed configuration of a cell that runs packed, but for the changes."""
    return {
        "model": {"name": "a", "source": "local", "path": "a"},
        "method": {"family": "weight"},
        "sparsity": 0.5,
        "benchmarks": {"tasks": []},
        "calibration": None,
        "efficiency": {},
        "execution": {"name": "bitmap"},
        "device": "cpu",
    } | changes


def random_tokens(sequences: int = 6, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (sequences, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def every_state_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that is stopped loses nothing."""
    monkeypatch.setattr(stopped, "SECONDS", 0)
    monkeypatch.setattr(stopped, "WRITING", math.inf)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder


def write_tiny_checkpoint(folder: Path) -> None:
    """A tiny random Llama with a byte-level tokenizer, as save_pretrained writes it."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        **{**GATED, "vocab_size": len(tokenizer), "max_position_embeddings": 4096},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def turns_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests' cells wait for each other, and not for those that somebody measures on this machine meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWEEP_TURNS", str(tmp_path_factory.mktemp("turns")))
        yield


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place in a new bucket of a local S3 server."""
    s3fs = pytest.importorskip("s3fs", reason="results on object storage need the extra s3")
    moto = pytest.importorskip("moto.server", reason="the local S3 server is moto's: pip install 'moto[server]'")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # which remember another server
    s3fs.S3FileSystem().mkdir(f"studies-{port}")
    yield f"s3://studies-{port}/first"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def data_root() -> Path:
    """Benchmark data laid out as the hub names them, which no clone carries."""
    folder = os.environ.get("SWEEP_DATA_ROOT")
    if not folder:
        pytest.skip("needs benchmark data: set SWEEP_DATA_ROOT=FOLDER, laid out as the hub names it")
    return Path(folder).resolve()
