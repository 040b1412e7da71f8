"""Calibration text that is made: by the model itself, of random tokens, and of several sources in turn."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sweep
from sweep import cache, config, plan, run, sources
from sweep.config import Benchmarks, Calibration, Cell, Efficiency, Execution, Model
from sweep.models import token_ids
from sweep.pruning import sharing
from sweep.pruning.families import Weight
from sweep.recovery.kinds import Recover, Text
from sweep.settings import RequestError
from sweep.sources import Source
from sweep.texts import text, written


@pytest.fixture
def dense(tiny_checkpoint: Path) -> tuple:
    """A model that is far from indifferent to what comes next, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.lm_head.weight *= 30
    return model.eval(), AutoTokenizer.from_pretrained(tiny_checkpoint)


def cell(checkpoint: Path, calibration: Calibration, **changes) -> Cell:
    return Cell(
        Model("tiny", "local", str(checkpoint)),
        Weight("weight", criterion="wanda", scope="row"),
        0.5,
        benchmarks=Benchmarks(()),
        calibration=calibration,
        efficiency=Efficiency(repeats=0),
        execution=Execution("dense"),
        dtype="float32",
        device="cpu",
        **changes,
    )


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.2, 0.1), (1.0,), (0.6, 0.399999, 0.000001)])
def test_sources_come_in_turn_by_their_shares(shares: tuple[float, ...]) -> None:
    taken = sources.order(shares, 50)
    assert taken[:20] == sources.order(shares, 20)
    for count in range(1, 51):
        for number, share in enumerate(shares):
            assert abs(taken[:count].count(number) - share * count) < 1 + 1e-6


def test_a_mix_is_the_sequences_of_its_sources_as_each_alone_gives_them(dense: tuple) -> None:
    model, tokenizer = dense
    write = functools.partial(written.write, model, tokenizer, sharing.unshared)
    asked = Calibration(
        "mix", 8, 16, sources=(Source("pydoc", 0.5), Source("self", 0.25, temperature=0.5), Source("random", 0.25))
    )
    found = text.calibration_tokens(asked, tokenizer, 3, None, write)
    alone = [
        text.calibration_tokens(part, tokenizer, 3, None, write)
        for part in (
            Calibration("pydoc", 4, 16),
            Calibration("self", 2, 16, temperature=0.5),
            Calibration("random", 2, 16),
        )
    ]
    taken = sources.order((0.5, 0.25, 0.25), 8)
    for number, sequences in enumerate(alone):
        assert torch.equal(found[[i for i, source in enumerate(taken) if source == number]], sequences)
    told = text.told(asked, found)
    assert [(each["source"], each["tokens"]) for each in told] == [("pydoc", 64), ("self", 32), ("random", 32)]
    assert told[0]["fingerprint"] == text.calibration_fingerprint(Calibration("pydoc"))
    assert told[1]["fingerprint"] == text.fingerprint(alone[1].tolist())


@pytest.mark.parametrize("source", ["self", "random", "pydoc"])
def test_the_seed_draws_and_fewer_sequences_are_the_first_of_more(source: str, dense: tuple) -> None:
    model, tokenizer = dense
    write = functools.partial(written.write, model, tokenizer, sharing.unshared)

    def drawn(count: int, seed: int) -> torch.Tensor:
        return text.calibration_tokens(Calibration(source, count, 12), tokenizer, seed, None, write)

    more = drawn(20, 0)
    assert more.shape == (20, 12) and torch.equal(drawn(5, 0), more[:5])
    assert not torch.equal(drawn(20, 1), more)
    assert len({tuple(sequence) for sequence in more.tolist()}) == 20


def test_random_tokens_are_all_that_spell_and_no_others(dense: tuple) -> None:
    _, tokenizer = dense
    found = text.calibration_tokens(Calibration("random", 200, 64), tokenizer, 0)
    spelling = set(token_ids.known(tokenizer)) - set(token_ids.special(tokenizer))
    assert set(found.flatten().tolist()) == spelling


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_model_writes_by_its_own_distribution(temperature: float, dense: tuple) -> None:
    """The surprise of what was drawn is, on average, the entropy of what it was drawn from, read without a cache."""
    model, tokenizer = dense
    asked = Calibration("self", 32, 32, temperature=temperature)
    found = written.write(model, tokenizer, sharing.unshared, asked, 0)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    known = torch.from_numpy(token_ids.known(tokenizer))
    with torch.inference_mode():
        logits = model(found[:, :-1]).logits[..., known] / temperature
    told = logits.log_softmax(-1)
    places = torch.searchsorted(known, found[:, 1:].contiguous())
    surprise = -told.gather(-1, places.unsqueeze(-1)).squeeze(-1)
    entropy = -(told.exp() * told).sum(-1)
    gap = surprise - entropy
    assert abs(gap.mean()) < 4 * gap.std() / gap.numel() ** 0.5
    assert entropy.mean() < 0.9 * torch.tensor(float(len(known))).log()  # else any draw would do


