"""How a pruned model is run. Zeros in a dense matrix save nothing: only another execution can.

`dense` runs the weights as they are, `shrunk` is what removal of units leaves; both need no change of the model.
"""

from transformers import PreTrainedModel

from sweep.config import Execution


def prepare(model: PreTrainedModel, execution: Execution) -> PreTrainedModel:
    """The model in the form in which it will be measured."""
    match execution.name:
        case "dense" | "shrunk":
            return model
