"""Units of every kind, on a tiny random model of every family: legal shapes, shrunk equals masked, exact counts."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import random_tokens, tiny_model
from sweep import calibrate, config, identity
from sweep.config import Cell
from sweep.models import anatomy, origin, parts, surgery
from sweep.pruning import (
    checks,
    criteria,
    methods,
    repair,
    select,
    unit_scores,
    unit_statistics,
    units,
)
from sweep.pruning.families import Head, Layer, Neuron, Vocab
from sweep.pruning.unit_scores import Gradients
from sweep.settings import RequestError
from sweep.texts import embedded


def logits(model: PreTrainedModel, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(seed=1), **kwargs).logits


def decoded(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the last token, read token by token through the key-value cache."""
    tokens, cache = random_tokens(seed=1), None
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            output = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    return output.logits[:, -1]


@pytest.mark.parametrize("criterion", [c.name for c in criteria.declared("unit") if not c.measured])
@pytest.mark.parametrize("make", [Neuron, Head])
def test_every_criterion_removes_the_exact_count(criterion: str, make: type) -> None:
    model = tiny_model("qwen2")
    pruned = methods.prune(model, make(criterion=criterion), 0.5, random_tokens(), seed=1)
    assert pruned.sparsity_units == 0.5 and pruned.sparsity == 0.5
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("unit", ["group", "query"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_heads_shrunk_equal_heads_masked(family: str, unit: str, scope: str) -> None:
    model = tiny_model(family)
    tokens, method = random_tokens(), Head(unit=unit, scope=scope, sparsity_of="units")
    shrunk = copy.deepcopy(model)
    methods.prune(shrunk, method, 0.5, tokens)
    found = units.parts(model, method)
    seen = units._statistics(model, method, found, tokens)
    scores = [
        units.score(criteria.find("taylor_abs", "unit"), part, s, torch.Generator())
        for part, s in zip(found, seen, strict=True)
    ]
    total = sum(part.units for part in found)
    for part, keep in zip(found, units.choose(found, scores, method, 0.5, 0, total), strict=True):
        with torch.no_grad():
            anatomy.weight(part.output)[:, ~keep.repeat_interleave(part.size)] = 0
    assert sum(a.heads for a in parts.attentions(shrunk)) == sum(a.heads for a in parts.attentions(model)) // 2
    assert all(a.heads % a.groups == 0 for a in parts.attentions(shrunk))
    torch.testing.assert_close(logits(shrunk), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(shrunk), logits(shrunk)[:, -1], rtol=1e-3, atol=1e-4)


def test_key_value_groups_of_unequal_size_are_refused() -> None:
    attention = parts.attentions(tiny_model("llama"))[0]
    with pytest.raises(ValueError, match=r"block 0: key-value groups would keep \[1, 2\] query heads"):
        surgery.remove_units(attention, torch.tensor([True, True, True, False]))


@pytest.mark.parametrize("gone", [0, 1])
def test_a_removed_layer_is_one_that_passes_its_input_on(family: str, gone: int) -> None:
    model = tiny_model(family)
    shrunk = copy.deepcopy(model)
    surgery.remove_blocks(shrunk, [index != gone for index in range(2)])
    anatomy.blocks(model)[gone].forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(logits(shrunk), logits(model, use_cache=False), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(shrunk), logits(shrunk)[:, -1], rtol=1e-3, atol=1e-4)
    assert shrunk.config.num_hidden_layers == 1
    assert len(getattr(shrunk.config, "layer_types", None) or [0]) == 1


def test_layers_go_by_influence_and_by_the_blocks_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # block 1 now adds nothing
        anatomy.blocks(model)[1].self_attn.o_proj.weight.zero_()
        anatomy.blocks(model)[1].mlp.down_proj.weight.zero_()
    first, second = (copy.deepcopy(model) for _ in range(2))
    pruned = methods.prune(first, Layer(), 0.5, random_tokens())
    assert (pruned.sparsity_units, pruned.units_removed, pruned.sparsity) == (0.5, 1, 0.5)
    torch.testing.assert_close(logits(first), logits(model))
    pruned = methods.prune(second, Layer(criterion="random", blocks=(0,)), 0.9, None)
    assert pruned.units == 1 and pruned.sparsity == 1.0
    assert torch.equal(anatomy.blocks(second)[0].mlp.up_proj.weight, anatomy.blocks(model)[1].mlp.up_proj.weight)
    assert unit_scores.block_influence(torch.tensor([1.0, 0.0])).tolist() == [0.0, 1.0]


def test_vocabulary_rows_go_and_the_rest_answers_as_before(family: str) -> None:
    model = tiny_model(family)
    kept = torch.tensor([0, 1, 2, *range(10, 40)])
    shrunk = copy.deepcopy(model)
    surgery.remove_tokens(shrunk, kept)
    ids = random_tokens(seed=1) % 30 + 3  # new ids of kept tokens
    with torch.no_grad():
        small, whole = shrunk(input_ids=ids).logits, model(input_ids=kept[ids]).logits
    torch.testing.assert_close(small, whole[..., kept], rtol=1e-4, atol=1e-4)
    assert shrunk.config.vocab_size == 33
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (shrunk.get_output_embeddings().weight is shrunk.get_input_embeddings().weight)


def test_the_tokenizer_of_a_pruned_vocabulary_round_trips(tiny_checkpoint: object) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    text = "the cat sat on the mat"
    ids = tokenizer(text, return_tensors="pt").input_ids
    pruned = methods.prune(model, Vocab(), 0.9, ids, tokenizer=tokenizer)
    small = pruned.tokenizer
    assert isinstance(small, type(tokenizer))
    assert len(small) == model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert pruned.sparsity == pytest.approx(0.9, abs=0.003) and pruned.units_removed == round(0.9 * len(tokenizer))
    assert small.decode(small(text).input_ids) == text
    assert max(small(text).input_ids) < len(small)
    unknown = small.convert_tokens_to_ids("</s>")
    assert small.eos_token_id == unknown == model.config.eos_token_id
    assert small.encode("Q!") == [unknown, unknown]
    assert small(["at", "the mat"], padding=True, return_tensors="pt").input_ids.shape == (2, 7)
    assert tokenizer.decode(tokenizer("Q!").input_ids) == "Q!"  # the old one is as it was


def test_a_vocabulary_cannot_lose_its_special_tokens(tiny_checkpoint: object) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with pytest.raises(RequestError, match="sparsity=0.999 removes 259 of 259 tokens, special ones among them"):
        methods.prune(model, Vocab("vocab", "random"), 0.999, None, tokenizer=tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(RequestError, match="neither an unknown nor an end-of-text token"):
        methods.prune(model, Vocab("vocab", "random"), 0.5, None, tokenizer=tokenizer)


@pytest.mark.parametrize("make", [Neuron, Head])
def test_repair_brings_the_block_nearer_to_what_it_answered(family: str, make: type) -> None:
    model = tiny_model(family)
    tokens = random_tokens(sequences=12)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        errors = {}
        for mended in (False, True):
            pruned = copy.deepcopy(model)
            methods.prune(pruned, make(scope="layer", repair=mended), 0.5, tokens)
            errors[mended] = float((pruned(input_ids=tokens).logits - whole).square().mean())
    assert errors[True] < 0.9 * errors[False]


def test_a_refit_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "DAMPING", 0.0)
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=draw), torch.randn(4, 6, generator=draw)
    keep = torch.tensor([True, False, True, True, False, True])
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.t()).solution.t()
    torch.testing.assert_close(repair.refit(weight, x.t() @ x, keep), expected, rtol=1e-4, atol=1e-5)


