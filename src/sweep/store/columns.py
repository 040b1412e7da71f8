"""The columns of a row: one record each, of which the schema, docs/metrics.md and the axes of figures are made.

    python -m sweep.store.columns > docs/metrics.md

A task's metrics have columns as well, whose records are those of sweep.metrics.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa

from sweep import config, metrics
from sweep.metrics import HIGH, LOW

SCHEMA_VERSION = 1  # raise when a column changes its name, type or meaning; one more column needs no raise

ASKED, COUNTED, MEASURED, ORIGIN = "what was asked", "counted", "measured", "where it comes from"
_TEXT, _FLOAT, _INT, _BOOL = pa.string(), pa.float64(), pa.int64(), pa.bool_()
_SHOWN = {
    "bytes": ("MB", 1e6),
    "MACs": ("millions", 1e6),
    "share": ("%", 0.01),
}  # units in which axes and tables show what has these
_ENDINGS = {"_bytes": "bytes", "_seconds": "seconds", "_ms": "milliseconds", "_joules": "joules"}  # of names: costs
_ENDS = ("_low", "_high")  # of the columns beside one, with the ends of its 95 % interval


@dataclass(frozen=True)
class Column:
    """What is known of a column. A name without a unit is a count, a fraction or a word."""

    name: str
    type: pa.DataType
    kind: str
    meaning: str
    unit: str = ""
    better: str | None = None  # LOW, HIGH, or None for what only describes
    label: str | None = None  # on an axis, in the unit in which it is shown; else made of the name
    short: str | None = None  # what is typed after --x


def _by_name(*columns: Column) -> dict[str, Column]:
    return {column.name: column for column in columns}


def _speedup(phase: str) -> list[Column]:
    return _with_ends(
        Column(
            f"{phase}_speedup",
            _FLOAT,
            MEASURED,
            f"dense time over this model's in {phase}, median over interleaved pairs",
            unit="ratio",
            better=HIGH,
        ),
        "lower end of its 95 % interval (order statistics, no assumption on the distribution; with "
        "`efficiency.precision` one of 99 % at each of at most eight looks, so that the last covers 95 %)",
    )


def _control(phase: str) -> list[Column]:
    noise = f"dense over dense in {phase}, timed as the speed-up is: what the machine's noise alone gives"
    return _with_ends(Column(f"{phase}_control", _FLOAT, MEASURED, noise, unit="ratio"))


def _with_ends(column: Column, low: str = "lower end of its 95 % interval") -> list[Column]:
    meanings = low, "upper end of its 95 % interval"
    ends = [
        dataclasses.replace(column, name=column.name + end, meaning=meaning, label=None, short=None)
        for end, meaning in zip(_ENDS, meanings, strict=True)
    ]
    return [column, *ends]


def _cost(stage: str) -> list[Column]:
    return [
        Column(
            f"{stage}_seconds",
            _FLOAT,
            MEASURED,
            "the whole stage, calibration included; what the cache held of an earlier measurement, statistics or drops, counts with what it took there",
            unit="seconds",
            better=LOW,
        ),
        Column(
            f"{stage}_peak_memory_bytes",
            _INT,
            MEASURED,
            "highest resident memory of the process during the stage",
            unit="bytes",
            better=LOW,
        ),
        Column(
            f"{stage}_forward_passes",
            _FLOAT,
            COUNTED,
            "how often the calibration text went through the blocks; a pass that resumes in the middle counts as its share",
            unit="passes",
            better=LOW,
        ),
    ]


def _cpu_seconds(stage: str) -> Column:
    meaning = f"CPU time of the process over what `{stage}_seconds` counts, all threads together: less moved by what else a machine does"
    return Column(f"{stage}_cpu_seconds", _FLOAT, MEASURED, meaning, unit="seconds", better=LOW)


def _statistics(stem: str, times: str) -> list[Column]:
    return [
        Column(f"{stem}_{name}", _FLOAT, MEASURED, f"{words} of the {times} times", unit="milliseconds", better=LOW)
        for name, words in (("mean", "mean"), ("p90", "90th percentile"), ("p99", "99th percentile"))
    ]


COLUMNS = _by_name(  # of the schema, in its order
    Column("cell", _TEXT, ORIGIN, "hash of everything that can change the numbers; also the name of the row's file"),
    Column(
        "status", _TEXT, ORIGIN, "`ok`, `failed`, `out_of_memory`, `crashed` or `timeout`; only `ok` rows have numbers"
    ),
    Column("error", _TEXT, ORIGIN, "why the cell is not ok: the exception and the end of its traceback"),
    Column("model", _TEXT, ASKED, "name of the model"),
    Column(
        "method",
        _TEXT,
        ASKED,
        "what is removed: `dense` (nothing), `weight`, `neuron`, `head`, `layer`, `expert` or `vocab`",
    ),
    Column("criterion", _TEXT, ASKED, "the importance score by which it is chosen"),
    Column(
        "sparsity",
        _FLOAT,
        ASKED,
        "fraction to remove, in [0, 1)",
        unit="fraction",
        label="sparsity requested (fraction removed)",
        short="sparsity",
    ),
    Column(
        "sparsity_achieved",
        _FLOAT,
        COUNTED,
        "fraction removed of the weights that the method targets: cut out, or zero and not zero in the dense model",
        unit="fraction",
    ),
    Column(
        "sparsity_units",
        _FLOAT,
        COUNTED,
        "fraction removed of the units (neurons, heads, layers, experts, vocabulary rows)",
        unit="fraction",
    ),
    Column(
        "sparsity_block_parameters",
        _FLOAT,
        COUNTED,
        "fraction removed of the parameters of the blocks, biases and norms included",
        unit="fraction",
    ),
    Column(
        "sparsity_all_parameters",
        _FLOAT,
        COUNTED,
        "fraction removed of all parameters, embeddings included, a tied matrix once",
        unit="fraction",
    ),
    Column(
        "seed", _INT, ASKED, "seed of the calibration samples and of random scores; 0 where the method reads neither"
    ),
    Column(
        "execution",
        _TEXT,
        ASKED,
        "how the pruned matrices are held and multiplied: `dense` keeps zeros in full ones, `shrunk` has smaller ones; README.md tells of the others",
    ),
    Column("kernel", _TEXT, ORIGIN, "which kernel ran the pruned matrices, where the execution has several; else null"),
    Column("dtype", _TEXT, ASKED, "type of the weights and activations"),
    Column("device", _TEXT, ASKED, "where the model ran"),
    Column("threads", _INT, ASKED, "CPU threads of the cell"),
    Column("parameters", _INT, COUNTED, "parameters that are held, a tied matrix once", unit="parameters", better=LOW),
    Column("nonzero_parameters", _INT, COUNTED, "those that are not zero", unit="parameters", better=LOW),
    Column(
        "weights_bytes",
        _INT,
        COUNTED,
        "bytes of the parameters as held in memory",
        unit="bytes",
        better=LOW,
        label="weights in memory (MB)",
        short="weights",
    ),
    Column(
        "stored_bytes",
        _INT,
        COUNTED,
        "bytes of the tensors that a checkpoint holds of the model as it ran, saved or not; its files have a header beside them",
        unit="bytes",
        better=LOW,
        label="stored weights (MB)",
        short="stored",
    ),
    Column(
        "macs_per_token",
        _INT,
        COUNTED,
        "multiply-accumulates of the linear layers and the head for one token, of experts those that it goes through; routers and attention scores left out",
        unit="MACs",
        better=LOW,
        label="MACs per token (millions, counted)",
    ),
    Column(
        "nonzero_macs_per_token",
        _INT,
        COUNTED,
        "those whose weight is not zero",
        unit="MACs",
        better=LOW,
        label="non-zero MACs per token (millions, counted)",
        short="macs",
    ),
    Column(
        "prefill_ms_p50",
        _FLOAT,
        MEASURED,
        "median time of the prompt; compare between cells through `prefill_speedup` only",
        unit="milliseconds",
        better=LOW,
    ),
    Column(
        "decode_ms_per_token_p50",
        _FLOAT,
        MEASURED,
        "median time of one generated token; compare between cells through `decode_speedup` only",
        unit="milliseconds",
        better=LOW,
    ),
    *_speedup("prefill"),
    *_speedup("decode"),
    Column(
        "dense_prefill_ms_p50",
        _FLOAT,
        MEASURED,
        "the same for the dense model, timed alternately with this one",
        unit="milliseconds",
        better=LOW,
    ),
    Column(
        "dense_decode_ms_per_token_p50",
        _FLOAT,
        MEASURED,
        "the same for the dense model, timed alternately with this one",
        unit="milliseconds",
        better=LOW,
    ),
    *_statistics("prefill_ms", "prompt's"),
    *_statistics("decode_ms_per_token", "generated tokens'"),
    *_control("prefill"),
    *_control("decode"),
    Column("no_measurable_gain", _BOOL, MEASURED, "true when neither phase is faster than dense beyond the noise"),
    Column("timed_repeats", _INT, COUNTED, "interleaved pairs that were timed"),
    Column(
        "timing_ended_by",
        _TEXT,
        ORIGIN,
        "what ended the timing: an interval that is narrow enough (`precision`), the `seconds`, or the `repeats`",
    ),
    Column(
        "memory_bytes_per_second",
        _FLOAT,
        MEASURED,
        "memory bandwidth of the machine, by a short probe",
        unit="bytes/second",
        better=HIGH,
    ),
    Column(
        "matrix_macs_per_second",
        _FLOAT,
        MEASURED,
        "matrix rate of the machine, by a short probe",
        unit="MACs/second",
        better=HIGH,
    ),
    Column(
        "decode_macs_per_byte",
        _FLOAT,
        COUNTED,
        "multiply-accumulates a byte that a generated token reads, of experts those that it goes through: arithmetic intensity",
        unit="MACs/byte",
    ),
    Column("decode_bound", _TEXT, MEASURED, "what limits a generated token on this machine, `memory` or `compute`"),
    Column(
        "decode_bound_ms",
        _FLOAT,
        MEASURED,
        "the time below which that limit lets no token be, from the probes",
        unit="milliseconds",
        better=LOW,
    ),
    Column(
        "decode_bound_reached",
        _FLOAT,
        MEASURED,
        "that limit over the measured time: 1 would be at the limit",
        unit="ratio",
    ),
    Column(
        "energy_joules_per_token",
        _FLOAT,
        MEASURED,
        "energy of one generated token by the machine's counters over two seconds of decoding, idling included; null where it has none",
        unit="joules",
        better=LOW,
        label="energy (J per token)",
        short="energy",
    ),
    Column(
        "energy_source",
        _TEXT,
        ORIGIN,
        "the counters that were read: RAPL's `package` and `dram` zones, or `gpu` by NVML",
    ),
    Column(
        "tokens_per_second",
        _FLOAT,
        MEASURED,
        "generated tokens a second, over the batch",
        unit="tokens/second",
        better=HIGH,
    ),
    Column(
        "peak_memory_bytes",
        _INT,
        MEASURED,
        "highest resident memory of the process during one prefill and decode (VmHWM)",
        unit="bytes",
        better=LOW,
        label="peak resident memory (MB)",
        short="memory",
    ),
    Column("base_memory_bytes", _INT, MEASURED, "resident memory before it", unit="bytes", better=LOW),
    Column(
        "peak_device_memory_bytes",
        _INT,
        MEASURED,
        "highest memory allocated on the CUDA device during it",
        unit="bytes",
        better=LOW,
        label="peak device memory (MB)",
        short="device_memory",
    ),
    Column("load_seconds", _FLOAT, MEASURED, "loading the model", unit="seconds", better=LOW),
    *(column for stage in config.STAGES for column in _cost(stage.name)),
    Column(
        "kv_cache_bytes",
        _INT,
        COUNTED,
        "bytes of the key-value cache after one prefill and decode",
        unit="bytes",
        better=LOW,
    ),
    Column("calibration_tokens", _INT, COUNTED, "tokens of calibration text that were read", unit="tokens"),
    Column(
        "damping",
        _FLOAT,
        MEASURED,
        "largest amount that was added to a Hessian, as a share of the mean of its diagonal",
    ),
    Column(
        "units_measured",
        _INT,
        COUNTED,
        "units whose drop was measured, where `criterion` is `drop`; with screening not all are",
    ),
    Column(
        "perplexity_tokens",
        _INT,
        COUNTED,
        "tokens of the windows over which the papers' perplexity was taken, the first of each, which is not predicted, included",
        unit="tokens",
    ),
    Column("perplexity_windows", _INT, COUNTED, "windows over which it was taken"),
    Column("perplexity_join", _TEXT, ORIGIN, "how its documents were joined before they were cut into windows"),
    Column("cell_seconds", _FLOAT, MEASURED, "the whole cell, without what it waited", unit="seconds", better=LOW),
    Column(
        "waited_seconds",
        _FLOAT,
        MEASURED,
        "waiting for other cells: for its turn, and for what they made at that moment; in no other column",
        unit="seconds",
        better=LOW,
    ),
    Column("config", _TEXT, ORIGIN, "the resolved configuration, as JSON"),
    Column("schema_version", _INT, ORIGIN, "version of these columns"),
    Column("command", _TEXT, ORIGIN, "command line that runs the cell again"),
    Column("started_at", _TEXT, ORIGIN, "time at the start, UTC"),
    Column("git_commit", _TEXT, ORIGIN, "commit of sweep's checkout, marked when it has changes"),
    Column("packages", _TEXT, ORIGIN, "versions of the packages that matter"),
    Column("python", _TEXT, ORIGIN, "version of Python"),
    Column("host", _TEXT, ORIGIN, "name of the machine"),
    Column("cpu", _TEXT, ORIGIN, "model of the processor"),
    Column(
        "openmp_wait",
        _TEXT,
        ORIGIN,
        "how idle threads of the cell wait for work: the environment variables that say so",
    ),
    Column("gpu", _TEXT, ORIGIN, "model of the GPU"),
    Column("cuda_visible_devices", _TEXT, ORIGIN, "which GPU the cell was given"),
    Column(
        "other_cores_busy",
        _FLOAT,
        MEASURED,
        "cores that other processes kept busy meanwhile, on average: high means that timings are contended",
    ),
    Column("model_fingerprint", _TEXT, ORIGIN, "hash of the model's file, or its revision"),
    Column("data_fingerprints", _TEXT, ORIGIN, "hashes of the texts that were read, as JSON"),
    Column(
        "measuring_version",
        _INT,
        ORIGIN,
        "version of the measuring code: rows of different versions are never averaged or compared",
    ),
    Column("higher_is_better", _TEXT, ORIGIN, "what lm-eval says of its metrics, `{column: true or false}` as JSON"),
    Column(
        "stage_versions",
        _TEXT,
        ORIGIN,
        "versions of the stages that changed the model, from 2 on, `{stage: version}` as JSON: other versions are other "
        "cells, which are never averaged",
    ),
    Column(
        "quantize", _TEXT, ASKED, "the form that weights were quantised to after pruning; `none` where they were not"
    ),
    Column("quantize_method", _TEXT, ASKED, "how: `rtn` (to the nearest) or `gptq` (what rounding loses is made good)"),
    Column(
        "quantize_damping",
        _FLOAT,
        MEASURED,
        "the largest damping of a Hessian when weights were quantised, as `damping`",
    ),
    Column(
        "bits_per_weight",
        _FLOAT,
        COUNTED,
        "bits that a weight of the blocks' matrices takes in the smallest of these: as it is, as the code and its share of "
        "a scale, and with one bit a weight and the non-zeros alone; whatever form runs it",
        unit="bits",
        better=LOW,
        label="bits a weight (counted)",
        short="bits",
    ),
    Column(
        "coded_bytes",
        _INT,
        COUNTED,
        "bytes of all parameters with the matrices so: what the same model would take in a form that fits, for frontiers "
        "at equal bytes",
        unit="bytes",
        better=LOW,
        label="weights as coded (MB, counted)",
        short="coded",
    ),
    Column(
        "active_parameters",
        _INT,
        COUNTED,
        "parameters that one token meets: of experts those that it takes, and all others; `parameters` has them all",
        unit="parameters",
        better=LOW,
        label="active parameters (counted)",
        short="active",
    ),
    Column(
        "experts_unreached",
        _INT,
        COUNTED,
        "experts of the pruned blocks that no calibration token took, so that their scores say nothing",
    ),
    Column(
        "engine",
        _TEXT,
        ORIGIN,
        "what ran the models while they were timed: `eager`, as transformers does, or `compiled`, with a cache of fixed size",
    ),
    Column("engine_fallback", _TEXT, ORIGIN, "why it was not the engine that efficiency.engine asked for; else null"),
    Column(
        "evaluated_by",
        _TEXT,
        ORIGIN,
        "how the model read what was scored: `batches`, each from end to end, or all `blocks` one after the other, so that "
        "weights that do not lie in memory are read once a benchmark; the numbers are the same",
    ),
    Column(
        "evaluated_by_fallback", _TEXT, ORIGIN, "why it was not by blocks where weights do not lie in memory; else null"
    ),
    Column("recovery", _TEXT, ASKED, "how what pruning has left was trained after it; `none` where it was not"),
    Column("recovery_tokens", _INT, COUNTED, "tokens that recovery read, each as often as it was read"),
    Column("recovery_steps", _INT, COUNTED, "steps of recovery: of the optimiser, or of the solver over all matrices"),
    Column("recovery_trained", _TEXT, COUNTED, "what recovery trained, such as `matrices`"),
    Column(
        "recovery_loss_before",
        _FLOAT,
        COUNTED,
        "loss on a text that recovery did not train on, before it",
        unit="nats",
    ),
    Column("recovery_loss_after", _FLOAT, COUNTED, "the same loss after it", unit="nats"),
    Column(
        "draft_speedup",
        _FLOAT,
        MEASURED,
        "what this model would gain the dense one as its draft, at the best number of drafted tokens: theorem 3.8 of "
        "arXiv:2211.17192 from `pydoc/draft_acceptance` and `decode_speedup`, which takes it that reading the draft costs "
        "the dense model one token; 1 where no draft pays",
        unit="ratio",
        better=HIGH,
        label="speed-up as a draft (expected)",
        short="draft",
    ),
    Column("draft_length", _INT, MEASURED, "that number; 0 where none pays", unit="tokens"),
    *(_cpu_seconds(name) for name in (*(stage.name for stage in config.STAGES), "calibration")),
    Column(
        "calibration_seconds",
        _FLOAT,
        MEASURED,
        "having the texts that the stages read: tokenising them, or the model's writing them; what the cache held of that counts with what it took there",
        unit="seconds",
        better=LOW,
    ),
    *(
        Column(
            f"{stage}_sources",
            _TEXT,
            ORIGIN,
            f"the sources of the {what}, `[{{source, fingerprint, tokens}}]` as JSON: of a text that exists the fingerprint of all of it, "
            "of what is made that of the tokens, and how many tokens were drawn",
        )
        for stage, what in (("calibration", "calibration text"), ("recovery", "text that recovery reads"))
    ),
    Column(
        "loads_in",
        _TEXT,
        COUNTED,
        "what loads the checkpoint that `save_model` writes of it, by rules: transformers, sweep, llama.cpp (by `python -m "
        "sweep.export gguf`), vLLM; none where no checkpoint holds its form",
    ),
)
MADE = _by_name(
    *_with_ends(
        Column(
            "decode_ms_paired",
            _FLOAT,
            MEASURED,
            "the dense model's median over all cells of the setting, divided by the cell's paired speed-up: the latency "
            "that can be compared between cells",
            unit="milliseconds",
            better=LOW,
            label="decode latency (ms per token)",
            short="latency",
        )
    ),
    *_with_ends(
        Column(
            "prefill_ms_paired",
            _FLOAT,
            MEASURED,
            "the same for the prompt",
            unit="milliseconds",
            better=LOW,
            label="prefill latency (ms)",
            short="prefill",
        )
    ),
    Column(
        "counted_speedup",
        _FLOAT,
        COUNTED,
        "the dense model's MACs over this one's non-zero MACs: what counting promises",
        unit="ratio",
        better=HIGH,
    ),
    Column(
        "quality_kept",
        _FLOAT,
        COUNTED,
        "the mean over benchmarks of what is left between guessing (0) and the dense model (1); of losses the dense model's "
        "over this one's",
        unit="share",
        better=HIGH,
        label="quality kept (%)",
        short="kept",
    ),
    Column(
        "baseline",
        _BOOL,
        ASKED,
        "whether the row is of the dense model, which no stage has changed: what the others are compared with",
    ),
    Column(
        "variant",
        _TEXT,
        ASKED,
        "settings of the recipe that vary between the rows of one method, criterion and what follows them",
    ),
    Column("setting", _TEXT, ASKED, "settings of the measurement that vary between the rows"),
    Column("version", _TEXT, ORIGIN, "the measuring version, where it varies between the rows"),
    Column("machine", _TEXT, ORIGIN, "processor and GPU, where they vary between the rows"),
)

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

Ours are the following, beside those that lm-eval has of a task. `{band}` is how rare a word is, by its Zipf frequency
from wordfreq: `zipf5up`, `zipf4to5`, `zipf3to4`, `zipf0to3`, and `no_word` for tokens without letters.
`{range}` is where in a text a token stands: `0to128` is what is told from 1 to 128 tokens before it.
"""
_READ = """
## Made when rows are read
"""


