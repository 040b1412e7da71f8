"""The rows of results folders as one flat file that every program reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from sweep.export import runs
from sweep.settings import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="results folders")
    parser.add_argument(
        "file", type=Path, help="the file, such as results.csv: a line a cell, columns as docs/metrics.md has them"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the file. Raises RequestError where it is none to write to."""
    rows = runs.read(arguments.results)
    if arguments.file.is_dir() or not arguments.file.parent.is_dir():
        raise RequestError(f"{arguments.file} is no file in a folder that exists: name one")
    rows.dropna(axis="columns", how="all").to_csv(arguments.file, index=False)
    print(f"{len(rows)} rows in {arguments.file}")