def test_steps_measure_again_and_reach_the_same_count() -> None:
    model = tiny_model("llama")
    pruned = methods.prune(model, Neuron(steps=3), 0.5, random_tokens())
    assert pruned.units_removed == 24 and sum(ffn.width for ffn in parts.ffns(model)) == 24


@pytest.mark.parametrize("multiple", [4, 5, 8])
def test_widths_are_multiples_and_the_total_is_as_near_as_they_allow(multiple: int) -> None:
    model = tiny_model("llama")
    methods.prune(model, Neuron(multiple_of=multiple), 0.4, random_tokens())
    widths = [ffn.width for ffn in parts.ffns(model)]
    assert all(width % multiple == 0 for width in widths)
    assert abs(sum(widths) - 0.6 * 48) <= multiple


def test_only_the_named_blocks_are_pruned() -> None:
    model = tiny_model("llama")
    pruned = methods.prune(model, Neuron(blocks=(1,)), 0.5, random_tokens())
    assert [ffn.width for ffn in parts.ffns(model)] == [24, 12] and pruned.sparsity == 0.5


def test_the_configuration_states_equal_widths() -> None:
    model = tiny_model("llama")
    methods.prune(model, Neuron(scope="layer"), 0.5, random_tokens())
    methods.prune(model, Head(scope="layer"), 0.5, random_tokens())
    assert model.config.intermediate_size == 12
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 4)


