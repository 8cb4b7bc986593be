"""The Dask client underneath: one that waits for a lost scheduler instead of closing itself."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client
from distributed.comm.core import CommClosedError, FatalCommClosedError

from headrace.pipeline.encryption import refusal

__all__ = ["PatientClient", "connections_may_close"]

log = logging.getLogger("headrace.pipeline")

_PAUSE, _LONGEST_PAUSE = 0.1, 1.0
_TRY_SECONDS = 2.0


_dask_log = logging.getLogger("distributed.batched")
_counting = threading.Lock()
_closing = 0


def _worth_telling(record: logging.LogRecord) -> bool:
    return not _closing or record.levelno > logging.INFO or _dask_log.level != logging.NOTSET


_dask_log.addFilter(_worth_telling)


@contextmanager
def connections_may_close() -> Iterator[None]:
    """Keep Dask from telling, with a traceback and at the level INFO, of connections that close in this block: that is
    what ends a cluster. Whoever has set a level for this logger is told all the same. Blocks may overlap.
    """
    global _closing
    with _counting:
        _closing += 1
    try:
        yield
    finally:
        with _counting:
            _closing -= 1


class PatientClient(Client):
    """A `distributed.Client` that looks for its scheduler until it is closed.

    Dask's gives up after its connect timeout and closes, and with it the connections to the workers, which answer all
    the while. Where a version of Dask has no ``_reconnect`` or names things otherwise, this does what Dask does.

    Attributes
    ----------
    losses : int
        How often the scheduler was lost.
    """

    losses = 0

    async def _start(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._start(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Exception:
            # Left open, it would be closed when it is collected, perhaps while this very thread makes another client
            # and holds the lock that closing waits for.
            if self.status != "closed":
                await self._close()
            raise

    async def _ensure_connected(self, timeout: float | None = None) -> None:
        """As Dask's, and again until the timeout if the scheduler goes while it greets: another may take its place."""
        until = None if timeout is None else time.monotonic() + timeout
        pause = _PAUSE
        while True:
            left = None if until is None else max(_PAUSE, until - time.monotonic())
            try:
                await super()._ensure_connected(timeout=left)  # type: ignore[no-untyped-call]
                return
            except FatalCommClosedError:
                raise
            except CommClosedError as error:
                if until is None or time.monotonic() >= until or refusal(error):
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _reconnect(self) -> Any:
        if not hasattr(self, "_ensure_connected"):
            return await super()._reconnect()
        address = getattr(self.scheduler, "address", "")
        log.warning("the scheduler %s is lost: reads go on with the workers", address)
        self.losses += 1
        self.status = "connecting"
        self.scheduler_comm = None
        for state in self.futures.values():
            state.cancel(reason="scheduler-connection-lost", msg="the scheduler was lost: run this again")
        self.futures.clear()
        while self.status == "connecting":
            try:
                await self._ensure_connected(timeout=_TRY_SECONDS)
                log.warning("the scheduler %s is back", address)
                return None
            except (OSError, TimeoutError):
                await asyncio.sleep(_PAUSE)
            except ImportError:  # how Dask says that versions do not go together
                await self._close()
                return None
        return None