def test_what_a_model_writes_is_written_once_and_every_row_says_what_it_costs(
    tiny_checkpoint: Path, cache_folder: Path
) -> None:
    asked = cell(tiny_checkpoint, Calibration("self", 4, 16))
    first = run.run_cell(asked)[0]
    (entry,) = [e for e in cache.entries() if e.name.startswith("statistics/")]
    (entry.path / "cost.json").write_text('{"seconds": 1000.0, "block_tokens": 896, "peak_bytes": 1}')
    second = run.run_cell(replace(asked, sparsity=0.25))[0]
    assert first["calibration_seconds"] < 1000 < second["calibration_seconds"]
    assert second["prune_seconds"] < 1000
    assert first["calibration_sources"] == second["calibration_sources"]
    (told,) = json.loads(first["calibration_sources"])
    assert (told["source"], told["tokens"]) == ("self", 64)
    other = run.run_cell(replace(asked, seed=1))[0]
    assert other["calibration_sources"] != first["calibration_sources"]
    assert len([e for e in cache.entries() if e.name.startswith("statistics/")]) == 2


def test_recovery_reads_texts_that_are_made_too(tiny_checkpoint: Path, cache_folder: Path) -> None:
    mixed = Text("mix", 4, 16, sources=(Source("pydoc", 0.5), Source("self", 0.5)))
    asked = cell(tiny_checkpoint, Calibration("random", 4, 16), recover=Recover("local", mixed, steps=2))
    row = run.run_cell(asked)[0]
    assert [each["source"] for each in json.loads(row["calibration_sources"])] == ["random"]
    assert [(each["source"], each["tokens"]) for each in json.loads(row["recovery_sources"])] == [
        ("pydoc", 6 * 16),
        ("self", 6 * 16),
    ]


def test_recovery_goes_on_in_the_mix_that_pruning_has_begun(dense: tuple, tmp_path: Path) -> None:
    """Each sequence of its own is told by its source, also where pruning ended in the middle of a turn."""
    _, tokenizer = dense
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 2000)
    mixed = tuple(Source(str(tmp_path / f"{letter}.txt"), 0.5) for letter in "ab")
    asked = cell(
        tmp_path,
        Calibration("mix", 3, 16, sources=mixed),
        recover=Recover("local", Text("mix", 3, 16, sources=mixed)),
    )
    drawn = text.recovery_tokens(asked, tokenizer)
    recovery = text.of_recovery(asked)
    assert drawn is not None and recovery is not None
    tokens = torch.cat(drawn)
    told = text.told(recovery, tokens, None, text.read_before_recovery(asked))
    for letter, source in zip("ab", told, strict=True):
        own = [s for s in tokens if set(tokenizer.decode(s, skip_special_tokens=True)) == {letter}]
        assert source["tokens"] == 16 * len(own)
    assert {each["tokens"] for each in told} == {5 * 16, 6 * 16}


