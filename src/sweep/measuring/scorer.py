"""Log-likelihoods of texts, and answers, many at once. What lm-eval's own HFLM computes, with less work:

- Requests that begin alike are one tree of tokens: what they share is read once. The four choices of a question share
  its context; requests that are equal are one.
- The output head, a third of the work in a small model, sees only the positions whose next token is scored.
- Rows of similar length share a batch, up to a budget of tokens. Batches depend on the requests alone, so that the
  same requests give the same numbers to the last digit.
- Answers are those that HFLM gives each prompt alone; how they are written is in `generation`.

A model with a pruned vocabulary is scored over the dense model's: the probability of its unknown token is shared equally
by the tokens that it stands for, so that probabilities still sum to 1 and losses can be compared. Taken as it is, the
model would be praised for the sheer frequency of what it no longer tells apart. This holds for every number.

Shapes: B rows (trees) in a batch, L tokens in the longest, K scored positions, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models import utils as requested
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from sweep.measuring import generation, reading
from sweep.measuring.reading import Reading
from sweep.models import cut_tokenizer, token_ids
from sweep.models.logits import Tail
from sweep.models.token_ids import Rows
from sweep.models.transformers_private import attention_kernel

log = logging.getLogger(__name__)

TOKENS_PER_ROW = 128  # `benchmarks.batch_size` counts rows of this many tokens
_WIDEST_TREE = 1024  # tokens; attention costs grow with the width of a row
_WORTH_SHARING = 0.25  # of a request's tokens must be in the tree already for it to join
_FULL = 0.8  # a row of a batch is at least so much of the longest: the rest is padding, and computed in vain

Request: TypeAlias = tuple[Sequence[int], int]  # tokens, of which the last so many are scored


@dataclass(frozen=True)
class Scores:
    """Of the scored tokens of one request, in order."""

    log_probs: np.ndarray  # float32, natural logarithm
    greedy: np.ndarray  # bool: whether no other token was likelier; never of a token that the vocabulary has lost


@dataclass(frozen=True)
class Text:
    """A scored text, or the ending of one: its own tokens, none of which the tokenizer put there."""

    ids: np.ndarray  # (T,) of the whole vocabulary
    told: np.ndarray  # (T,) bool: spells something. A special token in the text is read, and not to be told
    removed: np.ndarray  # (T,) bool: the vocabulary has lost it
    scores: Scores  # (T,)


@dataclass(frozen=True)
class Alternatives:
    """Of several tokens at each scored position of one request: T positions, k tokens."""

    ids: np.ndarray  # (T, k)
    log_probs: np.ndarray  # (T, k) float32


@dataclass
class Tree:
    """Requests that begin alike. Node i holds a token; its row of `parents` comes earlier, or is -1 at the root."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # nodes of each input, root first

    def grow(self, tokens: tuple[int, ...], beginning: Sequence[int]) -> None:
        """Add an input whose beginning is at these nodes already."""
        path = list(beginning)
        for token in tokens[len(beginning) :]:
            self.parents.append(path[-1] if path else -1)
            self.depths.append(len(path))
            path.append(len(self.tokens))
            self.tokens.append(token)
        self.paths[tokens] = path

    @property
    def is_chain(self) -> bool:
        return len(self.paths) == 1 or all(parent == node - 1 for node, parent in enumerate(self.parents))


