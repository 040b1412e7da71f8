"""The documentation says what is true: columns, criteria, links, and commands that run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import frames
from sweep import columns, config, report, store

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]


def commands() -> list[str]:
    """Every `python -m sweep…` command in a shell block that is not marked as needing a network or a GPU."""
    found = []
    for page in PAGES:
        for mark, block in re.findall(r"(<!-- needs: [^\n]*-->\n)?```sh\n(.*?)```", page.read_text(), re.S):
            if not mark:
                found += [line.split("  #")[0].strip() for line in block.splitlines()]
    return sorted({line for line in found if line.startswith("python -m sweep")})


def test_the_column_reference_is_made_from_the_schema() -> None:
    assert set(columns.MEANINGS) == set(store.COLUMNS)
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == columns.markdown(), "stale: python -m sweep.columns > docs/metrics.md"


@pytest.mark.parametrize(
    ("column", "unit"),
    [("weights_bytes", "bytes"), ("prune_seconds", "seconds"), ("decode_ms_per_token_p50", "milliseconds"),
     ("sparsity_all_parameters", "fraction"), ("decode_speedup_low", "ratio"), ("cell", "")],
)  # fmt: skip
def test_units_are_read_from_names(column: str, unit: str) -> None:
    assert columns.unit(column) == unit


def test_the_table_of_methods_has_every_criterion_and_no_other() -> None:
    page = (ROOT / "docs/methods.md").read_text()
    for name, family in config.FAMILIES.items():
        if name == "dense":
            continue
        heading = next(h for h in re.findall(r"^## .*$", page, re.M) if f"`{name}`" in h)
        section = page.partition(heading)[2].partition("\n## ")[0]
        listed = set(re.findall(r"^\| `(\w+)`", section, re.M))
        assert listed == set(typing.get_args(typing.get_type_hints(family)["criterion"])), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:src|conf|docs|tests|experiments|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows in `results`, as a reader of the documentation has after the first sweep."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "results" / "cells").mkdir(parents=True)
    frames.rows(seeds=1).to_parquet(folder / "results" / "cells" / "0-table-made.parquet")
    for study in ROOT.glob("experiments/*"):
        (folder / "experiments").mkdir(exist_ok=True)
        (folder / "experiments" / study.name).symlink_to(study)
    return folder


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m sweep ")])
def test_every_sweep_in_the_documentation_can_be_planned(command: str, place: Path) -> None:
    words = shlex.split(command)[3:]
    if "--help" not in words:
        where = words.index("-m") if "-m" in words else len(words)
        words = [*words[:where], "plan=true", *words[where:]]
    done = subprocess.run([sys.executable, "-m", "sweep", *words], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m sweep.report")])
def test_every_report_in_the_documentation_runs(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)[3:]
    monkeypatch.chdir(place)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            report.main(words)
        assert stop.value.code == 0
    else:
        report.main([*words, "--out", str(tmp_path)])  # the last --out counts
        assert list(tmp_path.glob("*.png"))