def test_flap_puts_the_mean_of_what_goes_into_a_bias() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    ffn = parts.ffns(model)[0]
    seen = units._statistics(model, Neuron(criterion="flap"), units.parts(model, Neuron()), tokens)[0]["activations"]
    before = ffn.output.weight.detach().clone()
    methods.prune(model, Neuron(criterion="flap", blocks=(0,)), 0.5, tokens)
    scores = unit_scores.flap(before, seen, 1)
    gone = ~select.lowest(scores, 12)
    torch.testing.assert_close(parts.ffns(model)[0].output.bias, before[:, gone] @ (seen.input_sum / 72)[gone].float())


def test_scores_are_their_formulas() -> None:
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 5, 6, generator=draw), torch.randn(2, 5, 6, generator=draw)
    weight = torch.randn(4, 6, generator=draw)
    product = (x * g).unflatten(-1, (3, 2)).sum(-1)
    flat = x.flatten(0, 1)
    seen = Gradients(
        10,
        flat.sum(0),
        flat.var(0, correction=0) * 10,
        product.sum((0, 1)),
        product.abs().sum((0, 1)),
        product.square().sum((0, 1)),
        product.sum(1).square().sum(0),
    )
    pair = torch.arange(6).view(3, 2)
    for unit, columns in enumerate(pair):
        assert unit_scores.l2([], weight, 2)[unit] == pytest.approx(float(weight[:, columns].norm()), rel=1e-5)
        assert unit_scores.activation(seen, 2)[unit] == pytest.approx(float(flat[:, columns].norm()), rel=1e-5)
        wanda = (weight[:, columns].abs() * flat[:, columns].norm(dim=0)).sum()
        assert unit_scores.wanda_sp(weight, seen, 2)[unit] == pytest.approx(float(wanda), rel=1e-5)
        norms = product[..., unit].abs().sum() * product[..., unit].norm()
        assert unit_scores.taylor_norms(seen)[unit] == pytest.approx(float(norms), rel=1e-5)
        middle = product.abs().sum((0, 1)).mul(product.square().sum((0, 1)).sqrt()).sqrt()
        balanced = middle[unit] / middle.mean() ** 0.3
        assert unit_scores.taylor_balanced(seen)[unit] == pytest.approx(float(balanced), rel=1e-5)
        assert unit_scores.taylor(seen)[unit] == pytest.approx(-float(product[..., unit].sum()), rel=1e-5)
    raw = (flat.var(0) * weight.square().sum(0))[pair].sum(1)
    torch.testing.assert_close(unit_scores.flap(weight, seen, 2), (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0, 10, 1000, 10_000])
