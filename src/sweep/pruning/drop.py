"""The measured drop: what a metric loses when one unit is removed, by leaving it out. Exact, in float32.

Removing a unit takes its columns' share out of its block's output matrix. Everything before that is as it was, so each
ablation starts from the changed block (`Resumed`); many ablations are stacked on the batch axis and go through the
later blocks together; and the head sees only the positions that are scored. Of those it is spared most: a unit moves
what enters the head so little that the log-normaliser follows from the whole model's (`normaliser`), with an error
that is proved to be small or else the head is computed. bfloat16 will not do: one unit changes the loss by less than
its rounding.

Legend: C ablations at once, R rows (texts), T tokens, d hidden size, P scored positions, O options (a text, or one
answer of a question). An option's log-likelihood is the sum over its scored tokens.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweep import cache, confusion, cost, versions
from sweep.calibrate import exact_device, inputs_observed
from sweep.models import anatomy, token_ids, trial
from sweep.models.logits import Tail, descend, given
from sweep.pruning import drop_file, normaliser
from sweep.pruning.checks import HIGHER_IS_WORSE
from sweep.pruning.families import Drop
from sweep.pruning.unit_statistics import BATCH, activations_differentiable, first_tensor
from sweep.texts import embedded, text

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 1024  # C * R * T in one pass through the later blocks
TOLERANCE = 1e-4  # nats: the most that a position's log-normaliser may be off, by proof; by experience a hundredth
PAYS = 2  # sparing the head costs as much as d heads: so many times d units and it pays
EXPANSION_BYTES = 2**30  # of covariances, (d, d) a position; the head is not spared at further positions
_ROWS_OF_LOGITS, _COLUMNS_OF_LOGITS = 512, 8192  # a piece of the logits that stays in the processor's cache


@dataclass(frozen=True)
class Probe:
    """What the drop is measured on."""

    rows: Tensor  # (R, T) token ids, padded at the end: attention is causal, so padding changes nothing
    places: Tensor  # (P, 2) row and position of each hidden state that the head sees
    reads: Tensor  # (reads, 3) index into places, the token whose probability is read there, the option it counts for
    options: Tensor  # (O, 2) document, and its place among the document's options
    truth: Tensor  # (documents,) place of the right option


@dataclass(frozen=True)
class Ablation:
    """Units of one block that are removed one at a time: sets of columns of `output`."""

    block: int
    output: anatomy.Linear
    columns: Sequence[Tensor]


@dataclass(frozen=True)
class Scheme:
    """How a `Probe`'s log-likelihoods become a number."""

    metric: str
    probe: Probe = field(repr=False)

    def __call__(self, likelihoods: np.ndarray) -> np.ndarray:
        """(…, O) log-likelihoods to (…) values of the metric."""
        documents, place = self.probe.options.numpy().T
        truth = self.probe.truth.numpy()
        gold = place == truth[documents]
        tokens = np.isin(self.probe.reads[:, 2].numpy(), np.flatnonzero(gold)).sum()
        loss = -likelihoods[..., gold].sum(-1) / tokens
        if self.metric == "loss":
            return loss
        if self.metric == "perplexity":
            return np.exp(loss)
        table = np.full((*likelihoods.shape[:-1], len(truth), place.max() + 1), -np.inf)
        table[..., documents, place] = likelihoods
        chosen = table.argmax(-1)
        if self.metric == "accuracy":
            return (chosen == truth).mean(-1)
        return confusion.macro(confusion.counts(truth, chosen))[self.metric]


def probe_of_text(tokens: Tensor) -> Probe:
    """Every next token of (sequences, length) text is scored; each sequence is one option of a document of its own."""
    count, length = tokens.shape
    row, position = torch.meshgrid(torch.arange(count), torch.arange(length - 1), indexing="ij")
    places = torch.stack([row.flatten(), position.flatten()], 1)
    reads = torch.stack([torch.arange(len(places)), tokens[:, 1:].flatten(), places[:, 0]], 1)
    options = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.long)], 1)
    return Probe(tokens[:, :-1].contiguous(), places, reads, options, torch.zeros(count, dtype=torch.long))


