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
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from headrace.cluster.calls import call
from headrace.cluster.staying import leave
from headrace.gpu.errors import ClusterError, HeadraceError
from headrace.pipeline import config, encryption
from headrace.pipeline.cli_common import shielded
from headrace.pipeline.launch import cannot_listen, check_host, dashboard_address, plugins_from_config

__all__ = ["Child", "end_with_parent", "run_scheduler", "run_workers"]

log = logging.getLogger("headrace.pipeline")

_PAUSES = (0.2, 5.0)
_END_SECONDS = 20.0
_LOOK = 0.1
_GRACE = 2.0
"""Seconds by which the scheduler's answer may come after its own deadline."""


async def run_scheduler(
    host: str, port: int, dashboard: str | None, backend: str | None, workers: int, ready: Callable[[str], None]
) -> None:
    """Run a scheduler with Headrace on it until SIGTERM or Ctrl-C; `ready` is told its address.

    Its workers stay up then, as if it had died, and wait for one in its place: it may be ended to be upgraded, or moved
    by whatever runs it. Who ends a whole cluster ends the workers too.

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
    where = dashboard_address(dashboard, host)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Port \d+ is already in use", UserWarning)  # told below, as a sentence
        try:
            scheduler = Scheduler(
                host=host, port=port, protocol=encryption.scheme(), dashboard_address=where, plugins=[plugin]
            )
        except OSError as error:
            at, _, number = where.rpartition(":")
            raise cannot_listen("dashboard", at, int(number), error) from error
    listens = scheduler.http_server.port  # type: ignore[attr-defined]
    if (taken := where.rpartition(":")[2]) not in ("0", str(listens)):
        log.warning("port %s is taken: the dashboard listens at port %d", taken, listens)
    await plugin.start(scheduler)  # before the first worker can come
    try:
        await scheduler
    except (OSError, RuntimeError) as error:
        raise cannot_listen("scheduler", host, port, error) from error
    ready(scheduler.address)
    await stopped.wait()
    await plugin.close()
    leave(scheduler)
    await scheduler.close(reason="headrace-stopped")


async def run_workers(address: str, count: int, host: str, role: str | None = None) -> None:
    """Run `count` worker processes, started again when they die, until SIGTERM or Ctrl-C, or the cluster ends.

    Told to end, they do so once others have what they hold, or after ``headrace.worker.drain``; told twice, at once.

    Parameters
    ----------
    role : {"ingest", "search", "both"}, optional
        As configured if left out.

    Raises
    ------
    ConfigError
        As `check_host` and `encryption.checked_address`.
    ClusterError
        No scheduler answers at `address`.
    """
    from distributed import Nanny

    check_host(host)
    address = encryption.checked_address(address, "worker")
    config.apply_dask_defaults()
    logging.getLogger("distributed").setLevel(logging.WARNING)
    stopped = _signalled()
    patience = config.get("worker.drain")
    nannies = [
        Nanny(
            address,
            nthreads=1,
            host=host,
            memory_limit=0,
            dashboard_address=dashboard_address(None, host),
            silence_logs=logging.WARNING,
            config=None if role is None else {"headrace": {"worker": {"role": role}}},  # for the worker's own process
        )
        for _ in range(count)
    ]

    async def finished() -> None:
        await asyncio.gather(*(nanny.finished() for nanny in nannies))  # type: ignore[no-untyped-call]

    starting = asyncio.gather(*nannies)
    try:
        with shielded():
            # Without a scheduler the start never ends, so an end that comes meanwhile must not wait for it.
            await _first(starting, stopped.wait(), _interrupted())
        if starting.done():
            starting.result()
            await _first(stopped.wait(), finished())
            if stopped.is_set() and patience:
                stopped.clear()
                await _first(_emptied(nannies, patience), stopped.wait(), finished())
    except (OSError, TimeoutError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if why := encryption.refusal(cause):
            cure = f"its scheduler does not have certificates of the same set ({why})"
        else:
            cure = "is its scheduler running?" if isinstance(cause, OSError | TimeoutError) else "its process ended"
        raise ClusterError(
            f"no worker could be started for {address} ({type(error).__name__}: {error}): {cure}"
        ) from error
    finally:
        await _end(nannies, starting)


async def _emptied(nannies: Sequence[Any], patience: float) -> None:
    """Return when others have what these workers hold, or nobody can say so."""
    addresses = [nanny.worker_address for nanny in nannies if nanny.worker_address]
    scheduler = nannies[0].scheduler.address
    try:
        await call(nannies[0].rpc, scheduler, "retire", deadline=patience + _GRACE, workers=addresses)
    except HeadraceError as error:
        log.warning("the workers end without being emptied: %s", error)


async def _first(*awaitables: Awaitable[Any]) -> None:
    """Wait for the first of them; coroutines are ended then, futures are left alone."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    own = [task for task, each in zip(tasks, awaitables, strict=True) if task is not each]
    for task in own:
        task.cancel()
    await asyncio.gather(*own, return_exceptions=True)


async def _interrupted() -> None:
    """Return when a Ctrl-C waits behind `shielded`."""
    while signal.SIGINT not in signal.sigpending():
        await asyncio.sleep(_LOOK)


async def _end(nannies: Sequence[Any], starting: asyncio.Future[Any]) -> None:
    """Close nannies that may not be up yet.

    `distributed.Nanny.close` waits until the worker process is up, which without a scheduler is never: a process that
    is still starting holds nothing and is killed.
    """
    closing = asyncio.gather(*(nanny.close() for nanny in nannies), return_exceptions=True)
    until = time.monotonic() + _END_SECONDS
    while not (closing.done() and starting.done()) and time.monotonic() < until:
        for nanny in nannies:
            process = nanny.process
            if process is not None and process.status.name == "starting" and process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        await asyncio.wait([each for each in (closing, starting) if not each.done()], timeout=_LOOK)
    for problem in closing.result() if closing.done() else []:
        if isinstance(problem, Exception):
            log.warning("a worker's nanny did not close in order (%s: %s)", type(problem).__name__, problem)
    for each in (closing, starting):
        each.cancel()
    # What the start failed of has been told, or was the end itself.
    await asyncio.gather(closing, starting, return_exceptions=True)


def _signalled() -> asyncio.Event:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def end_with_parent() -> None:
    """Have this process end when its standard input does: when whoever holds the other end is gone, however it went.

    In order, and by force after 20 s: nobody is there any more who would see that it hangs. Worker processes end with
    the one that started them, whatever it ended of.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_END_SECONDS)
        os._exit(1)

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
    def code(self) -> int | None:
        """With which code it ended, a signal's number below 0; None while it runs."""
        return self._process.poll()

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
