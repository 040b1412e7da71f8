"""Answers: what a model writes after a prompt until a stop string, many prompts at once.

The same answers as transformers' `generate` gives each prompt alone, with less work:

- Answers grow side by side, a token a step. One that is done leaves, and another prompt takes its place: `generate` decodes
  a whole batch to the end of its longest answer.
- Each prompt is read alone, without padding, and what all begin with, such as few-shot examples, is read once.
- The key-value cache grows in place. transformers copies all of it for every token.

Whether a model gives a row among others what it gives the row alone is tried. One that does not, and what is asked beside
greedy decoding, such as sampling or beams, is left to `generate`, prompt by prompt.

Shapes: B answers side by side, T slots of the cache, the last of which are a row's own: padding stands before.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from sweep.models import token_ids

log = logging.getLogger(__name__)

ROWS = 16  # side by side, at most
_SLOTS = 32768  # of their caches together, at most
_ROOM = 64  # tokens by which a cache grows
_JOINING = 4  # prompts wait until this fraction of the places is free: each joining copies the cache
# Of a generation's settings: those that change nothing of greedy decoding, or are given here.
_ASIDE = {
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "transformers_version",
    ),
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("cache_implementation", "cache_config", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
}


@dataclass(frozen=True)
class Question:
    """What is to be answered."""

    tokens: Sequence[int]  # of the prompt
    limit: int  # tokens of an answer
    stops: tuple[str, ...]  # strings that end one
    options: Mapping[str, Any] = field(default_factory=dict)  # of `generate`, beside: how tokens are chosen


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    tokens: list[int]  # that which ended it included
    truncated: bool  # whether the limit has ended it


class Ends:
    """Tells when answers to questions of one kind are done."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, stops: Sequence[str]) -> None:
        told = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.eos = {told} if isinstance(told, int) else {*(told or ())}
        self.stops = [stop for stop in stops if stop]
        self.tokenizer = tokenizer
        # as lm-eval looks back: a string may be written in other tokens than the tokenizer would choose
        own = (tokenizer.encode(stop, add_special_tokens=False) for stop in self.stops)
        self.back = max(map(len, own), default=0) + 2

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Of each answer so far, whether its last token has ended it."""
        texts = self.tokenizer.batch_decode([answer[-self.back :] for answer in answers]) if self.stops else answers
        return [
            answer[-1] in self.eos or any(stop in text for stop in self.stops)
            for answer, text in zip(answers, texts, strict=True)
        ]


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    rows: int = ROWS,
    way: Way | None = None,
) -> list[Answer]:
    """An answer to each question, in order.

    tokenizer  the model's, by which strings are found in answers
    rows       side by side, at most; 1 answers one after the other, as a user is answered
    way        how the model reads prompts, where that is known; else it is tried
    """
    found: dict[int, Answer] = {}
    way = way or Way.of(model)
    by_stops: dict[tuple[str, ...], list[int]] = {}
    with torch.inference_mode(), tqdm(total=len(questions), desc="answering", unit="answer", leave=False) as progress:
        for i, question in enumerate(questions):
            if way.together and _is_greedy(model, question):
                by_stops.setdefault(question.stops, []).append(i)
                continue
            found[i] = _generate(model, tokenizer, question)
            progress.update()
        for stops, alike in by_stops.items():
            ends = Ends(model, tokenizer, stops)
            for i, answer in _side_by_side(model, [questions[i] for i in alike], ends, way, rows):
                found[alike[i]] = answer
                progress.update()
    return [found[i] for i in range(len(questions))]


def _is_greedy(model: PreTrainedModel, question: Question) -> bool:
    """Whether each token is the likeliest one and nothing else is asked, by the task or by the model's own settings."""
    own = {} if model.generation_config is None else model.generation_config.to_diff_dict()
    asked = {name for name in {**own, **question.options} if name not in _ASIDE and not name.startswith("_")}
    return not asked and not question.options.get("do_sample")


def _generate(model: PreTrainedModel, tokenizer: Any, question: Question) -> Answer:
    """By transformers' own `generate`."""
    prompt = torch.tensor([[*question.tokens]], device=model.device)
    ends = Ends(model, tokenizer, question.stops)

    class Stopped(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor(ends(ids[:, prompt.shape[1] :].tolist()), device=ids.device)

    options = {"do_sample": False, **question.options}
    if not options["do_sample"]:
        options.pop("temperature", None)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=prompt.shape[1] + question.limit,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([Stopped()]),
        **options,
    )
    tokens = written[0, prompt.shape[1] :].tolist()
    return Answer(tokens, truncated=not ends([tokens])[0])


