"""`python -m sweep.export gguf CHECKPOINT FILE`: a checkpoint as a GGUF file, which counts as written once llama.cpp has
loaded it, reads text as the tokenizer does, and computes what the model does.

The model first takes the values that the file will hold, so that what is compared is all but the rounding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep.export import architectures, gguf_types, gguf_vocabulary, trying
from sweep.formats.packing import packed
from sweep.models import checkpoint, loading, runtimes
from sweep.settings import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a model, as sweep or transformers writes it")
    parser.add_argument("file", help="the GGUF file to write")
    parser.add_argument("--type", choices=gguf_types.TYPES, default="f16", help="of the matrices (default: f16)")


def run(arguments: argparse.Namespace) -> None:
    loading.quiet()
    found = export(arguments.checkpoint, arguments.file, arguments.type)
    print(
        f"{arguments.file}: llama.cpp loads it; its logits are {found['apart']:.1g} of the largest from the model's, which "
        f"rounding what matrices read moves by {found['rounding']:.1g}; {found['greedy']:.0f} of {trying.GREEDY} greedy tokens "
        "are the same"
    )


def export(folder: str | Path, file: str | Path, kind: str = "f16") -> dict[str, float]:
    """Write the model of a checkpoint folder as a GGUF file, in place of an earlier one, and say how near llama.cpp comes.

    Raises RequestError for what llama.cpp cannot hold, and where it computes something else: then nothing is written.
    """
    trying.check_installed()
    place = Path(file).expanduser()
    if not place.parent.is_dir() or place.is_dir():
        raise RequestError(f"{file} cannot be written: {place.parent} is no folder, or there is a folder of that name")
    model, tokenizer = load(folder)
    splitting = None if tokenizer is None else _splitting(model, tokenizer)
    half = place.with_name(f".{place.name}.tmp")
    try:
        write(model, tokenizer, half, kind, splitting)
        found = trying.compare(half, model, tokenizer, kind)
        half.replace(place)
    finally:
        half.unlink(missing_ok=True)
    return found


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of a checkpoint in float32, and its tokenizer. Raises RequestError where its matrices are packed."""
    model, tokenizer = checkpoint.load_model(folder, "float32")
    if matrices := packed(model):
        form = next(iter(matrices.values())).format.name
        raise RequestError(
            f"{folder} holds {len(matrices)} matrices in sweep's format {form}, which llama.cpp has not; it holds zeros as any "
            "other weight. Save the model with execution.saved=plain, in dense matrices, and export that"
        )
    return model, tokenizer


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, file: Path, kind: str, splitting: str | None
) -> None:
    """Write the file, and have the model take the values that it holds.

    splitting  the tokenizer's way of splitting text, as llama.cpp calls it; None for one that has none, or for no tokenizer
    """
    found = runtimes.shape(model)
    arch = runtimes.chosen(model, found)
    gguf_types.round_weights(model, kind)
    with _writer(file, arch) as writer:
        architectures.describe(writer, model, found)
        writer.add_file_type(gguf_types.TYPES[kind].file)
        gguf_vocabulary.describe(writer, tokenizer, _rows(model), splitting)
        for name, tensor in architectures.tensors(model, arch, found):
            writer.add_tensor(name, *gguf_types.stored(tensor, kind, name.startswith(("token_embd", "output."))))


def _splitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The way in which a tokenizer splits text, found by trying with files that hold the vocabulary alone.

    Raises RequestError where llama.cpp has none that gives the tokenizer's ids.
    """
    if not gguf_vocabulary.splits(tokenizer):
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name in gguf_vocabulary.SPLITTINGS:
            file = Path(folder) / f"{name}.gguf"
            with _writer(file, "llama") as writer:
                gguf_vocabulary.describe(writer, tokenizer, _rows(model), name)
            if trying.reads(file, tokenizer):
                return name
            file.unlink()
    raise RequestError(
        f"llama.cpp splits text in none of {len(gguf_vocabulary.SPLITTINGS)} ways as this tokenizer does: a file would read "
        "other text than the model"
    )


@contextmanager
def _writer(file: Path, arch: str) -> Iterator[gguf.GGUFWriter]:
    """What is told to it is written to the file."""
    writer = gguf.GGUFWriter(None, arch)
    yield writer
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    if any(writer.tensors):
        writer.write_tensors_to_file()
    writer.close()


def _rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
