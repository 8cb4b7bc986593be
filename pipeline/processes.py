"""A cluster's processes: a scheduler by itself, workers by themselves, and a parent that starts them again.

Apart from each other, because then neither ends with the other: workers outlive their scheduler (`cluster.staying`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from headrace.gpu.errors import ClusterError
from headrace.pipeline import config
from headrace.pipeline.cli_common import shielded
from headrace.pipeline.launch import check_host, dashboard_address, plugins_from_config

__all__ = ["Child", "end_with_parent", "run_scheduler", "run_workers"]

log = logging.getLogger("headrace.pipeline")

_PAUSES = (0.2, 5.0)
_END_SECONDS = 20.0


async def run_scheduler(
    host: str, port: int, dashboard: str | None, backend: str | None, workers: int, ready: Callable[[str], None]
) -> None:
    """Run a scheduler with Headrace on it until SIGTERM or Ctrl-C; `ready` is told its address.

    Raises
    ------
    ConfigError
        As `check_host`.
    ClusterError
        Nothing can listen there.
    """
    from distributed import Scheduler
    from distributed.protocol.pickle import dumps

    check_host(host)
    config.apply_dask_defaults()
    plugin, worker_plugin = plugins_from_config(workers, backend)
    plugin.hand_out(dumps(worker_plugin))  # type: ignore[no-untyped-call]
    logging.getLogger("distributed").setLevel(logging.WARNING)  # importing it has set it to INFO
    stopped = _signalled()
    scheduler = Scheduler(host=host, port=port, dashboard_address=dashboard_address(dashboard, host), plugins=[plugin])
    await plugin.start(scheduler)  # before the first worker can come
    try:
        await scheduler
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"no scheduler can listen at {host}:{port} ({error}): is the port taken?") from error
    ready(scheduler.address)
    await stopped.wait()
    await scheduler.close(reason="headrace-stopped")


async def run_workers(address: str, count: int, host: str) -> None:
    """Run `count` worker processes, started again when they die, until SIGTERM or Ctrl-C, or the cluster ends.

    Raises
    ------
    ConfigError
        As `check_host`.
    ClusterError
        No scheduler answers at `address`.
    """
    from distributed import Nanny

    check_host(host)
    config.apply_dask_defaults()
    logging.getLogger("distributed").setLevel(logging.WARNING)
    stopped = _signalled()
    nannies = [
        Nanny(
            address,
            nthreads=1,
            host=host,
            memory_limit=0,
            dashboard_address=f"{host}:0",
            silence_logs=logging.WARNING,
        )
        for _ in range(count)
    ]
    try:
        with shielded():
            await asyncio.gather(*nannies)
    except (OSError, TimeoutError, RuntimeError) as error:
        await asyncio.gather(*(nanny.close() for nanny in nannies), return_exceptions=True)
        raise ClusterError(
            f"no worker could be started for {address} ({type(error).__name__}: {error}): is its scheduler running?"
        ) from error

    async def finished() -> None:
        await asyncio.gather(*(nanny.finished() for nanny in nannies))  # type: ignore[no-untyped-call]

    waiting = [asyncio.create_task(stopped.wait()), asyncio.create_task(finished())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.gather(*(nanny.close() for nanny in nannies))


def _signalled() -> asyncio.Event:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def end_with_parent() -> None:
    """Have this process end when its standard input does: when whoever holds the other end is gone, however it went."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="headrace-parent", daemon=True).start()


class Child:
    """A ``headrace`` command in a process of its own, started again when it dies.

    Parameters
    ----------
    arguments : sequence of str
        Of the command; it is told to end with this process.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._stop = threading.Event()
        self._process = self._start()
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """It is not running at the moment."""
        return self._process.poll() is not None

    def keep(self) -> None:
        """From now on, start it again whenever it ends."""
        self._thread = threading.Thread(target=self._keep, name=f"headrace-{self._arguments[0]}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it in order, by force after 20 s."""
        self._stop.set()
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self._thread is not None:
            self._thread.join()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _start(self) -> subprocess.Popen[Any]:
        # In a session of its own: a Ctrl-C in the terminal is for this process, which ends the others in order.
        return subprocess.Popen(
            [sys.executable, "-m", "headrace.pipeline.cli", *self._arguments, "--end-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _keep(self) -> None:
        pause = _PAUSES[0]
        while True:
            code = self._process.wait()
            if self._stop.wait(pause):
                return
            log.warning("'headrace %s' ended with code %d: it is started again", self._arguments[0], code)
            pause = min(2 * pause, _PAUSES[1])
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = self._start()
            if self._stop.is_set():
                self._process.terminate()
