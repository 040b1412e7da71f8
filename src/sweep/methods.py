"""The seam: every method, as a change of the model in place.

To add a criterion: a function in scores.py, a line in the dictionary of weights.py or units.py, its name in config.py,
a YAML in conf/method, and a row in the test of invariants.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from sweep import models, units, weights
from sweep.config import Dense, Method, Neuron, Weight
from sweep.outcome import Outcome


def prune(model: PreTrainedModel, method: Method, sparsity: float, tokens: Tensor | None) -> Outcome:
    """Prune the model in place and report what was removed.

    tokens  (sequences, length) calibration text for methods that read one, else None
    Raises RuntimeError when the removed count is not the requested one.
    """
    match method:
        case Dense():
            return Outcome(targets=sum(models.weight(m).numel() for m in models.linears(model).values()), removed=0)
        case Weight():
            return weights.prune(model, method, sparsity)
        case Neuron():
            assert tokens is not None
            return units.prune_neurons(model, method, sparsity, tokens)
