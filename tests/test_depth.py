"""Blocks and sublayers that are gone: the model is the one in which they are passed by, with a cache, and when it is read again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_models
from sweep.models import anatomy, checkpoint, layers, sublayers, surgery, trial
from sweep.pruning import depth, methods, unit_scores
from sweep.pruning.families import Layer
from sweep.settings import RequestError

# With lists in the configuration, patterns, two kinds of block, fused or parallel parts, norms before, after and around.
TYPES = [
    "smollm3",
    "gemma3_text",
    "jamba",
    "minicpm3",
    "qwen3_moe",
    "phi",
    "falcon",
    "bloom",
    "opt",
    "olmo2",
    "bert",
    "gemma4_text",
]
WORD = {"attention": 0, "ffn": 1}


def tokens(sequences: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 259, (sequences, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@torch.no_grad()
def decoded(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(what a cache gives for the last three of some tokens, what reading them all at once gives)."""
    ids = tokens(1)
    whole = model(input_ids=ids, use_cache=False).logits[0, -3:]
    with_cache = model.generate(
        ids[:, :-2],
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=None,
        logits_processor=[_Forced(ids)],
    )
    return torch.cat(with_cache.logits), whole


class _Forced:
    """Writes the tokens that it was given, and then any."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, read: Tensor, scores: Tensor) -> Tensor:
        place = min(read.shape[1], self.ids.shape[1] - 1)
        return torch.full_like(scores, -1e9).index_fill_(1, self.ids[0, place : place + 1], 0.0)


def passed_by(restore: ExitStack, block: nn.Module) -> None:
    """The block gives what it gets, whatever else it gives as the one before it gave."""

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    restore.callback(block.register_forward_hook(hook, with_kwargs=True).remove)


def same(model: PreTrainedModel, wanted: Tensor, folder: Path) -> None:
    """The model gives these logits, with a cache too, and so does what is read of its checkpoint."""
    checkpoint.write(model, None, folder)
    again, _ = checkpoint.load_model(folder)
    for each in (model, again):
        torch.testing.assert_close(logits(each), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*decoded(each), rtol=1e-3, atol=1e-3)
    kinds = [[type(block) for block in anatomy.blocks(each)] for each in (model, again)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("gone", [(1,), (0, 2)])
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_left_is_the_model_in_which_the_blocks_are_passed_by(
    kind: str, gone: Sequence[int], tmp_path: Path
) -> None:
    model = tiny_models.make(kind)
    blocks = list(anatomy.blocks(model))
    with ExitStack() as restore:
        for number in gone:
            passed_by(restore, blocks[number])
        wanted = logits(model)
    surgery.remove_blocks(model, [number not in gone for number in range(len(blocks))])
    assert [id(block) for block in anatomy.blocks(model)] == [id(b) for n, b in enumerate(blocks) if n not in gone]
    same(model, wanted, tmp_path)


@pytest.mark.parametrize("unit", ["attention", "ffn"])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "jamba"])
def test_a_sublayer_that_is_gone_adds_nothing_and_leaves_nothing(kind: str, unit: str, tmp_path: Path) -> None:
    model = tiny_models.make(kind)
    whole, before = logits(model), {name: p.numel() for name, p in model.named_parameters()}
    found = [part for part in sublayers.find(model)[0] if part.kind == unit]
    names = [f"{anatomy.block_names(model)[0]}.{name}." for part in found for name in (*part.ends, *part.inside)]
    with ExitStack() as restore:
        for part in found:
            for name in part.ends:  # by hand: what it adds is nothing
                module = anatomy.blocks(model)[0].get_submodule(name)
                restore.callback(
                    module.register_forward_hook(_adds_nothing(part.ends[name].hands_on), with_kwargs=True).remove
                )
        wanted = logits(model)
    assert (wanted - whole).abs().max() > 1e-2
    sublayers.remove(model, found)
    left = {name for name, _ in model.named_parameters()}
    assert left == {name for name in before if not name.startswith(tuple(names))} and len(left) < len(before)
    same(model, wanted, tmp_path)
    with torch.no_grad():
        cache = model(input_ids=tokens(1), use_cache=True).past_key_values
    held = sum(getattr(layer, "keys", None) is not None for layer in cache.layers)
    assert held == sum(getattr(layer, "keys", None) is not None for layer in _cache(kind).layers) - (
        unit == "attention"
    )


def _cache(kind: str) -> Any:
    with torch.no_grad():
        return tiny_models.make(kind)(input_ids=tokens(1), use_cache=True).past_key_values


def _adds_nothing(hands_on: int | str | None) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        given = (
            torch.zeros_like(hidden)
            if hands_on is None
            else args[hands_on]
            if isinstance(hands_on, int)
            else kwargs[hands_on]
        )
        return given if isinstance(output, Tensor) else (given, *output[1:])

    return hook


@pytest.mark.parametrize("criterion", ["random", "block_influence", "drop"])
@pytest.mark.parametrize("unit", ["attention", "ffn", "sublayer"])
def test_sublayers_go_by_criterion_and_are_counted(unit: Any, criterion: str, cache_folder: object) -> None:
    model = tiny_models.make("llama")
    method = Layer(unit=unit, criterion=criterion, sparsity_of="units", steps=2)
    wanted = methods.targets(model, method)
    assert all(("mlp" in name) or ("post_attention" in name) for name in wanted) == (unit == "ffn")
    units, removable = methods.count_units(model, method)
    assert units == removable == (8 if unit == "sublayer" else 4)
    pruned = methods.prune(model, method, 0.5, tokens(3))
    assert (pruned.units_removed, pruned.sparsity_units) == (units // 2, 0.5)
    assert methods.count_units(model, method)[0] == units // 2
    assert {place for _, place in pruned.gone.tolist()} <= ({0, 1} if unit == "sublayer" else {WORD[unit]})


def test_the_cosine_of_a_sublayer_is_that_between_the_states_around_it() -> None:
    model, text = tiny_models.make("llama"), tokens(3)
    seen: dict[str, list[Tensor]] = {"before": [], "between": [], "after": []}
    block: Any = anatomy.blocks(model)[1]
    block.input_layernorm.register_forward_pre_hook(lambda _, args: seen["before"].append(args[0]))
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen["between"].append(args[0]))
    block.register_forward_hook(lambda _, __, output: seen["after"].append(output))
    with torch.no_grad():
        model(input_ids=text)
    before, between, after = (torch.cat(seen[name]) for name in ("before", "between", "after"))
    found = depth._cosines(model, depth.units(model, Layer(unit="sublayer")), text)["cosines"]
    cosine = nn.functional.cosine_similarity
    assert found[2].item() == pytest.approx(cosine(before, between, dim=-1).mean().item(), abs=1e-5)
    assert found[3].item() == pytest.approx(cosine(between, after, dim=-1).mean().item(), abs=1e-5)
    assert unit_scores.block_influence(found).shape == (8,)


def test_what_fails_the_trial_is_refused_and_the_model_stays() -> None:
    model = tiny_models.make("rwkv")  # whose first block alone has a norm before it
    before, whole, said = list(anatomy.blocks(model)), logits(model), model.config.to_dict()
    with pytest.raises(RequestError, match=r"blocks 0, 2 of RwkvForCausalLM cannot be removed: block 0: .*pre_ln"):
        surgery.remove_blocks(model, [False, True, False, True])
    assert list(anatomy.blocks(model)) == before and model.config.to_dict() == said
    assert torch.equal(logits(model), whole)
    with pytest.raises(RequestError, match=r"sublayers of block 0 of DeepseekV4ForCausalLM.*method.unit=block"):
        sublayers.find(tiny_models.make("deepseek_v4"))
    with pytest.raises(RequestError, match="sparsity=0.99 leaves no ffn: use at most 0.75"):
        methods.prune(tiny_models.make("llama"), Layer(unit="ffn", criterion="random", sparsity_of="units"), 0.99, None)


def test_a_trial_reaches_beyond_windows_and_sees_a_wrong_number() -> None:
    model = tiny_models.make("gemma3_text")
    proof = trial.Proof(model, lambda restore: None)
    model.config.layer_types = ["full_attention", *model.config.layer_types[1:]]
    with pytest.raises(RequestError, match="of the largest apart from those of a model in which they are passed by"):
        proof.check()
    other = tiny_models.make("llama")
    proof = trial.Proof(other, lambda restore: None)
    attention: Any = anatomy.blocks(other)[2].self_attn
    attention.layer_idx = 1
    with pytest.raises(RequestError, match="with a cache its logits are|generation with what is left fails"):
        proof.check()


def test_lists_patterns_and_numbers_of_a_configuration_follow() -> None:
    model = tiny_models.make("qwen3_moe")
    config = copy.deepcopy(model.config)
    config.mlp_only_layers, config.some_pattern, config.eos_token_id = [1, 3], ["a", "b", "c", "d"], [1, 2, 3, 4]
    with ExitStack() as undo:
        layers.cut(config, 4, [0, 1, 3], undo)
        assert (config.num_hidden_layers, config.mlp_only_layers, config.some_pattern) == (3, [1, 2], ["a", "b", "d"])
        assert config.eos_token_id == [1, 2, 3, 4]
    assert (config.num_hidden_layers, config.mlp_only_layers) == (4, [1, 3])
    hybrid = tiny_models.make("jamba").config
    said = list(hybrid.layers_block_type)
    with ExitStack() as undo:
        layers.cut(hybrid, 4, [1, 3], undo)
        assert hybrid.layers_block_type == [said[1], said[3]]
    assert hybrid.layers_block_type == said