def probe_of_questions(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], truth: Sequence[int]
) -> Probe:
    """Every answer is scored after its prompt; answers that begin alike share a row of tokens.

    prompts  token ids, one list a document
    answers  token ids of each document's answers
    """
    rows: list[tuple[int, ...]] = []
    places: dict[tuple[int, int], int] = {}
    reads: list[tuple[int, int, int]] = []
    options: list[tuple[int, int]] = []
    for document, (prompt, choices) in enumerate(zip(prompts, answers, strict=True)):
        inputs = sorted({(*prompt, *choice[:-1]) for choice in choices}, key=len, reverse=True)
        mine: list[int] = []
        for tokens in inputs:  # what begins another row needs none of its own
            if not any(rows[row][: len(tokens)] == tokens for row in mine):
                mine.append(len(rows))
                rows.append(tokens)
        for place, choice in enumerate(choices):
            whole = (*prompt, *choice)
            row = next(row for row in mine if rows[row][: len(whole) - 1] == whole[:-1])
            for position in range(len(prompt) - 1, len(whole) - 1):
                index = places.setdefault((row, position), len(places))
                reads.append((index, whole[position + 1], len(options)))
            options.append((document, place))
    length = max(map(len, rows))
    padded = torch.tensor([[*row, *([0] * (length - len(row)))] for row in rows])
    return Probe(padded, torch.tensor(list(places)), torch.tensor(reads), torch.tensor(options), torch.tensor(truth))


