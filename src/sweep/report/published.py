"""Our numbers beside published ones: the dense model first, because a protocol that differs shows there."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tabulate import tabulate

from sweep import config, store
from sweep.report import frontier, variants
from sweep.settings import RequestError

NEEDED = ("model", "method", "sparsity", "metric", "published", "source")
_ASIDE = {*NEEDED, "note"}
ANOTHER_VERSION = "--filter measuring_version=N reports another"
# Relative: the rounding of a table and of bfloat16 stays below it, another context length does not.
DENSE_TOLERANCE = 0.02


def read(path: Path) -> pd.DataFrame:
    """The published numbers: one a line, with its source. Raises RequestError for a file that is none."""
    if not path.is_file():
        raise RequestError(f"--against: there is no file {path}")
    table = pd.read_csv(path, comment="#")
    lacking = [name for name in NEEDED if name not in table]
    if lacking:
        raise RequestError(
            f"--against {path}: the columns {', '.join(lacking)} are missing. Needed: {', '.join(NEEDED)}; "
            "further columns are matched with the rows' columns or settings"
        )
    return table


def compare(rows: pd.DataFrame, path: Path) -> tuple[str, bool]:
    """(the table as text, whether every dense number that we have agrees).

    A line of the file matches the rows that agree in model, method, sparsity and every further column that it fills: a
    column of the rows, or a setting of the method or the calibration. A setting of the method that the file has and the line
    leaves empty is at its default. Seeds are averaged, and nothing else is: a line that matches rows of several settings
    stands there once for each.
    """
    wanted = read(path)
    ok, left_out = frontier.newest(rows[rows.status == "ok"], ANOTHER_VERSION)
    ok = frontier.numbered(ok)
    settings = (
        pd.DataFrame([variants.flat(config) for config in ok.config], index=ok.index) if len(ok) else pd.DataFrame()
    )
    lines, verdicts = [], []
    for line in wanted.to_dict("records"):
        dense = _is_dense(line)
        what = " ".join(str(line[k]) for k in line if k not in _ASIDE and not _is_empty(line[k]))
        what = "dense" if dense else f"{line['method']} {what} {line['sparsity']:g}".replace("  ", " ")
        found = _matching(ok, settings, line, path)
        ours = found.dropna(subset=line["metric"]) if line["metric"] in found else found.iloc[:0]
        values = ours.groupby("point")[line["metric"]].mean()
        for point, value in values.items() if len(values) else [(None, None)]:
            ratio = value / line["published"] if value is not None else None
            if dense and value is not None and ratio is not None:
                verdicts.append((line, value, abs(ratio - 1) <= DENSE_TOLERANCE))
            told = _told_apart(ours, point) if len(values) > 1 else ""
            lines.append([line["model"], what + told, line["metric"], line["published"], value, ratio, line["source"]])
    header = ["model", "what", "metric", "published", "ours", "ours / published", "source"]
    text = tabulate(
        lines, header, tablefmt="github", floatfmt=("", "", "", ".4g", ".4g", ".3f", ""), missingval="not run"
    )
    said = [*left_out, *_said(verdicts, wanted)]
    return "\n".join([*said, "", text]), all(agrees for _, _, agrees in verdicts)


def _told_apart(rows: pd.DataFrame, point: object) -> str:
    """What tells a point from the others that match the same published number."""
    names = ("model", "criterion", "variant", "execution", "setting", "version", "machine")
    row = rows[rows.point == point].iloc[0]
    return "".join(f" [{row[name]}]" for name in names if rows[name].nunique(dropna=False) > 1 and row[name])


def _said(verdicts: list[tuple[dict, float, bool]], wanted: pd.DataFrame) -> list[str]:
    if not any(map(_is_dense, wanted.to_dict("records"))):
        return ["no dense number is published here, so the protocol cannot be checked"]
    if not verdicts:
        return ["the dense model has not been measured: the protocol is unchecked"]
    said = []
    for line, value, agrees in verdicts:
        words = f"dense {line['model']}, {line['metric']}: published {line['published']:g}, ours {value:.4g}"
        said.append(
            f"{words}: "
            + (
                "agrees"
                if agrees
                else "PROTOCOL DIFFERS (context length, split, tokenisation or window rule): do not compare the lines below"
            )
        )
    return said


def _matching(rows: pd.DataFrame, settings: pd.DataFrame, line: dict, path: Path) -> pd.DataFrame:
    keep = variants.is_called(rows, line["model"]) & (rows.method == line["method"])
    for stage in config.STAGES:
        if _is_empty(line.get(stage.column)):
            keep &= rows[stage.column] == stage.nothing
    if not _is_dense(line):
        keep &= (rows.sparsity - line["sparsity"]).abs() < 1e-6
    for name, value in line.items():
        if name in _ASIDE:
            continue
        if _is_dense(line) and (name == "criterion" or name.startswith(("method.", "calibration."))):
            continue
        if _is_empty(value):
            if name.startswith("method."):
                keep &= variants.at_default(rows, name)
            continue
        source = rows if name in rows else settings
        if name not in source:
            if len(rows) == 0 or name in store.COLUMNS or "." in name:
                return rows.iloc[:0]  # no row has that setting yet
            raise RequestError(
                f"--against {path}: '{name}' is neither a column of the rows nor a setting such as method.scope"
            )
        keep &= source[name].astype(str) == _text(value, source[name])
    return rows[keep]


def _is_dense(line: dict) -> bool:
    """Whether a published number is of the dense model: a file says nothing of stages that it knows nothing of."""
    return all(_is_empty(line.get(stage.column)) or line[stage.column] == stage.nothing for stage in config.STAGES)


def _is_empty(value: object) -> bool:
    return value is None or value == "" or value != value  # NaN


def _text(value: object, column: pd.Series) -> str:
    """A CSV's 2048.0 is the 2048 of a setting."""
    if isinstance(value, float) and value.is_integer() and not pd.api.types.is_float_dtype(column):
        return str(int(value))
    return str(value)
