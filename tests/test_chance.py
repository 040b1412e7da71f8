"""Tests and intervals against their definition, and against what chance does: they err as often as they say."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from sweep.report import chance, paired

NOISES = {
    "normal": lambda draw, shape: draw.normal(0, 1, shape),
    "heavy tails": lambda draw, shape: draw.standard_t(3, shape),
    "two camps": lambda draw, shape: draw.choice([-1, 1], shape) * draw.gamma(2, 1, shape),
    "mostly none": lambda draw, shape: draw.normal(0, 1, shape) * (draw.random(shape) < 0.7),
}


def documents(draw: np.random.Generator, tries: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, difficulty) of skewed texts: a few are long, and a few are hard."""
    tokens = np.round(300 * np.exp(draw.normal(0, 0.9, (tries, count)))) + 20
    return tokens, np.exp(draw.normal(0, 0.8, (tries, count)))


def within(rate: float, tries: int, level: float = 0.05) -> bool:
    """Whether an error rate is what the level allows, up to three standard errors."""
    return rate <= level + 3 * np.sqrt(level * (1 - level) / tries)


def test_flipped_signs_are_counted_as_by_hand() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 7, 10):
        x = draw.integers(-3, 6, count).astype(float)  # with ties, and zeros
        sums = np.array([np.dot(signs, x) for signs in itertools.product((-1, 1), repeat=count)])
        expected = min(1, 2 * min((sums >= x.sum()).mean(), (sums <= x.sum()).mean()))
        assert chance.p_values(x[None])[0] == pytest.approx(expected)
    x = draw.normal(0.5, 1, 12)
    peer = permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert chance.p_values(x[None])[0] == pytest.approx(peer.pvalue)


def test_the_approximation_for_many_documents_is_near_the_count_already_for_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(0)
    tokens, hard = documents(draw, 200, 20)
    x = tokens * hard * draw.normal(draw.random((200, 1)), 1, (200, 20))
    exact = chance.p_values(x)
    monkeypatch.setattr(chance, "EXACT", 0)
    near = chance.p_values(x)
    assert (exact < 0.01).sum() > 10
    assert np.median(np.abs(near / exact - 1)) < 0.05  # where one document in five makes most of a difference
    assert np.quantile(np.abs(near / exact - 1)[exact > 1e-4], 0.9) < 0.2
    alike = np.abs(x)  # all on one side: as far as these documents go
    assert chance.p_values(alike) == pytest.approx(np.full(200, 2.0**-19))
    assert chance.p_values(np.array([[1.0, np.nan]])).tolist() == pytest.approx([np.nan], nan_ok=True)


@pytest.mark.parametrize("count", [6, 8, 17, 40])
def test_the_interval_holds_what_the_test_does_not_deny(count: int) -> None:
    draw = np.random.default_rng(count)
    for _ in range(5):
        tokens, hard = (v[0] for v in documents(draw, 1, count))
        shares, parts = tokens / tokens.sum(), tokens * hard * draw.normal(0.3, 1, count) / tokens.sum()
        low, high, p = chance.sign_flips(parts, shares)
        assert low < parts.sum() < high and (p < 0.05) == (low > 0 or high < 0)
        at = np.array([low - 1e-6, low + 1e-6, high - 1e-6, high + 1e-6])
        assert (chance.p_values(parts - at[:, None] * shares) < 0.05).tolist() == [True, False, False, True]


def test_too_few_documents_have_a_p_value_and_no_interval() -> None:
    low, high, p = chance.sign_flips(np.ones(5) / 5, np.ones(5) / 5)
    assert np.isnan([low, high]).all() and p == chance.least(5) == 2 / 32
    assert chance.sign_flips(np.ones(6) / 6, np.ones(6) / 6) == pytest.approx((1, 1, chance.least(6)))
    apart = chance.sign_flips([0.1, 0.2, 0.3, 0.4, -0.1, 0.1], np.ones(6) / 6)
    with_silent = chance.sign_flips([0.1, 0.2, 0.3, 0.4, -0.1, 0.1, 0, 0], [*np.ones(6) / 6, 0, 0])
    assert with_silent == apart  # documents without a token say nothing
    assert np.isnan(chance.sign_flips([], [])).all() and np.isnan(chance.sign_flips([np.inf, 1], [0.5, 0.5])).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("count", [8, 17, 40])
