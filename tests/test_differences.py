"""What a model is beyond its configuration is found, told in JSON and made again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_models
from conftest import random_tokens, tiny_model
from sweep.models import anatomy, differences, transformers_private
from sweep.settings import RequestError


class Doubled:
    """Mixed into a layer, as in a module of sweep's."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale  # type: ignore[misc]


class Constant(differences.Substitute):
    """Stands for a module, as in a module of sweep's."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def settings(self) -> dict[str, float]:
        return {"value": self.value}

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above stand where sweep's own do."""
    for kind in (Doubled, Constant):
        monkeypatch.setattr(kind, "__module__", "sweep.models.anatomy")
        monkeypatch.setattr(anatomy, kind.__name__, kind, raising=False)


def made_again(model: PreTrainedModel) -> tuple[differences.Facts, PreTrainedModel]:
    """(what the model is beyond its configuration, the model that is built from that, with the same tensors)"""
    facts = differences.between(transformers_private.built(type(model), model.config, model.dtype), model)
    again = transformers_private.built(type(model), model.config, model.dtype).eval()
    differences.make(again, json.loads(json.dumps(facts)))
    assert differences.set_tensors(again, model.state_dict()) == []
    again.tie_weights()
    assert differences.between(again, model) == {} and differences.buffers(again, model) == {}
    with torch.no_grad():
        pair = [each(input_ids=random_tokens(), use_cache=False).logits for each in (model, again)]
    assert torch.equal(*pair)
    return facts, again


@pytest.mark.parametrize("kind", ["llama", "gpt2", "glm4_moe", "jamba", "mamba2", "gemma3n_text", "bart", "rwkv"])
def test_nothing_is_told_of_a_model_as_its_configuration_builds_it(kind: str) -> None:
    assert made_again(tiny_models.make(kind))[0] == {}


def test_plain_values_are_told_and_set() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.scaling, attention.sizes, attention.table = 0.25, (1, 2), {"b": [1], "a": (None, True)}
    attention.not_plain = torch.nn.functional.silu
    facts, again = made_again(model)
    assert facts.keys() == {"attributes"} and facts["attributes"].keys() == {"model.layers.1.self_attn"}
    read = again.model.layers[1].self_attn
    assert (read.scaling, read.sizes, read.table) == (0.25, (1, 2), {"b": [1], "a": (None, True)})
    assert not hasattr(read, "not_plain")


def test_a_configuration_of_a_module_s_own_is_told_by_what_it_says_otherwise() -> None:
    model = tiny_models.make("phi3")  # whose attention reads its counts there
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    assert made_again(model)[0] == {}
    attention.config.num_attention_heads, attention.num_key_value_groups = 2, 1
    attention.config.architectures = ["Another"]  # written by whoever saved a model last
    size, kept = attention.head_dim, attention.config.num_key_value_heads
    attention.qkv_proj.weight = nn.Parameter(attention.qkv_proj.weight[-(2 + 2 * kept) * size :].clone())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, : 2 * size].clone())
    facts, again = made_again(model)
    assert facts["configurations"] == {"model.layers.0.self_attn": {"num_attention_heads": 2}}
    assert again.model.layers[1].self_attn.config is again.config


def test_what_is_gone_added_mixed_in_or_stands_for_something_is_told_and_made() -> None:
    model = tiny_model("qwen2")
    first, second = model.model.layers
    first.mlp.down_proj.bias = nn.Parameter(torch.ones(16), requires_grad=False)
    first.self_attn.q_proj.bias = None
    second.mlp = Constant(0.5)
    layer = first.self_attn.o_proj
    layer.__class__ = type("Linear", (Doubled, nn.Linear), {})
    layer.register_buffer("scale", torch.tensor([2.0]))
    del second.post_attention_layernorm
    second.post_attention_layernorm = nn.Identity()
    with pytest.raises(
        RequestError, match="post_attention_layernorm is a Identity, and the configuration builds a Qwen2"
    ):
        made_again(model)
    second.post_attention_layernorm = Constant(1.0)
    facts, again = made_again(model)
    assert facts == {
        "substitutes": {
            "model.layers.1.mlp": {"class": "anatomy.Constant", "settings": {"value": 0.5}},
            "model.layers.1.post_attention_layernorm": {"class": "anatomy.Constant", "settings": {"value": 1.0}},
        },
        "mixed": {"model.layers.0.self_attn.o_proj": "anatomy.Doubled"},
        "added": {"model.layers.0.self_attn.o_proj.scale": "buffer"},
        "absent": ["model.layers.0.self_attn.q_proj.bias"],
    }
    assert again.model.layers[0].mlp.down_proj.bias is not None


def test_of_a_list_the_numbers_of_what_is_left_are_told() -> None:
    model = tiny_models.make("jamba")
    kinds = [type(layer) for layer in model.model.layers]
    kept = [i for i in range(len(kinds)) if i != 1]
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    assert made_again_lists(model) == kept
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    if len(set(kinds)) > 1:
        with pytest.raises(
            RequestError, match="model.layers has 3 modules that do not follow each other so among the 4"
        ):
            made_again_lists(model)


def made_again_lists(model: PreTrainedModel) -> list[int]:
    built = transformers_private.built(type(model), model.config, model.dtype)
    facts = differences.between(built, model)
    assert [type(layer) for layer in built.model.layers] == [type(layer) for layer in model.model.layers]
    return facts["lists"]["model.layers"]


@pytest.mark.parametrize(
    "name", ["os.system", "anatomy.nothing", "nowhere.Thing", "anatomy.nn", "anatomy.PreTrainedModel"]
)
def test_no_other_class_is_made_than_sweeps_own(name: str) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    for facts in ({"mixed": {"model.norm": name}}, {"substitutes": {"model.norm": {"class": name, "settings": {}}}}):
        with pytest.raises(RequestError, match="the checkpoint has a module that"):
            differences.make(model, facts)
