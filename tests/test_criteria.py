"""Criteria: what is declared of each is what its function says."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from sweep.pruning import criteria
from sweep.pruning.criteria import CRITERIA, READABLE, Criterion
from sweep.settings import RequestError


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: f"{c.of}-{c.name}")
def test_what_a_criterion_reads_is_its_functions_parameters(criterion: Criterion) -> None:
    if criterion.measured:
        assert not criterion.function and not criterion.reads
        return
    assert tuple(inspect.signature(criterion.load()).parameters) == criterion.reads
    assert set(criterion.reads) <= READABLE[criterion.of].keys()
    corrects = any(readable.corrects for readable in criterion.given())
    assert corrects == bool(criterion.corrects_after)
    if corrects:
        deputy = criteria.find(criterion.corrects_after, criterion.of)
        assert not deputy.corrects_after
    if criterion.compensates:
        assert "activations" in criterion.reads  # whose mean goes into the bias
    if criterion.paper:
        assert "arXiv:" in criterion.paper or "ICLR" in criterion.paper


def test_names_are_told_apart_within_a_kind_and_what_is_readable_is_read() -> None:
    pairs = [(criterion.of, criterion.name) for criterion in CRITERIA]
    assert len(set(pairs)) == len(pairs)
    for of, readable in READABLE.items():
        assert readable.keys() == {name for criterion in criteria.declared(of) for name in criterion.reads}


@pytest.mark.parametrize(
    ("of", "text", "draws"),
    [
        ("weight", {"wanda", "ria", "gradient", "sparsegpt", "alps"}, {"random"}),
        ("block", {"block_influence"}, {"random"}),
        ("token", {"frequency"}, {"random"}),
    ],
)
def test_what_reads_text_and_what_draws_is_told_by_what_is_read(of: criteria.Kind, text: set, draws: set) -> None:
    assert {criterion.name for criterion in criteria.declared(of) if criterion.reads_text} == text
    assert {criterion.name for criterion in criteria.declared(of) if criterion.draws} == draws


def test_a_name_of_another_kind_is_no_name() -> None:
    with pytest.raises(
        RequestError, match="method.criterion must be one of random, block_influence, drop; got 'wanda'"
    ):
        criteria.find("wanda", "block")


def test_declarations_need_no_torch() -> None:
    code = "import sys; from sweep.pruning import criteria, families; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
