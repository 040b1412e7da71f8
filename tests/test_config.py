"""What is asked is checked before anything runs, and every complaint says which key, what is allowed, what came."""

from __future__ import annotations

import pytest

from sweep import command_line, config, settings
from sweep.settings import RequestError

MODEL = {"name": "m", "source": "local", "path": "x"}
ASKED = {
    "model": MODEL,
    "method": {"family": "weight"},
    "sparsity": 0.3,
    "benchmarks": {"tasks": ["pydoc"]},
    "calibration": {"source": "pydoc"},
    "efficiency": {},
    "execution": {},
}
NEURON = {"family": "neuron", "importance": "taylor_abs", "criterion": "taylor_abs"}


def asked(**changes: object) -> dict:
    return {**ASKED, **changes}


def band(**settings: object) -> dict:
    return {"method": {"family": "weight", **settings}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\), got 1.5"),
        ({"sparsity": 1}, r"sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"sparsity": "abc"}, "sparsity must be a number, got 'abc'"),
        ({"sparsity": True}, "sparsity must be a number, got True"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        (
            {"method": "???"},
            r"no method given: add \+method=NAME, with NAME one of dense, weight, neuron, head, layer, vocab",
        ),
        ({"method": "weight"}, r"method=weight replaces the whole group: write \+method=weight"),
        ({"method": {"family": "weigth"}}, "method.family must be one of .* Did you mean 'weight'"),
        ({"method": {"family": "weight", "criterion": "magnitud"}}, "method.criterion .* Did you mean 'magnitude'"),
        ({"method": {"family": "weight", "scop": "matrix"}}, "unknown key 'method.scop'. Did you mean 'scope'"),
        ({"sparsty": 0.1}, "unknown key 'sparsty'. Did you mean 'sparsity'"),
        ({"resum": True}, "unknown key 'resum'. Did you mean 'resume'"),
        ({"resume": "yes"}, "resume must be true or false, got 'yes'"),
        ({"benchmarks": {"tasks": ["pydoc"], "limit": 0}}, "benchmarks.limit must be at least 1, got 0"),
        ({"benchmarks": {"tasks": 3}}, r"benchmarks.tasks must be a list, such as \[a,b\]; got 3"),
        ({"benchmarks": {}}, "benchmarks.tasks is missing"),
        ({"benchmarks": "pydoc"}, "benchmarks must be a group of settings, got 'pydoc'"),
        ({"efficiency": {"repeats": 5}}, "efficiency.repeats must be at least 6, or 0 to time nothing; got 5"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"model": {**MODEL, "name": "???"}}, "model.name is missing: set model.name=VALUE"),
        (band(among_smallest=1.2), r"among_smallest must be in \(0, 1\], the share .* got 1.2"),
        (band(among_smallest=0), r"among_smallest must be in \(0, 1\], the share .* got 0"),
        (band(skip_lowest=0.3, among_smallest=0.5), "skip_lowest=0.3 and sparsity=0.3 are together more .*=0.5 of"),
        (band(skip_lowest=0.3, allocation="owl"), "method.allocation=owl contradicts: leave one of them out"),
        (band(skip_lowest=0.3, steps=2, criterion="wanda"), "method.steps=2 contradicts: leave one of them out"),
        (band(skip_lowest=0.3, scope="global"), "method.scope=global does not rank as a whole"),
        (band(among_smallest=0.5, criterion="sparsegpt"), "method.criterion=sparsegpt does not rank as a whole"),
        ({"execution": {"name": "shrunk"}}, "execution=shrunk needs a method that removes units"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        config.parse(asked(**changes))


def test_rounding_error_of_a_range_makes_no_new_cell() -> None:
    assert config.parse(asked(sparsity=0.30000000000000004))[0] == config.parse(asked(sparsity=0.3))[0]


def test_what_a_method_does_not_read_is_no_part_of_the_cell() -> None:
    magnitude = [config.parse(asked(seed=seed, calibration={"source": "x", "length": 8}))[0] for seed in (0, 1)]
    assert magnitude[0] == magnitude[1] == config.parse(ASKED)[0]
    neuron = [config.parse(asked(method=NEURON, seed=seed))[0] for seed in (0, 1)]
    assert neuron[0] != neuron[1]


def test_where_nothing_is_timed_the_rules_of_timing_are_not_read() -> None:
    untimed = [config.parse(asked(efficiency={"repeats": 0, "warmup": w, "seconds": 9 + w}))[0] for w in (0, 3)]
    assert untimed[0] == untimed[1] != config.parse(ASKED)[0]


def test_the_dense_baseline_is_the_same_for_every_method_and_sparsity() -> None:
    cells = [
        config.parse(asked(method=method, sparsity=s, seed=seed))[0].dense()
        for method in (ASKED["method"], NEURON)
        for s in (0.1, 0.5)
        for seed in (0, 1)
    ]
    assert len(set(cells)) == 1
    assert cells[0] == config.parse(asked(method={"family": "dense"}))[0]
    assert cells[0] == config.parse(asked(baseline=True))[0]
    assert cells[0].sparsity == 0


def test_a_renamed_key_is_accepted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    (now, _), (then, _) = (
        config.parse(asked(method={"family": "weight", **keys}))
        for keys in ({"lm_head": True}, {"lm_head": False, "head": True})
    )
    assert now == then and now.method.lm_head
    assert "method.head is now called method.lm_head: use that" in caplog.text
    assert settings.stated(now)["method"]["head"] is True  # recorded rows keep their names
    assert settings.plain(now)["method"]["lm_head"] is True


def test_a_renamed_key_on_the_command_line_is_accepted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+method=wanda", "method.head=true", "++method.head=false", "sparsity=0.5"]
    now = ["+method=wanda", "method.lm_head=true", "++method.lm_head=false", "sparsity=0.5"]
    assert command_line.under_present_names(words) == now
    assert "method.head is now called method.lm_head: use that" in capsys.readouterr().err
    assert command_line.under_present_names(now) == now and not capsys.readouterr().err


def test_settings_of_a_part_are_typed_as_if_they_were_the_holders() -> None:
    (cell, _) = config.parse(asked(method={"family": "neuron", "criterion": "drop", "metric": "perplexity"}))
    assert cell.method.drop.metric == "perplexity"
    assert settings.plain(cell)["method"]["metric"] == "perplexity" and "drop" not in settings.plain(cell)["method"]
    assert settings.stated(cell)["method"] == {"family": "neuron", "criterion": "drop", "metric": "perplexity"}


def test_the_importance_of_a_neuron_is_its_criterion() -> None:
    (cell, _) = config.parse(asked(method={"family": "neuron", "importance": "taylor_abs"}))
    assert cell.method.criterion == "taylor_abs"
    assert cell.execution.name == "shrunk"


def test_every_key_is_known_by_the_name_that_is_typed() -> None:
    keys = command_line.known_keys()
    assert {"sparsity", "benchmarks.limit", "method.criterion", "results", "efficiency.repeats"} <= set(keys)
