"""Load a model, and find its parts.

What differs between architectures is data: `ARCHITECTURES` says where the parts of a block are. Linear layers are found
by type, so that magnitude pruning works on a decoder that is not listed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from sweep import cache, headers, sources, stored
from sweep.config import Model, RequestError

log = logging.getLogger(__name__)

Linear: TypeAlias = nn.Linear | Conv1D  # GPT-2 writes its linear layers as Conv1D, whose weight is (in, out)


@dataclass(frozen=True)
class Architecture:
    """Attribute paths inside one block."""

    attention: str  # the attention module
    ffn_in: tuple[str, ...]  # matrices whose outputs are the FFN's neurons: one, or gate and up
    ffn_out: str  # the matrix that reads the neurons


_LLAMA = Architecture("self_attn", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
ROUTERS = {"router", "gate", "shared_expert_gate"}  # linear layers that choose experts
ATTENTION = {"self_attn", "attn", "attention", "self_attention"}  # what decoders call the attention module of a block
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], _LLAMA),
    "phi": Architecture("self_attn", ("mlp.fc1",), "mlp.fc2"),
    "opt": Architecture("self_attn", ("fc1",), "fc2"),
    "gpt2": Architecture("attn", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": Architecture("attention", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
}


_DECODERS = {"gpt_neox", "gpt_neox_japanese", "trocr"}  # whose configuration has an is_decoder that nothing reads


@dataclass(frozen=True)
class Ffn:
    """The feed-forward network of one block: neuron i is row i of each `inputs` and column i of `output`."""

    block: int
    inputs: tuple[Linear, ...]
    output: Linear

    @property
    def width(self) -> int:
        return weight(self.output).shape[1]


def load(model: Model, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer.

    A GGUF file is converted to safetensors once; afterwards the cached conversion is loaded.
    Raises RequestError when files are missing or damaged, when they do not hold the whole model, when its weights are
    quantised or not finite, and when it is no decoder.
    """
    place: Path | str
    if model.source == "gguf":
        place = converted(sources.gguf_file(model))
    elif model.source == "local":
        place = sources.checkpoint_folder(model)
    else:
        place = model.name
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.source == "hub":
        options["revision"] = model.revision or "main"
    try:
        check_decoder(AutoConfig.from_pretrained(place, **options), str(place))
        if isinstance(place, Path) and (place / headers.SWEEP_FILE).is_file():
            from sweep import shrunk  # here, since it needs this module to find the parts of a model

            loaded, tokenizer = shrunk.load_model(place, dtype, **options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            loaded = stored.load(place, getattr(torch, dtype), **options)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"model {model.name} cannot be loaded from {place}: {_first_line(error)}") from error
    if tokenizer is None:
        raise RequestError(f"model {model.name}: {place} holds no tokenizer: save the model with sweep.save")
    loaded = loaded.to(device).eval()
    if wrong := stored.not_finite(loaded.named_parameters()):
        advice = "try dtype=bfloat16 or float32" if dtype == "float16" else "the checkpoint is damaged"
        raise RequestError(
            f"{place} has NaN or infinite numbers in {len(wrong)} of its tensors ({headers.some(wrong)}) as "
            f"{dtype}: {advice}"
        )
    _check_causal(loaded, str(place))
    return loaded, tokenizer


