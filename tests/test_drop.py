"""The measured drop: equal to plain zeroing, unit by unit, in every family and for every metric."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import random_tokens, tiny_model
from sweep import cache
from sweep.models import anatomy
from sweep.pruning import checks, drop, drop_file, methods, units
from sweep.pruning.families import Drop, Head, Layer, Neuron
from sweep.settings import RequestError


def plain(model: PreTrainedModel, prompts: Sequence, answers: Sequence) -> np.ndarray:
    """Log-likelihood of every answer after its prompt, each read alone and from its first token."""
    found = []
    for prompt, choices in zip(prompts, answers, strict=True):
        for choice in choices:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].double().log_softmax(-1)
            found.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(choice)))
    return np.array(found)


def zeroed(model: PreTrainedModel, block: int, columns: torch.Tensor, part: str) -> PreTrainedModel:
    method = Neuron() if part == "neuron" else Head()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        anatomy.weight(units.parts(copied, method)[block].output)[:, columns] = 0
    return copied


QUESTIONS = ([[5, 6, 7], [8, 9]], [[[10], [11, 12], [11, 13]], [[14, 15, 16], [10]]])


@pytest.mark.parametrize("spare_head", [False, True])
@pytest.mark.parametrize("part", ["neuron", "head"])
def test_a_drop_is_what_plain_zeroing_gives(family: str, part: str, spare_head: bool) -> None:
    model = tiny_model(family)
    tokens = random_tokens(3, 9)
    whole = [row[:1].tolist() for row in tokens], [[row[1:].tolist()] for row in tokens]
    parts = units.parts(model, Neuron() if part == "neuron" else Head(unit="query"))
    ablations = [drop.Ablation(p.block, p.output, list(torch.arange(p.columns).view(-1, p.size)[:3])) for p in parts]
    for probe, (prompts, answers) in (
        (drop.probe_of_text(tokens), whole),
        (drop.probe_of_questions(*QUESTIONS, [0, 1]), QUESTIONS),
    ):
        base, found = drop.likelihoods(model, probe, ablations, resume=False, spare_head=spare_head)
        np.testing.assert_allclose(base, plain(model, prompts, answers), atol=1e-4)
        for ablation, values in zip(ablations, found, strict=True):
            for columns, value in zip(ablation.columns, values, strict=True):
                gone = zeroed(model, ablation.block, columns, part)
                np.testing.assert_allclose(value, plain(gone, prompts, answers), atol=1e-4)


def test_the_head_is_spared_where_the_bound_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = tiny_model("llama"), drop.probe_of_text(random_tokens(3, 9))  # 24 scored positions
    part = units.parts(model, Neuron())[0]
    ablation = drop.Ablation(0, part.output, list(torch.arange(24).view(-1, 1)))
    whole, original = [], drop.Resumed._log_normaliser_in_full

    def in_full(self: drop.Resumed, states: torch.Tensor) -> torch.Tensor:
        whole.append(len(states))
        return original(self, states)

    monkeypatch.setattr(drop.Resumed, "_log_normaliser_in_full", in_full)
    counts = {}
    for tolerance, room in ((1e-4, 2**30), (np.inf, 10 * 4 * 16**2), (-1.0, 2**30)):
        monkeypatch.setattr(drop, "TOLERANCE", tolerance)
        monkeypatch.setattr(drop, "EXPANSION_BYTES", room)
        whole.clear()
        drop.likelihoods(model, probe, [ablation], resume=False)  # 24 units of a model of hidden size 16: too few
        assert sum(whole) == 24 * (24 + 2)  # two are the whole model and the check
        monkeypatch.setattr(drop, "PAYS", 1)
        whole.clear()
        drop.likelihoods(model, probe, [ablation], resume=False)
        counts[tolerance] = sum(whole) - 24 * 2
        monkeypatch.undo()
        monkeypatch.setattr(drop.Resumed, "_log_normaliser_in_full", in_full)
    assert counts[1e-4] < 24 * 24 / 2 and counts[np.inf] == 24 * 14 and counts[-1.0] == 24 * 24


def test_a_removed_block_gives_what_the_model_without_it_gives(family: str) -> None:
    from sweep.models import surgery

    model, tokens = tiny_model(family), random_tokens(3, 9)
    with torch.inference_mode():
        run = drop.Resumed(model, drop.probe_of_text(tokens))
    whole = [row[:1].tolist() for row in tokens], [[row[1:].tolist()] for row in tokens]
    for block in (0, 1):
        shrunk = copy.deepcopy(model)
        surgery.remove_blocks(shrunk, [index != block for index in range(2)])
        with torch.inference_mode():
            np.testing.assert_allclose(run.without_block(block), plain(shrunk, *whole), atol=1e-4)


def test_the_first_order_estimate_is_the_derivative(family: str) -> None:
    model, probe = tiny_model(family), drop.probe_of_questions(*QUESTIONS, [0, 1])
    part = units.parts(model, Neuron())[0]
    estimate = drop.first_order(model, probe, [part.output])[0]
    scheme, step = drop.Scheme("loss", probe), 1e-2
    changes = []
    for sign in (1, -1):
        moved = copy.deepcopy(model).double()
        with torch.no_grad():
            anatomy.weight(units.parts(moved, Neuron())[0].output)[:, 3] *= 1 + sign * step
        changes.append(float(scheme(plain(moved, *QUESTIONS))))
    assert float(estimate[3]) == pytest.approx(-(changes[0] - changes[1]) / (2 * step), rel=1e-2, abs=1e-6)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_drops_of_a_counted_metric_that_are_equal_go_by_the_loss() -> None:
    probe = drop.probe_of_questions(*QUESTIONS, [0, 1])
    base = np.array([-1.0, -2.0, -3.0, -4.0, -1.0])
    found = np.stack([base, base - [0.5, 0, 0, 0, 0], base - [2.5, 0, 0, 0, 0]])  # the last one loses the first answer
    scores = drop.importance(drop.Scheme("accuracy", probe), base, found)
    assert scores[0] < scores[1] < scores[2]
    assert scores[2] - scores[1] > 0.2 and scores[1] - scores[0] < 0.5 / 2
    loss = drop.importance(drop.Scheme("loss", probe), base, found)
    assert loss.tolist() == pytest.approx([0.0, 0.25, 1.25])  # two scored tokens are right
    assert drop.importance(drop.Scheme("perplexity", probe), base, found)[1] == pytest.approx(np.e * (np.exp(0.25) - 1))


def test_an_interrupted_measurement_goes_on(cache_folder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = tiny_model("llama"), drop.probe_of_text(random_tokens(3, 9))
    part = units.parts(model, Neuron())[0]
    ablation = drop.Ablation(0, part.output, list(torch.arange(8).view(-1, 1)))
    monkeypatch.setattr(drop, "TOKENS_AT_ONCE", 48)  # two units at a time
    counted, original = [], drop.Resumed.after

    def after(self: drop.Resumed, block: int, hidden: torch.Tensor, copies: int) -> np.ndarray:
        counted.append(copies)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return original(self, block, hidden, copies)

    monkeypatch.setattr(drop.Resumed, "after", after)
    with pytest.raises(KeyboardInterrupt):
        drop.likelihoods(model, probe, [ablation])
    assert counted == [1, 2, 2, 2]
    _, (resumed,) = drop.likelihoods(model, probe, [ablation])
    assert counted[4:] == [1, 2, 2]  # the check, and the four units that were missing
    _, (fresh,) = drop.likelihoods(model, probe, [ablation], resume=False)
    np.testing.assert_array_equal(resumed, fresh)
    with torch.no_grad():
        part.output.weight[0, 0] += 1
    before = len(counted)
    drop.likelihoods(model, probe, [ablation])
    assert counted[before:] == [1, 2, 2, 2, 2]  # other weights, other measurement


@pytest.mark.parametrize("nth", range(10))
def test_a_measurement_that_is_killed_counts_nothing_that_it_did_not_measure(cache_folder: Path, nth: int) -> None:
    """Killed at the nth thing that it asks of the system from its first look at the cache on."""
    model, probe = tiny_model("llama"), drop.probe_of_text(random_tokens(3, 9))
    ablations = [
        drop.Ablation(p.block, p.output, list(torch.arange(8).view(-1, 1))) for p in units.parts(model, Neuron())
    ]
    child = os.fork()
    if not child:
        asked: list[str] = []

        def kill(event: str, arguments: tuple) -> None:
            if asked or any("drops/" in str(argument) for argument in arguments):
                asked.append(event)
            if len(asked) > 4 * nth + 1:
                os._exit(9)

        sys.addaudithook(kill)
        drop.likelihoods(model, probe, ablations)
        os._exit(0)
    os.waitpid(child, 0)
    _, found = drop.likelihoods(model, probe, ablations)
    _, expected = drop.likelihoods(model, probe, ablations, resume=False)
    np.testing.assert_array_equal(found, expected)
    left = [path.name for path in (cache_folder / "drops").iterdir() if not path.name.endswith(".lock")]
    assert len(left) == 2 and all(cache.damage(entry.path) is None for entry in cache.entries())


def test_a_killed_measurement_keeps_every_unit_that_was_measured(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, probe = tiny_model("llama"), drop.probe_of_text(random_tokens(3, 9))
    ablation = drop.Ablation(0, units.parts(model, Neuron())[0].output, list(torch.arange(8).view(-1, 1)))
    monkeypatch.setattr(drop, "TOKENS_AT_ONCE", 48)  # two units at a time
    measured, original = list[int](), drop.Resumed.ablated

    def ablated(self: drop.Resumed, ablation: drop.Ablation, wanted: Sequence[int], stop: int = 6) -> Iterator:
        for indices, values in original(self, ablation, wanted):
            measured.extend(indices)
            yield indices, values
            if len(measured) == stop:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        monkeypatch.setattr(drop.Resumed, "ablated", ablated)
        drop.likelihoods(model, probe, [ablation])
    os.waitpid(child, 0)
    monkeypatch.setattr(drop.Resumed, "ablated", functools.partialmethod(ablated, stop=-1))
    drop.likelihoods(model, probe, [ablation])
    assert measured == [6, 7]


def test_what_is_damaged_is_measured_again(cache_folder: Path) -> None:
    model, probe = tiny_model("llama"), drop.probe_of_text(random_tokens(3, 9))
    ablation = drop.Ablation(0, units.parts(model, Neuron())[0].output, list(torch.arange(8).view(-1, 1)))
    _, expected = drop.likelihoods(model, probe, [ablation])
    (whole,) = cache.entries()
    part, file = whole.path.with_name(f".{whole.path.name}.part"), whole.path / drop_file.LAYOUT[0]
    for damaged in (b"", file.read_bytes()[:-9], bytes(100), file.read_bytes().replace(b"seconds", b"minutes")):
        whole.path.rename(part)
        (part / file.name).write_bytes(damaged)
        np.testing.assert_array_equal(drop.likelihoods(model, probe, [ablation])[1], expected)
        file.write_bytes(damaged)
        np.testing.assert_array_equal(drop.likelihoods(model, probe, [ablation])[1], expected)


def test_a_row_that_was_half_put_is_measured_again(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = tiny_model("llama"), drop.probe_of_text(random_tokens(3, 9))
    ablation = drop.Ablation(0, units.parts(model, Neuron())[0].output, list(torch.arange(8).view(-1, 1)))
    _, expected = drop.likelihoods(model, probe, [ablation])
    (whole,) = cache.entries()
    part = whole.path.with_name(f".{whole.path.name}.part")
    measured, original = list[int](), drop.Resumed.ablated

    def ablated(self: drop.Resumed, ablation: drop.Ablation, wanted: Sequence[int]) -> Iterator:
        measured.extend(wanted)
        return original(self, ablation, wanted)

    monkeypatch.setattr(drop.Resumed, "ablated", ablated)
    for field in drop_file.whole(whole.path).dtype.names:
        rows = drop_file.begun(whole.path, 8, len(probe.options))
        rows[field][3] = np.nan
        whole.path.rename(part)
        np.testing.assert_array_equal(drop.likelihoods(model, probe, [ablation])[1], expected)
        assert measured == [3]
        measured.clear()


def test_answers_that_begin_alike_share_a_row() -> None:
    probe = drop.probe_of_questions(*QUESTIONS, [0, 1])
    assert [row.tolist() for row in probe.rows] == [[5, 6, 7, 11], [8, 9, 14, 15]]
    assert len(probe.reads) == 9 and len(probe.places) == 5


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            Neuron(drop=Drop(metric="f1")),
            "method.metric=f1 needs classes, and the calibration text has none: set method.task to one",
        ),
        (Layer(criterion="drop", drop=Drop(screen="taylor")), "method.screen=taylor is for neurons and heads"),
        (
            Neuron(drop=Drop(metric="f1", task="pydoc")),
            "method.task=pydoc has no classes, so that no drop can be measured on it",
        ),
        (Neuron(drop=Drop(task="arc_easy")), "method.task=arc_easy is not embedded"),
        (Neuron(drop=Drop(task="continents", documents=5000)), "method.documents=5000 is more than the"),
    ],
)
def test_a_metric_that_a_task_does_not_have_is_refused(method: Neuron | Layer, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        checks.check_drop(method)


def test_documents_of_one_class_are_refused() -> None:
    with pytest.raises(RequestError, match="the 3 documents of continents are all of one class"):
        checks.check_classes("continents", [1, 1, 1])
    checks.check_drop(Neuron(criterion="drop", drop=Drop(metric="f1", task="continents", documents=50)))


def test_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="measured in float32, and the model is in torch.bfloat16"):
        drop.likelihoods(tiny_model("llama").bfloat16(), drop.probe_of_text(random_tokens()), [])


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
@pytest.mark.parametrize(("make", "units_in_all"), [(Neuron, 48), (Head, 4), (Layer, 2)])
def test_units_go_by_their_measured_drop(metric: str, make: type, units_in_all: int, cache_folder: object) -> None:
    model, tokens = tiny_model("llama").bfloat16(), random_tokens(3, 9)
    pruned = methods.prune(model, make(criterion="drop", drop=Drop(metric=metric)), 0.5, tokens)
    assert pruned.units_removed == units_in_all // 2
    table = pruned.measured
    assert len(table) == units_in_all and table.measured.all() and table.importance.notna().all()


def test_the_lowest_drops_are_the_ones_that_go(cache_folder: object) -> None:
    model, tokens = tiny_model("llama"), random_tokens(3, 9)
    before = [part.output.weight.clone() for part in units.parts(model, Neuron())]
    table = methods.prune(model, Neuron(criterion="drop"), 0.5, tokens).measured
    kept = table.sort_values("importance").iloc[24:].sort_values(["block", "unit"])
    for block, part in enumerate(units.parts(model, Neuron())):
        chosen = kept[kept.block == block].unit.tolist()
        assert torch.equal(part.output.weight, before[block][:, chosen])


def test_screening_measures_only_what_is_near_the_cut(cache_folder: object) -> None:
    exact, screened = (tiny_model("llama") for _ in range(2))
    tokens = random_tokens(3, 9)
    whole = methods.prune(exact, Neuron(criterion="drop"), 0.5, tokens).measured
    method = Neuron(criterion="drop", drop=Drop(screen="taylor", screen_margin=0.125))
    table = methods.prune(screened, method, 0.5, tokens).measured
    assert table.measured.sum() == 12 and table.importance.notna().sum() == 12
    both = table[table.measured].importance
    np.testing.assert_allclose(both, whole.importance[both.index], atol=1e-6)
    estimates = [torch.arange(10.0), torch.arange(10.0) + 0.5]
    assert [m.nonzero().flatten().tolist() for m in units.screened(estimates, 0.5, 0.1, together=True)] == [
        [4, 5],
        [4, 5],
    ]
    assert units.screened(estimates, 0.2, 0.1, together=False)[0].nonzero().flatten().tolist() == [1, 2]


def test_a_table_of_several_rounds_has_every_unit_once_under_its_first_number(cache_folder: object) -> None:
    model, tokens = tiny_model("llama"), random_tokens(3, 9)
    before = [part.output.weight.clone() for part in units.parts(model, Neuron())]
    table = methods.prune(model, Neuron(criterion="drop", steps=3), 0.5, tokens).measured
    assert len(table) == 48 == len(table.drop_duplicates(["block", "unit"])) and table.measured.all()
    for block, part in enumerate(units.parts(model, Neuron())):
        left = [int((before[block] == column[:, None]).all(0).nonzero()) for column in part.output.weight.t()]
        mine = table[table.block == block].set_index("unit").importance
        assert mine[left].min() > mine.drop(left).min()
    screened = Neuron(criterion="drop", steps=3, drop=Drop(screen="taylor", screen_margin=0.1))
    table = methods.prune(tiny_model("llama"), screened, 0.5, tokens).measured
    assert len(table) == 48 and 10 < table.measured.sum() < 48  # more than the ten of one round


def test_a_dropped_block_is_a_unit_that_was_measured(cache_folder: object) -> None:
    model = tiny_model("llama")
    table = methods.prune(model, Layer(criterion="drop", blocks=(1,)), 0.9, random_tokens(3, 9)).measured
    assert table[["block", "unit", "measured"]].to_numpy().tolist() == [[1, 0, True]]


def test_groups_are_measured_and_removed_together(cache_folder: object) -> None:
    model, tokens = tiny_model("llama"), random_tokens(3, 9)
    pruned = methods.prune(model, Neuron(criterion="drop", group=4), 0.25, tokens)
    assert pruned.units_removed == 12
    assert all(part.units % 4 == 0 for part in units.parts(model, Neuron()))
    assert (pruned.measured.groupby(["block", "importance"]).size() == 4).all()
