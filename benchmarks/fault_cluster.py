"""A cluster as ``headrace scheduler`` and ``headrace worker`` make it: of processes that can be killed one by one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import headrace

__all__ = ["SchedulerProcess", "command", "end", "running_cluster"]

_START_SECONDS = 120.0


def command(*arguments: str, settings: Mapping[str, object] | None = None) -> subprocess.Popen[bytes]:
    """A ``headrace`` command in a process of its own, which ends with this one.

    `settings` are dotted names of the configuration, such as ``codebook.min-rows``.
    """
    variables = {
        "DASK_HEADRACE__" + name.upper().replace(".", "__").replace("-", "_"): str(value)
        for name, value in (settings or {}).items()
    }
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.pipeline.cli", *arguments, "--end-with-parent"],
        stdin=subprocess.PIPE,
        env={**os.environ, **variables},
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and kill it if it does not."""
    process.terminate()
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


class SchedulerProcess:
    """A scheduler that can be killed and replaced, always at the same address.

    Parameters
    ----------
    workers : int
        Worker processes that share this machine.
    settings : mapping
        As in `command`.
    """

    def __init__(self, workers: int = 2, settings: Mapping[str, object] | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._workers, self._settings = workers, settings
        self.start()

    def start(self) -> None:
        where = ["--port", str(self.port), "--dashboard", ":0", "--backend", "host", "--workers", str(self._workers)]
        self._process = command("scheduler", *where, settings=self._settings)

    def wait(self) -> None:
        """Return once it listens; `ClusterError` if it does not come, or has ended."""
        until = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            if self._process.poll() is not None or time.monotonic() > until:
                raise headrace.ClusterError(f"no scheduler listens at {self.address} (see its words above)")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def end(self) -> None:
        end(self._process)


@contextlib.contextmanager
def running_cluster(
    workers: int, settings: Mapping[str, object] | None = None, *, timeout: float = 30.0
) -> Iterator[tuple[headrace.Database, SchedulerProcess]]:
    """A scheduler, so many worker processes, which are started again when they die, and a client.

    `timeout` is how long a client of Dask's waits for a scheduler that is away before it closes itself.
    """
    scheduler = SchedulerProcess(workers, settings)
    try:
        scheduler.wait()
        processes = command("worker", scheduler.address, "--workers", str(workers), settings=settings)
        try:
            with headrace.connect(scheduler.address, backend="host", timeout=timeout) as db:
                until = time.monotonic() + _START_SECONDS
                while len(db.workers) < workers:
                    if time.monotonic() > until:
                        raise headrace.ClusterError(f"only {len(db.workers)} of {workers} workers came")
                    time.sleep(0.05)
                yield db, scheduler
        finally:
            end(processes)
    finally:
        scheduler.end()