def quiet() -> None:
    """Have transformers speak up only when something is wrong: it says so in exceptions, and in `check` and `load`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check(model: Model, *, convert: bool = False) -> PreTrainedTokenizerBase | None:
    """Refuse, from the headers of its files, a model that `load` would refuse; its tokenizer, for further checks.

    convert  a GGUF file that was never converted, which else is left to loading
    Raises RequestError. What is not on this machine yet, or runs code of its own, is left to loading: then None.
    """
    if convert and model.source == "gguf":
        return AutoTokenizer.from_pretrained(converted(sources.gguf_file(model)))
    folder = headers.folder_of(model)
    if folder is None or model.trust_remote_code:
        return None
    place, options = (
        (str(folder), {}) if model.source == "local" else (model.name, {"revision": model.revision or "main"})
    )
    try:
        check_decoder(AutoConfig.from_pretrained(folder), place)
        if (folder / headers.SWEEP_FILE).is_file():
            from sweep import shrunk  # here, since it needs this module to find the parts of a model

            return shrunk.check(folder)
        if model.source == "local" or headers.is_whole(folder):
            stored.check(folder)
        return AutoTokenizer.from_pretrained(place, **options)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"model {model.name} cannot be loaded from {place}: {_first_line(error)}") from error


def check_decoder(config: PreTrainedConfig, place: str) -> None:
    """Refuse a model that does not predict the next token of a text. Raises RequestError."""
    kind, name = config.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder and a decoder"
    elif getattr(config, "is_decoder", True) is False and kind not in _DECODERS:
        what = "an encoder, whose tokens see those after them (is_decoder is false)"
    elif name is None and not hasattr(config, "auto_map"):
        what = "no language model"
    elif name is not None and name.endswith("ForConditionalGeneration"):
        what = "a model of more than text"
    else:
        return
    raise RequestError(
        f"{place} is {what} ({kind}); sweep prunes decoders that predict the next token of a text, such as "
        f"{', '.join(list(ARCHITECTURES)[:4])}: give one of these"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer with no token to begin a text, whose first token lm-eval predicts from it. Raises RequestError."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RequestError(
            f"the tokenizer of {place} has neither a BOS nor an EOS token, and benchmarks need one to begin a "
            "text with: name it as bos_token or eos_token in tokenizer_config.json, or measure no "
            "benchmarks (benchmarks.tasks=[])"
        )


@torch.inference_mode()
def _check_causal(model: PreTrainedModel, place: str) -> None:
    """Refuse a model whose logits change with tokens that come later: its likelihood of a text is none.

    Tried on two texts that differ in their last token. What differs before it in a decoder is rounding.
    """
    size = model.get_input_embeddings().weight.shape[0]
    texts = torch.linspace(0, size - 1, 5, device=model.device).long()
    one, other = (
        model(input_ids=texts[list(pick)].unsqueeze(0), use_cache=False).logits[0, :3].float()
        for pick in ((1, 2, 3, 0), (1, 2, 3, 4))
    )
    if (one - other).abs().max() > 8 * torch.finfo(model.dtype).eps * one.abs().max():
        raise RequestError(
            f"{place} is no decoder: what it says of a token changes with the tokens after it. sweep prunes "
            "decoders that predict the next token of a text"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@functools.lru_cache
def skeleton(model: Model) -> PreTrainedModel | None:
    """The model without its weights, on the meta device: what it consists of, told before it is loaded.

    None where its configuration is not at hand or does not tell: code of the model's own, blocks of several widths, a
    GGUF file that was never converted, a type that transformers does not know.
    """
    shape = sources.shape(model)
    shrunk = model.source == "local" and (sources.checkpoint_folder(model) / headers.SWEEP_FILE).is_file()
    if "model_type" not in shape or model.trust_remote_code or shrunk:
        return None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    except ValueError:  # loading says why
        return None


def converted(gguf: Path) -> Path:
    """The folder of `gguf` as a float32 safetensors checkpoint, converted when first asked for.

    float32, because the values that a 4-bit block stands for are exact in it and not in bfloat16.
    Raises RequestError when the GGUF file cannot be read; a damaged conversion is named, dropped and made again.
    """
    key = sources.conversion_key(gguf)
    folder = cache.entry("models", key, lambda half: _convert(gguf, half))
    if problem := _damage(folder):
        log.warning("%s in the cached conversion %s; converting %s again", problem, folder, gguf.name)
        cache.discard(folder)
        folder = cache.entry("models", key, lambda half: _convert(gguf, half))
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
        stored.refuse(told, str(gguf))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except RequestError:
        raise
    except Exception as error:  # the reader raises whatever the damaged bytes lead it to
        raise RequestError(f"model file {gguf} is damaged and cannot be converted: {_first_line(error)}") from error
    # Left in place, these make save_pretrained refuse: the weights are no longer quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted checkpoint, as far as its file headers can tell."""
    from safetensors import SafetensorError, safe_open

    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(folder / "model.safetensors", "pt"):  # compares the header with the file's length
            return None
    except SafetensorError as error:
        return f"model.safetensors is damaged ({error})"


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks, in order: the longest list of modules of one class that is not inside another."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    nested = {id(inner) for outer in lists for inner in outer.modules() if inner is not outer}  # such as experts
    lists = [m for m in lists if id(m) not in nested]
    if not lists:
        raise RequestError(f"{type(model).__name__} has no list of equal blocks, so it is no decoder that sweep knows")
    return max(lists, key=len)


