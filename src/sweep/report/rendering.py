"""`python -m sweep.report results`: figures, tables, a page to explore and answers in words, from the rows alone."""

from __future__ import annotations

import argparse
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sweep import config, messages, store
from sweep.metrics import main_metrics, task_metrics
from sweep.report import advice, frontier, page, paired, plot, published, summary, variants
from sweep.report.evidence import Evidence
from sweep.settings import RequestError, byte_size, did_you_mean
from sweep.store import columns

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_STAGES = [stage.column for stage in config.STAGES]
_RECIPE = (*_STAGES, "criterion", "sparsity", "seed", "execution")  # what was done to a model, by columns
_DEFAULT_COSTS = ("latency", "memory", "stored", "macs", "energy")
_MARKS = "Bold: the best at its sparsity. ~: within noise of it."
_SAMPLED = 500  # more cells than this, and their tables are not read


@dataclass(frozen=True)
class Wanted:
    """What a report shows; every field is a flag of the command line."""

    x: tuple[str, ...] = ()  # costs, also several in one text; empty = every one that the rows hold
    y: tuple[str, ...] = ()  # metrics, likewise; empty = the main one of each task
    filters: tuple[str, ...] = ()
    facet: str | None = None
    width: str = "column"
    max_drop: str = "2%"
    max_ms: float | None = None
    max_bytes: int | None = None
    html: bool = True
    formats: tuple[str, ...] = plot.FORMATS  # of the figures


def read(results: Sequence[str]) -> pd.DataFrame:
    """The rows of one or several results folders, each cell once.

    Of a cell that several folders hold, a row that is ok is kept, and of two such the newer one.
    Raises RequestError when a folder has no rows.
    """
    frames = []
    for folder in results:
        try:
            frames.append(store.load(folder))
        except FileNotFoundError as error:
            example = "python -m sweep +method=weight sparsity=0.1,0.3,0.5 -m"
            raise RequestError(f"{error}, or run one first, such as: {example}") from error
    if len(frames) == 1:
        return frames[0]
    rows = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    rows = rows.assign(_ok=rows.status == "ok").sort_values(["_ok", "started_at"], kind="stable")
    return rows.drop_duplicates("cell", keep="last").drop(columns="_ok").reset_index(drop=True)


def select(rows: pd.DataFrame, filters: Iterable[str]) -> pd.DataFrame:
    """The rows that meet every filter: `method=weight,neuron`, `sparsity<=0.5`, `criterion!=random`.

    Dense rows meet every filter on what was pruned and how: without them nothing can be compared.
    Raises RequestError for an unknown column, a filter that is none, or when no row is left.
    """
    for words in filters:
        match = re.fullmatch(r"\s*(.+?)\s*(!=|<=|>=|=|<|>)\s*(.+?)\s*", words)
        if match is None:
            raise RequestError(f"--filter {words!r} must be COLUMN=VALUE[,VALUE], or use !=, <, <=, > or >=")
        name, sign, value = match.groups()
        column = _column(rows, name, "--filter")
        meets = pd.Series(sign == "!=", index=rows.index)
        for choice in value.split(","):
            wanted = _typed(rows[column], choice, words)
            one = _OPERATORS[sign](rows[column], wanted)
            if column == "model" and sign in ("=", "!="):  # it may go by another name elsewhere
                one = variants.is_called(rows, choice) == (sign == "=")
            meets = meets & one if sign == "!=" else meets | one
        if column in (*_RECIPE, "sparsity_achieved"):
            meets |= variants.is_baseline(rows)
        rows = rows[meets]
        if variants.is_baseline(rows).all():
            raise RequestError(f"--filter {words!r} leaves no pruned row")
    return rows


