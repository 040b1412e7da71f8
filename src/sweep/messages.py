"""A user's mistake becomes a line or two on the terminal: which key, what is allowed, what came. No traceback."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any

from sweep.settings import RequestError

USAGE_ERROR, INTERRUPTED, UNREAD = 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE
_FULL_ERRORS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as it was set for us: no mistake is then put into words


def explain(error: Exception) -> str | None:
    """The words for a mistake in what was asked; None for another error."""
    return str(error) if isinstance(error, RequestError) else None


def guard(command: Callable[[], Any], explain: Callable[[Exception], str | None] = explain) -> int:
    """Run a command and return its exit code, with wrong requests put into words on standard error.

    What `explain` has no words for is not the user's mistake, and passes through with its traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()  # here, where it can still be told whether anybody reads it
    except KeyboardInterrupt:
        again = shlex.join(["python", *sys.orig_argv[1:]])
        _say(f"\nsweep: interrupted; finished rows are kept. To go on from here: {again}")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return UNREAD
        if _FULL_ERRORS or (words := explain(error)) is None:
            raise
        return complain(words)


def complain(words: object) -> int:
    """Say on standard error what is wrong with the request, and return the exit code for it."""
    _say(f"sweep: {words}")
    return USAGE_ERROR


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr)
    except BrokenPipeError:
        _nobody_reads()


def _nobody_reads() -> bool:
    """Whether the program that read our output has ended, as `head` does; what is still printed is then dropped."""
    ended = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream.fileno())]
    for stream in ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python complains when it ends
    return bool(ended)


def _is_unread(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)  # an error is told unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))
