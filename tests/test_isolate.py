"""Whatever happens in a cell becomes its status, with a reason, and happens to that cell alone."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import sweep
from sweep import isolate, locks, store
from sweep.isolate import Limits

CELL: Any = None  # what the child gets; these children never look at it
DESCRIBED = {"cell": "00000000000000aa", "model": "m", "method": "weight"}


def fine(cell: Any) -> Any:
    return {"status": "ok", "t/acc": 0.5}, {}


def raises(cell: Any) -> Any:
    raise KeyError("no such thing")


def exits(cell: Any) -> Any:
    sys.exit("enough")


def exits_at_once(cell: Any) -> Any:
    os._exit(7)


def pretends_success(cell: Any) -> Any:
    os._exit(0)


def segfaults(cell: Any) -> Any:
    ctypes.string_at(0)


def aborts(cell: Any) -> Any:
    os.write(2, b"terminate called after throwing an instance of 'std::runtime_error'\n")
    os.abort()


def killed(cell: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def too_large_a_tensor(cell: Any) -> Any:
    torch.empty(2**60)


def too_large_for_the_device(cell: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def hangs(cell: Any) -> Any:
    print("\rdeciding:  50%|#####     | 1/2 [00:01<00:01]", end="", file=sys.stderr, flush=True)
    time.sleep(600)


def grows(cell: Any) -> Any:
    held = []
    while True:
        held.append(bytearray(os.urandom(1) * 2**24))


def what_it_sees(cell: Any) -> Any:
    return {"status": "ok", "gpu": os.environ["CUDA_VISIBLE_DEVICES"]}, {}


@pytest.mark.parametrize(
    ("work", "status", "words"),
    [
        (raises, "failed", ["KeyError: 'no such thing'", "test_isolate.py"]),
        (exits, "failed", ["SystemExit: enough", "in exits"]),
        (exits_at_once, "failed", ["ended with exit code 7"]),
        (pretends_success, "failed", ["ended with exit code 0 before the cell was done"]),
        (segfaults, "crashed", ["Fatal Python error: Segmentation fault", "in segfaults", "killed by signal SIGSEGV"]),
        (aborts, "crashed", ["terminate called after throwing", "in aborts", "SIGABRT"]),
        (killed, "crashed", ["killed by signal SIGKILL"]),
        (too_large_a_tensor, "out_of_memory", ["can't allocate memory", "in too_large_a_tensor"]),
        (too_large_for_the_device, "out_of_memory", ["CUDA out of memory"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_every_way_to_die_becomes_a_status_with_its_reason(
    work: isolate.Work, status: str, words: list[str], tmp_path: Path
) -> None:
    row, unstored, outdone = isolate.run(CELL, DESCRIBED, str(tmp_path), work=work)
    assert unstored is None and not outdone
    stored = sweep.load(tmp_path).iloc[0]
    assert stored.status == row["status"] == status
    for word in words:
        assert word in stored.error
    assert isolate.run(CELL, DESCRIBED, str(tmp_path), work=fine).row["t/acc"] == 0.5  # the next one is none the worse
    assert sweep.load(tmp_path).status.tolist() == ["ok"]


def test_a_hang_ends_at_the_timeout_and_says_where_it_was(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    row = isolate.run(CELL, DESCRIBED, str(tmp_path), Limits(timeout=2), work=hangs).row
    assert row["status"] == "timeout"
    assert "not finished after timeout=2 seconds" in row["error"] and "in hangs" in row["error"]
    assert "deciding" not in row["error"] and "deciding" not in capfd.readouterr().err  # no progress bar in a log


def test_a_cell_that_takes_more_memory_than_it_may_is_ended(tmp_path: Path) -> None:
    row = isolate.run(CELL, DESCRIBED, str(tmp_path), Limits(memory=2**30), work=grows).row
    assert row["status"] == "out_of_memory"
    assert "ended at memory_limit=1.00 GiB" in row["error"] and "in grows" in row["error"]


def test_a_kill_by_the_kernel_for_memory_is_told_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([3, 4])
    monkeypatch.setattr(isolate, "_oom_kills", lambda: next(kills))
    row = isolate.run(CELL, DESCRIBED, str(tmp_path), work=killed).row
    assert row["status"] == "out_of_memory" and "killed by the kernel" in row["error"]


def measured(cell: Any) -> Any:
    return {"status": "ok", "t/acc": 0.5}, {"samples": pd.DataFrame({"task": ["t"], "value": [0.5]})}


def killed_between_its_row_and_its_report(cell: Any) -> Any:
    stores = store.write

    def stores_and_dies(*asked: Any) -> None:
        stores(*asked)
        os.kill(os.getpid(), signal.SIGKILL)

    store.write = stores_and_dies
    return measured(cell)


def hangs_between_its_row_and_its_report(cell: Any) -> Any:
    stores = store.write

    def stores_and_hangs(*asked: Any) -> None:
        stores(*asked)
        time.sleep(600)

    store.write = stores_and_hangs
    return measured(cell)


def described(second: int) -> dict[str, str]:
    return DESCRIBED | {"started_at": f"2026-01-01T00:00:0{second}+00:00"}


@pytest.mark.parametrize("work", [killed_between_its_row_and_its_report, hangs_between_its_row_and_its_report])
def test_a_row_that_is_stored_is_the_cells_outcome_whatever_becomes_of_its_process(
    work: isolate.Work, tmp_path: Path
) -> None:
    row, unstored, outdone = isolate.run(CELL, described(1), str(tmp_path), Limits(timeout=3), work=work)
    assert (row["status"], row["t/acc"], unstored, outdone) == ("ok", 0.5, None, False)
    assert sweep.load(tmp_path).status.tolist() == ["ok"]
    assert store.read_table(tmp_path, "samples").value.tolist() == [0.5]


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("work", [raises, killed, exits_at_once])
def test_a_run_that_fails_leaves_the_ok_row_of_an_earlier_one(
    work: isolate.Work, compacted: bool, tmp_path: Path
) -> None:
    isolate.run(CELL, described(1), str(tmp_path), work=measured)
    if compacted:
        store.compact(tmp_path)
    before = sweep.load(tmp_path)
    row, unstored, outdone = isolate.run(CELL, described(2), str(tmp_path), work=work)
    assert row["status"] in ("failed", "crashed") and unstored is None and outdone
    pd.testing.assert_frame_equal(sweep.load(tmp_path), before)
    assert store.read_table(tmp_path, "samples").value.tolist() == [0.5]


def waits_and_works(held: Path, cell: Any) -> Any:
    (held.parent / "there").touch()
    with locks.lock(held):
        time.sleep(1)
    return {"status": "ok", "cell_seconds": 1.0}, {}


def waits_and_hangs(held: Path, cell: Any) -> Any:
    waits_and_works(held, cell)
    hangs(cell)


@pytest.mark.parametrize(("work", "status"), [(waits_and_works, "ok"), (waits_and_hangs, "timeout")])
def test_waiting_for_another_cell_is_in_no_timeout_and_in_a_column_of_its_own(
    work: Callable[[Path, Any], Any], status: str, tmp_path: Path
) -> None:
    """Another cell holds something that this one needs, as a cell does that measures shared statistics."""
    held, limit = tmp_path / "held", 6.0

    def another_cell() -> None:
        with locks.lock(held):
            while not (tmp_path / "there").exists():
                time.sleep(0.05)
            time.sleep(limit + 2)

    other = threading.Thread(target=another_cell)
    other.start()
    results = tmp_path / "results"
    found = isolate.run(CELL, DESCRIBED, str(results), Limits(timeout=limit), work=functools.partial(work, held))
    other.join()
    assert found.row["status"] == status
    if status == "ok":  # though it took longer, from its start to its end
        assert limit < sweep.load(results).waited_seconds.item() < limit + 4
    else:  # a limit there is, all the same
        assert (
            "not finished after timeout=6 seconds" in found.row["error"] and "in waits_and_hangs" in found.row["error"]
        )


def test_the_child_sees_the_device_that_it_is_given(tmp_path: Path) -> None:
    assert isolate.run(CELL, DESCRIBED, str(tmp_path), gpu="3", work=what_it_sees).row["gpu"] == "3"


def how_its_threads_wait(cell: Any) -> Any:
    """What libgomp says of itself when it is loaded, in a process that starts as the cell's server has."""
    variables = dict(entry.split("=", 1) for entry in Path("/proc/self/environ").read_text().split("\0") if entry)
    asked = subprocess.run(
        [sys.executable, "-c", "import torch"],
        capture_output=True,
        text=True,
        env=variables | {"OMP_DISPLAY_ENV": "verbose"},
    )
    return {"status": "ok", "gpu": asked.stderr}, {}


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP of torch on Linux")
def test_idle_threads_of_a_cell_leave_the_cores_to_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "cell.py"  # apart: the server of the tests runs already
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_isolate as t\n"
        f"if __name__ == '__main__': t.isolate.run(None, t.DESCRIBED, {str(tmp_path)!r}, work=t.how_its_threads_wait)"
    )
    subprocess.run([sys.executable, str(script)], check=True)
    assert "GOMP_SPINCOUNT = '10000'" in sweep.load(tmp_path).gpu.item()


