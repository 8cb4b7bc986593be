"""The Dask client underneath: one that waits for a lost scheduler instead of closing itself."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Client

__all__ = ["PatientClient"]

log = logging.getLogger("headrace.pipeline")

_PAUSE = 0.1
_TRY_SECONDS = 2.0


class PatientClient(Client):
    """A `distributed.Client` that looks for its scheduler until it is closed.

    Dask's gives up after its connect timeout and closes, and with it the connections to the workers, which answer all
    the while. Where a version of Dask has no ``_reconnect`` or names things otherwise, this does what Dask does.
    """

    async def _start(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._start(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Exception:
            # Left open, it would be closed when it is collected, perhaps while this very thread makes another client
            # and holds the lock that closing waits for.
            if self.status != "closed":
                await self._close()
            raise

    async def _reconnect(self) -> Any:
        if not hasattr(self, "_ensure_connected"):
            return await super()._reconnect()
        address = getattr(self.scheduler, "address", "")
        log.warning("the scheduler %s is lost: reads go on with the workers", address)
        self.status = "connecting"
        self.scheduler_comm = None
        for state in self.futures.values():
            state.cancel(reason="scheduler-connection-lost", msg="the scheduler was lost: run this again")
        self.futures.clear()
        while self.status == "connecting":
            try:
                await self._ensure_connected(timeout=_TRY_SECONDS)  # type: ignore[no-untyped-call]
                log.warning("the scheduler %s is back", address)
                return None
            except (OSError, TimeoutError):
                await asyncio.sleep(_PAUSE)
            except ImportError:  # how Dask says that versions do not go together
                await self._close()
                return None
        return None
