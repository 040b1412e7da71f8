"""Whether two checkouts of sweep give the same numbers, to the last digit: for before and after code is moved about.

    python benchmarks/same_numbers.py OLD NEW                 two checkouts, such as git worktrees
    python benchmarks/same_numbers.py OLD NEW --keep FOLDER   OLD's rows stay in FOLDER, with what they were made from
    python benchmarks/same_numbers.py FOLDER NEW              such a folder in place of OLD, which need not run again

Both run one study, cells of every family on a tiny random model, each with a results folder and a cache of its own. Of a
cell its name, all columns but those that are timed or tell of the machine, and its tables are compared: float32 in one
thread on one processor leaves nothing to chance. Exits 1, after a table of the differences, when anything differs, and 2
when a study did not run. It goes through doors that users have, the command line and files of parquet, so that it runs
with checkouts whose insides have nothing in common. Both run in the environment of the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NoReturn

import pandas as pd
from tabulate import tabulate

# Everything that a cell reads lies in one folder, in which the command runs: paths are part of a row's configuration.
STUDY = """# @package _global_
defaults:
  - override /model: local
  - override /calibration: file
  - override /efficiency: none
  - override /execution: dense
model: {path: model}
calibration: {source: calibration.txt, sequences: 8, length: 64}
perplexity: {source: test.txt, seqlen: 64, windows: 16}
benchmarks: {tasks: [pydoc, capitals, continents], limit: 12, max_length: 128}
dtype: float32
device: cpu
threads: 1
hydra:
  sweeper:
    grids:
      - {+method: "weight,wanda,ria,gradient,alps,random", sparsity: 0.3}
      - {+method: "random,wanda", sparsity: 0.3, seed: 1}
      - {+method: "sparsegpt,wanda", method.pattern: "2:4", sparsity: 0.5}
      - {+method: sparsegpt, sparsity: 0.5, calibration.sequential: "true,false"}
      - {+method: owl, method.outlier_ratio: 2, sparsity: 0.5}
      - {+method: "weight,wanda", method.scope: global, sparsity: 0.4}
      - {+method: "weight,wanda", method.scope: matrix, method.among_smallest: 0.5, method.skip_lowest: 0.1, sparsity: 0.2}
      - {+method: weight, method.embeddings: true, method.head: true, method.exclude: "[*.0.*]", sparsity: 0.3}
      - {+method: weight, execution: bitmap, execution.kernel: portable, sparsity: 0.5}
      - {+method: weight, execution: csr, sparsity: 0.5}
      - {+method: neuron, method.importance: "taylor_sampled,flap,fisher", sparsity: 0.3}
      - {+method: neuron, method.importance: flap, method.repair: true, method.steps: 2, sparsity: 0.3}
      - {+method: neuron, method.importance: drop, method.group: 8, sparsity: 0.3}
      - {+method: head, method.importance: "taylor_abs,drop", sparsity: 0.25}
      - {+method: head, method.unit: query, method.importance: "wanda_sp,l2", sparsity: 0.25}
      - {+method: layer, method.importance: "block_influence,drop", sparsity: 0.25}
      - {+method: vocab, method.importance: "frequency,random", sparsity: 0.2}
"""
NAME = "same_numbers"
VOCABULARY = 512
WEIGHTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Columns that differ between two runs of one code: what was timed or read from the system, by whom, when and where.
OF_THE_RUN = {
    "error",
    "load_seconds",
    "prune_seconds",
    "cell_seconds",
    "waited_seconds",
    "peak_memory_bytes",
    "base_memory_bytes",
    "prune_peak_memory_bytes",
    "peak_device_memory_bytes",
    "other_cores_busy",
    "command",
    "started_at",
    "git_commit",
    "host",
    "openmp_wait",
    "cuda_visible_devices",
}
NOT_COMPARED = {"cells", "latency"}  # folders of results: the rows, which are read on their own, and what was timed

Difference = tuple[str, str, str, str]  # cell, what, old, new


def refuse(reason: str) -> NoReturn:
    print(f"{NAME}: {reason}", file=sys.stderr)
    sys.exit(2)


def make_inputs(folder: Path) -> None:
    """The model, its tokenizer, the texts and the study: the same for both, also when they run weeks apart."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / f"{NAME}.yaml").write_text(STUDY)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (folder / "calibration.txt").write_text("\n\n".join(topics[0:20]))
    (folder / "test.txt").write_text("\n\n".join(topics[20:40]))

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics[0:20], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WEIGHTS), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # of norms, which are all ones at first: activations of one size hide much
                parameter.uniform_(0.5, 2.0)
    model.save_pretrained(folder / "model")