class _Layer(DynamicLayer):
    """A layer of a cache that grows in place, with room for more tokens than it holds."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (states[..., :0, :] for states in (key_states, value_states))
        self.stores = [self.keys, self.values]

    @classmethod
    def joined(cls, layers: Sequence[DynamicLayer]) -> _Layer:
        """The rows of all, (B, heads, T, size), padded on the left to the longest."""
        length, made = max(layer.keys.shape[-2] for layer in layers), cls()
        made.lazy_initialization(layers[0].keys, layers[0].values)
        for i, held in enumerate(("keys", "values")):
            parts = [getattr(layer, held) for layer in layers]
            count, (_, heads, _, size) = sum(len(part) for part in parts), parts[0].shape
            made.stores[i] = parts[0].new_zeros((count, heads, length + _ROOM, size))
            start = 0
            for part in parts:
                made.stores[i][start : start + len(part), :, length - part.shape[-2] : length] = part
                start += len(part)
            setattr(made, held, made.stores[i][..., :length, :])
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, more = self.keys.shape[-2], key_states.shape[-2]
        if held + more > self.stores[0].shape[-2]:
            for i, old in enumerate((self.keys, self.values)):
                shape = (*key_states.shape[:2], held + more + _ROOM, old.shape[-1])
                self.stores[i] = old.new_zeros(shape)
                self.stores[i][..., :held, :] = old
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[..., held : held + more, :] = new
        self.keys, self.values = (store[..., : held + more, :] for store in self.stores)
        return self.keys, self.values

    def keep(self, rows: Tensor, skip: int) -> None:
        """Only these rows, without their first slots."""
        held = self.keys.shape[-2] - skip
        self.stores = [store[rows, :, skip:] for store in self.stores]
        self.keys, self.values = (store[..., :held, :] for store in self.stores)


class _Rows:
    """Answers that grow side by side, and what the model holds of them."""

    def __init__(self, model: PreTrainedModel, *, numbered: bool) -> None:
        self.model, self.numbered = model, numbered
        self.past: Cache | None = None
        self.seen = torch.zeros((0, 0), dtype=torch.long, device=model.device)  # (B, T) 0 = padding

    def join(self, prompts: Sequence[Sequence[int]], beginning: Cache | None) -> Tensor:
        """Read more prompts, each alone; (prompts, vocabulary) logits after them.

        beginning  of what is read of the tokens that all begin with; None = of none
        """
        pasts, logits, seen = [self.past] if len(self.seen) else [], [], [*self.seen]
        for prompt in prompts:
            past = _read(self.model, prompt, beginning)
            pasts.append(past.past_key_values)
            logits.append(past.logits[:, -1])
            seen.append(self.seen.new_ones(len(prompt)))
        longest = max(map(len, seen))
        self.seen = torch.stack([pad(row, (longest - len(row), 0)) for row in seen])
        layers = zip(*(past.layers for past in pasts if past is not None), strict=True)
        self.past = Cache(layers=[_Layer.joined(layer) for layer in layers])
        return torch.cat(logits)

    def read(self, tokens: Tensor) -> Tensor:
        """(B, vocabulary) logits after one more token (B,) of each."""
        self.seen = pad(self.seen, (0, 1), value=1)
        arguments: dict[str, Any] = {"attention_mask": self.seen} if not self.seen.all() else {}
        if self.numbered:
            arguments["position_ids"] = self.seen.sum(1, keepdim=True) - 1
        output = self.model(
            input_ids=tokens[:, None], past_key_values=self.past, use_cache=True, logits_to_keep=1, **arguments
        )
        return output.logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these."""
        left = torch.tensor(rows, dtype=torch.long, device=self.seen.device)
        self.seen = self.seen[left]
        skip = int(self.seen.argmax(1).min()) if len(rows) else 0
        self.seen = self.seen[:, skip:]
        for layer in self.past.layers if self.past is not None and rows else ():
            layer.keep(left, skip)


def _read(model: PreTrainedModel, tokens: Sequence[int], beginning: Cache | None) -> Any:
    """What the model puts out, with its cache, after tokens whose beginning it has read."""
    done = 0 if beginning is None else beginning.get_seq_length()
    past = Cache(
        layers=None if beginning is None else [_Layer(layer.keys, layer.values) for layer in beginning.layers],
        layer_class_to_replicate=_Layer if beginning is None else None,
    )
    own = torch.tensor([[*tokens[done:]]], device=model.device)
    return model(input_ids=own, past_key_values=past, use_cache=True, logits_to_keep=1)


