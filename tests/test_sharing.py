"""Statistics that cells share: read, they change no number, and a row says what its cell costs alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import random_tokens, tiny_model
from sweep import cache, locks, run
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model
from sweep.pruning import drop, methods, sharing
from sweep.pruning.families import Head, Layer, Method, Neuron, Weight

SHARING = [
    Weight("weight", criterion="wanda", allocation="owl"),
    Weight("weight", criterion="ria", allocation="global"),
    Neuron(criterion="taylor_sampled"),
    Neuron(criterion="flap"),
    Head(criterion="activation"),
    Head(criterion="taylor_abs", unit="query"),
    Layer(criterion="block_influence"),
]


@pytest.mark.parametrize("method", SHARING, ids=lambda m: f"{m.family}-{m.criterion}-{getattr(m, 'allocation', '')}")
@pytest.mark.parametrize("sequential", [True, False])
def test_shared_statistics_give_the_same_model(method: Method, sequential: bool) -> None:
    tokens, store, asked = random_tokens(), dict[str, sharing.Tensors](), list[str]()

    def memo(what: str, measure) -> sharing.Tensors:
        asked.append(what)
        if what not in store:
            store[what] = measure()
        return {name: t.clone() for name, t in store[what].items()}

    for sparsity in (0.25, 0.5):
        alone, together = tiny_model("llama"), tiny_model("llama")
        methods.prune(alone, method, sparsity, tokens, sequential=sequential)
        methods.prune(together, method, sparsity, tokens, sequential=sequential, memo=memo)
        for a, b in zip(alone.parameters(), together.parameters(), strict=True):
            assert torch.equal(a, b)
    assert len(store) == 1 and len(asked) == 2


def test_wanda_on_the_dense_models_activations_shares_them() -> None:
    store: list[str] = []

    def memo(what: str, measure) -> sharing.Tensors:
        store.append(what)
        return measure()

    method = Weight("weight", criterion="wanda", scope="row")
    methods.prune(tiny_model("llama"), method, 0.5, random_tokens(), sequential=True, memo=memo)
    assert not store  # each block reads what the pruned blocks before it put out
    methods.prune(tiny_model("llama"), method, 0.5, random_tokens(), sequential=False, memo=memo)
    assert len(store) == 1


@pytest.mark.parametrize(
    "method",
    [Weight("weight", allocation="global", steps=2, criterion="wanda"), Neuron(criterion="taylor_abs", steps=2)],
)
def test_only_the_first_step_reads_what_was_measured_on_the_unpruned_model(method: Method) -> None:
    asked: list[str] = []

    def memo(what: str, measure) -> sharing.Tensors:
        asked.append(what)
        return measure()

    methods.prune(tiny_model("llama"), method, 0.5, random_tokens(), sequential=True, memo=memo)
    assert len(asked) == 1


def cell(checkpoint: Path, sparsity: float, **changes) -> Cell:
    settings = {"method": Neuron(criterion="taylor_abs"), "seed": 0} | changes
    return Cell(
        Model("tiny", "local", str(checkpoint)),
        sparsity=sparsity,
        benchmarks=Benchmarks(()),
        calibration=Calibration("pydoc", 4, 16),
        efficiency=Efficiency(repeats=0),
        execution=Execution("shrunk"),
        dtype="float32",
        device="cpu",
        **settings,
    )


def test_a_second_sparsity_measures_nothing_and_its_row_says_what_it_costs(
    tiny_checkpoint: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(**changes) -> pd.Series:
        return pd.Series(run.run_cell(cell(tiny_checkpoint, **changes))[0])

    first = row(sparsity=0.25)
    (entry,) = [e for e in cache.entries() if e.name.startswith("statistics/")]
    # 896: 7 times the 4 x 16 tokens through both blocks
    (entry.path / "cost.json").write_text(
        '{"seconds": 1000.0, "block_tokens": 896, "peak_bytes": 123456789012345, "cpu_seconds": 3000.0}'
    )
    second = row(sparsity=0.5)
    assert first.prune_forward_passes == 1 and first.prune_seconds < 1000
    assert second.prune_seconds > 1000 and second.prune_forward_passes == 7
    assert second.prune_peak_memory_bytes == 123456789012345
    assert 0 < first.prune_cpu_seconds < 3000 < second.prune_cpu_seconds
    other = row(sparsity=0.5, seed=1)  # another draw of the text
    assert other.prune_seconds < 1000
    assert len([e for e in cache.entries() if e.name.startswith("statistics/")]) == 2


def test_waiting_for_what_another_cell_measures_is_in_no_column_of_work(
    tiny_checkpoint: Path, cache_folder: Path, tmp_path: Path
) -> None:
    run.run_cell(cell(tiny_checkpoint, 0.25))
    (entry,) = [e.path for e in cache.entries() if e.name.startswith("statistics/")]
    (entry / "cost.json").write_text('{"seconds": 2.0, "block_tokens": 128, "peak_bytes": 1}')
    entry.rename(tmp_path / "measured")
    begun, waited = threading.Event(), locks.waited_seconds()

    def another_cell() -> None:
        with locks.lock(entry.with_name(f".{entry.name}.lock")):
            begun.set()
            time.sleep(8)
            (tmp_path / "measured").rename(entry)

    other = threading.Thread(target=another_cell)
    other.start()
    begun.wait()
    started = time.perf_counter()
    row, _ = run.run_cell(cell(tiny_checkpoint, 0.5))
    seconds, waited = time.perf_counter() - started, locks.waited_seconds() - waited
    other.join()
    assert waited > 2  # else the cell took so long to get there that it needed not wait
    assert 2 <= row["prune_seconds"] < 2 + waited / 2
    assert row["cell_seconds"] == pytest.approx(seconds - waited, abs=0.3)


@pytest.mark.parametrize(("family", "at_once"), [(Neuron, 120), (Head, 60)])  # tokens: two neurons, one head
def test_what_a_drop_costs_does_not_depend_on_the_cache(
    family: type, at_once: int, tiny_checkpoint: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(sparsity: float) -> pd.Series:
        asked = cell(tiny_checkpoint, sparsity, method=family(criterion="drop"))
        return pd.Series(run.run_cell(asked)[0])

    original, measured = drop.Resumed.after, list[int]()

    def slow(self: drop.Resumed, block: int, hidden: torch.Tensor, copies: int) -> np.ndarray:
        measured.append(copies)
        if len(measured) == 3:
            raise KeyboardInterrupt
        time.sleep(0.2)
        return original(self, block, hidden, copies)

    monkeypatch.setattr(drop, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(drop.Resumed, "after", slow)
    with pytest.raises(KeyboardInterrupt):
        row(0.5)
    resumed = row(0.5)
    after = len(measured)
    read = row(0.25)
    assert len(measured) == after + 1  # the check alone
    for entry in cache.entries():
        if entry.name.startswith("drops/"):
            cache.discard(entry.path)
    fresh = row(0.5)
    assert len(measured) - after - 1 > 3
    assert fresh.prune_forward_passes == resumed.prune_forward_passes == read.prune_forward_passes
    waits = 0.2 * (len(measured) - after - 1)
    assert all(found.prune_seconds >= waits for found in (fresh, resumed, read))
