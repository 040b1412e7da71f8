"""Paired tests against their formulas, written out, and against what chance does."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from sweep import store
from sweep.report import paired
from sweep.settings import RequestError


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


def test_the_mean_difference_of_pairs_is_that_of_their_differences() -> None:
    outcomes = {}
    for seed, shift in enumerate((0.1, 0.3)):
        before, after = losses(0, shift)  # the same documents, of the same lengths
        outcomes |= {f"before{seed}": before, f"after{seed}": after}
    pairs = [("before0", "after0"), ("before1", "after1")]
    each = [paired.difference(outcomes[one], outcomes[other], "loss") for one, other in pairs]
    found = paired.mean_difference(outcomes, pairs, "loss")
    assert found["difference"] == pytest.approx((each[0]["difference"] + each[1]["difference"]) / 2)
    assert found["low"] < found["difference"] < found["high"]
    alone = paired.mean_difference(outcomes, pairs[:1], "loss")
    assert {name: each[0][name] for name in alone} == pytest.approx(alone)


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


def test_f1_is_scikit_learns_and_its_interval_as_wide_as_a_bootstraps() -> None:
    draw = np.random.default_rng(0)
    target = draw.integers(0, 4, 80)
    before, after = (
        pd.DataFrame({"target": target, "chosen": np.where(draw.random(80) < right, target, 0)}) for right in (0.9, 0.5)
    )
    found = paired.difference(before, after, "f1_macro")
    expected = [f1_score(target, frame.chosen, average="macro") for frame in (before, after)]
    assert [found["before"], found["after"]] == pytest.approx(expected)
    assert found["high"] < 0 and found["p"] < 0.01
    chosen = draw.integers(0, 80, (300, 80))
    drawn = [
        f1_score(target[i], after.chosen.to_numpy()[i], average="macro")
        - f1_score(target[i], before.chosen.to_numpy()[i], average="macro")
        for i in chosen
    ]
    assert found["high"] - found["low"] == pytest.approx(np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025), rel=0.2)


def test_a_band_is_divided_by_its_own_tokens() -> None:
    before = pd.DataFrame({"loss_band_zipf0to3": [2.0, np.nan, 6.0], "tokens_band_zipf0to3": [1.0, np.nan, 2.0]})
    after = pd.DataFrame({"loss_band_zipf0to3": [3.0, np.nan, 4.0], "tokens_band_zipf0to3": [1.0, np.nan, 1.0]})
    found = paired.difference(before, after, "loss_band_zipf0to3")
    assert found["before"] == pytest.approx(8 / 3) and found["after"] == pytest.approx(7 / 2)


def test_the_gap_between_bands_is_a_difference_of_differences() -> None:
    draw = np.random.default_rng(0)

    def outcomes(rare: float, common: float) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "loss_band_zipf0to3": draw.normal(rare, 0.1, 50) * 10,
                "tokens_band_zipf0to3": 10.0,
                "loss_band_zipf5up": draw.normal(common, 0.1, 50) * 40,
                "tokens_band_zipf5up": 40.0,
            }
        )

    dense, pruned = outcomes(5.0, 2.0), outcomes(6.0, 2.5)
    found = paired.band_gap(dense, pruned, "zipf0to3", "zipf5up")
    means = {
        f"{n}{b}": (f[f"loss_band_{b}"].sum() / f[f"tokens_band_{b}"].sum())
        for n, f in (("dense", dense), ("pruned", pruned))
        for b in ("zipf0to3", "zipf5up")
    }
    expected = means["prunedzipf0to3"] - means["densezipf0to3"] - (means["prunedzipf5up"] - means["densezipf5up"])
    assert found["gap"] == pytest.approx(expected)
    assert 0 < found["low"] < found["gap"] < found["high"] < 1 and found["p"] < 0.01


@pytest.mark.parametrize("strange", [np.nan, -np.inf])
def test_a_loss_that_is_no_number_gives_no_verdict(strange: float) -> None:
    before, after = losses(0, 0.2)
    after.loc[0, "log_likelihood"] = strange
    found = paired.difference(before, after, "loss")
    assert np.isnan(found["p"]) and not np.isfinite(found["difference"])
    before = pd.DataFrame({"loss_band_zipf0to3": [2.0, 1.0], "tokens_band_zipf0to3": [1.0, 1.0]})
    after = before.assign(loss_band_zipf0to3=[np.nan, 1.0])  # no band that the document lacks
    assert np.isnan(paired.difference(before, after, "loss_band_zipf0to3")["after"])


def test_windows_of_the_papers_perplexity_are_paired_like_any_documents(tmp_path: Path) -> None:
    before, after = losses(0, 0.2)
    windows = [pd.DataFrame({"loss": -o.log_likelihood / o.tokens}) for o in (before, after)]
    found = {name: paired.difference(*windows, name) for name in ("loss", "perplexity", "token_perplexity")}
    assert found["loss"] == found["perplexity"] == found["token_perplexity"]
    assert found["loss"]["difference"] == pytest.approx(windows[1].loss.mean() - windows[0].loss.mean())
    assert found["loss"]["test"] == "sign flips" and found["loss"]["p"] < 0.01
    results(tmp_path, {"dense": windows[0], "weight": windows[1]}, task="wikitext2")
    (line,) = paired.compare(tmp_path, ["wikitext2/perplexity"]).itertuples()
    assert line.verdict == "worse" and line.documents == 60


def test_metrics_of_log_likelihoods_are_losses_and_point_the_right_way(tmp_path: Path) -> None:
    likelihood = pd.DataFrame(
        {
            "word_perplexity": [-20.0, -30.0],
            "word_perplexity_weight": [10.0, 5.0],
            "bits_per_byte": [-20.0, -30.0],
            "bits_per_byte_weight": [40.0, 20.0],
            "perplexity": [-20.0, -30.0],
        }
    )
    words, bits, mean = (paired.estimate(likelihood, m) for m in ("word_perplexity", "bits_per_byte", "perplexity"))
    assert words.value == pytest.approx(50 / 15) and mean.value == 25  # exp of which is lm-eval's perplexity
    assert bits.value == pytest.approx(50 / 60 / np.log(2))
    many = pd.DataFrame({"perplexity": np.linspace(-9, -3, 12)})
    results(tmp_path, {"dense": many, "weight": many - 1}, task="lambada_openai")
    assert paired.compare(tmp_path, ["lambada_openai/perplexity"]).verdict.item() == "worse"


def test_a_divergence_is_a_mean_over_tokens() -> None:
    pages = pd.DataFrame({"kl_from_dense": [1.0, 8.0], "tokens": [10.0, 20.0]})
    assert paired.estimate(pages, "kl_from_dense").value == pytest.approx(9 / 30)


def test_what_a_document_does_to_a_metric_is_told_to_first_order() -> None:
    """Leaving a document out moves a metric by minus its residual, as far as a straight line goes."""
    draw = np.random.default_rng(0)
    found, _ = losses(0, 0.0, documents=200)
    found["target"], found["chosen"] = draw.integers(0, 3, (2, 200))
    for metric in ("loss", "f1_macro", "tokens"):
        whole = paired.estimate(found, metric)
        assert whole.residuals.sum() == pytest.approx(0, abs=1e-9) and whole.shares.sum() == pytest.approx(1)
        left_out = [paired.estimate(found.drop(i), metric).value - whole.value for i in range(10)]
        assert left_out == pytest.approx(-whole.residuals[:10], rel=0.05, abs=1e-5)


def results(
    folder: Path, cells: dict[str, pd.DataFrame], task: str = "t", dtype: str = "float32", start: int = 0
) -> None:
    """A results folder of cells named a, b, …: their methods, and the outcomes of their documents."""
    for i, (method, outcomes) in enumerate(cells.items(), start):
        config = json.dumps({"model": "m", "dtype": dtype, "device": "cpu", "threads": 1, "benchmarks": {}})
        samples = outcomes.melt(var_name="metric", ignore_index=False).rename_axis("document").reset_index()
        row = {
            "cell": "abcdefgh"[i],
            "status": "ok",
            "method": method.partition(" ")[0],
            "config": config,
            "sparsity": 0.5,
        }
        store.write(folder, row, {"samples": samples.assign(task=task, document=samples.document.astype(str))})


def test_a_table_says_what_is_within_noise(tmp_path: Path) -> None:
    easy = np.random.default_rng(0).random(300)
    dense, near, far = (pd.DataFrame({"acc": (easy < skill).astype(float)}) for skill in (0.7, 0.69, 0.3))
    results(tmp_path, {"dense": dense, "weight near": near, "weight far": far})
    results(tmp_path, {"weight": far}, dtype="bfloat16", start=3)
    found = paired.compare(tmp_path, ["t/acc", "missing/acc"]).set_index("after")
    assert found.verdict.to_dict() == {"b": "within noise", "c": "worse"}  # d has no dense cell of its dtype
    assert (found.p_holm >= found.p).all()
    back = paired.compare(tmp_path, ["t/acc"], pairs=[("c", "b")])
    assert back.verdict.item() == "better" and back.gained.item() > 50
    with pytest.raises(RequestError, match="t/acc_nrm: the examples of t have no acc_nrm. Did you mean 'acc'"):
        paired.compare(tmp_path, ["t/acc_nrm"])
    with pytest.raises(RequestError, match="t/f1_macro: the examples of t have no f1_macro"):
        paired.compare(tmp_path, ["t/f1_macro"])


def test_a_table_too_large_for_its_documents_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, after = losses(0, 5.0, documents=8)
    results(tmp_path, {"dense": before, **{f"weight {i}": after for i in range(6)}})
    assert (paired.compare(tmp_path, ["t/loss"]).verdict == "worse").all() and not caplog.text  # 6 / 128 is below 0.05
    results(tmp_path, {"weight": after}, start=7)
    assert (paired.compare(tmp_path, ["t/loss"]).verdict == "within noise").all()
    assert "t/loss: 8 documents give no p-value below 0.0078, and Holm's correction of 7 comparisons" in caplog.text


OUTCOMES = {
    "of windows": {"loss"},
    "of pages": {"log_likelihood", "tokens"},
    "of choices": {"acc", "target", "chosen"},
    "of old pages": {"log_likelihood", "tokens", "word_perplexity"},
    "of pages by band": {"log_likelihood", "tokens", "loss_band_no_word", "tokens_band_no_word"},
}


@pytest.mark.parametrize("columns", OUTCOMES.values(), ids=OUTCOMES)
def test_what_is_refused_is_not_what_is_offered(columns: set[str]) -> None:
    found = pd.DataFrame({column: [1.0, 0.0, 1.0] for column in columns})
    offered = paired.comparable(found)
    for metric in offered:
        paired._check(f"t/{metric}", found)
        assert paired.difference(found, found, metric)["difference"] == 0
    for metric in {"loss", "perplexity", "word_perplexity", "f1_macro", "loss_band_no_word", "kl_from_dense", "los"} - {
        *offered
    }:
        with pytest.raises(RequestError) as refused:
            paired._check(f"t/{metric}", found)
        assert f"have no {metric}." in str(refused.value) and f"'{metric}'" not in str(refused.value)


def test_a_task_whose_right_answer_is_not_always_a_choice_has_no_f1() -> None:
    found = pd.DataFrame({"acc": [1.0, 0.0], "target": [1.0, np.nan], "chosen": [1.0, np.nan]})
    with pytest.raises(RequestError, match="t/f1_macro: the examples of t have no f1_macro"):
        paired._check("t/f1_macro", found)
    paired._check("t/acc", found)