def test_a_loss_that_is_alike_is_called_news_and_missed_as_often_as_is_said(noise: str, count: int) -> None:
    """Of skewed documents of unequal length; that an interval misses is that the test denies the true difference."""
    draw, tries, true = np.random.default_rng(count), 1000, 0.03
    tokens, hard = documents(draw, tries, count)
    shares = tokens / tokens.sum(1, keepdims=True)
    parts = shares * (true + 0.05 * hard * NOISES[noise](draw, (tries, count)))
    assert within((chance.p_values(parts - true * shares) < 0.05).mean(), tries)
    found = [chance.sign_flips(*one) for one in zip(parts[:15], shares[:15], strict=True)]
    missed = [not low <= true <= high for low, high, _ in found]
    assert missed == (chance.p_values((parts - true * shares)[:15]) < 0.05).tolist()


@pytest.mark.parametrize("cells", [3, 9, 18])
def test_of_tables_without_a_difference_one_in_twenty_has_a_verdict(cells: int) -> None:
    """All cells are compared with one dense model, as paired.compare does."""
    draw, tables, count = np.random.default_rng(cells), 500, 17
    tokens, hard = documents(draw, tables, count)
    noise = 0.05 * (tokens * hard)[:, None] * draw.standard_t(4, (tables, cells + 1, count))
    p = chance.p_values((noise[:, 1:] - noise[:, :1]).reshape(-1, count)).reshape(tables, cells)
    assert within((np.array([chance.holm(line).min() for line in p]) < 0.05).mean(), tables)


@pytest.mark.parametrize("count", [8, 17, 40])
@pytest.mark.parametrize("classes", [2, 4, 6])
def test_an_f1_that_is_alike_is_called_news_as_often_as_is_said(count: int, classes: int) -> None:
    draw, tries = np.random.default_rng(count * classes), 300
    p = []
    for _ in range(tries):
        truth, sure = draw.integers(0, classes, count), np.clip(draw.normal(0.6, 0.3, count), 0, 1)
        cells = [
            pd.DataFrame(
                {
                    "target": truth,
                    "chosen": np.where(draw.random(count) < sure, truth, draw.integers(0, classes, count)),
                }
            )
            for _ in range(2)
        ]
        found = paired.minus(*(paired.estimate(cell, "f1_macro") for cell in cells))
        p.append(chance.p_values(found.parts()[None])[0])
    assert within((np.array(p) < 0.05).mean(), tries)


def test_an_interval_of_answers_covers_and_agrees_with_mcnemar() -> None:
    for count in (8, 20, 100):
        for gained, lost in itertools.combinations_with_replacement(range(count // 2 + 1), 2):
            p = chance.mcnemar([0] * gained + [1] * lost, [1] * gained + [0] * lost)[0]
            low, high = chance.flip_interval(gained, lost, count, p)
            assert -1 <= low <= (gained - lost) / count <= high <= 1
            assert (p < 0.05) == (high < 0)  # lost is the larger
    assert chance.flip_interval(0, 0, 8, 1.0)[1] > 0.2  # that none of eight flips says little
    draw, tries = np.random.default_rng(0), 3000
    for count, up, down in ((8, 0.1, 0.1), (8, 0.0, 0.3), (20, 0.05, 0.0), (20, 0.0, 0.6), (100, 0.02, 0.05)):
        flips = draw.multinomial(count, [up, down, 1 - up - down], tries)[:, :2]
        kinds, which = np.unique(flips, axis=0, return_inverse=True)
        covers = []
        for gained, lost in kinds:
            p = chance.mcnemar([0] * gained + [1] * lost, [1] * gained + [0] * lost)[0]
            low, high = chance.flip_interval(int(gained), int(lost), count, p)
            covers.append(low <= up - down <= high)
        assert within(1 - np.array(covers)[which.ravel()].mean(), tries)
