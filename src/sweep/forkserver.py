"""multiprocessing's forkserver as cells need it, which is more than it offers: one that Ctrl-C does not reach, and whose
children end with the process that asked for them.

What is used beyond its documentation stands in this file alone; tests/test_private.py says which of it a new Python, or a
new joblib, has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def started(preload: Sequence[str]) -> ForkServerContext:
    """A context whose server runs, with the modules `preload` imported in it; it keeps the environment of this moment.

    Ctrl-C is the parent's matter. What the server blocks, its children block from their first moment on, and so it is
    started, by an undocumented call, while this process blocks the signal. The resource tracker is started before, since
    that would unblock it.
    """
    if (
        multiprocessing.get_start_method(allow_none=True) == "loky"
    ):  # a worker of joblib; its children know no such method
        multiprocessing.set_start_method("forkserver", force=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_the_parent() -> None:
    """Called in a child: it does not outlive its parent, for a killed parent ends the server, and that ends this process.

    The server ends when nobody holds the other end of its pipe any more, and hands that end to every child, which would
    so keep it alive. This child starts no others, and gives it up. To watch the parent from a thread would not do: a
    child may hang in C code that lets no thread run.
    """
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # the kernel, short of memory, is to choose the child and not the parent
            Path("/proc/self/oom_score_adj").write_text("500")
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the line above
        os._exit(1)