def record(column: str) -> Column | None:
    """The record of a column that is no task's.

    One of the reader's own has the unit in which its name ends, as all names here do, and None without one.
    """
    if column in COLUMNS or column in MADE:
        return COLUMNS.get(column) or MADE[column]
    unit = next((unit for ending, unit in _ENDINGS.items() if column.endswith(ending)), None)
    return Column(column, _FLOAT, COUNTED, "a column of the reader's own", unit=unit, better=LOW) if unit else None


def is_measured(column: str) -> bool:
    """Whether a column was timed or read from the system, and so belongs to the machine in the row."""
    if "/" in column:
        of_task = metrics.record(re.sub("_stderr(?=,|$)", "", column))
        return of_task is not None and of_task.measured
    known = record(column)
    return known is not None and known.kind == MEASURED


def is_loss(column: str, rows: pd.DataFrame | None = None) -> bool:
    """Whether lower is better.

    rows  that hold the column: what lm-eval said of a task's metric stands in them. Of a metric that they say nothing
          of, which is one of ours or comes from an older row, the metric's exact name decides; a task's name never does.
    """
    if "/" not in column:
        known = record(column)
        return known is not None and known.better == LOW
    told = rows["higher_is_better"].dropna().unique() if rows is not None and "higher_is_better" in rows else ()
    said = [better[column] for better in map(json.loads, told) if column in better]
    return not said[-1] if said else metrics.is_loss(column)


