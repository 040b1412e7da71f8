"""A report that is made again while a sweep runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import frames
from sweep.report import __main__, watching

ROWS = frames.rows(seeds=1, sparsities=(0.1, 0.5), failed=1)


def arriving(place: Path, counts: list[int | None]) -> Callable[[float], None]:
    """A sleep during which the folder comes to hold so many rows; after the last, Ctrl-C."""

    def sleep(_: float) -> None:
        if not counts:
            raise KeyboardInterrupt
        if (count := counts.pop(0)) is not None:
            (place / "cells").mkdir(parents=True, exist_ok=True)
            ROWS[:count].to_parquet(place / "cells" / "0-table-made.parquet")

    return sleep


def test_it_is_made_again_when_there_are_new_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(watching.time, "sleep", arriving(tmp_path, [None, None, 2, 2, len(ROWS)]))
    made: list[int] = []
    watching.watch([str(tmp_path)], lambda: made.append(1))
    said = capsys.readouterr().out.splitlines()
    assert len(made) == 2 and len(said) == 4
    assert said[0].startswith("waiting for the first row in") and said[-1] == "stopped: the last report stays"
    assert said[1].endswith("2 cells, 2 of them new")
    assert said[2].endswith(f"{len(ROWS) - 1} cells, 1 not ok, {len(ROWS) - 2} of them new")
    assert all(len(line) <= 100 for line in said[1:])


def test_the_command_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    place = tmp_path / "results"
    monkeypatch.setattr(watching.time, "sleep", arriving(place, [len(ROWS)]))
    __main__.main([str(place), "--watch", "--no-html", "--formats", "png"])
    assert (place / "report" / "overview.png").is_file() and "files in" in capsys.readouterr().out


def test_a_wrong_request_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        __main__.main([str(tmp_path), "--watch", "--figures", "nonsense"])
    assert "--figures must be among" in capsys.readouterr().err
