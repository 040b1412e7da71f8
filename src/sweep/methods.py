"""The seam: every method, as a change of the model in place.

To add a criterion: a function in scores.py, its line in weights.py or units.py, its name in config.py,
a YAML in conf/method, and a row in the test of invariants.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep import layers, models, shared, units, vocabulary, weights
from sweep.config import Dense, Head, Layer, Method, Neuron, Vocab, Weight
from sweep.outcome import Outcome


def prune(
    model: PreTrainedModel,
    method: Method,
    sparsity: float,
    tokens: Tensor | None,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequential: bool = True,
    share: shared.Share = shared.alone,
) -> Outcome:
    """Prune the model in place and report what was removed.

    tokens     (sequences, length) calibration text for methods that read one, else None
    seed       of criteria that draw numbers
    tokenizer  for methods that change the vocabulary or measure on a task
    sequential weight methods calibrate a block on what the pruned blocks before it put out
    share      where statistics of the unpruned model come from: by default they are measured
    Raises RuntimeError when the removed count is not the requested one.
    """
    match method:
        case Dense():
            return Outcome(
                targets=sum(w.numel() for block in models.blocks(model) for w in models.matrices(block).values()),
                removed=0,
            )
        case Weight():
            return weights.prune(model, method, sparsity, tokens, seed=seed, sequential=sequential, share=share)
        case Neuron() | Head():
            return units.prune(model, method, sparsity, tokens, seed, tokenizer, share)
        case Layer():
            return layers.prune(model, method, sparsity, tokens, seed, tokenizer, share)
        case Vocab():
            assert tokenizer is not None
            return vocabulary.prune(model, tokenizer, method, sparsity, tokens, seed)