def architecture(model: PreTrainedModel) -> Architecture:
    """Where the parts of a block are. Raises RequestError for a model type that is not listed."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise RequestError(
            f"the parts of a '{kind}' block are not known: use +method=weight, which needs none, or add a "
            f"line to ARCHITECTURES in sweep/models.py. Known: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


def matrices(block: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Every weight matrix of the linear layers and experts inside a block, (out, in), as a view that writes through.

    prefix  the block's own name, without which names are those within the block
    The matrices of experts, which transformers keep fused in three dimensions, are named by expert: `mlp.experts.3.up_proj`.
    Routers decide which expert reads a token; they are tiny, and no linear layers to prune.
    """
    found = {}
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, Linear) and path.rpartition(".")[2] not in ROUTERS:
            found[path] = weight(module).detach()
        for name, parameter in fused(module).items():
            found |= _expert_matrices(module, f"{path}.", name, parameter)
    return found


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a model consists of: its parameters, a tied one once, and of fused experts each one's matrices.

    Names are the parameters' without `.weight`, so that a matrix is called as in `matrices`.
    """
    found: dict[str, Tensor] = {}
    for full, parameter in model.named_parameters():
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        if name in fused(module):
            found |= _expert_matrices(module, f"{path}.", name, parameter)
        else:
            found[full.removesuffix(".weight")] = parameter
    return found


def fused(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters in which a module, not what is inside it, keeps matrices of many experts, (experts, ., .), by name."""
    own = {} if isinstance(module, nn.Conv1d) else dict(module.named_parameters(recurse=False))
    return {name: parameter for name, parameter in own.items() if parameter.ndim == 3}


def experts(model: PreTrainedModel) -> dict[str, float]:
    """The matrices of experts, by the names of `tensors`, with the share of the experts that one token goes through.

    All of them where the configuration does not say how many a token takes.
    """
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return {
        matrix: taken / len(parameter) if taken else 1.0
        for path, module in model.named_modules()
        for name, parameter in fused(module).items()
        for matrix in _expert_matrices(module, f"{path}.", name, parameter)
    }


def _expert_matrices(module: nn.Module, path: str, name: str, fused: Tensor) -> dict[str, Tensor]:
    found = {}
    for expert, matrix in enumerate(fused.detach()):
        matrix = matrix.t() if getattr(module, "is_transposed", False) else matrix
        if name == "gate_up_proj" and getattr(module, "is_concatenated", True):
            found[f"{path}{expert}.gate_proj"], found[f"{path}{expert}.up_proj"] = matrix.chunk(2)
        else:
            found[f"{path}{expert}.{name}"] = matrix
    return found


def block_names(model: PreTrainedModel) -> list[str]:
    """The name of every block, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks(model)]


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the blocks: what the text goes through between its ids and the head."""
    return model.get_submodule(block_names(model)[0].rpartition(".")[0].rpartition(".")[0])


def replace_forward(restore: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `forward` stand in for what the module does, until `restore` is closed."""
    own = module.__dict__.get("forward")
    restore.callback(lambda: module.__dict__.pop("forward") if own is None else setattr(module, "forward", own))
    module.forward = forward


def products(model: PreTrainedModel) -> list[Linear]:
    """Every linear layer that a token's hidden state goes through: in the decoder, routers left out, and the head.

    Some decoders have some beside their blocks, such as OPT's between embeddings and blocks of another width.
    """
    found = [
        module
        for path, module in decoder(model).named_modules()
        if isinstance(module, Linear) and path.rpartition(".")[2] not in ROUTERS
    ]
    head = model.get_output_embeddings()
    return found if head is None else [*found, head]


def linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Every linear layer inside the blocks, by its full name, in order. Embeddings and head are outside the blocks."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if id(module) in inside and isinstance(module, Linear)
    }


def ffns(model: PreTrainedModel) -> list[Ffn]:
    """The feed-forward network of every block, in order."""
    parts = architecture(model)
    return [
        Ffn(index, tuple(block.get_submodule(path) for path in parts.ffn_in), block.get_submodule(parts.ffn_out))
        for index, block in enumerate(blocks(model))
    ]


def weight(linear: Linear) -> Tensor:
    """The matrix of a linear layer as (out, in); for GPT-2's Conv1D, which stores (in, out), a transposed view."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
