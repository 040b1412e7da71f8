"""One child process a cell, so that whatever happens in a cell happens to that cell alone.

The children come from a forkserver that has the heavy imports loaded: a cell starts in hundredths of a second. The
child writes its row itself and reports it; the parent writes one only for a child that died without. On its way there it
says when it begins to wait for other cells and when it goes on, since that is in no limit. A child's standard error
passes through the parent, which keeps its end: what C code said before it died is part of the reason.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sweep import forkserver, locks, machine, store, turns
from sweep.config import Cell

T = TypeVar("T")

# None of them starts CUDA. The last is what a child imports first, being the program that its parent runs.
_PRELOAD = ["sweep.run", "lm_eval.models.huggingface", "lm_eval.tasks", "pandas", "pyarrow.parquet", "sweep.__main__"]
_POLL = 0.05  # seconds between looks at a child's memory: what it may take beyond the limit before it is ended
_GRACE = 20.0  # seconds from the report of a row to the end of the process
_TAIL = 4000  # characters of standard error that a row keeps
_BAR = re.compile(r"[^\n]*\r|[^\r\n]*\d+%\|[^\r\n]*\]")  # what tqdm draws
Status = str  # ok, failed, out_of_memory, crashed, timeout
Work = Callable[[Cell], tuple[dict[str, Any], dict[str, Any]]]  # a cell's measured columns and its tables


class Ending(NamedTuple):
    row: dict[str, Any]
    unstored: str | None = None  # why the results folder did not take the row
    outdone: bool = False  # the row is not stored, because it is not ok and one that is stands there


class Limits(NamedTuple):
    timeout: float | None = None  # seconds of work, not of waiting for other cells
    memory: int | None = None  # resident bytes


def run(
    cell: Cell,
    known: dict[str, Any],
    results: str,
    limits: Limits = Limits(),  # noqa: B008
    gpu: str | None = None,
    stop: threading.Event | None = None,
    save_model: str | None = None,
    work: Work | None = None,
) -> Ending:
    """Run a cell in a child process and return the row that it left.

    known       the columns that are known before the cell runs, for a row of a child that cannot write its own
    limits      beyond which the child is ended. Memory is watched as resident bytes (VmHWM), not limited by
                RLIMIT_AS or RLIMIT_DATA: CUDA and thread stacks reserve address space that they never touch
    gpu         the only CUDA device that the child shall see
    stop        set by another thread to end the child
    save_model  folder that receives the pruned model, or None
    work        what the child does; by default run.run_cell
    Raises KeyboardInterrupt after Ctrl-C or `stop`, with the child ended and no row written.
    """
    if work is None:
        work = functools.partial(_run_cell, save_model=save_model, command=known["command"])
    context = _context()
    reports, report = context.Pipe(duplex=False)
    errors, error = context.Pipe(duplex=False)
    child = context.Process(
        target=_child, args=(cell, known, results, gpu, work, report, error), name=f"cell-{known['cell']}"
    )
    ooms = _oom_kills()
    child.start()
    report.close()
    error.close()
    tail = _Tail(errors)
    try:
        reported, ended = _watch(child, reports, limits, stop)
    finally:  # also on Ctrl-C
        if child.is_alive():
            child.kill()
        child.join()
        said = tail.close()
        reports.close()
    if reported is not None:
        return reported
    status, reason = ended or _cause(child.exitcode, ooms)
    return record(known, results, status, f"{said}\n{reason}".strip())


def _watch(
    child: BaseProcess, reports: Connection, limits: Limits, stop: threading.Event | None
) -> tuple[Ending | None, tuple[Status, str] | None]:
    """(what the child reported, why it had to be ended); both None when it died by itself."""
    work = _Stopwatch()
    poll = _POLL if limits.memory else 0.2 if stop else None
    while True:
        left = limits.timeout - work.seconds() if limits.timeout and work.runs else None
        pause = min((p for p in (poll, left) if p is not None), default=None)
        ready = wait([child.sentinel, reports], None if pause is None else max(pause, 0.0))
        if reports in ready:
            with contextlib.suppress(EOFError):  # it died, as the sentinel says
                said = reports.recv()
                if isinstance(said, Ending):
                    child.join(_GRACE)
                    return said, None
                work.run(not said)  # it waits for other cells, or goes on
                continue
        if child.sentinel in ready:
            return None, None
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        resident = _resident(child.pid) if limits.memory else 0
        if limits.memory and resident > limits.memory:
            _ask_where(child)
            took = f"it held {resident / 2**30:.2f} GiB"
            return None, ("out_of_memory", f"ended at memory_limit={limits.memory / 2**30:.2f} GiB: {took}")
        if limits.timeout and work.seconds() >= limits.timeout:
            _ask_where(child)
            return None, ("timeout", f"not finished after timeout={limits.timeout:g} seconds")


def _cause(exitcode: int | None, ooms: int) -> tuple[Status, str]:
    if exitcode == -signal.SIGKILL and _oom_kills() > ooms:
        return "out_of_memory", "killed by the kernel because the machine or its container ran out of memory"
    if exitcode is not None and exitcode < 0:
        return "crashed", f"killed by signal {signal.Signals(-exitcode).name}"
    if exitcode == 255:  # also what multiprocessing says of a child whose forkserver was killed
        return "crashed", "the process ended with exit code 255, or the server that it came from was killed"
    return "failed", f"the process ended with exit code {exitcode} before the cell was done"


def _context() -> ForkServerContext:
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # a progress bar in a log file is noise; tqdm reads this when it is imported
    os.environ.update(machine.thread_settings())  # read when the server loads torch
    return forkserver.started(_PRELOAD)


def _child(
    cell: Cell,
    known: dict[str, Any],
    results: str,
    gpu: str | None,
    work: Work,
    reports: Connection,
    errors: Connection,
) -> None:
    os.dup2(errors.fileno(), 2)
    errors.close()  # so that its end is seen when this process ends
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    forkserver.end_with_the_parent()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    locks.on_wait(reports.send)
    with turns.working():
        tables: dict[str, Any] = {}
        try:
            row, tables = work(cell)
            row = known | row
        except BaseException as error:
            status = "out_of_memory" if is_out_of_memory(error) else "failed"
            row = known | {"status": status, "error": traceback.format_exc(limit=-8)}
        ending = _stored(results, row | {"waited_seconds": locks.waited_seconds()}, tables)
        if ending.unstored and row["status"] == "ok":
            ending = record(known, results, "failed", ending.unstored)
    reports.send(ending)


def _run_cell(cell: Cell, save_model: str | None, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from sweep.run import run_cell  # here, so that the parent loads no torch

    return run_cell(cell, save_model, command)


def record(known: dict[str, Any], results: str, status: Status, error: str) -> Ending:
    """Write the row of a cell that has no numbers, unless it has them: a child may die after it has stored its row."""
    return _stored(results, known | {"status": status, "error": error}, {})


def _stored(results: str, row: dict[str, Any], tables: dict[str, Any]) -> Ending:
    try:
        standing = store.write(results, row, tables)
    except Exception as problem:
        return Ending(row, f"the row could not be written to {results}: {type(problem).__name__}: {problem}")
    if standing is None:
        return Ending(row)
    same_run = standing["started_at"] is not None and standing["started_at"] == row.get("started_at")
    return Ending(standing) if same_run else Ending(row, outdone=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the machine or of a device, ran out."""
    text = str(error).lower()
    phrases = ("can't allocate memory", "out of memory", "alloc_failed", "unable to allocate", "cannot allocate memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError | OSError) and any(phrase in text for phrase in phrases))
    )


