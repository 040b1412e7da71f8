"""Entries are made once, whole, and removed when they are too many; never while they may be in use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep import cache, locks
from sweep.settings import RequestError


def fill(kind: str, key: str, size: int, age: float) -> Path:
    path = cache.entry(kind, key, lambda folder: (folder / "data").write_bytes(bytes(size)) and None)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_of_many_that_want_the_same_one_makes_it_and_the_others_wait(cache_folder: Path, tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from sweep import cache
def make(folder):
    with open({str(tmp_path / "made")!r}, "a") as log:
        log.write("made\\n")
    time.sleep(0.5)
    (folder / "data").write_text("whole")
print((cache.entry("kind", "key", make) / "data").read_text())
"""
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(5)]
    assert [worker.communicate()[0].strip() for worker in workers] == ["whole"] * 5
    assert (tmp_path / "made").read_text() == "made\n"


def test_a_maker_that_fails_or_is_killed_leaves_nothing_that_counts(cache_folder: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        cache.entry("kind", "key", fails)
    assert cache.entries() == []
    code = (
        "import os, sys; from pathlib import Path; from sweep import cache\n"
        "cache.entry('kind', 'key', lambda f: ((f / 'half').write_text('half'), os._exit(9)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert cache.entries() == []
    assert (fill("kind", "key", 10, 0) / "data").stat().st_size == 10  # the lock of the dead one holds nobody up


def test_the_longest_unused_go_first_and_what_is_in_use_stays(cache_folder: Path) -> None:
    old, older, used = fill("a", "old", 1000, 7200), fill("a", "older", 1000, 9000), fill("b", "used", 1000, 10)
    size = cache.entries()[0].size
    assert [entry.name for entry in cache.entries()] == ["a/older", "a/old", "b/used"]
    assert [entry.path for entry in cache.prune(2 * size)] == [older]
    assert [entry.path for entry in cache.prune(0)] == [old]
    assert used.is_dir() and cache.prune(0) == []


def test_a_use_makes_an_entry_young_and_a_new_one_keeps_the_limit(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fill("a", "first", 50_000, 9000), fill("a", "second", 50_000, 8000)
    cache.entry("a", "first", lambda folder: pytest.fail("it is there"))
    monkeypatch.setenv("SWEEP_CACHE_LIMIT", "120KB")
    third = fill("a", "third", 50_000, 0)
    assert first.is_dir() and third.is_dir() and not second.exists()
    monkeypatch.setenv("SWEEP_CACHE_LIMIT", "plenty")
    with pytest.raises(RequestError, match="SWEEP_CACHE_LIMIT must be a size such as 12GiB.*got 'plenty'"):
        fill("a", "fourth", 1, 0)


def test_damaged_entries_are_found_and_removed(cache_folder: Path, capsys: pytest.CaptureFixture) -> None:
    good, changed, short = fill("a", "good", 10, 0), fill("a", "changed", 10, 0), fill("a", "short", 10, 0)
    (changed / "data").write_bytes(b"0123456789")
    (short / "data").unlink()
    assert (cache.damage(good), cache.damage(changed), cache.damage(short)) == (
        None,
        "data has changed",
        "data is missing",
    )
    with pytest.raises(SystemExit, match="1"):
        cache.main(["verify"])
    output = capsys.readouterr().out
    assert "a/changed: data has changed; removed" in output and "2 of 3 entries were damaged" in output
    assert good.is_dir() and not changed.exists() and not short.exists()


def test_what_a_killed_maker_has_left_is_seen_and_goes_when_it_is_old(
    cache_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    code = (
        "import os; from pathlib import Path; from sweep import cache\n"
        "cache.entry('kind', 'key', lambda f: ((f / 'half').write_bytes(bytes(3_000_000)), os._exit(9)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (left,) = [path for path in (cache_folder / "kind").iterdir() if path.is_dir()]
    (cache_folder / "kind" / "stray.npy").write_bytes(bytes(500))  # a file that is no entry
    for arguments, expected in ((["list"], 0), (["verify"], 0), (["prune"], 0)):
        with pytest.raises(SystemExit, match=str(expected)):
            cache.main(arguments)
    output = capsys.readouterr().out
    assert "3.0 MB in" in output and "0 of 0 entries were damaged" in output
    assert left.is_dir()  # it may be at work
    for path in (*left.iterdir(), left, cache_folder / "kind" / "stray.npy"):
        os.utime(path, (time.time() - 4000,) * 2)
    with locks.lock(cache_folder / "kind" / ".key.lock"):
        busy = subprocess.run([sys.executable, "-m", "sweep.cache", "prune"], capture_output=True, text=True)
    assert "removed 1 entries" in busy.stdout and left.is_dir()  # it is at work, though slowly
    assert [entry.size for entry in cache.prune(0)] == [3_000_000] and not left.exists()


def test_a_resumable_maker_goes_on_where_the_last_one_ended(cache_folder: Path) -> None:
    seen: list[list[str]] = []

    def make(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        cache.write(folder / f"part{len(seen)}", lambda file: file.write(b"done"))
        if len(seen) < 3:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cache.entry("kind", "key", make, resumable=True)
        assert cache.entries() == []
    path = cache.entry("kind", "key", make, resumable=True)
    assert seen == [[], ["part1"], ["part1", "part2"]]
    assert cache.damage(path) is None and (path / "part3").read_bytes() == b"done"


def test_the_command_line_lists_and_prunes(cache_folder: Path, capsys: pytest.CaptureFixture) -> None:
    fill("models", "abc", 3_000_000, 7200)
    for arguments in (["list"], ["prune", "--limit", "5MB"], ["prune"], ["list"]):
        with pytest.raises(SystemExit, match="0"):
            cache.main(arguments)
    output = capsys.readouterr().out
    assert "models/abc  3.0" in output and "removed 0 entries" in output and "removed 1 entries, 3.0 MB" in output
    with pytest.raises(SystemExit, match="2"):
        cache.main(["prune", "--limit", "all"])
