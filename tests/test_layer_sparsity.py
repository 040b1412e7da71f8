"""What the table of matrices says of each kind of pruning, against counts made by hand."""

from __future__ import annotations

import pytest

from conftest import random_tokens, tiny_model
from sweep import layer_sparsity, methods, models
from sweep.config import Head, Layer, Method, Neuron, Weight


@pytest.mark.parametrize(
    "method", [Weight("weight", allocation="global"), Neuron(criterion="l2"), Head(criterion="l2"), Layer(criterion="random")]
)  # fmt: skip
def test_what_is_zero_or_gone_adds_up_to_what_was_removed(method: Method) -> None:
    model = tiny_model("llama")
    before = layer_sparsity.sizes(model)
    dense = layer_sparsity.table(before, model)
    assert (dense.zeros == 0).all()
    assert dense.weights.sum() == sum(w.numel() for b in models.blocks(model) for w in models.matrices(b).values())
    methods.prune(model, method, 0.5, random_tokens())
    found = layer_sparsity.table(before, model)
    assert found[["block", "matrix", "weights"]].equals(dense[["block", "matrix", "weights"]])
    left = sum(int((w != 0).sum()) for b in models.blocks(model) for w in models.matrices(b).values())
    assert found.zeros.sum() == dense.weights.sum() - left > 0


def test_a_removed_block_keeps_its_number() -> None:
    model = tiny_model("llama")
    before = layer_sparsity.sizes(model)
    del model.model.layers[0]
    found = layer_sparsity.table(before, model).groupby("block")[["weights", "zeros"]].sum()
    assert found.loc[0].weights == found.loc[0].zeros > 0 and found.loc[1].zeros == 0