def test_stop_ends_the_child_and_writes_no_row(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    with pytest.raises(KeyboardInterrupt):
        isolate.run(CELL, DESCRIBED, str(tmp_path), stop=stop, work=hangs)
    assert not list(tmp_path.glob("cells/*"))
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("cell-")]


def test_a_row_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.write_text("a file stands where the folder should be")
    row, unstored, _ = isolate.run(CELL, DESCRIBED, str(results), work=fine)
    assert row["status"] == "failed" and "could not be written" in row["error"]
    assert unstored is not None and "NotADirectoryError" in unstored


def test_no_child_outlives_its_sweep(tmp_path: Path) -> None:
    """The head is killed as the kernel or a person would, and cannot clean up."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_isolate as t\n"
        f"if __name__ == '__main__': t.isolate.run(None, t.DESCRIBED, {str(tmp_path)!r}, work=t.leaves_its_number)"
    )
    script = tmp_path / "head.py"
    script.write_text(code)
    head = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    number = tmp_path / "number"
    while not number.exists() or not number.read_text():
        time.sleep(0.1)
        assert head.poll() is None
    child = int(number.read_text())
    os.kill(head.pid, signal.SIGKILL)
    head.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still there, ten seconds after its sweep was killed")


def leaves_its_number(cell: Any) -> Any:
    Path("number").write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize(
    ("line", "rest"),
    [
        ("Running: 10%|#   | 1/10 [00:01<00:09,  1.0it/s]", ""),
        ("\r 10%|# | 1/10 [00:01]\r100%|##| 10/10 [00:10<00:00]", ""),
        ("\r 10%|# | 1/10 [00:01]\rUserWarning: odd", "UserWarning: odd"),
        ("50% of [them] are odd", "50% of [them] are odd"),
    ],
)
def test_progress_bars_are_taken_out_of_lines(line: str, rest: str) -> None:
    assert isolate.without_bars(line) == rest
