"""A recipe removes the same again: of the same model to the bit, of another of its shape the same places."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import sweep
import tiny_models
from conftest import random_tokens, tiny_model
from sweep import config, identity, store
from sweep.models import anatomy
from sweep.pruning import families, masks, methods, recipe
from sweep.pruning.families import Expert, Head, Layer, Method, Neuron, Vocab, Weight
from sweep.pruning.recipe import Recipe
from sweep.settings import RequestError
from test_cli import run

CASES: dict[str, tuple[str, Method, float]] = {
    "magnitude": ("llama", Weight(), 0.5),
    "wanda": ("llama", Weight(criterion="wanda"), 0.5),
    "2:4": ("llama", Weight(criterion="wanda", pattern="2:4"), 0.5),
    "global": ("llama", Weight(scope="global", embeddings=True, lm_head=True), 0.4),
    "tied": ("gpt2", Weight(embeddings=True, exclude=("*.0.*",)), 0.3),
    "experts": ("qwen3_moe", Weight(), 0.5),
    "neuron": ("llama", Neuron(), 0.3),
    "neuron, in steps": ("llama", Neuron(steps=2, blocks=(0,)), 0.25),
    "head": ("llama", Head(), 0.25),
    "query": ("llama", Head(unit="query", scope="layer"), 0.5),
    "layer": ("llama", Layer(), 0.5),
    "sublayer": ("llama", Layer(unit="sublayer"), 0.5),
    "expert": ("qwen3_moe", Expert(), 0.25),
    "vocab": ("llama", Vocab(), 0.25),
}
MOE = {"qwen3_moe"}


def made(kind: str, seed: int = 0) -> PreTrainedModel:
    if kind not in MOE:
        return tiny_model(kind, seed)
    torch.manual_seed(seed)
    return tiny_models.make(kind)


def pruned(model: PreTrainedModel, method: Method, sparsity: float, tokenizer: Any) -> Recipe:
    done = methods.prune(
        model, families.normalised(method, sparsity), sparsity, random_tokens(), seed=1, tokenizer=tokenizer
    )
    assert done.recipe is not None and done.removed > 0
    return done.recipe


def again(method: Method, file: Path, sparsity: float) -> Method:
    """As the user asks for it: the family and the file, and nothing else."""
    return families.normalised(type(method)(replay=str(file)), sparsity)  # type: ignore[call-arg]


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_the_same_goes_of_the_same_model_to_the_bit_and_of_another_in_the_same_places(
    case: str, tmp_path: Path, tokenizer: Any
) -> None:
    kind, method, sparsity = CASES[case]
    dense, other, file = made(kind), made(kind, seed=7), tmp_path / recipe.FILE
    model = copy.deepcopy(dense)
    kept = pruned(model, method, sparsity, tokenizer)
    kept.write(file)
    asked = again(method, file, sparsity)
    assert families.criterion_of(asked) is None and not families.reads_text(asked) and not families.draws(asked)

    done = methods.prune(dense, asked, sparsity, None, seed=1, tokenizer=tokenizer)
    found, wanted = state(dense), state(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert dense.config.to_dict() == model.config.to_dict()
    assert done.recipe is not None and done.recipe.to_bytes() == kept.to_bytes()  # and that once more

    before = copy.deepcopy(other)
    methods.prune(other, asked, sparsity, None, seed=1, tokenizer=tokenizer)
    assert {name: tensor.shape for name, tensor in state(other).items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    for name, (bits, shape) in kept.masks.items():
        keep = torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).astype(bool)).view(shape)
        assert torch.equal(masks.matrices(other)[name], masks.matrices(before)[name] * keep), name


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", Weight(criterion="sparsegpt")), ("llama", Neuron(criterion="flap"))]
)
def test_of_what_corrects_the_weights_that_stay_the_choice_alone_is_replayed(
    kind: str, method: Method, tmp_path: Path
) -> None:
    dense, file = made(kind), tmp_path / recipe.FILE
    model = copy.deepcopy(dense)
    pruned(model, method, 0.5, None).write(file)
    asked = again(method, file, 0.5)
    assert families.criterion_shown(asked) == f"replay of {method.criterion}"  # type: ignore[union-attr]
    whole = copy.deepcopy(dense)
    done = methods.prune(dense, asked, 0.5, None)
    assert not any(module.bias is not None for module in dense.modules() if isinstance(module, torch.nn.Linear))
    for name, weight in anatomy.all_matrices(dense).items():
        if done.masks:
            assert torch.equal(weight, anatomy.all_matrices(whole)[name] * done.masks[name])
            assert torch.equal(weight == 0, anatomy.all_matrices(model)[name] == 0)


def test_experts_that_left_their_mean_go_with_their_logits_where_enough_are_left(tmp_path: Path) -> None:
    dense, file = made("qwen3_moe"), tmp_path / recipe.FILE
    kept = pruned(copy.deepcopy(dense), Expert(criterion="mone"), 0.25, None)
    kept.write(file)
    methods.prune(dense, again(Expert(), file, 0.25), 0.25, None)
    assert dense.config.num_experts == 6
    dense = made("qwen3_moe")
    replace(kept, gone=np.array([(1, expert) for expert in range(7)])).write(file)
    with pytest.raises(RequestError, match="leaves block 1 1 of 8 experts, and a token takes 2, so that 2 are needed"):
        methods.prune(dense, again(Expert(), file, 0.25), 0.25, None)
    assert dense.config.num_experts == 8


def test_a_model_of_another_shape_is_refused_with_the_first_difference_and_stays(tmp_path: Path) -> None:
    file = tmp_path / recipe.FILE
    pruned(made("llama"), Weight(), 0.5, None).write(file)
    other = made("gpt2")
    before = copy.deepcopy(state(other))
    with pytest.raises(
        RequestError, match=r"model\.layers\.0\.\S+ is \d+ x \d+ in the .* made of, and is not there in this"
    ):
        methods.prune(other, again(Weight(), file, 0.5), 0.5, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(other).items())

    pruned(made("llama"), Head(), 0.25, None).write(file)
    asked, other = again(Head(), file, 0.25), made("llama")
    kept = recipe.read(file)
    units = tuple(number // 2 for number in kept.units)
    with pytest.raises(RequestError, match=r"the blocks have \[.*\] units in the model .* in this one"):
        kept.check(kept.shapes, units)
    methods.prune(other, asked, 0.25, None)


def test_what_contradicts_a_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / recipe.FILE
    pruned(made("llama"), Weight(criterion="wanda"), 0.5, None).write(file)
    for method, sparsity, says in (
        (Neuron(replay=str(file)), 0.5, "is of method=weight, not of method=neuron"),
        (Weight(replay=str(file)), 0.25, "was made at sparsity=0.5, .* set sparsity=0.5"),
        (
            Weight(replay=str(file), criterion="ria"),
            0.5,
            "method.criterion=ria contradicts .* made with wanda: leave it out",
        ),
        (Weight(replay=str(tmp_path / "none")), 0.5, "there is no file"),
    ):
        with pytest.raises(RequestError, match=says):
            families.normalised(method, sparsity)
    assert families.normalised(Weight(replay=str(file), criterion="wanda"), 0.5) == again(Weight(), file, 0.5)


def test_a_bad_file_is_refused_in_words(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    pruned(made("llama"), Weight(), 0.5, None).write(good)
    content, tensors, about = good.read_bytes(), load_file(good), recipe.told(good)

    def holding(**changes: Any) -> None:
        told = {key: value for key, value in (about | changes).items() if value is not None}
        save_file(tensors, bad, {"sweep_recipe": json.dumps(told)})

    def refused(says: str) -> None:
        with pytest.raises(RequestError, match=says):
            recipe.read(bad)

    for size in (0, 5, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:size])
        refused("it is cut, or no recipe at all")
    bad.write_text("a text")
    refused("it is cut, or no recipe at all")
    save_file(tensors, bad)
    refused("it is no recipe: name a recipe.sweep")
    holding(version=2)
    refused("a recipe of version 2, and this version of sweep reads 1: install")
    holding(units=None, seed=None)
    refused("does not say its seed, units")
    name = next(name for name in tensors if name.startswith("masks."))
    tensors[name] = tensors[name][:-1]
    holding()
    refused(f"{name} is missing or of another size")
    del tensors[name]
    holding()
    refused(f"{name} is missing")


def test_the_content_of_a_recipe_is_part_of_the_cell_and_its_place_is_not(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def name(**method: Any) -> str:
        asked = {"family": "weight", **method}
        model = {"name": "tiny", "source": "local", "path": str(tiny_checkpoint)}
        cell = config.parse(
            {"model": model, "method": asked, "sparsity": 0.5, "benchmarks": {"tasks": []}, "calibration": None}
            | {"efficiency": {"repeats": 0}, "execution": {}}
        )[0]
        return identity.cell_name(cell)

    first = pruned(made("llama"), Weight(), 0.5, None)
    first.write(tmp_path / "a")
    first.write(tmp_path / "b")
    pruned(made("llama", seed=3), Weight(), 0.5, None).write(tmp_path / "c")
    assert name(replay=None) == name()
    assert name(replay=str(tmp_path / "a")) == name(replay=str(tmp_path / "b")) != name(replay=str(tmp_path / "c"))
    assert name(replay=str(tmp_path / "a")) != name()


def test_from_the_command_line_and_from_python(tmp_path: Path, tiny_checkpoint: Path) -> None:
    tiny = ["model=local", f"model.path={tiny_checkpoint}", "benchmarks.tasks=[]", "efficiency=none", "device=cpu"]
    tiny += ["dtype=float32", "calibration.sequences=4", "calibration.length=32", "execution=dense", "sparsity=0.25"]
    run("+method=wanda,neuron", "save_model=saved", *tiny, "-m", cwd=tmp_path)
    cells = store.load(tmp_path / "results").set_index("method").cell
    stored = f"results/recipes/{cells['neuron']}.sweep"
    assert [path.name for path in (tmp_path / "results/recipes").iterdir()] == [f"{cells['neuron']}.sweep"]
    assert (tmp_path / "saved" / cells["neuron"] / recipe.FILE).read_bytes() == (tmp_path / stored).read_bytes()

    run("+method=neuron", f"method.replay={stored}", "save_model=again", *tiny, cwd=tmp_path)
    rows = store.load(tmp_path / "results").set_index("criterion")
    assert set(rows.status) == {"ok"}
    columns = ["sparsity", "sparsity_achieved", "sparsity_units", "sparsity_all_parameters", "nonzero_parameters"]
    assert rows.loc["replay of taylor_sampled", columns].equals(rows.loc["taylor_sampled", columns])
    one, two = (state(sweep.load_model(tmp_path / at)[0]) for at in (f"saved/{cells['neuron']}", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    folder = tmp_path / "saved" / cells["weight"]
    assert recipe.told(folder)["cell"] == cells["weight"]
    model, tokenizer = sweep.load_model(tiny_checkpoint)
    done = sweep.prune(model.float(), tokenizer, method="weight", sparsity=0.25, replay=str(folder))
    wanted = state(sweep.load_model(folder)[0])
    assert done.calibration_tokens == 0
    assert all(torch.equal(wanted[name], tensor) for name, tensor in state(model).items())
