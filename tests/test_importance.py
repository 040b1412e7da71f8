"""The diagnostic of the study neuron_importance: its rank correlation is scipy's, its sample is what was asked for, and its files are written."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from conftest import random_tokens, tiny_model
from sweep.models import anatomy
from sweep.pruning import units
from sweep.pruning.families import Neuron
from sweep.settings import RequestError

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "neuron_importance" / "diagnose.py"
diagnose = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
NAMES = [criterion.name for criterion in diagnose.PROXIES]


def test_rank_correlation_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 9, 40).astype(float)
    y = x + draw.normal(size=40)
    assert diagnose.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(diagnose.spearman(x, np.ones(40)))


def test_the_interval_is_seeded_and_holds_what_it_is_of() -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 9, 40).astype(float)
    y = x + draw.normal(size=40)
    low, high = diagnose.interval(x, y)
    assert low < diagnose.spearman(x, y) < high and (low, high) == diagnose.interval(x, y)
    assert (low, high) != diagnose.interval(x, y, seed=1)
    assert np.isnan(diagnose.interval(x, np.ones(40))).all()
    seldom = np.array([0.0, 0.0, 0.0, 1.0])  # of a third of the draws nothing can be said
    assert np.isfinite(diagnose.interval(seldom, np.arange(4.0))).all()


def test_drops_and_proxies_are_those_of_the_sampled_units(cache_folder: Path) -> None:
    model, tokens = tiny_model("llama"), random_tokens(4, 9)
    frame = diagnose.measure(model, tokens, 12, seed=3)
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
    for name in NAMES:
        assert frame[name].notna().all()
    # to first order the drop of one of 48 small neurons is its signed Taylor term
    summary = diagnose.summarise(frame).set_index("criterion")
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
    diagnose.main(arguments)
    summary = pd.read_parquet(tmp_path / "out" / "summary.parquet")
    assert set(summary.criterion) == {"drop", *NAMES}
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
        diagnose.main([str(tmp_path), *arguments])


def test_a_sample_larger_than_the_model_is_refused(cache_folder: Path) -> None:
    with pytest.raises(RequestError, match="--units must be 2 to 48, the neurons of the model; got 49"):
        diagnose.measure(tiny_model("llama"), random_tokens(2, 6), 49, 0)