def forest(inputs: Sequence[tuple[int, ...]], widest: int = _WIDEST_TREE) -> list[Tree]:
    """Trees that hold every input once, of at most `widest` tokens where inputs share one; 0 gives each its own tree.

    In lexicographic order, what an input shares with any earlier one it shares with the one before it.
    """
    trees: list[Tree] = []
    before: tuple[int, ...] = ()
    for tokens in sorted(set(inputs)):
        common = _common(before, tokens) if trees and widest else 0
        if common >= _WORTH_SHARING * len(tokens) and len(trees[-1].tokens) + len(tokens) - common <= widest:
            trees[-1].grow(tokens, trees[-1].paths[before][:common])
        else:
            trees.append(Tree())
            trees[-1].grow(tokens, [])
        before = tokens
    return trees


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def batches(trees: Sequence[Tree], budget: int) -> Iterator[list[Tree]]:
    """Trees of similar size together, at most `budget` tokens with padding; chains apart, since they need no mask."""
    for chain in (True, False):
        ordered = sorted((t for t in trees if t.is_chain == chain), key=lambda t: -len(t.tokens))
        start = 0
        while start < len(ordered):
            longest = len(ordered[start].tokens)
            stop = start + max(1, budget // longest)
            batch = [tree for tree in ordered[start:stop] if len(tree.tokens) >= _FULL * longest]
            stop = start + len(batch)
            yield batch
            start = stop


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    requests: Sequence[Request],
    budget: int,
    widest: int | None = None,
    *,
    rows: Rows | None = None,
    top: int = 0,
    ids: Sequence[np.ndarray] | None = None,
    alternatives: list[Alternatives] | None = None,
    read: Reading = reading.whole,
) -> list[Scores]:
    """The scores of each request, in order.

    budget  tokens in a batch, padding included
    widest  tokens of a tree; by default as many as the model can read, and 0 shares nothing
    rows    of a vocabulary that may have been pruned; None = it was not
    top     also the likeliest so many tokens at each scored position, appended to `alternatives` request by request
    ids     also these tokens, (T, k) for each request, appended to `alternatives`
    read    how the model reads the batches
    """
    tail = Tail(model)
    widest = widest_tree(model, read) if widest is None else widest
    inputs = [tuple(tokens[:-1]) for tokens, _ in requests]
    ends: dict[tuple[int, ...], list[int]] = {}  # requests by input
    for i, tokens in enumerate(inputs):
        ends.setdefault(tokens, []).append(i)
    found: dict[int, Scores] = {}
    beside: dict[int, Alternatives] = {}
    planned = list(batches(forest(inputs, widest), budget))
    given = [functools.partial(_arguments, batch, model) for batch in planned]
    for batch, states in zip(planned, read(tail, given), strict=True):
        wanted = [
            (row, node, requests[i][0][len(path) - count + 1 + j], i)
            for row, tree in enumerate(batch)
            for tokens, path in tree.paths.items()
            for i in ends[tokens]
            for count in [requests[i][1]]
            for j, node in enumerate(path[len(path) - count :])
        ]
        positions = sorted({(row, node) for row, node, _, _ in wanted})
        index = {position: k for k, position in enumerate(positions)}
        at = torch.tensor([index[row, node] for row, node, _, _ in wanted])
        targets = torch.tensor([target for _, _, target, _ in wanted])
        owner = np.array([i for _, _, _, i in wanted])
        cuts = np.flatnonzero(np.diff(owner)) + 1
        owners = [int(i) for i in owner[[0, *cuts]]]
        asked = None if ids is None else torch.from_numpy(np.concatenate([ids[i] for i in owners]))
        scores, others = _read(tail, _at(states, positions), at, targets, rows, top, asked)
        for i, a, b in zip(owners, np.split(scores.log_probs, cuts), np.split(scores.greedy, cuts), strict=True):
            found[i] = Scores(a, b)
        if others is not None:
            for i, a, b in zip(owners, np.split(others.ids, cuts), np.split(others.log_probs, cuts), strict=True):
                beside[i] = Alternatives(a, b)
    if alternatives is not None:
        alternatives += [beside[i] for i in range(len(requests))]
    return [found[i] for i in range(len(requests))]


def _log_probs(logits: Tensor, rows: Rows | None) -> Tensor:
    """(K, V) float32: log-probabilities over the whole vocabulary, those of lost tokens in place of the unknown one's."""
    found = logits.float().log_softmax(-1)
    if rows is not None and rows.candidates > 1:
        found[:, rows.unknown] -= math.log(rows.candidates)
    return found


