"""What each column of a row means, and which way it points: the source of docs/metrics.md, which is made by
`python -m sweep.store.columns > docs/metrics.md`.

Units are in the names: `_bytes`, `_seconds`, `_ms`, `_joules`; a name without a unit is a count, a fraction or a word.
What has the unit of a cost is better low, and a task's metric points where lm-eval says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable

import pandas as pd
import pyarrow as pa

SCHEMA_VERSION = 1  # raise when a column changes its name, type or meaning; one more column needs no raise

_TEXT, _FLOAT, _INT = pa.string(), pa.float64(), pa.int64()

COLUMNS: dict[str, pa.DataType] = {  # what each is stands in columns.py, of which docs/metrics.md is made
    "cell": _TEXT,
    "status": _TEXT,
    "error": _TEXT,
    "model": _TEXT,
    "method": _TEXT,
    "criterion": _TEXT,
    "sparsity": _FLOAT,
    "sparsity_achieved": _FLOAT,
    "sparsity_units": _FLOAT,
    "sparsity_block_parameters": _FLOAT,
    "sparsity_all_parameters": _FLOAT,
    "seed": _INT,
    "execution": _TEXT,
    "kernel": _TEXT,
    "dtype": _TEXT,
    "device": _TEXT,
    "threads": _INT,
    "parameters": _INT,
    "nonzero_parameters": _INT,
    "weights_bytes": _INT,
    "stored_bytes": _INT,
    "macs_per_token": _INT,
    "nonzero_macs_per_token": _INT,
    "prefill_ms_p50": _FLOAT,
    "decode_ms_per_token_p50": _FLOAT,
    "prefill_speedup": _FLOAT,
    "prefill_speedup_low": _FLOAT,
    "prefill_speedup_high": _FLOAT,
    "decode_speedup": _FLOAT,
    "decode_speedup_low": _FLOAT,
    "decode_speedup_high": _FLOAT,
    "dense_prefill_ms_p50": _FLOAT,
    "dense_decode_ms_per_token_p50": _FLOAT,
    "prefill_ms_mean": _FLOAT,
    "prefill_ms_p90": _FLOAT,
    "prefill_ms_p99": _FLOAT,
    "decode_ms_per_token_mean": _FLOAT,
    "decode_ms_per_token_p90": _FLOAT,
    "decode_ms_per_token_p99": _FLOAT,
    "prefill_control": _FLOAT,
    "prefill_control_low": _FLOAT,
    "prefill_control_high": _FLOAT,
    "decode_control": _FLOAT,
    "decode_control_low": _FLOAT,
    "decode_control_high": _FLOAT,
    "no_measurable_gain": pa.bool_(),
    "timed_repeats": _INT,
    "timing_ended_by": _TEXT,
    "memory_bytes_per_second": _FLOAT,
    "matrix_macs_per_second": _FLOAT,
    "decode_macs_per_byte": _FLOAT,
    "decode_bound": _TEXT,
    "decode_bound_ms": _FLOAT,
    "decode_bound_reached": _FLOAT,
    "energy_joules_per_token": _FLOAT,
    "energy_source": _TEXT,
    "tokens_per_second": _FLOAT,
    "peak_memory_bytes": _INT,
    "base_memory_bytes": _INT,
    "peak_device_memory_bytes": _INT,
    "load_seconds": _FLOAT,
    "prune_seconds": _FLOAT,
    "prune_peak_memory_bytes": _INT,
    "prune_forward_passes": _FLOAT,
    "kv_cache_bytes": _INT,
    "calibration_tokens": _INT,
    "damping": _FLOAT,
    "units_measured": _INT,
    "perplexity_tokens": _INT,
    "perplexity_windows": _INT,
    "perplexity_join": _TEXT,
    "cell_seconds": _FLOAT,
    "waited_seconds": _FLOAT,
    "config": _TEXT,
    "schema_version": _INT,
    "command": _TEXT,
    "started_at": _TEXT,
    "git_commit": _TEXT,
    "packages": _TEXT,
    "python": _TEXT,
    "host": _TEXT,
    "cpu": _TEXT,
    "openmp_wait": _TEXT,
    "gpu": _TEXT,
    "cuda_visible_devices": _TEXT,
    "other_cores_busy": _FLOAT,
    "model_fingerprint": _TEXT,
    "data_fingerprints": _TEXT,
    "measuring_version": _INT,
    "higher_is_better": _TEXT,
}

ASKED, COUNTED, MEASURED, ORIGIN = "what was asked", "counted", "measured", "where it comes from"

MEANINGS: dict[str, tuple[str, str]] = {
    "cell": (ORIGIN, "hash of everything that can change the numbers; also the name of the row's file"),
    "status": (ORIGIN, "`ok`, `failed`, `out_of_memory`, `crashed` or `timeout`; only `ok` rows have numbers"),
    "error": (ORIGIN, "why the cell is not ok: the exception and the end of its traceback"),
    "model": (ASKED, "name of the model"),
    "method": (ASKED, "what is removed: `dense` (nothing), `weight`, `neuron`, `head`, `layer` or `vocab`"),
    "criterion": (ASKED, "the importance score by which it is chosen"),
    "sparsity": (ASKED, "fraction to remove, in [0, 1)"),
    "sparsity_achieved": (
        COUNTED,
        "fraction removed of the weights that the method targets: cut out, or zero and not zero in the dense model",
    ),
    "sparsity_units": (COUNTED, "fraction removed of the units (neurons, heads, layers, vocabulary rows)"),
    "sparsity_block_parameters": (
        COUNTED,
        "fraction removed of the parameters of the blocks, biases and norms included",
    ),
    "sparsity_all_parameters": (COUNTED, "fraction removed of all parameters, embeddings included, a tied matrix once"),
    "seed": (ASKED, "seed of the calibration samples and of random scores; 0 where the method reads neither"),
    "execution": (
        ASKED,
        "how the pruned weights are run: `dense` keeps zeros in full matrices, `shrunk` has smaller ones, `bitmap`, `csr` and `semi_structured` hold the non-zeros alone",
    ),
    "kernel": (ORIGIN, "which kernel ran the pruned matrices, where the execution has several; else null"),
    "dtype": (ASKED, "type of the weights and activations"),
    "device": (ASKED, "where the model ran"),
    "threads": (ASKED, "CPU threads of the cell"),
    "parameters": (COUNTED, "parameters that are held, a tied matrix once"),
    "nonzero_parameters": (COUNTED, "those that are not zero"),
    "weights_bytes": (COUNTED, "bytes of the parameters as held in memory"),
    "stored_bytes": (
        COUNTED,
        "bytes of the tensors that a checkpoint of the model holds, saved or not; its files have a header beside them",
    ),
    "macs_per_token": (
        COUNTED,
        "multiply-accumulates of the linear layers and the head for one token, of experts those that it goes through; routers and attention scores left out",
    ),
    "nonzero_macs_per_token": (COUNTED, "those whose weight is not zero"),
    "prefill_ms_p50": (MEASURED, "median time of the prompt; compare between cells through `prefill_speedup` only"),
    "decode_ms_per_token_p50": (
        MEASURED,
        "median time of one generated token; compare between cells through `decode_speedup` only",
    ),
    "dense_prefill_ms_p50": (MEASURED, "the same for the dense model, timed alternately with this one"),
    "dense_decode_ms_per_token_p50": (MEASURED, "the same for the dense model, timed alternately with this one"),
    **{
        f"{phase}_speedup{end}": (MEASURED, text)
        for phase in ("prefill", "decode")
        for end, text in (
            ("", f"dense time over this model's in {phase}, median over interleaved pairs"),
            (
                "_low",
                "lower end of its 95 % interval (order statistics, no assumption on the distribution; with `efficiency.precision` one of 99 % at each of at most eight looks, so that the last covers 95 %)",
            ),
            ("_high", "upper end of its 95 % interval"),
        )
    },
    **{
        f"{stem}_{end}": (MEASURED, f"{words} of the {what} times")
        for stem, what in (("prefill_ms", "prompt's"), ("decode_ms_per_token", "generated tokens'"))
        for end, words in (("mean", "mean"), ("p90", "90th percentile"), ("p99", "99th percentile"))
    },
    **{
        f"{phase}_control{end}": (MEASURED, text)
        for phase in ("prefill", "decode")
        for end, text in (
            ("", f"dense over dense in {phase}, timed as the speed-up is: what the machine's noise alone gives"),
            ("_low", "lower end of its 95 % interval"),
            ("_high", "upper end of its 95 % interval"),
        )
    },
    "no_measurable_gain": (MEASURED, "true when neither phase is faster than dense beyond the noise"),
    "timed_repeats": (COUNTED, "interleaved pairs that were timed"),
    "timing_ended_by": (
        ORIGIN,
        "what ended the timing: an interval that is narrow enough (`precision`), the `seconds`, or the `repeats`",
    ),
    "memory_bytes_per_second": (MEASURED, "memory bandwidth of the machine, by a short probe"),
    "matrix_macs_per_second": (MEASURED, "matrix rate of the machine, by a short probe"),
    "decode_macs_per_byte": (
        COUNTED,
        "multiply-accumulates a byte that a generated token reads, of experts those that it goes through: arithmetic intensity",
    ),
    "decode_bound": (MEASURED, "what limits a generated token on this machine, `memory` or `compute`"),
    "decode_bound_ms": (MEASURED, "the time below which that limit lets no token be, from the probes"),
    "decode_bound_reached": (MEASURED, "that limit over the measured time: 1 would be at the limit"),
    "kv_cache_bytes": (COUNTED, "bytes of the key-value cache after one prefill and decode"),
    "prune_peak_memory_bytes": (MEASURED, "highest resident memory of the process while it was pruned"),
    "energy_joules_per_token": (
        MEASURED,
        "energy of one generated token by the machine's counters over two seconds of decoding, idling included; null where it has none",
    ),
    "energy_source": (ORIGIN, "the counters that were read: RAPL's `package` and `dram` zones, or `gpu` by NVML"),
    "tokens_per_second": (MEASURED, "generated tokens a second, over the batch"),
    "peak_memory_bytes": (MEASURED, "highest resident memory of the process during one prefill and decode (VmHWM)"),
    "base_memory_bytes": (MEASURED, "resident memory before it"),
    "peak_device_memory_bytes": (MEASURED, "highest memory allocated on the CUDA device during it"),
    "load_seconds": (MEASURED, "loading the model"),
    "prune_forward_passes": (
        COUNTED,
        "how often the calibration text went through the blocks; a pass that resumes in the middle counts as its share",
    ),
    "prune_seconds": (
        MEASURED,
        "calibration, scoring and removal; what the cache held of an earlier measurement, statistics or drops, counts with what it took there",
    ),
    "calibration_tokens": (COUNTED, "tokens of calibration text that were read"),
    "units_measured": (
        COUNTED,
        "units whose drop was measured, where `criterion` is `drop`; with screening not all are",
    ),
    "damping": (MEASURED, "largest amount that was added to a Hessian, as a share of the mean of its diagonal"),
    "perplexity_tokens": (
        COUNTED,
        "tokens of the windows over which the papers' perplexity was taken, the first of each, which is not predicted, included",
    ),
    "perplexity_windows": (COUNTED, "windows over which it was taken"),
    "perplexity_join": (ORIGIN, "how its documents were joined before they were cut into windows"),
    "cell_seconds": (MEASURED, "the whole cell, without what it waited"),
    "waited_seconds": (
        MEASURED,
        "waiting for other cells: for its turn, and for what they made at that moment; in no other column",
    ),
    "config": (ORIGIN, "the resolved configuration, as JSON"),
    "schema_version": (ORIGIN, "version of these columns"),
    "command": (ORIGIN, "command line that runs the cell again"),
    "started_at": (ORIGIN, "time at the start, UTC"),
    "git_commit": (ORIGIN, "commit of sweep's checkout, marked when it has changes"),
    "packages": (ORIGIN, "versions of the packages that matter"),
    "python": (ORIGIN, "version of Python"),
    "host": (ORIGIN, "name of the machine"),
    "cpu": (ORIGIN, "model of the processor"),
    "openmp_wait": (ORIGIN, "how idle threads of the cell wait for work: the environment variables that say so"),
    "gpu": (ORIGIN, "model of the GPU"),
    "cuda_visible_devices": (ORIGIN, "which GPU the cell was given"),
    "other_cores_busy": (
        MEASURED,
        "cores that other processes kept busy meanwhile, on average: high means that timings are contended",
    ),
    "model_fingerprint": (ORIGIN, "hash of the model's file, or its revision"),
    "data_fingerprints": (ORIGIN, "hashes of the texts that were read, as JSON"),
    "measuring_version": (
        ORIGIN,
        "version of the measuring code: rows of different versions are never averaged or compared",
    ),
    "higher_is_better": (ORIGIN, "what lm-eval says of its metrics, `{column: true or false}` as JSON"),
}

_COSTS = {"bytes", "seconds", "milliseconds", "joules", "MACs", "parameters", "passes"}  # units that are better low

OURS: dict[str, bool] = {  # our own metrics of a task, and whether higher is better
    "token_perplexity": False,
    "kl_from_dense": False,
    "loss": False,
    "loss_band": False,
    "word_loss_band": False,
    "perplexity_band": False,
    "acc_band": True,
    "removed_share_band": False,
    "told": True,
    "log_likelihood": True,
    "precision": True,
    "recall": True,
    "f1": True,
    "precision_macro": True,
    "recall_macro": True,
    "f1_macro": True,
    "precision_weighted": True,
    "recall_weighted": True,
    "f1_weighted": True,
    "matthews": True,
    "calibration_error": False,
}
# Of rows from before lm-eval's word was kept: its metrics of which lower is better, by their exact names.
LM_EVAL_LOSSES = {
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "brier_score",
    "ter",
    "wer",
    "likelihood_diff",
    "difference_male_female",
    "pct_female_preferred",
    "pct_male_preferred",
    "pct_stereotype",
    "pct_invalid",
    "perspective_api_toxicity_score",
    "bias_score_ambig",
    "bias_score_disambig",
    "age_bias",
    "asian_bias",
    "black_bias",
    "female_bias",
    "hispanic_bias",
    "native_american_bias",
    "non_binary_bias",
    *(
        f"{which}_bias_score{of}"
        for which in ("amb", "disamb")
        for of in (
            "",
            "_Age",
            "_Disability_status",
            "_Gender_identity",
            "_Nationality",
            "_Physical_appearance",
            "_Race_ethnicity",
            "_Race_x_SES",
            "_Race_x_gender",
            "_Religion",
            "_SES",
            "_Sexual_orientation",
        )
    ),
}

_FIRST = ("acc", "f1", "exact_match", "token_perplexity", "word_perplexity", "perplexity")

_HEADER = """# Columns of a row

