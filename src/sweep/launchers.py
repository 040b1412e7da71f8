"""What Hydra's launchers lack: one job's exception is not another's, and a job that Slurm has killed must not be waited for."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_UNSEEN = 30.0  # seconds that a job may be absent from the queue before its result counts as lost: files arrive late


def result(job: Any) -> Any:
    """What a job returned, or the exception that it raised or was lost by."""
    if isinstance(job, Exception):
        return job
    try:
        return job.return_value
    except Exception as error:
        return error


@contextmanager
def not_waiting_for_the_dead() -> Iterator[None]:
    """While open, submitit asks squeue which jobs live, and a job that died gives its exception instead of raising it.

    submitit asks sacct, which needs Slurm's accounting database; without one it takes a killed job for one that is
    still to come, for ever. And the first exception would keep Hydra's launcher from waiting for the other jobs.
    """
    try:
        from submitit.core.core import InfoWatcher
        from submitit.slurm.slurm import SlurmJob
    except ImportError:  # another launcher
        yield
        return

    class Watcher(InfoWatcher):
        """States by `squeue`; a job that is no longer listed has ended."""

        def __init__(self) -> None:
            super().__init__(delay_s=10)
            self.seen: dict[str, float] = {}

        def _make_command(self) -> list[str] | None:
            jobs = sorted({job.split("_")[0] for job in self._registered - self._finished})
            return (
                ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={','.join(jobs)}"]
                if jobs
                else None
            )

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            text = string.decode() if isinstance(string, bytes) else string
            now = time.monotonic()
            listed = dict(line.strip().split("|") for line in text.splitlines() if "|" in line)
            self.seen |= dict.fromkeys(listed, now)
            gone = [
                job for job in self._registered if job not in listed and now - self.seen.setdefault(job, now) > _UNSEEN
            ]
            return {job: {"State": state} for job, state in (listed | dict.fromkeys(gone, "GONE")).items()}

        def update(self) -> None:
            command = self._make_command()
            if command is None:
                return
            self._num_calls += 1
            self._last_status_check = time.time()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            # squeue forgets ended jobs after a while, and then calls their number invalid
            if done.returncode == 0 or "Invalid job id" in done.stderr:
                self._info_dict.update(self.read_info(done.stdout))
            self._finished |= {job for job in self._registered - self._finished if self.is_done(job, mode="cache")}

        def get_state(self, job_id: str, mode: str = "standard") -> str:
            return self.get_info(job_id, mode=mode).get("State") or "UNKNOWN"

    waits_and_raises, watcher = SlurmJob.results, SlurmJob.watcher

    def results(job: SlurmJob) -> list[Any]:
        try:
            return waits_and_raises(job)
        except Exception as error:
            return [error]

    SlurmJob.results, SlurmJob.watcher = results, Watcher()
    try:
        yield
    finally:
        SlurmJob.results, SlurmJob.watcher = waits_and_raises, watcher