def label(column: str) -> str:
    """What an axis is called, with its unit."""
    task, slash, metric = column.partition("/")
    if slash:
        return f"{metrics.label(metric)}, {metrics.title(task)}"
    known = record(column)
    if known is not None and known.label is not None:
        return known.label
    words = column.replace("_", " ")
    if known is None or known.unit not in _SHOWN:
        return words
    return f"{words.removesuffix(' bytes')} ({_SHOWN[known.unit][0]})"


def scale(column: str) -> float:
    """What a column is divided by to be in the unit of its label."""
    known = record(column)
    return _SHOWN[known.unit][1] if known is not None and known.unit in _SHOWN else 1.0


def markdown() -> str:
    """docs/metrics.md."""
    return "\n".join(
        [
            _HEADER,
            *_table(["column", "kind", "unit", "better", "what it is"], map(_line, COLUMNS.values())),
            _TASKS,
            *_table(
                ["metric", "better", "unit", "what it is"],
                ([f"`{m.name}`", m.better or "", m.unit, m.meaning] for m in metrics.METRICS if m.meaning),
            ),
            _READ,
            *_table(["column", "kind", "unit", "better", "what it is"], map(_line, MADE.values())),
            "",
        ]
    )


def _line(column: Column) -> list[str]:
    return [f"`{column.name}`", column.kind, column.unit, column.better or "", column.meaning]


def _table(header: list[str], lines: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]


if __name__ == "__main__":
    sys.stdout.write(markdown())