def test_the_variance_of_what_hardly_fluctuates_is_exact(ratio: float) -> None:
    """mean / standard deviation = ratio, over many batches, against numpy in float64 of the same float32 values."""
    table = ratio + torch.randn(5000, 24, generator=torch.Generator().manual_seed(0))
    model, batches = tiny_model("llama"), iter(table.view(-1, 4, 50, 24))
    output = parts.ffns(model)[0].output
    output.register_forward_pre_hook(lambda *_: (next(batches),))  # the matrix reads the table, batch by batch
    (seen,) = unit_statistics.gather(model, [output], [1], random_tokens(100, 50), labels=None)
    exact = table.double().numpy()
    np.testing.assert_allclose(seen.input_scatter, exact.var(0) * 5000, rtol=1e-5)
    np.testing.assert_allclose(seen.input_sum, exact.sum(0), rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(seen.input_square, (exact**2).sum(0), rtol=1e-6)
    weight = output.weight.detach()
    raw = exact.var(0, ddof=1) * weight.double().square().sum(0).numpy()
    np.testing.assert_allclose(unit_scores.flap(weight, seen, 1), (raw - raw.mean()) / raw.std(ddof=1), atol=1e-4)


def test_equal_counts_go_by_the_word_and_then_the_id_however_large_they_are() -> None:
    zipf = torch.tensor([3.0, 5.0, 5.0, 0.0, 5.0], dtype=torch.float64)
    for large in (0, 10, 2**24, 2**53 - 2):
        counts = torch.tensor([large, large, large, large + 1, large])
        rank = unit_scores.frequency(counts, zipf)
        assert rank.argsort().tolist() == [0, 4, 2, 1, 3]
    scores = 2.0**24 + torch.arange(9, dtype=torch.float64)  # of which float32 holds every other one
    for exact in (scores, scores.long()):
        assert select.lowest(exact.flip(0), 4).tolist() == [True] * 5 + [False] * 4


def test_sums_in_float64_are_kept_where_there_is_such_a_type() -> None:
    assert calibrate.exact_device("mps") == torch.device("cpu")
    for device in ("cpu", "cuda:1"):
        assert calibrate.exact_device(device) == torch.device(device)


def test_nearest_spends_what_comes_nearest_and_keeps_the_best() -> None:
    scores, costs = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])], [torch.tensor([5, 5]), torch.tensor([2, 2])]
    assert [k.tolist() for k in select.nearest(scores, costs, 6.1)] == [[True, False], [False, True]]
    assert [k.tolist() for k in select.nearest(scores, costs, 5.9)] == [[True, False], [True, True]]
    assert [k.tolist() for k in select.nearest(scores, costs, 8.0, at_least=1)] == [[True, False], [False, True]]
    with pytest.raises(ValueError, match="more than can be removed"):
        select.nearest(scores, costs, 12.0, at_least=1)
    with pytest.raises(ValueError, match="1 of 1 scores are NaN"):
        select.nearest([torch.tensor([float("nan")])], [torch.ones(1)], 1.0)


@pytest.mark.parametrize(
    ("method", "sparsity", "message"),
    [
        (
            {"family": "neuron"},
            0.99,
            "leaves a block without a neuron .0 of 48 neurons kept, 2 needed.: use at most 0.95",
        ),
        ({"family": "neuron", "scope": "layer"}, 0.99, "leaves a block without a neuron .0 of 24"),
        (
            {"family": "neuron", "multiple_of": 8},
            0.8,
            "leaves a block without a neuron .10 of 48 neurons kept, 16 needed",
        ),
        ({"family": "neuron", "multiple_of": 25}, 0.1, "method.multiple_of and method.group must be at most 24"),
        ({"family": "head"}, 0.9, "leaves a block without a head .0 of 4 key-value groups kept, 2 needed"),
        ({"family": "head", "unit": "query", "sparsity_of": "units"}, 0.9, "leaves a key-value group without a head"),
        ({"family": "layer"}, 0.8, "leaves the model without a layer .0 of 2 layers kept, 1 needed"),
        (
            {"family": "neuron", "blocks": [2]},
            0.1,
            r"method.blocks must be block numbers of 0 to 1, each once; got \[2\]",
        ),
        ({"family": "neuron", "blocks": []}, 0.1, "method.blocks must be block numbers"),
    ],
)
def test_a_request_that_no_such_model_can_meet_is_refused(
    method: dict, sparsity: float, message: str, tmp_path: object
) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    (cell, _) = config.parse(
        {
            "model": {"name": "m", "source": "local", "path": str(tmp_path)},
            "method": method,
            "sparsity": sparsity,
            "benchmarks": {"tasks": []},
            "calibration": {"source": "pydoc"},
            "efficiency": {},
            "execution": {},
        }
    )
    with pytest.raises(RequestError, match=message):
        checks.check(cell, origin.shape(cell.model))


