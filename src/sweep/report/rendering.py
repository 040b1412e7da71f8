"""Everything that a report writes: its front page, figures, tables, and a page to explore, from the rows alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from sweep import store
from sweep.report import asked, drawing, figures, overview, page, parts, plot, summary, variants
from sweep.report.decision import Limits
from sweep.report.evidence import Evidence
from sweep.report.parts import Part
from sweep.settings import RequestError
from sweep.store import columns

_MARKS = "Bold: the best at its sparsity. ~: within noise of it."
_SAMPLED = 500  # more cells than this, and their tables are not read
_LISTED = 200  # more lines than this, and the front page has no table


@dataclass(frozen=True)
class Wanted:
    """What a report shows; every field is a flag of the command line."""

    x: tuple[str, ...] = ()  # costs, also several in one text; empty = every one that the rows hold
    y: tuple[str, ...] = ()  # metrics, likewise; empty = the main one of each task
    filters: tuple[str, ...] = ()
    facet: str | None = None
    figures: tuple[str, ...] = ()  # beside those that every report has
    width: str | None = None  # of figures: None = of a page for the overview, of a column for the others
    limits: Limits = field(default=Limits())  # of the decision table's last line
    html: bool = True
    formats: tuple[str, ...] = drawing.FORMATS  # of the figures


def report(results: Sequence[str], out: Path, wanted: Wanted | None = None) -> list[Path]:
    """Write every figure, table and the page that the rows allow into `out`; returns the files.

    Raises RequestError when there are no rows to report, or for a column that they lack.
    """
    wanted = wanted or Wanted()
    rows = asked.select(asked.read(results), wanted.filters)
    ok, left_out = parts.ready(rows)
    if ok.empty:
        raise RequestError(f"{', '.join(results)}: none of the {len(rows)} rows is ok, so there is nothing to plot")
    metrics = asked.metrics(ok, wanted.y)
    costs = [cost for cost in asked.costs(ok, wanted.x) if cost != "sparsity"]  # against it all is drawn anyway
    samples, layers = _table(results, ok, "samples"), _table(results, ok, "layers")
    evidence = Evidence(ok, samples)
    ok = overview.with_kept(ok, metrics)
    seen = parts.parts(ok, metrics, wanted.facet, wanted.limits, evidence)
    out.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, str]] = []  # file and caption
    kinds = (*wanted.figures, "cost") if wanted.x else wanted.figures
    with drawing.Saver(wanted.formats) as save:
        for part in seen:
            of = figures.Material(part.rows, metrics, costs, part.overview, evidence, samples, layers, wanted.width)
            for drawn in figures.drawn(of, kinds):
                save(drawn.figure, out / f"{drawn.stem}{part.suffix}")
                pictures.append((f"{drawn.stem}{part.suffix}", drawn.caption))
    files = list(save.files)
    texts = _tables(ok, metrics, costs, evidence)
    texts["README.md"] = _readme(results, rows, left_out, seen, pictures, wanted.formats, texts["table.md"])
    if wanted.html:
        said, models = summary.failures(rows), sorted(set(variants.models(rows).dropna()))
        texts["report.html"] = page.render(len(rows), models, ok, metrics, costs, left_out, seen, said, evidence)
    texts["overview.txt"] = parts.words(seen)
    for name, text in texts.items():
        (out / name).write_text(text)
        files.append(out / name)
    return files


def _tables(rows: pd.DataFrame, metrics: Sequence[str], costs: Sequence[str], evidence: Evidence) -> dict[str, str]:
    """The texts of the files with a line a point."""
    lines, shown = summary.lines(rows, metrics, costs), [*metrics, *costs]
    marked = {
        column: summary.marks(lines, column, loss=columns.is_loss(column, rows), evidence=evidence) for column in shown
    }
    notes = " ".join(filter(None, [_MARKS, _told_by(evidence, metrics), summary.intervals(lines, shown)]))
    caption = f"{len(rows)} cells. {notes.replace('~', 'Dagger')}"
    return {
        "table.md": f"{summary.markdown(lines, marked)}\n{notes}\n",
        "table.tex": summary.latex(lines, marked, caption),
        "table.csv": lines.drop(columns="point", errors="ignore").to_csv(index=False),
        "drop-by-benchmark.csv": plot.drop_table(rows, metrics).to_csv(),
    }


def _table(results: Sequence[str], rows: pd.DataFrame, name: str) -> pd.DataFrame | None:
    """A table of all cells, such as the outcomes of single documents; None where there is none, or of too many cells."""
    if len(rows) > _SAMPLED:
        return None
    found = [table for folder in results if len(table := store.read_table(folder, name))]
    return pd.concat(found, ignore_index=True) if found else None


def _told_by(evidence: Evidence, metrics: Sequence[str]) -> str:
    """By what the marks are told, in a sentence."""
    by_documents = [columns.label(metric) for metric in metrics if evidence.pairs(metric)]
    if not by_documents:
        return "Told by their intervals."
    return f"Told by the documents that both answered for {'; '.join(by_documents)}, else by their intervals."


def _readme(
    results: Sequence[str],
    rows: pd.DataFrame,
    left_out: Sequence[str],
    seen: Sequence[Part],
    pictures: Sequence[tuple[str, str]],
    formats: Sequence[str],
    table: str,
) -> str:
    """The report's front page: the overview and what to choose, then what failed, the other figures, and the table."""
    shown_as = next((suffix for suffix in ("png", "svg") if suffix in formats), None)

    def picture(stem: str, caption: str) -> str:
        return f"![{caption}]({stem}.{shown_as})\n\n*{caption}*\n" if shown_as else ""

    counts = " ".join([f"{len(rows)} cells, {(rows.status == 'ok').sum()} of them ok.", *left_out])
    text = [f"# Report on {', '.join(results)}\n\n{counts}\n"]
    for part in seen:
        mine = [one for one in pictures if one[0] == f"overview{part.suffix}"]
        text += [f"## {part.title}\n"] if part.title else []
        text += [picture(*one) for one in mine]
        text += [f"{note}\n" for note in (part.overview.notes if part.overview else ())]
        text += (
            [part.decision.markdown()]
            if part.decision
            else ["No pruned cell has a quality to compare with a dense one's.\n"]
        )
    if failed := summary.failures(rows):
        text += ["## Cells that are not ok, and in no figure\n", "\n".join(f"- {line}" for line in failed) + "\n"]
    others = [picture(*one) for one in pictures if not one[0].startswith("overview")]
    text += ["## Figures\n", *others] if any(others) else []
    lines = table.count("\n| ")
    text += ["## Table\n", table if lines <= _LISTED else f"The table has {lines} lines: see table.csv.\n"]
    return "\n".join(text)