def _side_by_side(
    model: PreTrainedModel, questions: Sequence[Question], ends: Ends, way: Way, most: int
) -> Iterator[tuple[int, Answer]]:
    """(which question, its answer) as answers are done, greedily; the longest prompts first, by the questions alone."""
    waiting = sorted(range(len(questions)), key=lambda i: (len(questions[i].tokens), tuple(questions[i].tokens)))
    shared = way.shared(questions)
    beginning = _read(model, questions[0].tokens[:shared], None).past_key_values if shared else None
    rows = _Rows(model, numbered=way.numbered)
    at: list[int] = []  # the questions of the rows
    answers: list[list[int]] = [[] for _ in questions]
    chosen = torch.zeros(0, dtype=torch.long, device=model.device)
    slots = max(len(question.tokens) + question.limit for question in questions)
    most = max(1, min(most, _SLOTS // slots))
    while waiting or at:
        if waiting and (more := most - len(at)) >= min(len(waiting), max(1, most // _JOINING)):
            new = [waiting.pop() for _ in range(min(more, len(waiting)))]
            logits = rows.join([questions[i].tokens for i in new], beginning)
            first = logits.argmax(-1)
            at, fresh = [*at, *new], new
            chosen = torch.cat([chosen, first])
        else:
            fresh = at
            chosen = rows.read(chosen).argmax(-1)
        tokens = chosen.tolist()
        for i, token in zip(at, tokens, strict=True):
            if i in fresh:
                answers[i].append(token)
        going = []
        for j, (i, ended) in enumerate(zip(at, ends([answers[i] for i in at]), strict=True)):
            if ended or len(answers[i]) >= questions[i].limit:
                yield i, Answer(answers[i], truncated=not ended)
            else:
                going.append(j)
        if len(going) < len(at):
            rows.keep(going)
            at, chosen = [at[j] for j in going], chosen[going]


@dataclass(frozen=True)
class Way:
    """How a model reads prompts, as far as it then gives each what it gives it alone."""

    together: bool  # rows of unequal length, side by side
    shares: bool  # after a beginning that was read once
    numbered: bool  # it is told the positions of tokens

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel) -> Way:
        """Found by trying on a few tokens, of which the median decides: see `scorer.widest_tree`."""
        parameters = inspect.signature(model.forward).parameters
        numbered = "position_ids" in parameters
        drawn = np.random.default_rng(0).integers(0, token_ids.embedded(model), (4, 14)).tolist()
        begun = [[*drawn[0][:8], *tokens[8 : 14 - 2 * (i % 2)]] for i, tokens in enumerate(drawn)]  # 14 and 12
        try:
            apart = torch.cat([model(torch.tensor([[*t, t[0]]], device=model.device)).logits[:, -2:] for t in begun])
            found = [_alike(_tried(model, begun, shared, numbered), apart) for shared in (0, 8)]
        except Exception as error:  # whatever a model raises that cannot be asked so: it is asked as it can be
            log.info("%s answers one prompt after the other: %s", type(model).__name__, error)
            found = [False, False]
        return cls(found[0], all(found), numbered)

    def shared(self, questions: Sequence[Question]) -> int:
        """How many tokens all prompts begin with, where the model can read these once; each keeps a token of its own."""
        prompts = [question.tokens for question in questions]
        if len(prompts) < 2 or not self.shares:
            return 0
        shortest = min(map(len, prompts)) - 1
        first, last = min(prompts, key=tuple), max(prompts, key=tuple)  # all others share what these two do
        return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _tried(model: PreTrainedModel, prompts: Sequence[Sequence[int]], shared: int, numbered: bool) -> Tensor:
    """(prompts, 2, vocabulary) logits after each prompt and after its first token once more."""
    rows = _Rows(model, numbered=numbered)
    first = rows.join(prompts, _read(model, prompts[0][:shared], None).past_key_values if shared else None)
    return torch.stack([first, rows.read(torch.tensor([tokens[0] for tokens in prompts], device=model.device))], dim=1)


def _alike(found: Tensor, expected: Tensor) -> bool:
    gaps = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return bool(gaps.median() < 0.5 * torch.finfo(expected.dtype).eps ** 0.5)
