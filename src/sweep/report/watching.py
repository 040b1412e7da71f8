"""A report that is made again while its rows arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from sweep.report import asked
from sweep.settings import RequestError

EVERY = 5.0  # seconds between looks


def watch(results: Sequence[str], render: Callable[[], None], every: float = EVERY) -> None:
    """Call `render` when there are rows that it has not seen, with a line for each time, until Ctrl-C.

    A folder without rows is waited for. What is wrong with the request ends it, as without watching: RequestError.
    """
    seen: frozenset[tuple[str, str]] = frozenset()
    waits = False
    try:
        while True:
            found = _rows(results)
            if found - seen:
                render()
                ok = sum(status == "ok" for _, status in found)
                others = f", {len(found) - ok} not ok" if len(found) - ok else ""
                print(f"{datetime.now():%H:%M:%S}  {ok} cells{others}, {len(found - seen)} of them new", flush=True)
                seen = found
            elif not seen and not waits:
                print(f"waiting for the first row in {', '.join(results)}; Ctrl-C ends", flush=True)
                waits = True
            time.sleep(every)
    except KeyboardInterrupt:
        print("stopped: the last report stays")


def _rows(results: Sequence[str]) -> frozenset[tuple[str, str]]:
    """(cell and when it started, status) of each row; none where there is no folder yet."""
    try:
        rows = asked.read(results)
    except RequestError:
        return frozenset()
    names = rows.cell + " " + rows.started_at.astype(str)
    return frozenset(zip(names, rows.status, strict=True))
