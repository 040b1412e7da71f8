"""One child process a cell, so that whatever happens in a cell happens to that cell alone.

The children come from a forkserver that has the heavy imports loaded: a cell starts in hundredths of a second. The
child writes its row itself; the parent writes one only for a child that died without.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from sweep import store
from sweep.config import Cell

_PRELOAD = ["sweep.run", "lm_eval.models.huggingface", "lm_eval.tasks"]  # none of them starts CUDA
_PR_SET_PDEATHSIG = 1
Status = str  # ok, failed, out_of_memory, crashed, timeout


def run(
    cell: Cell, described: dict[str, Any], results: str, timeout: float | None, save_model: str | None = None
) -> dict[str, Any]:
    """Run a cell in a child process and return the row that it left.

    described   the columns that are known before the cell runs, for a row of a child that cannot write its own
    timeout     seconds, or None
    save_model  folder that receives the pruned model, or None
    """
    child = _context().Process(
        target=_child, args=(cell, described, results, save_model), name=f"cell-{described['cell']}"
    )
    ooms = _oom_kills()
    child.start()
    try:
        child.join(timeout)
        timed_out = child.is_alive()
    finally:  # also on Ctrl-C
        if child.is_alive():
            child.kill()
            child.join()
    if child.exitcode == 0:
        row = store.read_row(results, described["cell"])
        assert row is not None
        return row
    if timed_out:
        status, error = "timeout", f"not finished after {timeout:g} seconds"
    elif child.exitcode == -signal.SIGKILL and _oom_kills() > ooms:
        status, error = "out_of_memory", "killed by the kernel because the machine ran out of memory"
    elif child.exitcode is not None and child.exitcode < 0:
        status, error = "crashed", f"killed by signal {signal.Signals(-child.exitcode).name}"
    else:
        status, error = "failed", f"the process ended with exit code {child.exitcode} before the cell was done"
    return _record_failure(described, results, status, error)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # a progress bar in a log file is noise; tqdm reads this when it is imported
    return context


def _child(cell: Cell, described: dict[str, Any], results: str, save_model: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    if sys.platform == "linux":  # no cell outlives a sweep that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from sweep.run import run_cell

    try:
        row, tables = run_cell(cell, save_model, described["command"])
    except BaseException as error:
        status = "out_of_memory" if _is_out_of_memory(error) else "failed"
        _record_failure(described, results, status, traceback.format_exc(limit=-8))
        return
    store.write(results, described | row, tables)


def _record_failure(described: dict[str, Any], results: str, status: Status, error: str) -> dict[str, Any]:
    row = described | {"status": status, "error": error}
    store.write(results, row, {})
    return row


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )  # fmt: skip


def _oom_kills() -> int:
    """How often this machine's kernel has killed a process for memory; 0 where it does not tell."""
    try:
        with Path("/proc/vmstat").open() as handle:
            return next((int(line.split()[1]) for line in handle if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