def python(checkout: Path, *words: str, folder: Path, cache: str) -> subprocess.CompletedProcess[str]:
    """Python with the code of a checkout, started in a folder; what it prints is in `stdout`."""
    source = {"PYTHONPATH": str(checkout.resolve() / "src"), "SWEEP_CACHE": cache, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(checkout: Path) -> None:
    """Refuse a checkout whose code is not what would run: then another's, installed here, would be compared."""
    look = "import sweep, hydra_plugins.sweep_sweeper as plugin; print(sweep.__file__, plugin.__file__, sep='\\n')"
    with tempfile.TemporaryDirectory() as empty:
        looked = python(checkout, "-c", look, folder=Path(empty), cache=empty)
    if looked.returncode:
        refuse(f"sweep cannot be imported from {checkout}:\n{looked.stdout}")
    for file in looked.stdout.splitlines():
        if not Path(file).resolve().is_relative_to(checkout.resolve() / "src"):
            refuse(f"{checkout} is no checkout of sweep: {file} would run in its place")


def run(checkout: Path, inputs: Path, results: Path) -> None:
    """The study with the code of a checkout."""
    words = ["-m", f"+experiment={NAME}", f"results={results.resolve()}", "--config-dir", str(inputs.resolve())]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        done = python(checkout, "-m", "sweep", *words, folder=inputs, cache=cache)
    if done.returncode not in (0, 1):
        refuse(f"the study did not run with {checkout}:\n{done.stdout}")
    if done.returncode == 1:  # some cell is not ok; its status is among what is compared
        print(done.stdout)
    print(f"{checkout}: {len(rows(results))} cells in {time.perf_counter() - started:.0f} s", flush=True)


RENAMED = {"head": "lm_head"}  # keys inside `config` that were renamed since


def rows(results: Path) -> pd.DataFrame:
    """What can be compared of the rows, by cell."""
    found = pd.read_parquet(results / "cells").set_index("cell").sort_index()
    for was, now in RENAMED.items():
        found["config"] = [
            json.dumps(json.loads(c.replace(f'"{was}":', f'"{now}":')), sort_keys=True) for c in found["config"]
        ]
    return found.drop(columns=OF_THE_RUN & set(found.columns))


def known_to_both(one: str, other: str) -> tuple[str, str]:
    """Two configurations of a cell without the settings that one code alone has: at another value than their default they
    would be in its name."""

    def without(settings: object, known: object) -> object:
        if not isinstance(settings, dict) or not isinstance(known, dict):
            return settings
        return {key: without(value, known[key]) for key, value in settings.items() if key in known}

    first, second = json.loads(one), json.loads(other)
    return json.dumps(without(first, second)), json.dumps(without(second, first))


def tables(results: Path, cell: str) -> dict[str, pd.DataFrame]:
    """What can be compared of the tables of a cell, by the name of their folder."""
    folders = [path for path in results.iterdir() if path.is_dir() and path.name not in NOT_COMPARED]
    found = {path.name: path / f"{cell}.parquet" for path in folders}
    return {name: pd.read_parquet(file) for name, file in sorted(found.items()) if file.exists()}


def differences(old: Path, new: Path) -> Iterator[Difference]:
    before, after = rows(old), rows(new)
    for cell in sorted({*before.index} ^ {*after.index}):
        which = before if cell in before.index else after
        yield label(which.loc[cell]), "cell", *where(cell, before.index, after.index)
    for name in sorted({*before.columns} ^ {*after.columns}):
        yield "all", f"column {name}", *where(name, before.columns, after.columns)
    for cell in before.index.intersection(after.index):
        words = label(before.loc[cell])
        one, other = before.loc[[cell]], after.loc[[cell]]
        one["config"], other["config"] = known_to_both(one["config"].item(), other["config"].item())
        for what, was, now in unequal(one, other):
            yield words, what, was, now
        for what, was, now in unequal_tables(tables(old, cell), tables(new, cell)):
            yield words, what, was, now


def unequal_tables(before: dict[str, pd.DataFrame], after: dict[str, pd.DataFrame]) -> Iterator[tuple[str, str, str]]:
    for name in sorted({*before} ^ {*after}):
        yield f"table {name}", *where(name, before, after)
    for name in sorted({*before} & {*after}):
        was, now = before[name], after[name]
        for column in sorted({*was.columns} ^ {*now.columns}):
            yield f"{name}: column {column}", *where(column, was.columns, now.columns)
        if len(was) != len(now):
            yield f"{name}: rows", str(len(was)), str(len(now))
            continue
        for what, first, second in unequal(was, now):
            yield f"{name}: {what}", first, second


def where(name: str, before: Container[str], after: Container[str]) -> tuple[str, str]:
    """In which of the two something stands that one of them lacks."""
    return "there" if name in before else "none", "there" if name in after else "none"


def unequal(before: pd.DataFrame, after: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """The columns that both have and that differ, with the first values that do; frames of equal length."""
    for name in [name for name in before.columns if name in after.columns]:
        was, now = before[name].reset_index(drop=True), after[name].reset_index(drop=True)
        if was.equals(now):  # of equal types, and null where the other is null
            continue
        other = ~((was == now) | (was.isna() & now.isna()))
        if not other.any():
            yield name, f"type {was.dtype}", f"type {now.dtype}"
            continue
        many = f" ({other.sum()} of {len(other)} rows)" if len(other) > 1 else ""
        yield f"{name}{many}", str(was[other].iloc[0]), str(now[other].iloc[0])


def label(row: pd.Series) -> str:
    """The words by which a person recognises a cell; its name tells apart what differs in other settings."""
    criterion = row["criterion"] if isinstance(row["criterion"], str) else ""
    return f"{row['method']} {criterion} {row['sparsity']:g} {row['execution']} {row.name[:8]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether two checkouts of sweep give the same numbers.")
    parser.add_argument("old", type=Path, help="a checkout, or a folder that --keep made")
    parser.add_argument("new", type=Path, help="a checkout")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that keeps OLD's rows")
    asked = parser.parse_args()
    if asked.keep is not None and asked.keep.exists():
        refuse(f"--keep {asked.keep}: there is one already; name a new folder")
    is_kept = (asked.old / "inputs").is_dir() and (asked.old / "results").is_dir()
    for checkout in [asked.new] if is_kept else [asked.old, asked.new]:
        check(checkout)
    with tempfile.TemporaryDirectory() as made:
        kept = asked.old if is_kept else asked.keep or Path(made) / "old"
        old, new = kept / "results", Path(made) / "new"
        if not is_kept:
            make_inputs(kept / "inputs")
            run(asked.old, kept / "inputs", old)
        frame = rows(old)
        if not (frame["status"] == "ok").all():
            refuse(f"not every cell of {asked.old} is ok: nothing can be told by it")
        run(asked.new, kept / "inputs", new)
        found = list(differences(old, new))
    if found:
        shown = [[text if len(text) <= 40 else f"{text[:37]}..." for text in line] for line in found]
        print(tabulate(shown, headers=["cell", "what", "old", "new"], disable_numparse=True))
        print(f"{len(found)} differences; {len(frame)} cells were compared")
        sys.exit(1)
    print(f"the same: {len(frame)} cells, {len(frame.columns)} columns, and their tables")


if __name__ == "__main__":
    main()