Made from the schema by `python -m sweep.store.columns > docs/metrics.md`; a test fails when it is stale.

A column is null where nothing was measured, never zero. **Counted** follows from the shapes and values of the tensors and
is the same on every machine. **Measured** was timed or read from the system, and belongs to the machine in the row.
"""

_TASKS = """
## Task metrics

After these come two columns for each metric of each task, `task/metric` and `task/metric_stderr`, as lm-eval reports
them, and for tasks that score whole texts `task/token_perplexity`: exp of the mean negative log-likelihood a token.
In what is ours (that one, `log_likelihood` in `samples`, bands, `kl_from_dense`, the papers' perplexity) no special token
is told and no BOS is read twice. lm-eval's own metrics stay lm-eval's, which begins a whole text with a second BOS where
the tokenizer adds one, and has the tokenizer's told.

A token that the vocabulary has lost costs what it takes to tell it, in every number: the probability of the unknown token
that stands for it is shared equally by all the tokens that it stands for, and a word with such a token is never told.
Where a task filters answers by a named filter, the filter is part of the metric's name, in columns, in `samples` and in
every option: `gsm8k/exact_match,strict-match` and `gsm8k/exact_match,flexible-extract`.

By how rare a word is (Zipf frequency from wordfreq: `zipf5up`, `zipf4to5`, `zipf3to4`, `zipf0to3`, and `no_word` for
tokens without letters), for each band B: `task/loss_band_B` (nats a token) with `_stderr`, `task/perplexity_band_B`,
`task/word_loss_band_B`, `task/acc_band_B`, `task/tokens_band_B`; and of the embedding `embedding/row_norm_band_B` and
`embedding/share_pruned_band_B`.

## Made when rows are read

| column | unit | what it is |
|---|---|---|
| `decode_ms_paired`, `prefill_ms_paired` | milliseconds | the dense model's median over all cells of the setting, divided by the cell's paired speed-up: the latency that can be compared between cells |
| `counted_speedup` | ratio | the dense model's MACs over this one's non-zero MACs: what counting promises |
| `variant`, `setting` | words | knobs of the method, and of the measurement, that vary between the rows |
| `version`, `machine` | words | the measuring version, and processor and GPU, where they vary between the rows |
"""


def unit(column: str) -> str:
    """The unit of a column, read from its name."""
    for ending, name in (
        ("_bytes", "bytes"),
        ("_seconds", "seconds"),
        ("_joules", "joules"),
        ("joules_per_token", "joules"),
        ("tokens", "tokens"),
        ("passes", "passes"),
        ("parameters", "parameters"),
        ("speedup", "ratio"),
        ("macs_per_token", "MACs"),
        ("control", "ratio"),
        ("bytes_per_second", "bytes/second"),
        ("macs_per_second", "MACs/second"),
        ("macs_per_byte", "MACs/byte"),
        ("bound_reached", "ratio"),
    ):
        if column.startswith("sparsity"):
            return "fraction"
        if column.removesuffix("_low").removesuffix("_high").endswith(ending):
            return name
    return "milliseconds" if "_ms_" in column or column.endswith("_ms") else ""


def is_measured(column: str) -> bool:
    """Whether a column was timed or read from the system, and so belongs to the machine in the row."""
    kind, _ = MEANINGS.get(column, (MEASURED if re.fullmatch(r"\w+_ms_paired(_low|_high)?", column) else COUNTED, ""))
    return kind == MEASURED


def metric(column: str) -> str:
    """The metric in a task's column, without the answer filter: `exact_match` of `gsm8k/exact_match,strict-match`."""
    return column.rpartition("/")[2].partition(",")[0]


def stderr(column: str) -> str:
    """The column with the standard error of a metric: `gsm8k/exact_match_stderr,strict-match`."""
    task, slash, name = column.rpartition("/")
    plain, comma, answer_filter = name.partition(",")
    return f"{task}{slash}{plain}_stderr{comma}{answer_filter}"


def metrics(names: Iterable[str]) -> list[str]:
    """The task metrics among the names of columns, without their standard errors."""
    return [name for name in names if "/" in name and not metric(name).endswith("_stderr")]


def main_metrics(names: Iterable[str]) -> list[str]:
    """Of each task, the metric that a person reads first, under each of its answer filters.

    An accuracy or F1 where a task has one, else its perplexity a token, else the first that lm-eval reports of it.
    """
    by_task: dict[str, dict[str, list[str]]] = {}
    for name in metrics(names):
        by_task.setdefault(name.partition("/")[0], {}).setdefault(metric(name), []).append(name)
    chosen: list[str] = []
    for found in by_task.values():
        theirs = [name for name in found if "_band_" not in name and name not in OURS]
        first = next((name for name in (*_FIRST, *theirs) if name in found), None)
        chosen += found[first] if first else []
    return chosen


def is_logarithm(column: str) -> bool:
    """Whether it is the logarithm of a column that scatters evenly about its mean, as a loss does: of perplexities."""
    return metric(column).endswith("perplexity")


def is_loss(column: str, rows: pd.DataFrame | None = None) -> bool:
    """Whether lower is better.

    rows  that hold the column: what lm-eval said of a task's metric stands in them. Of a metric that they say nothing
          of, which is one of ours or comes from an older row, the metric's exact name decides; a task's name never does.
    """
    if "/" not in column:
        return unit(column) in _COSTS
    told = rows["higher_is_better"].dropna().unique() if rows is not None and "higher_is_better" in rows else ()
    said = [better[column] for better in map(json.loads, told) if column in better]
    if said:
        return not said[-1]
    name = metric(column)
    ours = OURS.get(re.sub(r"_band_\w+$", "_band", name))
    return name in LM_EVAL_LOSSES if ours is None else not ours


def markdown() -> str:
    """docs/metrics.md. Raises KeyError for a column of the schema that has no meaning here."""
    lines = ["| column | kind | unit | what it is |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {MEANINGS[name][0]} | {unit(name)} | {MEANINGS[name][1]} |" for name in COLUMNS]
    return _HEADER + "\n" + "\n".join(lines) + "\n" + _TASKS


if __name__ == "__main__":
    sys.stdout.write(markdown())