def _read(
    tail: Tail, states: Tensor, at: Tensor, targets: Tensor, rows: Rows | None, top: int, ids: Tensor | None
) -> tuple[Scores, Alternatives | None]:
    """What the model says of the tokens `targets` at places `at` of the states (K, d), N of them.

    top, ids  the likeliest so many tokens there, or these tokens (N, k), are the others; None where neither is asked for
    """
    count = ids.shape[1] if ids is not None else top
    log_probs, greedy = torch.empty(len(at)), torch.empty(len(at), dtype=torch.bool)
    other_ids, other_log_probs = torch.empty(len(at), count, dtype=torch.long), torch.empty(len(at), count)
    for piece in tail.pieces(states):
        some = _log_probs(tail.logits(states[piece]), rows)
        here = (at >= piece.start) & (at < piece.start + len(some))
        place, target = (at[here] - piece.start).to(some.device), targets[here].to(some.device)
        log_probs[here] = some[place, target].cpu()
        greedy[here] = (some.argmax(-1)[place] == target).cpu()
        if count:
            tokens = some.topk(top).indices[place] if ids is None else ids[here].to(some.device)
            other_ids[here], other_log_probs[here] = tokens.cpu(), some[place[:, None], tokens].cpu()
    if rows is not None and rows.candidates > 1:
        greedy &= targets != rows.unknown
    others = Alternatives(other_ids.numpy(), other_log_probs.numpy()) if count else None
    return Scores(log_probs.numpy(), greedy.numpy()), others


def _at(states: Tensor, positions: Sequence[tuple[int, int]]) -> Tensor:
    """(K, d) of the states (B, L, d) those at these (row, node) positions."""
    rows, nodes = (torch.tensor(places, device=states.device) for places in zip(*positions, strict=True))
    return states[rows, nodes]


def _arguments(batch: Sequence[Tree], model: PreTrainedModel) -> dict[str, Tensor]:
    """Padded to the right. Chains need no mask, for no token looks to its right; a tree's token sees its ancestors."""
    length = max(len(tree.tokens) for tree in batch)
    tokens = np.zeros((len(batch), length), dtype=np.int64)
    for row, tree in enumerate(batch):
        tokens[row, : len(tree.tokens)] = tree.tokens
    arguments = {"input_ids": torch.from_numpy(tokens).to(model.device)}
    if all(tree.is_chain for tree in batch):
        return arguments
    depths = np.zeros_like(tokens)
    sees = np.zeros((len(batch), length, length), dtype=bool)
    sees[:, range(length), range(length)] = True  # padding sees itself, so that no row of the softmax is empty
    for row, tree in enumerate(batch):
        depths[row, : len(tree.tokens)] = tree.depths
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                sees[row, node] |= sees[row, parent]
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill_(
        torch.from_numpy(~sees), torch.finfo(model.dtype).min
    )
    return arguments | {
        "attention_mask": mask.unsqueeze(1).to(model.device),
        "position_ids": torch.from_numpy(depths).to(model.device),
    }


@torch.inference_mode()
def widest_tree(model: PreTrainedModel, read: Reading = reading.whole) -> int:
    """Tokens of the widest tree whose tokens the model gives what it gives each path alone; 0 when it reads no trees.

    It must take a mask and positions from outside, and within the tree look at all earlier tokens. Whether it does is
    tried on small trees: a model with a recurrent state, or with positions of its own, does not. The trees' tokens are
    drawn from all rows of the embedding, and the median of several positions decides: the first tokens of a vocabulary are
    special ones, after which the rounding of bfloat16 alone may change logits by half and more.
    """
    config = model.config.get_text_config()
    if not {"attention_mask", "position_ids"} <= set(inspect.signature(model.forward).parameters):
        return 0
    if attention_kernel(config) not in ("sdpa", "eager"):
        return 0
    shared, own = 8, 4  # tokens
    pairs = np.random.default_rng(0).integers(0, token_ids.embedded(model), (4, shared + 2 * own)).tolist()
    trees, chains = [], []
    for pair in pairs:
        paths = tuple(pair[: shared + own]), (*pair[:shared], *pair[shared + own :])
        trees.append(Tree())
        trees[-1].grow(paths[0], [])
        trees[-1].grow(paths[1], trees[-1].paths[paths[0]][:shared])
        chains.append(Tree())
        chains[-1].grow(paths[1], [])  # the first would be read right even without mask and positions
    ends = [
        [(row, node) for row, tree in enumerate(batch) for node in range(len(tree.tokens))[-own:]]
        for batch in (trees, chains)
    ]
    tail = Tail(model)
    given = [functools.partial(_arguments, batch, model) for batch in (trees, chains)]
    together, apart = (
        tail.logits(_at(states, end)).float() for states, end in zip(read(tail, given), ends, strict=True)
    )
    gaps = (together - apart).norm(dim=-1) / apart.norm(dim=-1)
    alike = gaps.median() < 0.5 * torch.finfo(model.dtype).eps ** 0.5
    if not alike:
        log.info("%s reads no trees of tokens: what its requests share is read once for each", type(model).__name__)
    return min(_WIDEST_TREE, getattr(config, "sliding_window", None) or _WIDEST_TREE) if alike else 0


