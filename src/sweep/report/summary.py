"""A summary of the rows, one line a point: in Markdown for reading, for spreadsheets, and in LaTeX (booktabs) for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from sweep import config
from sweep.report import frontier
from sweep.report.evidence import NOTHING, Evidence
from sweep.report.names import number, series
from sweep.store.columns import label, scale

_OF_THE_LINE = ["name", "point", "seeds"]  # the same for all columns of a line


def lines(rows: pd.DataFrame, metrics: Sequence[str], costs: Sequence[str]) -> pd.DataFrame:
    """One line a point (seeds together): what was asked, then each metric and cost with its 95 % interval.

    Columns `NAME`, `NAME_low`, `NAME_high`, and `NAME_over`, what the interval is over (see frontier.points); `seeds` is
    the number of replicates behind the line, `point` the number of the point.
    """
    frames = []
    for column in [*costs, *metrics]:
        points = frontier.points(rows, "sparsity", column)
        points["name"] = series(points)
        part = points.set_index(frontier.SAME_POINT)[["name", "point", "seeds", "y", "y_low", "y_high", "interval"]]
        frames.append(
            part.rename(
                columns={
                    "y": column,
                    "y_low": f"{column}_low",
                    "y_high": f"{column}_high",
                    "interval": f"{column}_over",
                }
            )
        )
    if not frames:
        return pd.DataFrame()
    joined = frames[0]
    for part in frames[1:]:
        joined = joined.join(part.drop(columns=_OF_THE_LINE), how="outer")
        joined[_OF_THE_LINE] = joined[_OF_THE_LINE].fillna(part[_OF_THE_LINE])
    joined = joined.reset_index()
    return joined.sort_values(["baseline", "name", "sparsity"], ascending=[False, True, True])


def marks(summary: pd.DataFrame, column: str, *, loss: bool, evidence: Evidence = NOTHING) -> pd.Series:
    """`best`, `within noise` of the best, or nothing, among the pruned lines of one sparsity and model.

    Within noise: chance alone may make the line as different from the best, after Holm's correction for their number;
    by the documents that both have answered where `evidence` has them, else by their intervals.
    """
    found = pd.Series("", index=summary.index)
    points = summary[["point", "seeds"]].assign(
        y=summary[column],
        y_low=summary[f"{column}_low"],
        y_high=summary[f"{column}_high"],
        interval=summary[f"{column}_over"],
    )
    place = np.flatnonzero(~summary.baseline & summary[column].notna())
    pruned = summary.iloc[place]
    group = pruned.groupby(["model", "setting", "version", "machine", "sparsity"], dropna=False).ngroup().to_numpy()
    value = pruned[column].to_numpy() * (1 if loss else -1)
    first = np.lexsort((value, group))[np.unique(np.sort(group), return_index=True)[1]]  # the best of each group
    best = value == value[first][group]
    several = np.bincount(group)[group] > 1
    others = np.flatnonzero(~best & several)
    alike = evidence.alike(points, place[others], place[first[group[others]]], column, group[others])
    found.iloc[place[others[alike]]] = frontier.WITHIN_NOISE
    found.iloc[place[best & several]] = "best"
    return found


def intervals(summary: pd.DataFrame, columns: Sequence[str]) -> str:
    """What ± says of each column, in a sentence; empty where no line has an interval."""
    over: dict[str, list[str]] = {}
    for column in columns:
        for kind in summary[f"{column}_over"].dropna().unique():
            over.setdefault(kind, []).append(label(column))
    said = [f"over {kind} for {', '.join(labels)}" for kind, labels in sorted(over.items()) if kind != "none"]
    return f"±: half a 95 % interval, {'; '.join(said)}." if said else ""


def markdown(summary: pd.DataFrame, marked: Mapping[str, pd.Series]) -> str:
    """The summary as a Markdown table: the best of each sparsity bold, what is within noise of it marked with ~.

    marked  the columns to show, each with its marks
    """
    header = ["method", "sparsity", "seeds", *map(label, marked)]
    lines = [header, ["---"] * len(header)]
    texts = {column: _texts(summary, column, marked[column], "**{}**", "{} ~", "{} ± {}") for column in marked}
    for i, row in summary.iterrows():
        lines.append(
            [row["name"].replace("|", "\\|"), f"{row.sparsity:g}", f"{row.seeds:g}", *(texts[c][i] for c in marked)]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex(summary: pd.DataFrame, marked: Mapping[str, pd.Series], caption: str) -> str:
    """The summary as a LaTeX table for booktabs: best in bold, within noise of the best with a dagger."""
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering\small",
        f"\\caption{{{_escape(caption)}}}",
        r"\begin{tabular}{lr" + "r" * len(marked) + "}",
        r"\toprule",
        " & ".join(["method", "sparsity", *(_escape(label(c)) for c in marked)]) + r" \\",
        r"\midrule",
    ]
    texts = {
        column: _texts(summary, column, marked[column], r"\textbf{{{}}}", r"{}$^\dagger$", r"${} \pm {}$")
        for column in marked
    }
    for i, row in summary.iterrows():
        lines.append(" & ".join([_escape(row["name"]), f"{row.sparsity:g}", *(texts[c][i] for c in marked)]) + r" \\")
        if row.baseline:
            lines.append(r"\midrule")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def failures(rows: pd.DataFrame) -> list[str]:
    """A line for each cell that is not ok: what it was, its status, and the last line of its reason."""
    lines = []
    for row in rows[rows.status != "ok"].itertuples():
        reason = (row.error if isinstance(row.error, str) else "").strip().splitlines()[-1:] or ["no reason recorded"]
        later = [getattr(row, stage.column, None) for stage in config.STAGES[1:]]
        words = [row.model, row.method, row.criterion, f"sparsity {row.sparsity:g}", *later, f"seed {row.seed}"]
        lines.append(f"{' '.join(str(w) for w in words if isinstance(w, str))}: {row.status}: {reason[0]}")
    return lines


def _texts(
    summary: pd.DataFrame, column: str, marked: pd.Series, bold: str, near: str, interval: str
) -> dict[int, str]:
    """Each line's number in the unit of its label, with half its interval, marked."""
    unit = scale(column)
    numbers = (summary[name] / unit for name in (column, f"{column}_low", f"{column}_high"))
    found = {}
    for i, mark, value, low, high in zip(summary.index, marked, *numbers, strict=True):
        text = number(value)
        if text and pd.notna(low) and high > low:
            text = interval.format(text, number((high - low) / 2))
        shape = {"best": bold, "within noise": near}.get(mark, "{}")
        found[i] = shape.format(text)
    return found


def _escape(text: str) -> str:
    special = {**{c: f"\\{c}" for c in "_%&#${}"}, "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
    return "".join(special.get(character, character) for character in text)