def report(results: Sequence[str], out: Path, wanted: Wanted | None = None) -> list[Path]:
    """Write every figure, table and the page that the rows allow into `out`; returns the files.

    Raises RequestError when there are no rows to report, or for a column that they lack.
    """
    wanted = wanted or Wanted()
    rows = select(read(results), wanted.filters)
    ok, left_out = frontier.newest(rows[rows.status == "ok"], published.ANOTHER_VERSION)
    ok = frontier.numbered(frontier.with_paired_latency(ok))
    if ok.empty:
        raise RequestError(f"{', '.join(results)}: none of the {len(rows)} rows is ok, so there is nothing to plot")
    metrics = [_column(ok, name, "--y") for name in _split(wanted.y, ok)] or quality_metrics(ok)
    costs = [cost for cost in _costs(ok, wanted.x) if cost != "sparsity"]  # against it all is drawn anyway
    limit = _drop(wanted.max_drop)
    parts = facets(ok, wanted.facet)
    out.mkdir(parents=True, exist_ok=True)
    samples, layers = _table(results, ok, "samples"), _table(results, ok, "layers")
    evidence = Evidence(ok, samples)
    with plot.Saver(wanted.formats) as save:
        for words, part in parts:
            _figures(save, part, metrics, costs, out, words, wanted.width, evidence)
            _flips(save, part, samples, metrics, out, words, wanted.width)
            if layers is not None and (figure := plot.layer_figure(part, layers, wanted.width)) is not None:
                save(figure, out / f"sparsity-by-block{words}")
        advised = _advice(ok, metrics, costs, limit, wanted, evidence)
        lines = summary.lines(ok, metrics, costs)
    drops = plot.drop_table(ok, metrics)
    files = list(save.files)
    shown = [*metrics, *costs]
    losses = {column for column in shown if columns.is_loss(column, ok)}
    failed = summary.failures(rows)
    markdown = summary.markdown(lines, shown, losses, evidence)
    notes = " ".join(filter(None, [_MARKS, _told_by(evidence, metrics), summary.intervals(lines, shown)]))
    caption = f"{len(ok)} cells. {notes.replace('~', 'Dagger')}"
    texts = {
        "table.md": f"{markdown}\n{notes}\n",
        "table.tex": summary.latex(lines, shown, losses, caption, evidence),
        "table.csv": lines.drop(columns="point", errors="ignore").to_csv(index=False),
        "drop-by-benchmark.csv": drops.to_csv(),
        "README.md": _readme(results, rows, left_out, failed, advised, files, len(lines), f"{notes}\n\n{markdown}"),
    }
    for name, text in texts.items():
        (out / name).write_text(text)
        files.append(out / name)
    if wanted.html:
        (out / "report.html").write_text(
            page.render(
                variants.with_variant(rows), ok.drop(columns="point"), metrics, costs, left_out, advised, failed
            )
        )
        files.append(out / "report.html")
    return files


def quality_metrics(rows: pd.DataFrame) -> list[str]:
    """The task metrics worth a figure, of those that any row has."""
    return main_metrics(c for c in rows.columns if "/" in c and rows[c].notna().any())


def facets(rows: pd.DataFrame, by: str | None) -> list[tuple[str, pd.DataFrame]]:
    """(suffix of the file names, rows) of each facet; without one, a facet for each model when there are several.

    Where rows come from several machines each has figures of its own, since what was timed on two cannot be compared.
    """
    column = _column(rows, by, "--facet") if by else "model"
    values = rows[column].dropna().unique()
    keeps_dense = column in (*_RECIPE, "variant")
    parts = [
        (f"-{column}-{_file_name(value)}", rows[(rows[column] == value) | (rows.baseline & keeps_dense)])
        for value in values
    ]
    if by is None and len(values) == 1:
        parts = [("", rows)]
    return [
        (words + (f"-{_file_name(machine)}" if machine else ""), mine)
        for words, part in parts
        for machine, mine in by_machine(part)
    ]