@pytest.mark.parametrize(
    ("family", "sizes", "method", "sparsity", "message"),
    [
        (
            "llama",
            {"num_key_value_heads": 1},
            {"family": "head"},
            0.5,
            "0 of 2|1 of 2 key-value groups kept, 2 needed.: choose another method, or method.unit=query, which removes a query head",
        ),
        ("llama", {}, {"family": "head"}, 0.9, "use at most 0.5000, or method.unit=query"),
        ("gpt2", {}, {"family": "head"}, 0.9, "4 needed.: use at most 0.5000$|2 needed.: use at most 0.7500$"),
        (
            "gpt2",
            {},
            {"family": "head", "unit": "query", "sparsity_of": "units"},
            0.9,
            "2 needed.: use at most 0.7500$",
        ),
    ],
)
def test_a_refusal_names_a_way_out_that_is_one(
    family: str, sizes: dict, method: dict, sparsity: float, message: str, tmp_path: Path
) -> None:
    """Before anything is loaded, and from Python; what it says is possible is, and a little more is not."""
    model = tiny_model(family)
    for name, value in sizes.items():
        setattr(model.config, name, value)
    model = AutoModelForCausalLM.from_config(model.config)
    model.config.save_pretrained(tmp_path)

    def asked(sparsity: float, **more: str) -> tuple[Cell, Head]:
        composed = {
            "model": {"name": "m", "source": "local", "path": str(tmp_path)},
            "method": method | more | {"criterion": "l2"},
            "sparsity": sparsity,
            "benchmarks": {"tasks": []},
            "calibration": {"source": "pydoc"},
            "efficiency": {},
            "execution": {},
        }
        cell, _ = config.parse(composed)
        assert isinstance(cell.method, Head)
        return cell, cell.method

    with pytest.raises(RequestError, match=message) as refusal:
        checks.check(asked(sparsity)[0], model.config.to_dict())
    with pytest.raises(RequestError, match="leaves a block without a head: ") as from_python:
        units.prune(model, asked(sparsity)[1], sparsity, None)
    for said in (str(refusal.value), str(from_python.value)):
        if found := re.search(r"use at most (0.\d+)", said):
            most = float(found[1])
            checks.check(asked(most)[0], model.config.to_dict())
            assert units.prune(copy.deepcopy(model), asked(most)[1], most, None).sparsity == pytest.approx(most)
        assert ("method.unit=query" in said) == (family == "llama")
    if family == "llama":
        other, method_by_query = asked(0.3, unit="query")
        checks.check(other, model.config.to_dict())
        assert units.prune(model, method_by_query, 0.3, None).removed > 0


@pytest.mark.parametrize("multiple_of", [1, 5])
def test_the_most_that_is_possible_is_named_exactly(multiple_of: int) -> None:
    method = Neuron(criterion="l2", multiple_of=multiple_of)
    with pytest.raises(RequestError, match="leaves a block without a neuron: use at most") as refusal:
        units.prune(tiny_model("llama"), method, 0.99, None)
    most = float(re.search(r"0\.\d+", str(refusal.value).split("at most")[1])[0])
    assert most == math.floor((24 - multiple_of) / 24 * 10_000) / 10_000
    model = tiny_model("llama")
    units.prune(model, method, most, None)
    assert [ffn.width for ffn in parts.ffns(model)] == [multiple_of, multiple_of]


def test_the_questions_of_a_drop_are_part_of_the_cell(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)

    def name(method: dict) -> str:
        (cell, _) = config.parse(
            {
                "model": {"name": "m", "source": "local", "path": str(tmp_path)},
                "method": method,
                "sparsity": 0.1,
                "benchmarks": {"tasks": []},
                "calibration": {"source": "pydoc"},
                "efficiency": {},
                "execution": {},
            }
        )
        return identity.cell_name(cell)

    asked = {"family": "neuron", "criterion": "drop", "metric": "f1", "task": "continents"}
    before = name(asked)
    assert name(asked | {"criterion": "l2"}) == name({"family": "neuron", "criterion": "l2"})  # reads none of it
    monkeypatch.setitem(embedded.QUESTIONS, "continents", lambda d: (f"{d['country']} lies in", ["A", "B"], 0))
    assert name(asked) != before
