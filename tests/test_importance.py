"""The diagnostic: its rank correlation is scipy's, its sample is what was asked for, and its files are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from conftest import random_tokens, tiny_model
from sweep import importance
from sweep.models import anatomy
from sweep.pruning import families, units
from sweep.pruning.families import Neuron
from sweep.settings import RequestError


def test_rank_correlation_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 9, 40).astype(float)
    y = x + draw.normal(size=40)
    assert importance.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(importance.spearman(x, np.ones(40)))
    low, high = importance.interval(x, y, draws=500)
    assert low < importance.spearman(x, y) < high


def test_drops_and_proxies_are_those_of_the_sampled_units(cache_folder: Path) -> None:
    model, tokens = tiny_model("llama"), random_tokens(4, 9)
    frame = importance.measure(model, tokens, 12, seed=3)
    assert len(frame) == 12 and not frame.duplicated(["block", "unit"]).any()
    row = frame.iloc[-1]
    with torch.no_grad():

        def loss() -> float:
            logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
            return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))

        before = loss()
        anatomy.weight(units.parts(model, Neuron())[int(row.block)].output)[:, int(row.unit)] = 0
        assert row["drop"] == pytest.approx(loss() - before, abs=1e-5)
    assert frame["drop"].to_numpy() == pytest.approx((frame.drop_half_0 + frame.drop_half_1).to_numpy() / 2)
    for name in families.PROXIES:
        assert frame[name].notna().all()
    # to first order the drop of one of 48 small neurons is its signed Taylor term
    summary = importance.summarise(frame).set_index("criterion")
    assert summary.with_drop["drop"] == 1.0 and summary.with_drop["taylor"] > 0.9


def test_the_command_writes_tables_and_figure(tiny_checkpoint: Path, tmp_path: Path, cache_folder: Path) -> None:
    arguments = [
        str(tmp_path / "out"),
        "--model",
        "local",
        "--path",
        str(tiny_checkpoint),
        "--units",
        "6",
        "--texts",
        "2",
        "--tokens",
        "16",
    ]
    importance.main(arguments)
    summary = pd.read_parquet(tmp_path / "out" / "summary.parquet")
    assert set(summary.criterion) == {"drop", *families.PROXIES}
    assert (summary.with_drop_low <= summary.with_drop_high).all()
    assert len(pd.read_parquet(tmp_path / "out" / "units.parquet")) == 6
    assert (tmp_path / "out" / "importance.png").stat().st_size > 5000
    assert (tmp_path / "out" / "importance.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smolm2"], "--model smolm2: there is no such model. Did you mean 'smollm2'"),
        (["--texts", "1"], "--texts and --tokens must be at least 2, got 1 and 64"),
    ],
)
def test_a_wrong_request_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        importance.main([str(tmp_path), *arguments])


def test_a_sample_larger_than_the_model_is_refused(cache_folder: Path) -> None:
    with pytest.raises(RequestError, match="--units must be 2 to 48, the neurons of the model; got 49"):
        importance.measure(tiny_model("llama"), random_tokens(2, 6), 49, 0)