def by_machine(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(machine, its rows) where there are several, else all rows under no name.

    A dense cell is measured once, on one of the machines. For the others its row lends what is no measurement of the
    machine, and the dense model's time is that of the repeats in which it was timed there with the pruned ones.
    """
    machines = rows.machine.unique()
    if len(machines) == 1:
        return [("", rows)]
    foreign = rows[rows.baseline].copy()
    foreign[[c for c in rows.columns if columns.is_measured(c)]] = np.nan
    parts = []
    for machine in machines:
        mine = rows[rows.machine == machine]
        lent = foreign[(foreign.machine != machine) & ~foreign.setting.isin(mine.setting[mine.baseline])]
        lent = lent.assign(**{name: mine[name].iloc[0] for name in ("machine", "cpu", "gpu") if name in mine})
        parts.append((machine, frontier.with_paired_latency(pd.concat([mine, lent]).sort_index())))
    return parts


def _figures(
    save: plot.Saver,
    rows: pd.DataFrame,
    metrics: Sequence[str],
    costs: Sequence[str],
    out: Path,
    suffix: str,
    width: str,
    evidence: Evidence,
) -> None:
    short = {column: name for name, column in plot.AXES.items()}
    for metric in metrics:
        if not rows[metric].notna().any():
            continue
        name = _file_name(metric)
        save(plot.sparsity_figure(rows, metric, width, evidence), out / f"{name}-against-sparsity{suffix}")
        for cost in costs:
            if (rows[cost].notna() & rows[metric].notna()).any():
                path = out / f"{name}-against-{short.get(cost, _file_name(cost))}{suffix}"
                save(plot.cost_figure(rows, cost, metric, width, evidence), path)
    for phase in ("decode", "prefill"):
        if rows[f"{phase}_speedup"].notna().any():
            save(plot.speedup_figure(rows, phase, width), out / f"{phase}-speedup-against-sparsity{suffix}")
    drops = plot.drop_table(rows, metrics)
    if drops.notna().any(axis=None):
        save(plot.heat_figure(drops, width), out / f"drop-by-benchmark{suffix}")
    if (kinds := plot.kinds_figure(rows, metrics, width)) is not None:
        save(kinds, out / f"lost-by-kind{suffix}")
    for task in dict.fromkeys(c.partition("/")[0] for c in rows.columns if c.endswith("/answer_speedup")):
        if (answers := plot.answer_figure(rows, task, width)) is not None:
            save(answers, out / f"{_file_name(task)}-answer-against-token{suffix}")

    for task in dict.fromkeys(c.partition("/")[0] for c in rows.columns if "/loss_band_" in c):
        if (bands := plot.band_figure(rows, task, width)) is not None:
            save(bands, out / f"{_file_name(task)}-loss-by-word-frequency{suffix}")
    for task in dict.fromkeys(c.partition("/")[0] for c in rows.columns if "/loss_at_" in c):
        if (by_place := plot.position_figure(rows, task, width)) is not None:
            save(by_place, out / f"{_file_name(task)}-loss-by-position{suffix}")


def _table(results: Sequence[str], rows: pd.DataFrame, name: str) -> pd.DataFrame | None:
    """A table of all cells, such as the outcomes of single documents; None where there is none, or of too many cells."""
    if len(rows) > _SAMPLED:
        return None
    found = [table for folder in results if len(table := store.read_table(folder, name))]
    return pd.concat(found, ignore_index=True) if found else None


def _flips(
    save: plot.Saver,
    rows: pd.DataFrame,
    samples: pd.DataFrame | None,
    metrics: Sequence[str],
    out: Path,
    suffix: str,
    width: str,
) -> None:
    tasks = Counter(metric.partition("/")[0] for metric in metrics)
    for metric in metrics:
        if samples is not None:
            turned = paired.flips(rows, samples, metric)
            if len(turned):
                task, _, name = metric.partition("/")
                shown = (
                    task if tasks[task] == 1 else f"{task} ({name})"
                )  # of several metrics of a task each has a figure
                save(plot.flips_figure(turned, shown, width), out / f"{_file_name(shown)}-flips{suffix}")


def _advice(
    rows: pd.DataFrame,
    metrics: Sequence[str],
    costs: Sequence[str],
    drop: tuple[float, bool],
    wanted: Wanted,
    evidence: Evidence,
) -> list[str]:
    latency, memory = "decode_ms_paired", "peak_memory_bytes"
    sentences = []
    for machine, mine in by_machine(rows):
        said = []
        for metric in metrics:
            said += [advice.cheapest_within(mine, cost, metric, *drop, evidence) for cost in costs[:1]]
            if wanted.max_ms is not None:
                said.append(advice.best_within(mine, latency, metric, wanted.max_ms, evidence))
            if wanted.max_bytes is not None:
                said.append(advice.best_within(mine, memory, metric, wanted.max_bytes, evidence))
            said += [advice.knee(mine, cost, metric, evidence) for cost in costs[:1]]
        said += advice.break_even(mine)
        sentences += [f"{machine}: {sentence}" if machine else sentence for sentence in said]
    return sentences


def _told_by(evidence: Evidence, metrics: Sequence[str]) -> str:
    """By what the marks are told, in a sentence."""
    by_documents = [columns.label(metric) for metric in metrics if evidence.pairs(metric)]
    if not by_documents:
        return "Told by their intervals."
    return f"Told by the documents that both answered for {', '.join(by_documents)}, else by their intervals."


def _readme(
    results: Sequence[str],
    rows: pd.DataFrame,
    left_out: Sequence[str],
    failed: Sequence[str],
    advised: Sequence[str],
    files: Sequence[Path],
    lines: int,
    table: str,
) -> str:
    """The report's front page: answers first, then what failed, the table, and the figures."""
    counts = " ".join([f"{len(rows)} cells, {(rows.status == 'ok').sum()} of them ok.", *left_out])
    parts = [
        f"# Report on {', '.join(results)}\n\n{counts}\n",
        "## Which should I use\n",
        "\n".join(f"- {sentence}" for sentence in advised) + "\n",
    ]
    if failed:
        parts += ["## Cells that are not ok, and in no figure\n", "\n".join(f"- {line}" for line in failed) + "\n"]
    if lines <= 200:
        parts += ["## Table\n", table]
    else:
        parts += [f"The table has {lines} lines: see table.csv.\n"]
    shown_as = next((s for s in (".png", ".svg") if any(file.suffix == s for file in files)), None)
    pictures = [file.name for file in files if file.suffix == shown_as]
    parts += ["## Figures\n", "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures) + "\n"]
    return "\n".join(parts)


def _costs(rows: pd.DataFrame, asked: Sequence[str]) -> list[str]:
    if asked:
        found = []
        for name in _split(asked, [*plot.AXES, *rows]):
            column = plot.AXES[name] if name in plot.AXES else _column(rows, name, "--x")
            if column not in rows or not rows[column].notna().any():
                raise RequestError(f"--x {name}: no row has a value of {column}")
            found.append(column)
        return found
    known = [plot.AXES[name] for name in _DEFAULT_COSTS]
    return [column for column in known if column in rows and rows[column].notna().any()]


def _split(texts: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names that are separated by commas; a name that is known may have commas of its own (`gsm8k/acc,strict-match`)."""
    names, known = [], set(known)
    for text in texts:
        words = text.split(",")
        while words:
            taken = next((n for n in range(len(words), 1, -1) if ",".join(words[:n]) in known), 1)
            names.append(",".join(words[:taken]))
            words = words[taken:]
    return [name for name in names if name]


def _column(rows: pd.DataFrame, name: str, flag: str) -> str:
    if name not in rows:
        filtered = [c for c in rows.columns if c.startswith(f"{name},")]
        shown = ", ".join(filtered or task_metrics(rows.columns) or rows.columns[:15])
        near = " It is there under each of its answer filters." if filtered else did_you_mean(name, [*plot.AXES, *rows])
        raise RequestError(f"{flag} {name}: the rows have no such column.{near} Among them: {shown}")
    return name


def _typed(column: pd.Series, text: str, words: str) -> Any:
    if not pd.api.types.is_numeric_dtype(column):
        return text
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"--filter {words!r}: {column.name} is a number, got {text!r}") from None


def _drop(text: str) -> tuple[float, bool]:
    """`2%` as (0.02, relative to dense), `0.02` as (0.02, in the metric's unit). Raises RequestError."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", text)
    try:
        value = float(match[1]) if match else -1.0
    except ValueError:
        value = -1.0
    if match is None or value < 0:
        raise RequestError(f"--max-drop must be a share such as 2%, or an amount such as 0.02; got {text!r}")
    return (value / 100, True) if match[2] else (value, False)


def _file_name(text: object) -> str:
    return re.sub(r"[^\w.]+", "-", str(text)).strip("-")


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits 2 for a wrong request."""
    options = _parser().parse_args(arguments)
    first = options.results[0]
    out = options.out or Path("report" if "://" in first else f"{first}/report")
    try:
        if options.against:
            sys.exit(_compare(options))
        wanted = Wanted(
            x=_given(options.x),
            y=_given(options.y),
            filters=tuple(options.filter),
            facet=options.facet,
            width=options.width,
            max_drop=options.max_drop,
            max_ms=options.max_ms,
            max_bytes=None if options.max_bytes is None else byte_size("--max-bytes", options.max_bytes),
            html=not options.no_html,
            formats=_formats(options.formats),
        )
        files = report(options.results, out, wanted)
    except RequestError as error:
        sys.exit(messages.complain(error))
    print((out / "README.md").read_text().partition("## Figures")[0].partition("## Table")[0].strip())
    print(f"\n{len(files)} files in {out}" + (f"; open {out / 'report.html'} in a browser" if wanted.html else ""))


def _compare(options: argparse.Namespace) -> int:
    text, agrees = published.compare(select(read(options.results), options.filter), options.against)
    print(text)
    return 0 if agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sweep.report",
        description="Figures, tables and report.html from the rows of a sweep.",
        epilog="Example: python -m sweep.report results --x latency,memory --filter 'sparsity<=0.5' --max-drop 2%%",
    )
    add = parser.add_argument
    add("results", nargs="*", default=["results"], help="results folders (default: results)")
    add("--out", type=Path, help="folder for the report (default: RESULTS/report)")
    add("--x", help=f"costs, of {', '.join(plot.AXES)}, or columns; comma-separated (default: all that rows hold)")
    add("--y", help="task metrics, such as capitals/acc; comma-separated (default: the main one of each task)")
    add(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE[,VALUE]",
        help="keep these rows; also != < <= > >=; may be given again",
    )
    add(
        "--facet",
        metavar="COLUMN",
        help="a figure for each value of this column (default: model, when there are several)",
    )
    add("--width", choices=plot.WIDTHS, default="column", help="for one or two columns of a paper (default: column)")
    add("--formats", default=",".join(plot.FORMATS), help="files of a figure (default: png,svg,pdf)")
    add("--max-drop", default="2%", help="quality loss for `which should I use`: 2%% of dense, or 0.02 (default: 2%%)")
    add("--max-ms", type=float, help="say the best quality within this decode latency, in ms per token")
    add("--max-bytes", help="say the best quality within this peak memory, such as 800MB")
    add("--no-html", action="store_true", help="leave out report.html")
    add("--against", type=Path, metavar="CSV", help="print our numbers beside published ones, and write nothing")
    return parser


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(word for word in text.split(",") if word)
    for name in formats:
        if name not in plot.FORMATS:
            raise RequestError(f"--formats must be among {', '.join(plot.FORMATS)}, comma-separated; got {name!r}")
    return formats


def _given(text: str | None) -> tuple[str, ...]:
    return (text,) if text else ()


if __name__ == "__main__":
    sys.exit(messages.guard(main))
