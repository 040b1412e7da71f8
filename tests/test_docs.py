"""The documentation says what is true: columns, criteria, links, and commands that run."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import typing
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import frames
from sweep import config, settings
from sweep.measuring import catalogue
from sweep.pruning import criteria
from sweep.report import __main__, published
from sweep.store import columns

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]


def commands() -> list[str]:
    """Every `python -m sweep…` command in a shell block that is not marked as needing a network or a GPU."""
    found = []
    for page in PAGES:
        for mark, block in re.findall(r"(<!-- needs: [^\n]*-->\n)?```sh\n(.*?)```", page.read_text(), re.S):
            if not mark:
                found += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line for line in found if line.startswith("python -m sweep")})


def test_the_column_reference_is_made_from_the_schema() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == columns.markdown(), "stale: python -m sweep.store.columns > docs/metrics.md"


@pytest.mark.parametrize(
    ("page", "heading"), [("methods", "| criterion | score of {} |"), ("adding", "| read of {} | what it is |")]
)
def test_the_tables_of_criteria_are_made_from_the_declarations(page: str, heading: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    for of in criteria.READABLE:
        assert heading.format(criteria.with_article(of)) in text
    assert text == criteria.with_tables(text), "stale: python -m sweep.pruning.criteria docs/methods.md docs/adding.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:src|conf|docs|tests|experiments|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


def messages() -> list[str]:
    """Every text of the source that is joined from parts, `…` for what is put in, and whole texts."""
    found = []
    for file in sorted((ROOT / "src").glob("**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_what_was_tried_is_told_in_the_words_of_the_messages() -> None:
    """Each line of docs/files.md that refuses quotes what is said; the tests of each module see that it is said."""
    lines = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$", (ROOT / "docs/files.md").read_text(), re.M)
    known = messages()
    told = 0
    for tried, outcome, said in lines:
        if outcome.strip() in ("what happens", "---"):
            continue
        assert ("refused" in outcome) == bool(said.strip()), tried
        for quoted in re.findall(r"`([^`]+)`", said):
            parts = [re.escape(part) for part in quoted.split("…")]
            assert any(re.search("[^\n]*".join(parts), text) for text in known), quoted
            told += 1
    assert told > 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows in `results`, as a reader of the documentation has after the first sweep."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "results" / "cells").mkdir(parents=True)
    frames.rows(seeds=1).to_parquet(folder / "results" / "cells" / "0-table-made.parquet")
    for study in ROOT.glob("experiments/*"):
        mine = folder / "experiments" / study.name
        mine.mkdir(parents=True)
        for part in study.iterdir():
            (mine / part.name).symlink_to(part)
        if not (mine / "results").exists():  # a study that has not run
            (mine / "results").symlink_to(folder / "results")
    return folder


def cells(words: list[str]) -> list[config.Cell]:
    """What the command line would run, through the door that it goes through, without a process for each."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        named = [word for word in words if word.startswith("+experiment=")]
        study = compose("config", named, return_hydra_config=True).hydra.sweeper if named else {}
        grid: list[tuple[str, ...]] = []
        for own in study.get("grids") or [{}]:
            given = {**(study.get("params") or {}), **own}
            asked = OverridesParser.create().parse_overrides([*(f"{k}={v}" for k, v in given.items()), *words])
            choices = [
                [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
                if o.is_sweep_override()
                else [o.input_line]
                for o in asked
            ]
            product = list(itertools.product(*choices))
            if len(product) > 12:  # each choice once is enough to know that it composes
                first = [options[0] for options in choices]
                product = [(*first[:i], o, *first[i + 1 :]) for i, options in enumerate(choices) for o in options]
            grid += product
        found = []
        for overrides in dict.fromkeys(grid):
            composed = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
            found.append(config.parse(typing.cast(dict, composed))[0])
        return found


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m sweep ")])
def test_every_sweep_in_the_documentation_makes_cells(command: str) -> None:
    words = [word for word in shlex.split(command)[3:] if word != "-m"]
    if "--help" not in words:
        made = cells(words)
        for cell in made:
            catalogue.check(cell.benchmarks, None)
        assert len(made) == 1 or " -m" in command


@pytest.mark.parametrize("page", sorted(ROOT.glob("experiments/*/README.md")), ids=lambda p: p.parent.name)
def test_a_study_says_its_question_and_its_command(page: Path) -> None:
    text = page.read_text()
    assert "?" in text and "python -m sweep" in text
    named = ROOT / "conf" / "experiment" / f"{page.parent.name}.yaml"
    if named.exists():
        assert f"python -m sweep +experiment={named.stem}" in text
        assert f"python -m sweep +experiment={named.stem} -m" in named.read_text()
        assert len(set(cells([f"+experiment={named.stem}"]))) > 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/published.csv")), ids=lambda p: p.parent.name)
def test_published_numbers_have_a_source_and_meet_the_cells_of_their_study(path: Path) -> None:
    """A row made for each cell of the study is found by each published line: the columns fit."""
    table = published.read(path)
    assert table.source.str.len().min() > 5 and (table.method == "dense").any()
    made = cells([f"+experiment={path.parent.name}"])
    made += list({cell.dense() for cell in made})
    rows = pd.DataFrame(
        [
            {
                "status": "ok",
                "model": cell.model.name,
                "method": cell.method.family,
                "sparsity": cell.sparsity,
                "seed": cell.seed,
                "execution": cell.execution.name,
                "criterion": getattr(cell.method, "criterion", None),
                "config": json.dumps(settings.plain(cell)),
                **dict.fromkeys(table.metric, 1.0),
            }
            for cell in made
        ]
    )
    text, agrees = published.compare(rows, path)
    assert "not run" not in text and "PROTOCOL DIFFERS" in text and not agrees


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m sweep.report")])
def test_every_report_in_the_documentation_runs(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)[3:]
    monkeypatch.chdir(place)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            __main__.main(words)
        assert stop.value.code == 0
    else:
        __main__.main([*words, "--out", str(tmp_path)])  # the last --out counts
        assert list(tmp_path.glob("*.png"))