def test_a_sequence_that_is_not_packed_lies_within_one_document(dense: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = dense
    documents = ["a" * 40, "b" * 17, "c" * 5]
    monkeypatch.setattr(text.embedded, "pydoc_split", lambda: text.embedded.Split({}, {}, documents))
    found = text.calibration_tokens(Calibration("pydoc", 5, 8, packed=False), tokenizer, 0)
    said = sorted("".join(sorted(set(tokenizer.decode(s, skip_special_tokens=True)))) for s in found)
    assert set(said) == {"a", "b"}
    with pytest.raises(RequestError, match="gives . sequences of 8 tokens; 20 are asked"):
        text.calibration_tokens(Calibration("pydoc", 20, 8, packed=False), tokenizer, 0)
    packed = text.calibration_tokens(Calibration("pydoc", 7, 8), tokenizer, 0)
    assert any(len(set(tokenizer.decode(s, skip_special_tokens=True)) & set("abc")) > 1 for s in packed)


def test_python_takes_a_mix_too(dense: tuple) -> None:
    model, tokenizer = dense
    asked = {"source": "mix", "sources": [{"source": "self"}, {"source": "random"}]}
    pruned = sweep.prune(model, tokenizer, method="wanda", sparsity=0.5, calibration=asked, sequences=4, length=16)
    assert pruned.calibration_tokens == 64 and pruned.sparsity == 0.5
    asked = {"source": "random", "sequences": 2, "length": 8}
    assert sweep.prune(model, tokenizer, method="wanda", sparsity=0.6, calibration=asked).calibration_tokens == 16


ASKED = {
    "model": {"name": "m", "source": "local", "path": "x"},
    "method": {"family": "weight", "criterion": "wanda"},
    "sparsity": 0.5,
    "benchmarks": {"tasks": []},
    "efficiency": {},
    "execution": {"name": "dense"},
}


def of(**calibration: object) -> dict:
    return ASKED | {"calibration": calibration}


def test_shares_are_relative_and_what_a_source_does_not_read_makes_no_other_cell() -> None:
    def parsed(**asked: object) -> Cell:
        return config.parse(of(**asked))[0]

    halves = [{"source": "pydoc", "share": 0.5}, {"source": "self", "share": 0.5}]
    assert parsed(source="mix", sources=halves) == parsed(
        source="mix", sources=[{"source": "pydoc"}, {"source": "self"}]
    )
    assert parsed(source="pydoc", temperature=0.5) == parsed(source="pydoc")
    assert parsed(source="random", packed=False) == parsed(source="random")
    assert parsed(source="self", temperature=0.5) != parsed(source="self")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (of(source="mix"), r"calibration.source=mix needs calibration.sources, such as \[\{source:pydoc"),
        (of(source="pydoc", sources=[{"source": "self"}]), "calibration.sources are those of calibration.source=mix"),
        (of(source="mix", sources=[{"source": "mix"}]), "a mix is made of no other mix"),
        (of(source="mix", sources=[{"source": "self", "share": 0}]), "sources.0.share must be more than 0; got 0"),
        (
            of(source="mix", sources=[{"sauce": "self"}]),
            "unknown key 'calibration.sources.sauce'. Did you mean 'source'",
        ),
        (of(source="mix", sources=["self"]), "calibration.sources must be a group of settings, got 'self'"),
        (of(source="self", split="train"), "calibration.split=train is of a data set .*source=self is none"),
        (of(source="self", temperature=0), "calibration.temperature must be at least 0.01, got 0"),
        (
            of(source="random") | {"method": {"family": "vocab"}},
            "method=vocab counts the tokens of a whole text, and calibration.source=random has none",
        ),
        (
            of(source="pydoc") | {"recover": {"name": "local", "text": {"source": "mix"}}},
            "recover.text.source=mix needs recover.text.sources",
        ),
    ],
)
def test_what_contradicts_a_source_is_refused(asked: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        config.parse(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            Calibration("mix", 4, 16, sources=(Source("pydoc", 0.9), Source("self", 0.1))),
            "a share of 0.1 of 4 sequences is none of self: raise calibration.sequences or the share",
        ),
        (Calibration("mix", 4, 16, sources=(Source("nowhere.txt"), Source("self"))), "there is no file 'nowhere.txt'"),
        (Calibration("self", 4, 8192), "calibration.length=8192 is more than the 4096 positions of the model"),
    ],
)
def test_what_a_model_or_a_text_cannot_give_is_refused_before_it_is_loaded(
    asked: Calibration, message: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        plan.check_method(cell(tiny_checkpoint, asked), {"max_position_embeddings": 4096, "model_type": "llama"})


def test_a_tokenizer_that_cannot_begin_a_text_writes_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.bos_token = tokenizer.eos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for source, others in (("self", ()), ("mix", (Source("random"), Source("self")))):
        asked = cell(tmp_path, Calibration(source, 4, 16, sources=others))
        with pytest.raises(RequestError, match="needs a BOS or an EOS token to begin with: name another text"):
            plan.check_models([asked])
    plan.check_models([cell(tmp_path, Calibration("random", 4, 16))])