class _Stopwatch:
    """Seconds that a child has worked, without those in which it has waited."""

    def __init__(self) -> None:
        self.runs, self.before, self.since = True, 0.0, time.monotonic()

    def run(self, runs: bool) -> None:
        self.before, self.since, self.runs = self.seconds(), time.monotonic(), runs

    def seconds(self) -> float:
        return self.before + (time.monotonic() - self.since if self.runs else 0.0)


class _Tail:
    """Passes a child's standard error on, line by line, and keeps its end.

    A class because a thread and its buffer belong together. Progress bars pass only to a terminal.
    """

    def __init__(self, source: Connection) -> None:
        self.source, self.kept = source, ""
        self.thread = threading.Thread(target=self._pass_on, daemon=True)
        self.thread.start()

    def _pass_on(self) -> None:
        to_terminal, pending = sys.stderr.isatty(), ""
        while chunk := self._read():
            text = chunk.decode(errors="replace")
            self.kept = (self.kept + text)[-4 * _TAIL :]
            if not to_terminal:
                *lines, pending = (pending + text).split("\n")
                text = "".join(f"{line}\n" for line in map(without_bars, lines) if line.strip())
            with contextlib.suppress(BrokenPipeError):  # nobody reads it; the child is not to wait for that
                sys.stderr.write(text)
                sys.stderr.flush()

    def _read(self) -> bytes:
        try:
            return os.read(self.source.fileno(), 65536)
        except OSError:
            return b""

    def close(self) -> str:
        """The end of what was said; waits a second for what a child of the child may still say."""
        self.thread.join(1.0)
        if not self.thread.is_alive():
            self.source.close()
        return "\n".join(filter(str.strip, map(without_bars, self.kept.split("\n"))))[-_TAIL:]


def without_bars(line: str) -> str:
    """A line of standard error without the progress bars that were drawn in it, and without faulthandler's list of
    every module there is."""
    return "" if line.startswith("Extension modules: ") else _BAR.sub("", line)


def ask(question: Callable[..., T], *arguments: Any) -> T:
    """What `question` answers in a child that has the heavy imports loaded, for a parent that is to load none.

    Raises what it raises; RuntimeError when the child dies of it.
    """
    context = _context()
    answers, answer = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(question, arguments, answer), name="question")
    child.start()
    answer.close()
    try:
        said, error = answers.recv()
        child.join(_GRACE)
    except EOFError:
        child.join()
        raise RuntimeError(f"a child process died with exit code {child.exitcode}") from None
    finally:  # also on Ctrl-C
        if child.is_alive():
            child.kill()
        child.join()
        answers.close()
    if error is not None:
        raise error
    return said


def _answer(question: Callable[..., Any], arguments: tuple[Any, ...], answer: Connection) -> None:
    forkserver.end_with_the_parent()
    try:
        with turns.working():  # it may read a whole checkpoint: not beside a cell that is timed
            answer.send((question(*arguments), None))
    except Exception as error:
        answer.send((None, error))


def _ask_where(child: BaseProcess) -> None:
    """Have the child's main thread print its traceback, and give it the time to."""
    if child.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGUSR1)
            time.sleep(0.2)


def _resident(pid: int | None) -> int:
    """The most resident bytes that a process has held, since it started or had the mark reset."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def _oom_kills() -> int:
    """How often the kernel has killed a process for memory, of this machine or this container; 0 where it is silent."""
    total = 0
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with contextlib.suppress(OSError):
            total += sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill "))
    return total
