"""A tokenizer as llama.cpp has it: its tokens with their kinds, its merges, and the name of its way of splitting text.

Of a cut vocabulary the tokens that are left stand there, and all merges: llama.cpp joins pieces by merges, and looks up
what comes of it, so that a token that is left is found as before. A word whose token went becomes its letters there, where
these are tokens; sweep's own tokenizer has one token for all that went.
"""

from __future__ import annotations

from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from sweep.models import cut_tokenizer, runtimes

# One name for each way of splitting text before merging that llama.cpp has, from its src/llama-vocab.cpp, the commonest
# first. Which is a tokenizer's own is found by trying: see `trying.reads`.
SPLITTINGS = (
    *("llama-bpe", "qwen2", "smollm", "gpt-2", "default", "tekken", "gpt-4o", "qwen35", "deepseek-llm", "deepseek-v3"),
    *("deepseek-coder", "falcon", "starcoder", "command-r", "olmo", "dbrx", "stablelm2", "smaug-bpe", "chatglm-bpe"),
    *(
        "glm4",
        "mpt",
        "refact",
        "viking",
        "jais",
        "codeshell",
        "bloom",
        "gpt3-finnish",
        "exaone",
        "exaone4",
        "chameleon",
    ),
    *(
        "minerva-7b",
        "megrez",
        "superbpe",
        "trillion",
        "bailingmoe",
        "seed-coder",
        "hunyuan",
        "hunyuan-dense",
        "kimi-k2",
    ),
    *("poro-chat", "llama4", "grok-2", "afmoe", "minimax-m2", "whitespace"),
)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad", "sep": "sep"}  # transformers' names, and GGUF's
# What tokenizers split in different ways: digits, contractions, spaces, scripts, signs.
SAMPLE = (
    "The quick brown fox can't jump over 12345 lazy dogs, I'LL say!  Two spaces\n\nand   three\tTAB 3.14159 x=1e-9;\r\n"
    "'s 'T we'Ve\u2019re __init__ snake_case CamelCase HTML5 1st 22nd 1,000,000 +-*/ <tag/> {a: [b]} ... ???!!! #$%\n \n"
    "na\u00efve \u00e9t\u00e9 Stra\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\u4e16\u754c2024\u5e74 \u0645\u0631\u062d\u0628\u0627 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f680\U0001f600 \u2028 end  \n   "
)


def splits(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text is split before it is merged, in one of `SPLITTINGS`."""
    return not runtimes.merging(tokenizer).get("byte_fallback")


def describe(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, rows: int, splitting: str | None
) -> None:
    """Write the tokenizer's keys.

    rows       of the embedding; those of no token are named so
    splitting  one of `SPLITTINGS`, or None for a tokenizer that does not split, or for none
    Raises RequestError for a tokenizer that does not merge pairs.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    whole, model = cut_tokenizer.original(tokenizer), runtimes.merging(tokenizer)
    tokens, kinds = _tokens(tokenizer, rows, bytes_named=bool(model.get("byte_fallback")))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if splits(tokenizer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting or "default")
        writer.add_token_merges(pairs)
    else:  # what llama.cpp calls by its own name: of two pieces that may be joined, those of the highest score are
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(pairs):
            ranks.setdefault(pair.replace(" ", ""), rank)
        writer.add_token_scores([-float(ranks.get(token, len(pairs))) for token in tokens])
        writer.add_add_space_prefix(_prefixes(whole))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    known = tokenizer.get_vocab()
    for name, key in _SPECIAL.items():
        if (token := getattr(tokenizer, f"{name}_token", None)) is not None and token in known:
            getattr(writer, f"add_{key}_token_id")(known[token])
    plain, with_special = (whole("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    writer.add_add_bos_token(with_special != plain and with_special[:1] == [whole.bos_token_id])
    writer.add_add_eos_token(with_special != plain and with_special[-1:] == [whole.eos_token_id])
    if isinstance(template := getattr(whole, "chat_template", None), str):
        writer.add_chat_template(template)


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, *, bytes_named: bool) -> tuple[list[str], list[int]]:
    """(the token of every row, its kind)."""
    whole = cut_tokenizer.original(tokenizer)
    added = {token.content: token for token in whole.added_tokens_decoder.values()}
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [int(gguf.TokenType.UNUSED)] * rows
    for token, row in tokenizer.get_vocab().items():
        if row >= rows:
            continue
        kind = gguf.TokenType.NORMAL
        if token in added:
            kind = gguf.TokenType.CONTROL if added[token].special else gguf.TokenType.USER_DEFINED
            kind = gguf.TokenType.UNKNOWN if bytes_named and token == whole.unk_token else kind
        elif bytes_named and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens[row], kinds[row] = token, int(kind)
    return tokens, kinds


def _prefixes(tokenizer: Any) -> bool:
    """Whether a space is put before the text."""
    return tokenizer("a", add_special_tokens=False).tokens()[0].startswith("\u2581")