class Scorer(HFLM):
    """lm-eval's HFLM with the work above. Tokenisation, truncation, what is scored and where answers end are HFLM's.

    Beside what lm-eval asks for, each text is scored as it is: HFLM begins a rolled text with a BOS of its own beside the
    tokenizer's and has the second predicted, and where a tokenizer ends texts, it scores that end as part of the answer.
    Where nothing is put around a text, both are one request and cost nothing.

    texts    every text and ending so far, by its request's arguments, for statistics of single tokens
    answers  every answer so far, by its request's arguments: a prompt may have been answered several times
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_size: int,
        max_length: int | None,
        read: Reading = reading.whole,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.budget = batch_size * TOKENS_PER_ROW
        self.read = read
        self.whole = cut_tokenizer.original(tokenizer)  # all ids here are its
        self.rows = token_ids.Rows.of(tokenizer, token_ids.embedded(model))
        self.prefix = int(self.whole.eos_token_id if self.whole.bos_token_id is None else self.whole.bos_token_id)
        self.before, self.after = token_ids.around(tokenizer)
        self.special = token_ids.special(tokenizer)
        self.texts: dict[tuple[str, ...], Text] = {}
        self.answers: dict[tuple[str, str], list[generation.Answer]] = {}
        self.top = 0  # of each rolled text, the likeliest so many tokens at every position go into `alternatives`
        self.ids: dict[str, np.ndarray] = {}  # or, by text, the tokens (T, k) that go there
        self.alternatives: dict[str, Alternatives] = {}  # (T, k); ids of the whole vocabulary

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """`tok_encode` of each text, all at once: the tokenizer then works in parallel."""
        prefix = self.whole.decode(self.prefix)
        found: dict[str, list[int]] = {}
        for begun in (False, True):
            adds = self.add_bos_token if add_special_tokens is None else add_special_tokens
            if add_special_tokens is None and begun:
                adds = False  # the text begins with the special token itself
            options = {} if adds is None else {"add_special_tokens": adds}  # else as the tokenizer does by itself
            some = [t for t in dict.fromkeys(texts) if t.startswith(prefix) == begun]
            if some:
                found |= dict(zip(some, self.whole(some, verbose=False, **options)["input_ids"], strict=True))
        return [found[text] for text in texts]

    def unended(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Each text with what the tokenizer puts before it, once, and without what it puts behind it."""
        before = self.before if add_special_tokens else []
        return [before + ids for ids in token_ids.own(self.whole, texts, before)]

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        """Where each of the text's own tokens stands in it; None when the tokenizer cannot tell."""
        if not self.whole.is_fast:
            return None
        encoded = self.whole(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["offset_mapping"][token_ids.begun(encoded["input_ids"], self.before or [self.prefix]) :]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        arguments = [(str(context), str(continuation)) for context, continuation in (r.args for r in requests)]
        encoded = self._encode_pairs(arguments, self.encode)
        cut = sum(len(context) + len(ids) > self.max_length + 1 for context, ids in encoded)
        if cut:
            log.warning(
                "%d of %d requests are longer than max_length=%d tokens and lose their beginning",
                cut,
                len(encoded),
                self.max_length,
            )
        if self.after:
            encoded += self._encode_pairs(arguments, self.unended)
        asked: list[Request] = []
        for i, (context, ids) in enumerate(encoded):
            if not 0 < len(ids) <= self.max_length:
                _, continuation = arguments[i % len(arguments)]
                raise ValueError(
                    f"a continuation has {len(ids)} tokens; 1 to max_length={self.max_length} can be "
                    f"scored: {continuation[:80]!r}"
                )
            asked.append((self.rows((context + ids)[-(self.max_length + 1) :]).tolist(), len(ids)))
        found = score(self.model, asked, self.budget, rows=self.rows, read=self.read)
        own = slice(len(encoded) - len(arguments), None)
        for argument, (_, ids), scores in zip(arguments, encoded[own], found[own], strict=True):
            self.texts[argument] = self._text(ids, scores)
        return [(_sum(scores), bool(scores.greedy.all())) for scores in found[: len(arguments)]]

    def _encode_pairs(
        self, arguments: Sequence[tuple[str, str]], encode: Callable[..., list[list[int]]]
    ) -> list[tuple[list[int], list[int]]]:
        """lm-eval's `_encode_pair` and its rule for an empty context, for all pairs at once."""
        pairs = []
        for context, continuation in arguments:
            stripped = context.rstrip()
            pairs.append((stripped, context[len(stripped) :] + continuation) if context else (context, continuation))
        texts = [text for context, continuation in pairs if context for text in (context, context + continuation)]
        whole = dict(zip(texts, encode(texts), strict=True))
        alone = [continuation for context, continuation in pairs if not context]
        bare = dict(zip(alone, encode(alone, add_special_tokens=False), strict=True))
        encoded = []
        for context, continuation in pairs:
            if context:
                begin = whole[context]
                encoded.append((begin, whole[context + continuation][len(begin) :]))
            elif bare[continuation][:1] == [self.prefix]:
                encoded.append((bare[continuation][:1], bare[continuation][1:]))
            else:
                encoded.append(([self.prefix], bare[continuation]))
        return encoded

    def _text(self, ids: Sequence[int], scores: Scores) -> Text:
        asked = np.asarray(ids, dtype=np.int64)
        return Text(asked, ~np.isin(asked, self.special), self.rows.removed[asked], scores)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [str(request.args[0]) for request in requests]
        beginning = self.before or [self.prefix]
        own = token_ids.own(self.whole, texts, beginning)
        ours = [self._windows(ids, beginning) for ids in own]
        theirs = [self._windows(ids, [self.prefix]) for ids in self.encode(texts)]
        wanted = {i for i, text in enumerate(texts) if self.top or text in self.ids}
        scored = self._rolled(texts, ours, wanted)
        for text, ids, scores in zip(texts, own, scored, strict=True):
            self.texts[(text,)] = self._text(ids, scores)
        apart = [i for i in range(len(texts)) if theirs[i] != ours[i]]
        for i, scores in zip(apart, self._rolled(texts, [theirs[i] for i in apart], set()), strict=True):
            scored[i] = scores
        return [_sum(scores) for scores in scored]

    def _windows(self, ids: list[int], beginning: list[int]) -> list[Request]:
        """lm-eval's windows of a rolled text: every token is scored once, the first after the beginning."""
        *earlier, last = beginning
        rolled = utils.get_rolling_token_windows(
            token_list=ids, prefix_token=last, context_len=1, max_seq_len=self.max_length - len(earlier)
        )
        windows = [(a + b, len(b)) for a, b in map(utils.make_disjoint_window, rolled)]
        return [
            (self.rows(earlier + window if i == 0 else window).tolist(), count)
            for i, (window, count) in enumerate(windows)
        ]

    def _rolled(self, texts: Sequence[str], windows: Sequence[Sequence[Request]], wanted: set[int]) -> list[Scores]:
        """The scores of each text from those of its windows; of `wanted` ones, what is asked goes into `alternatives`."""
        parts: list[list[Scores]] = [[] for _ in windows]
        for looked_at in (False, True):
            mine = [(i, window) for i in range(len(windows)) if (i in wanted) == looked_at for window in windows[i]]
            for (i, _), scores in zip(mine, self._scored(texts, mine, looked_at), strict=True):
                parts[i].append(scores)
        return [
            Scores(
                *(
                    np.concatenate([getattr(s, name) for s in scored] or [np.zeros(0)])
                    for name in ("log_probs", "greedy")
                )
            )
            for scored in parts
        ]

    def _scored(self, texts: Sequence[str], windows: Sequence[tuple[int, Request]], wanted: bool) -> list[Scores]:
        """The scores of windows of texts; where `wanted`, what is asked of their positions goes into `alternatives`."""
        requests = [window for _, window in windows]
        if not wanted:
            return score(self.model, requests, self.budget, rows=self.rows, read=self.read)
        ids, done = [], dict.fromkeys([i for i, _ in windows], 0)
        for i, (_, count) in windows:
            ids.append(self.rows(self.ids[texts[i]][done[i] : done[i] + count]) if self.ids else np.zeros(0))
            done[i] += count
        found: list[Alternatives] = []
        scores = score(
            self.model,
            requests,
            self.budget,
            rows=self.rows,
            top=self.top,
            ids=ids if self.ids else None,
            alternatives=found,
            read=self.read,
        )
        for i in done:
            mine = [others for (j, _), others in zip(windows, found, strict=True) if j == i]
            others = Alternatives(*(np.concatenate([getattr(p, n) for p in mine]) for n in ("ids", "log_probs")))
            self.alternatives[texts[i]] = Alternatives(self.rows.ids[others.ids], others.log_probs)
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        questions = [self.question(*request.args) for request in requests]
        answers = generation.write(self.model, self.tokenizer, questions)
        texts = []
        for request, question, answer in zip(requests, questions, answers, strict=True):
            self.answers.setdefault(self.as_key(request.args), []).append(answer)
            text = self.tok_decode(answer.tokens)
            texts.append(requested.postprocess_generated_text(text, [*question.stops], None))
        return texts

    @staticmethod
    def as_key(arguments: Sequence[Any]) -> tuple[str, str]:
        """The arguments of a request for an answer, which hold settings."""
        prompt, settings = arguments
        return str(prompt), json.dumps(settings, sort_keys=True, default=str)

    def question(self, prompt: str, settings: dict[str, Any]) -> generation.Question:
        """A request as HFLM resolves it. Raises ValueError where prompt or answer are left no token."""
        options = dict(requested.normalize_gen_kwargs(settings, self.max_gen_toks))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = requested.handle_stop_sequences(options.pop("until", None), eos=end)
        limit = options.pop("max_gen_toks")
        room = self.max_length - limit
        if room <= 0:
            raise ValueError(f"an answer may take {limit} tokens, and max_length={self.max_length} leaves no prompt")
        begun = (bos := self.tokenizer.bos_token) is not None and prompt.startswith(bos)
        adds = False if begun else self.add_bos_token
        tokens = self.tokenizer(prompt, **({} if adds is None else {"add_special_tokens": adds}))["input_ids"]
        if len(tokens) > room:
            log.warning("a prompt of %d tokens loses its beginning, beside an answer of %d", len(tokens), limit)
        tokens = tokens[-room:]
        if (longest := options.pop("max_length", None)) is not None:  # of prompt and answer together
            limit = longest - len(tokens)
        if limit < 1:
            raise ValueError(f"a prompt has {len(tokens)} tokens, and its task's max_length leaves no answer after it")
        return generation.Question(tokens, limit, tuple(stops), options)


def _sum(scores: Scores) -> float:
    return float(scores.log_probs.sum(dtype=np.float64))
