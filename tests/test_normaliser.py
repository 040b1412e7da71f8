"""The log-normaliser near known states: equal to the one in full, within the bound, in double precision."""

from __future__ import annotations

import pytest
import torch

from sweep.pruning import normaliser


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_the_rest_is_within_its_bound(step: float, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, states, change = (
        torch.randn(*shape, dtype=torch.double, generator=generator) for shape in ((50, 8), (5, 8), (200, 5, 8))
    )
    offset = torch.randn(50, dtype=torch.double, generator=generator) if bias else None
    moved = states + step * change
    found, bound = normaliser.expand(weight, offset, states)(moved)
    exact = torch.nn.functional.linear(moved, weight, offset).logsumexp(-1)
    assert found.shape == bound.shape == (200, 5)
    assert ((found - exact).abs() <= bound + 1e-12).all()
    assert (found - exact).abs().median() < bound.median() < 1e4 * step**3 or step >= 1


def test_means_and_covariances_are_those_under_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(*shape, dtype=torch.double, generator=generator) for shape in ((50, 8), (3, 8)))
    found = normaliser.expand(weight, None, states)
    for position, state in enumerate(states):
        share = (weight @ state).softmax(0)
        mean = share @ weight
        torch.testing.assert_close(found.means[position], mean)
        torch.testing.assert_close(found.covariances[position], torch.cov(weight.t(), correction=0, aweights=share))


def test_a_state_without_end_has_no_bound() -> None:
    weight = torch.eye(4)
    _, bound = normaliser.expand(weight, None, torch.zeros(1, 4))(torch.full((1, 1, 4), 1e4).cumsum(2))
    assert not bound.isfinite().any()
