"""The wheel stands on its own: it carries the configuration and the tasks, and runs in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "content")
    return folder / "content"


def test_every_file_of_the_checkout_is_in_the_wheel(unpacked: Path) -> None:
    for source, target in ((ROOT / "conf", "sweep/conf"), (ROOT / "src" / "sweep", "sweep")):
        here = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        there = {str(p.relative_to(unpacked / target)) for p in (unpacked / target).rglob("*")}
        assert here and here <= there


def test_the_wheel_runs_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sweep", "+method=weight", "sparsity=0.1,0.2", "plan=true", "-m"]
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    where = subprocess.run(
        [sys.executable, "-c", "import sweep; print(sweep.__file__)"],
        cwd=tmp_path,
        text=True,
        env=environment,
        check=True,
        capture_output=True,
    ).stdout
    assert where.startswith(str(unpacked))
    done = subprocess.run(command, cwd=tmp_path, text=True, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "3 cells (dense baselines included)" in done.stdout
