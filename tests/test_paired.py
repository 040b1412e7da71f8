"""Paired tests against their formulas, written out, and against what chance does."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from sweep import paired, store
from sweep.config import RequestError


def test_mcnemar_is_the_binomial_sum() -> None:
    before = [1] * 10 + [0] * 12
    after = [1] * 3 + [0] * 7 + [1] * 2 + [0] * 10  # 7 lost, 2 gained
    p, gained, lost = paired.mcnemar(before, after)
    assert (gained, lost) == (2, 7)
    assert p == pytest.approx(2 * sum(comb(9, k) for k in range(3)) / 2**9)
    assert paired.mcnemar([1, 0], [1, 0]) == (1.0, 0, 0)


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = paired.holm([0.01, np.nan, 0.02])
    assert with_gap[[0, 2]].tolist() == pytest.approx([0.02, 0.02]) and np.isnan(with_gap[1])
    assert paired.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert len(paired.holm([])) == 0


def test_equal_accuracy_may_hide_flips() -> None:
    before = pd.DataFrame({"acc": [1.0, 0, 1, 0, 1, 1]})
    after = pd.DataFrame({"acc": [0.0, 1, 1, 0, 1, 1]})
    found = paired.difference(before, after, "acc")
    assert found["difference"] == 0 and (found["gained"], found["lost"]) == (1, 1) and found["p"] == 1


def losses(seed: int, shift: float, documents: int = 60) -> tuple[pd.DataFrame, pd.DataFrame]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(50, 200, documents).astype(float)
    base = tokens * draw.normal(3, 1, documents)
    return tuple(
        pd.DataFrame({"log_likelihood": -(base + tokens * draw.normal(by, 0.2, documents)), "tokens": tokens})
        for by in (0.0, shift)
    )  # type: ignore[return-value]


def test_documents_are_paired_so_that_a_small_difference_shows() -> None:
    before, after = losses(0, 0.2)
    found = paired.difference(before, after, "loss")
    assert found["difference"] == pytest.approx(
        (before.log_likelihood.sum() - after.log_likelihood.sum()) / before.tokens.sum()
    )
    assert found["low"] < found["difference"] < found["high"] and found["p"] < 0.01
    shuffled = after.sample(frac=1, random_state=1).reset_index(drop=True)  # pairs torn apart: the same losses
    assert paired.difference(before, shuffled, "loss")["p"] > 0.05


def test_a_difference_that_no_draw_denies_stays_news_in_a_large_table() -> None:
    found = paired.difference(*losses(0, 1.0), "loss")
    assert 2.0**-59 <= found["p"] < 1e-9  # a shift of five times its spread, over 60 documents
    assert paired.holm([found["p"], *[0.5] * 200])[0] < 0.05
    few = paired.difference(*losses(0, 1.0, documents=5), "loss")
    assert few["p"] == 2.0**-4  # five documents cannot tell more, however far apart


def test_chance_is_called_news_about_as_often_as_it_says() -> None:
    wrong = sum(paired.difference(*losses(seed, 0.0), "loss")["p"] < 0.05 for seed in range(100))
    assert wrong <= 12  # 5 expected; 13 or more of 100 has probability 0.0015


def test_f1_is_scikit_learns_on_every_draw() -> None:
    draw = np.random.default_rng(0)
    target = draw.integers(0, 4, 80)
    before, after = (pd.DataFrame({"target": target, "chosen": np.where(draw.random(80) < right, target, 0)})
                     for right in (0.9, 0.5))  # fmt: skip
    found = paired.difference(before, after, "f1_macro")
    expected = [f1_score(target, frame.chosen, average="macro") for frame in (before, after)]
    assert [found["before"], found["after"]] == pytest.approx(expected)
    assert found["high"] < 0 and found["p"] < 0.01
    chosen = draw.integers(0, 80, (300, 80))
    drawn = [f1_score(target[i], after.chosen.to_numpy()[i], average="macro")
             - f1_score(target[i], before.chosen.to_numpy()[i], average="macro") for i in chosen]  # fmt: skip
    assert found["high"] - found["low"] == pytest.approx(np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025), rel=0.2)


def test_a_band_is_divided_by_its_own_tokens() -> None:
    before = pd.DataFrame({"loss_band_zipf0to3": [2.0, np.nan, 6.0], "tokens_band_zipf0to3": [1.0, np.nan, 2.0]})
    after = pd.DataFrame({"loss_band_zipf0to3": [3.0, np.nan, 4.0], "tokens_band_zipf0to3": [1.0, np.nan, 1.0]})
    found = paired.difference(before, after, "loss_band_zipf0to3")
    assert found["before"] == pytest.approx(8 / 3) and found["after"] == pytest.approx(7 / 2)


def test_the_gap_between_bands_is_a_difference_of_differences() -> None:
    draw = np.random.default_rng(0)

    def outcomes(rare: float, common: float) -> pd.DataFrame:
        return pd.DataFrame({"loss_band_zipf0to3": draw.normal(rare, 0.1, 50) * 10, "tokens_band_zipf0to3": 10.0,
                             "loss_band_zipf5up": draw.normal(common, 0.1, 50) * 40, "tokens_band_zipf5up": 40.0})  # fmt: skip

    dense, pruned = outcomes(5.0, 2.0), outcomes(6.0, 2.5)
    found = paired.band_gap(dense, pruned, "zipf0to3", "zipf5up")
    means = {f"{n}{b}": (f[f"loss_band_{b}"].sum() / f[f"tokens_band_{b}"].sum())
             for n, f in (("dense", dense), ("pruned", pruned)) for b in ("zipf0to3", "zipf5up")}  # fmt: skip
    expected = means["prunedzipf0to3"] - means["densezipf0to3"] - (means["prunedzipf5up"] - means["densezipf5up"])
    assert found["gap"] == pytest.approx(expected)
    assert 0 < found["low"] < 0.5 < found["high"] + 0.1 and found["p"] < 0.01


def test_a_loss_that_is_no_number_gives_no_verdict() -> None:
    before, after = losses(0, 0.2)
    after.loc[0, "log_likelihood"] = np.nan
    found = paired.difference(before, after, "loss")
    assert np.isnan(found["p"]) and np.isnan(found["difference"])


def test_a_table_says_what_is_within_noise(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    easy = draw.random(300)
    for cell, method, skill, dtype in (("a", "dense", 0.7, "float32"), ("b", "weight", 0.69, "float32"),
                                       ("c", "weight", 0.3, "float32"), ("d", "weight", 0.3, "bfloat16")):  # fmt: skip
        config = json.dumps({"model": "m", "dtype": dtype, "device": "cpu", "threads": 1, "benchmarks": {}})
        samples = pd.DataFrame({"task": "t", "document": [str(i) for i in range(300)], "metric": "acc",
                                "value": (easy < skill).astype(float)})  # fmt: skip
        row = {"cell": cell, "status": "ok", "method": method, "config": config, "sparsity": 0.5, "t/acc": skill}
        store.write(tmp_path, row, {"samples": samples})
    found = paired.table(tmp_path, ["t/acc", "missing/acc"]).set_index("after")
    assert found.verdict.to_dict() == {"b": "within noise", "c": "worse"}  # d has no dense cell of its dtype
    assert (found.p_holm >= found.p).all()
    back = paired.table(tmp_path, ["t/acc"], pairs=[("c", "b")])
    assert back.verdict.item() == "better" and back.gained.item() > 50
    with pytest.raises(RequestError, match="t/acc_nrm: the examples of t have no acc_nrm. Did you mean 'acc'"):
        paired.table(tmp_path, ["t/acc_nrm"])
    with pytest.raises(RequestError, match="t/f1_macro: the examples of t have no f1_macro"):
        paired.table(tmp_path, ["t/f1_macro"])
