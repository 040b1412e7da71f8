"""The house stands as its plan says: who imports whom, and what works without the heavy libraries."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/house.md").read_text()
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "hydra", "omegaconf"}


def broken_imports(source: Path) -> str:
    """What import-linter says of the package in `source` under the contracts of pyproject.toml; empty when all are kept."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    environment = os.environ | {"PYTHONPATH": str(source), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    return (done.stdout + done.stderr) if done.returncode else ""


def test_who_imports_whom() -> None:
    broken = broken_imports(ROOT / "src")
    assert not broken, broken


@pytest.mark.parametrize(
    ("module", "line", "told"),
    [
        ("config.py", "import torch", "sweep.config -> torch"),
        ("store/rows.py", "from sweep.models import anatomy", "sweep.store.rows -> sweep.models.anatomy"),
        ("pruning/select.py", "from sweep import store", "sweep.pruning.select -> sweep.store"),
        ("models/anatomy.py", "def f():\n    from sweep.models import loading", "anatomy -> sweep.models.loading"),
        ("attic.py", "", "sweep.attic"),
    ],
)
def test_an_import_against_the_plan_is_told(tmp_path: Path, module: str, line: str, told: str) -> None:
    shutil.copytree(ROOT / "src/sweep", tmp_path / "sweep", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "sweep" / module).open("a") as file:
        file.write(f"\n{line}\n")
    assert told in broken_imports(tmp_path)


def test_requests_rows_and_reports_are_read_without_the_heavy_libraries() -> None:
    modules = ["config", "identity", "plan", "provenance", "runner", "isolate", "saving", "store", "report.rendering"]
    code = (
        f"import sys, {', '.join(f'sweep.{name}' for name in modules)}; "
        f"sweep.load, sweep.compare; print(*{HEAVY} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


NEEDED_BY_OTHERS = {"accelerate", "ninja"}  # as pyproject.toml says beside them
OF_AN_EXTRA = {"submitit", "llama_cpp"}  # imported where a launcher is used that has it, and where a GGUF file is tried
BUILDS = {"hatchling"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "sweep", "hydra_plugins"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    found = packages_distributions()
    used = {found[name][0].lower().replace("_", "-") for name in imported - OF_AN_EXTRA - BUILDS}
    assert not used - declared, "imported in src and not declared in pyproject.toml"
    assert declared - used == NEEDED_BY_OTHERS, "declared in pyproject.toml and not imported in src"
    assert imported >= OF_AN_EXTRA | BUILDS


def test_the_page_of_the_house_names_every_module_and_no_other() -> None:
    named = []
    for room, rows in re.findall(r"^### (sweep\S*):.*?\n(.*?)(?=^#)", PAGE, re.M | re.S):
        named += [f"{room}/{name.replace('.', '/')}.py" for name in re.findall(r"^\| `([\w.]+)` \|", rows, re.M)]
    there = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/sweep").rglob("*.py")}
    entrances = {name for name in there if name.count("/") > 1 and name.endswith("/__main__.py")}
    assert sorted(named) == sorted(name for name in there - entrances if not name.endswith("/__init__.py"))


def test_the_page_of_the_house_draws_the_floors_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = next(contract["layers"] for contract in project["contracts"] if contract["id"] == "floors")
    drawn = PAGE.partition("```text\n")[2].partition("```")[0].splitlines()
    assert drawn == [floor.replace(" : ", " · ") for floor in floors]


def test_files_that_the_page_of_the_house_sends_to_are_there() -> None:
    for place in re.findall(r"`((?:conf|tests|benchmarks|src|experiments)/[\w./]+)`", PAGE):
        assert (ROOT / place).exists(), place


def test_long_functions_are_the_exception() -> None:
    known = {  # of more than 60 lines, and why
        "inputs_of": "its hooks share what they have seen",
        "gather": "its hooks share what they have seen",
        "not_waiting_for_the_dead": "it holds a class that cannot be made where submitit is not installed",
        "test_every_counted_column_is_what_a_hand_count_says": "it is a table",
    }
    paths = [path for folder in ("src", "tests", "benchmarks", "experiments") for path in (ROOT / folder).rglob("*.py")]
    functions = [
        node
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert {f.name for f in functions if f.end_lineno - f.lineno >= 60} <= set(known)
