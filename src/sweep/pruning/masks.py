"""Which weights a pruning keeps, one bit a weight: what comes after it can zero again what it must not bring back.

Legend: a mask is True where the weight is kept, and has the shape (out, in) of its matrix, by the name that this has in
`anatomy.matrices`. Packed, the masks of a model take an eighth of a byte a weight; only one is ever unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep.models import anatomy, scratch, surgery


class Masks(Mapping[str, Tensor]):
    """Keep-masks of matrices by name; a value is unpacked anew each time that it is asked for."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[np.ndarray, torch.Size]] = {}

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Masks:
        """Of weights that were pruned already: what is not zero is kept."""
        masks = cls()
        for name, weight in weights.items():
            masks[name] = weight != 0
        return masks

    @classmethod
    def of_packed(cls, packed: Mapping[str, tuple[np.ndarray, tuple[int, ...]]]) -> Masks:
        """Of bits as `packed` gives them."""
        masks = cls()
        masks._packed = {name: (bits, torch.Size(shape)) for name, (bits, shape) in packed.items()}
        return masks

    @property
    def packed(self) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
        """Of each matrix the bits, by numpy.packbits, and its shape."""
        return {name: (bits, tuple(shape)) for name, (bits, shape) in self._packed.items()}

    def with_zeros(self, model: PreTrainedModel) -> Masks:
        """These, applied already, and of every other matrix that has zeros: what is zero is not kept, whoever zeroed it."""
        return Masks.of({name: weight for name, weight in matrices(model).items() if name in self or not weight.all()})

    def __setitem__(self, name: str, keep: Tensor) -> None:
        self._packed[name] = scratch.kept(np.packbits(keep.cpu().numpy())), keep.shape

    def __getitem__(self, name: str) -> Tensor:
        packed, shape = self._packed[name]
        return torch.from_numpy(np.unpackbits(packed, count=shape.numel()).view(bool)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(packed.nbytes for packed, _ in self._packed.values())

    def count(self) -> int:
        """How many weights are not kept."""
        return sum(shape.numel() - int(np.bitwise_count(packed).sum()) for packed, shape in self._packed.values())

    def apply(self, model: PreTrainedModel) -> None:
        """Zero what is not kept, in place, one matrix at a time.

        Raises ValueError for a matrix that is not there any more, or has another shape, such as after units were removed.
        """
        weights = matrices(model)
        for name, (_, shape) in self._packed.items():
            if name not in weights or weights[name].shape != shape:
                now = tuple(weights[name].shape) if name in weights else "not there"
                raise ValueError(f"the mask of {name} is of shape {tuple(shape)}, and the model's matrix is {now}")
        for name in self._packed:
            surgery.zero_weights(weights[name], self[name].to(weights[name].device))


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that weight pruning may prune, as views that write through; of tied embeddings and head both names."""
    found = anatomy.all_matrices(model)
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            found[names[id(module)]] = anatomy.weight(module).detach()
    return found