def probe_of_task(task: str, documents: int | None, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """The last `documents` questions of an embedded task; an evaluation with a limit takes the first ones."""
    chosen = embedded.EMBEDDED[task]()[-(documents or 0) :]
    triples = [embedded.QUESTIONS[task](document) for document in chosen]
    before, _ = token_ids.around(tokenizer)
    rows = token_ids.Rows.of(tokenizer)
    prompts = [
        rows(before + ids).tolist() for ids in token_ids.own(tokenizer, [prompt for prompt, _, _ in triples], before)
    ]
    answers = [
        [rows(ids).tolist() for ids in token_ids.own(tokenizer, [f" {answer}" for answer in choices], [])]
        for _, choices, _ in triples
    ]
    return probe_of_questions(prompts, answers, [truth for _, _, truth in triples])


def probe(asked: Drop, tokens: Tensor | None, tokenizer: PreTrainedTokenizerBase | None) -> Probe:
    """What is measured on: the task, or else the calibration text `tokens`."""
    if asked.task is None:
        assert tokens is not None
        return probe_of_text(tokens.cpu())
    assert tokenizer is not None
    return probe_of_task(asked.task, asked.documents, tokenizer)


def importance(scheme: Scheme, base: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(units,) drop of the metric from (O,) log-likelihoods to (units, O) ones; positive = the unit was of use.

    Many drops of a counted metric are equal; those are ordered by the drop of the loss, within the smallest gap.
    """
    sign = 1.0 if scheme.metric in HIGHER_IS_WORSE else -1.0
    drops = sign * (scheme(found) - scheme(base))
    if scheme.metric in HIGHER_IS_WORSE:
        return drops
    rank = Scheme("loss", scheme.probe)(found).argsort(kind="stable").argsort(kind="stable") / len(found)
    levels = np.unique(drops.round(12))
    return drops + rank * (np.diff(levels).min() / 2 if len(levels) > 1 else 1e-6)


def numbered(table: pd.DataFrame, numbers: Mapping[int, Tensor]) -> pd.DataFrame:
    """A table of measured drops with the units by their numbers in the unpruned model.

    table    block, unit (its number among those that are left), importance, measured
    numbers  by block
    """
    units = [int(numbers[block][unit]) for block, unit in zip(table.block, table.unit, strict=True)]
    return table.assign(unit=units)


def latest(tables: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """One line a unit out of the tables of several rounds: what it was when it was last measured. None without any."""
    if not tables:
        return None
    lines = pd.concat(tables, ignore_index=True).sort_values("measured", kind="stable")
    last = lines.drop_duplicates(["block", "unit"], keep="last")
    return last.sort_values(["block", "unit"], ignore_index=True)


def likelihoods(
    model: PreTrainedModel,
    probe: Probe,
    ablations: Sequence[Ablation],
    *,
    resume: bool = True,
    spare_head: bool | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """((O,) log-likelihoods of the whole model, for each block (units, O) with one unit left out).

    resume      go on from an earlier, interrupted measurement of the same model, text and units, and keep what is measured
    spare_head  whether to prepare for computing it at few positions; None = where that pays, with many units
    Raises ValueError for a model that is not in float32, RuntimeError when going on from a block does not give what
    the whole model gives.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"the drop is measured in float32, and the model is in {model.dtype}: pass model.float()")
    with torch.inference_mode():
        run = Resumed(model, probe)
        base = run.whole()
        again = run.after(0, run.entering(1) if len(run.blocks) > 1 else run.leaving(0), 1)[0]
        if not np.allclose(base, again, rtol=1e-4, atol=1e-3):
            raise RuntimeError(
                f"going on from block 0 gives log-likelihoods that differ by up to "
                f"{np.abs(base - again).max():.3g} nats from those of {type(model).__name__}"
            )
        key = _key(model, probe) if resume else []
        if spare_head is None:  # by all units, not by those that an interrupted run left: it must go on as it began
            spare_head = sum(len(a.columns) for a in ablations) > PAYS * run.head.weight.shape[1]
        depth = len(run.blocks)
        work = sum((depth - a.block) * len(a.columns) for a in ablations)
        found, done = [], 0
        progress = tqdm(total=work, desc="measuring drops", unit="block", leave=False)
        with progress as bar, cost.Meter(model) as meter:
            for ablation in ablations:
                measure = functools.partial(_measure, run, ablation, bar=bar, meter=meter, spare_head=spare_head)
                shape = len(ablation.columns), len(base)
                if resume:
                    columns = [c.tolist() for c in ablation.columns]
                    name = text.fingerprint([*key, drop_file.LAYOUT, spare_head, ablation.block, columns])
                    rows = _kept(name, shape, measure)
                else:
                    measure(rows := drop_file.blank(*shape))
                found.append(rows["log_likelihoods"][:-1])
                done += (depth - ablation.block) * len(ablation.columns)
                bar.update(done - bar.n)  # what lay in the cache
        return base, found


def _kept(name: str, shape: tuple[int, int], measure: Callable[[np.ndarray], object]) -> np.ndarray:
    """A block's rows from the cache: measured when they are not there, and again when they are damaged.

    shape  (units, O)
    """
    here: list[Path] = []  # else another has measured them, and what it spent is to be counted

    def made(half: Path) -> None:
        here.append(half)
        measure(drop_file.begun(half, *shape))

    folder = cache.entry("drops", name, made, resumable=True)
    if problem := cache.damage(folder):
        log.warning("%s in the cached measurement %s; measuring again", problem, folder)
        cache.discard(folder)
        folder = cache.entry("drops", name, made, resumable=True)
    rows = drop_file.whole(folder)
    if not here:
        cost.charge(drop_file.cost(rows))
    return rows


def _measure(
    run: Resumed, ablation: Ablation, rows: np.ndarray, *, bar: Any, meter: cost.Meter, spare_head: bool
) -> None:
    """Fill the rows of the units that are not measured, and count what those that are have cost."""
    measured = drop_file.is_measured(rows)
    missing = np.flatnonzero(~measured[:-1]).tolist()
    measured[-1] &= not missing  # the preparations of another, which are made again
    cost.charge(drop_file.cost(rows[measured]))
    depth = len(run.blocks) - ablation.block
    bar.update(depth * (len(ablation.columns) - len(missing)))
    if not missing:
        return
    before = meter.spent()
    if spare_head:
        run.spare_head()
    batches = run.ablated(ablation, missing)
    drop_file.put(rows, [-1], run.whole()[None], meter.since(before))
    before = meter.spent()
    for units, values in batches:
        drop_file.put(rows, units, values, meter.since(before))
        before = meter.spent()
        bar.update(depth * len(units))


def first_order(model: PreTrainedModel, probe: Probe, outputs: Sequence[anatomy.Linear]) -> list[Tensor]:
    """The first-order estimate of every column's drop of `loss`: (columns,) float32 for each output matrix.

    -sum over tokens of x_j times the gradient of the loss with respect to x_j: what screening goes by.
    """
    right = probe.options[:, 1] == probe.truth[probe.options[:, 0]]
    reads = probe.reads[right[probe.reads[:, 2]]]
    totals = [torch.zeros(anatomy.weight(output).shape[1], device=model.device) for output in outputs]

    def observe(index: int, x: Tensor) -> None:
        value = x.detach()

        def on_gradient(gradient: Tensor) -> None:
            totals[index].sub_((value * gradient).flatten(0, -2).sum(0))

        x.register_hook(on_gradient)

    tail = Tail(model)
    with inputs_observed(outputs, observe), activations_differentiable(model):
        for start in range(0, len(probe.rows), BATCH):
            row, position = probe.places[reads[:, 0]].t()
            here = (row >= start) & (row < start + BATCH)
            if not here.any():
                continue
            states = tail.states(input_ids=probe.rows[start : start + BATCH].to(model.device))
            descend(tail, states[row[here] - start, position[here]], given(reads[here, 1].to(states.device)))
    return [total / len(reads) for total in totals]


class Resumed:
    """A model that can be run from any block on, on the rows of a probe, many times at once."""

    def __init__(self, model: PreTrainedModel, probe: Probe) -> None:
        self.model, self.probe = model, probe
        self.blocks = list(anatomy.blocks(model))
        forms = trial.forms(model)
        self.forms = {block: forms[block] for block in self.blocks}
        self.rows = probe.rows.to(model.device)
        self.head = model.get_output_embeddings()
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.at_once = max(1, TOKENS_AT_ONCE // self.rows.numel())
        self._expansion: normaliser.Expansion | None = None
        self._entering: list[Tensor] = []  # what each block gets in the whole model
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: self._entering.append(first_tensor(args, kwargs)), with_kwargs=True
            )
            for block in self.blocks
        ]
        try:
            hidden = self._scored(self.model, self.rows)
        finally:
            for handle in handles:
                handle.remove()
        row, position = probe.places.to(hidden.device).t()
        self._states = hidden[row, position]  # (P, d) what the head gets in the whole model
        self._base = self._likelihoods(hidden, 1)[0]

    def spare_head(self) -> None:
        """From now on the head is computed only where its log-normaliser does not follow from the whole model's."""
        if self._expansion is not None or self.softcap is not None:
            return  # capped logits are not linear in the states
        weight = self.head.weight
        count = EXPANSION_BYTES // (4 * weight.shape[1] ** 2)
        self._expansion = normaliser.expand(weight, self.head.bias, self._states[:count])

    def whole(self) -> np.ndarray:
        """(O,) log-likelihoods of the model as it is."""
        return self._base

    def entering(self, block: int) -> Tensor:
        """(R, T, d) what the block gets in the whole model."""
        return self._entering[block]

    def leaving(self, block: int) -> Tensor:
        """(R, T, d) what the block gives in the whole model."""
        if block + 1 < len(self.blocks):
            return self._entering[block + 1]
        return self.through(block)

    def after(self, block: int, hidden: Tensor, copies: int) -> np.ndarray:
        """(copies, O) log-likelihoods when `hidden`, (copies * R, T, d), leaves the block."""
        with _skipped(self.forms, block + 1, hidden):
            return self._likelihoods(self._scored(self.model, self._nothing(len(hidden))), copies)

    def without_block(self, block: int) -> np.ndarray:
        """(O,) log-likelihoods of the model that lacks the block."""
        return self.after(block, self.entering(block), 1)[0]

    def through(self, block: int) -> Tensor:
        """(R, T, d) what the block gives, as it is now, of what it gets in the whole model."""
        return self._from(block, self.entering(block), self.blocks[block])

    def ablated(self, ablation: Ablation, wanted: Sequence[int]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """(indices into the ablation's units, (C, O) log-likelihoods without each), for all wanted units.

        What all units need is made at once, and the units one batch after the other.
        """
        block = self.blocks[ablation.block]
        weight = anatomy.weight(ablation.output)
        seen: dict[str, Tensor] = {}
        handles = [
            ablation.output.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
            ablation.output.register_forward_hook(lambda _, __, output: seen.update(y=output)),
        ]
        try:
            leaving = self._from(ablation.block, self.entering(ablation.block), block)
        finally:
            for handle in handles:
                handle.remove()
        shape = self.rows.shape  # OPT joins rows and tokens
        x, added = seen["x"].view(*shape, -1), self._adds(ablation, block, leaving, seen["y"])

        def batches() -> Iterator[tuple[Sequence[int], np.ndarray]]:
            for start in range(0, len(wanted), self.at_once):
                indices = wanted[start : start + self.at_once]
                lost = torch.stack([x[..., ablation.columns[i]] @ weight[:, ablation.columns[i]].t() for i in indices])
                hidden = (leaving - lost).flatten(0, 1) if added else self._rerun(ablation, block, lost)
                yield indices, self.after(ablation.block, hidden, len(indices))

        return batches()

    def _adds(self, ablation: Ablation, block: nn.Module, leaving: Tensor, y: Tensor) -> bool:
        """Whether the matrix's output is simply added to what leaves the block: tried, since families differ."""
        without = self._rerun(ablation, block, y.view(1, *self.rows.shape, -1))
        return torch.allclose(leaving, without + y.view_as(leaving), rtol=1e-5, atol=1e-5 * float(leaving.abs().max()))

    def _rerun(self, ablation: Ablation, block: nn.Module, lost: Tensor) -> Tensor:
        """What leaves the block, (C * R, T, d), when its output matrix gives `lost`, (C, R, T, d), less."""
        handle = ablation.output.register_forward_hook(lambda _, __, output: output - lost.view_as(output))
        try:
            hidden = self.entering(ablation.block).repeat(len(lost), 1, 1)
            return self._from(ablation.block, hidden, block)
        finally:
            handle.remove()

    def _from(self, index: int, hidden: Tensor, block: nn.Module) -> Tensor:
        """What leaves one block when `hidden` enters it. The model itself makes the block's masks and positions."""
        found: list[Tensor] = []
        handle = block.register_forward_hook(lambda _, __, output: found.append(first_tensor((output,), {})))
        try:
            with _skipped(self.forms, index, hidden), _skipped_after(self.forms, index):
                self._scored(self.model, self._nothing(len(hidden)))
        finally:
            handle.remove()
        return found[0]

    def _nothing(self, rows: int) -> dict[str, Tensor]:
        """Input embeddings that no block will see: those before the resumed one are skipped."""
        width = self.model.get_input_embeddings().weight.shape[1]
        return {"inputs_embeds": torch.zeros((), device=self.rows.device).expand(rows, self.rows.shape[1], width)}

    def _scored(self, model: PreTrainedModel, inputs: Tensor | dict[str, Tensor]) -> Tensor:
        """(rows, T, d) what would enter the head; the head itself gets one position."""
        found: list[Tensor] = []

        def on_head(_: nn.Module, args: tuple) -> tuple:
            found.append(args[0])
            return (args[0][:1, :1],)

        handle = self.head.register_forward_pre_hook(on_head)
        try:
            model(**(inputs if isinstance(inputs, dict) else {"input_ids": inputs}), use_cache=False)
        finally:
            handle.remove()
        return found[0]

    def _likelihoods(self, hidden: Tensor, copies: int) -> np.ndarray:
        """(copies, O) from what would enter the head, (copies * R, T, d)."""
        probe = self.probe
        row, position = probe.places.to(hidden.device).t()
        states = hidden.view(copies, *self.rows.shape, -1)[:, row, position]  # (C, P, d)
        index, token, option = probe.reads.to(hidden.device).t()
        log_z = self._log_normaliser(states)
        read = torch.einsum("crd,rd->cr", states[:, index], self.head.weight[token])
        if self.head.bias is not None:
            read = read + self.head.bias[token]
        log_probs = self._capped(read) - log_z[:, index]
        total = torch.zeros(copies, len(probe.options), dtype=torch.double, device=exact_device(hidden.device))
        return total.index_add_(1, option.to(total.device), log_probs.to(total)).cpu().numpy()

    def _log_normaliser(self, states: Tensor) -> Tensor:
        """log of the sum over the vocabulary of exp(logit), (C, P)."""
        if self._expansion is None:
            return self._log_normaliser_in_full(states.flatten(0, 1)).view(states.shape[:2])
        found, known = states.new_empty(states.shape[:2]), len(self._expansion.states)
        found[:, :known], bound = self._expansion(states[:, :known])
        far = torch.ones_like(found, dtype=torch.bool)
        far[:, :known] = ~(bound <= TOLERANCE)  # infinite and undefined bounds too
        found[far] = self._log_normaliser_in_full(states[far])
        return found

    def _log_normaliser_in_full(self, states: Tensor) -> Tensor:
        """The same for (n, d) states, (n,), without ever holding all logits."""
        pieces = []
        for rows in states.split(_ROWS_OF_LOGITS):
            parts = []
            for start in range(0, len(self.head.weight), _COLUMNS_OF_LOGITS):
                bias = None if self.head.bias is None else self.head.bias[start : start + _COLUMNS_OF_LOGITS]
                logits = nn.functional.linear(rows, self.head.weight[start : start + _COLUMNS_OF_LOGITS], bias)
                parts.append(torch.logsumexp(self._capped(logits), 1))
            pieces.append(torch.logsumexp(torch.stack(parts), 0))
        return torch.cat(pieces)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@contextmanager
def _skipped(forms: Mapping[nn.Module, trial.Form], count: int, hidden: Tensor) -> Iterator[None]:
    """The first `count` blocks do nothing, and `hidden` is what leaves them (enters the next, when count is 0)."""
    with ExitStack() as restore:
        for block, form in list(forms.items())[: max(count, 0)]:
            anatomy.replace_forward(restore, block, lambda *a, form=form, **k: form.of(hidden, a, k))
        if count == 0:
            handle = next(iter(forms)).register_forward_pre_hook(
                lambda _, args, kwargs: trial.with_hidden_state(args, kwargs, hidden), with_kwargs=True
            )
            restore.callback(handle.remove)
        yield


@contextmanager
def _skipped_after(forms: Mapping[nn.Module, trial.Form], last: int) -> Iterator[None]:
    """The blocks after `last` pass on what they get."""
    with ExitStack() as restore:
        trial.pass_by(restore, dict(list(forms.items())[last + 1 :]))
        yield


def _key(model: PreTrainedModel, probe: Probe) -> list[Any]:
    """Of the weights, of what is read, and of what computes: other content, other measurement."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for tensor in (probe.rows, probe.places, probe.reads):
        digest.update(tensor.contiguous().numpy().data)
    return [digest.hexdigest(), str(model.device), torch.get_num_threads(), *versions.code()]
