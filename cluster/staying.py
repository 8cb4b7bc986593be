"""Workers that outlive their scheduler: they go on answering, and register again with the one that takes its place.

Dask's own worker closes when its connection to the scheduler breaks, and its rows would be gone with it. `Staying`
stands in the way of just that one `close`. It leans on names that Dask does not promise, so `unsupported` looks at the
installed version first; where it finds them changed, workers end as Dask's do, and that is said in the log and by
``status``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from headrace.gpu.errors import HeadraceError

__all__ = ["Staying", "leave", "unsupported"]

log = logging.getLogger("headrace.cluster")

_BROKEN = "worker-handle-scheduler-connection-broken"
_MISSING = "worker-heartbeat-missing"
_PAUSE = 0.1
_TRY_SECONDS = 1.0


def unsupported(worker: Any) -> str:
    """Why this worker would end with its scheduler all the same; empty if it need not."""
    from distributed.batched import BatchedSend

    if worker.address.startswith("inproc://"):
        return ""  # they share a process, and end together whatever anybody does
    kind = type(worker)
    try:
        sources = {name: inspect.getsource(getattr(kind, name)) for name in ("handle_scheduler", "heartbeat", "close")}
        inspect.signature(kind.close).bind(worker, reason="")
        inspect.signature(kind.plugin_add).bind(worker, plugin=b"", name="")
        found = (
            f'self.close(reason="{_BROKEN}")' in sources["handle_scheduler"]
            and f'self.close(reason="{_MISSING}")' in sources["heartbeat"]
            and inspect.iscoroutinefunction(kind._register_with_scheduler)
            and {"heartbeat", "keep-alive"} <= set(worker.periodic_callbacks)
            and isinstance(worker.batched_stream, BatchedSend)
            and worker.handlers["plugin-add"] == worker.plugin_add
        )
    except (AttributeError, KeyError, OSError, TypeError):  # OSError: no source code is installed
        found = False
    if found:
        return ""
    return f"distributed {version('distributed')} works otherwise than the versions that are known"


def leave(scheduler: Any) -> None:
    """Part a `distributed.Scheduler` that is about to close from its workers, so that they stay up as if it had died.

    Dask's ``close`` tells every worker that is connected to end too. On the scheduler's event loop; whatever changes
    collections must have been closed before, or it would take the workers for lost.
    """
    for listener in scheduler.listeners:
        listener.stop()  # first: one that returns at once would be told to end
    for stream in scheduler.stream_comms.values():
        stream.abort()


class Staying:
    """Keeps a `distributed.Worker` up when its scheduler is lost. Belongs to the worker's event loop.

    Parameters
    ----------
    worker : distributed.Worker
        One for which `unsupported` finds no reason.
    plugin : str
        The plugin whose state must live on: it is not set up a second time by a scheduler that hands it out.
    returned : async callable
        Awaited each time the worker has registered again, and again if it raises `OSError` or `HeadraceError`.
    patience : float
        Seconds without a scheduler after which the worker closes after all.
    """

    def __init__(
        self, worker: Any, plugin: str, returned: Callable[[], Awaitable[None]], *, patience: float = 3600.0
    ) -> None:
        self._worker, self._plugin, self._returned, self._patience = worker, plugin, returned, patience
        self._close, self._plugin_add = worker.close, worker.plugin_add
        self._returning: asyncio.Task[None] | None = None
        self._lost = False
        worker.close = self._close_unless_lost
        for handlers in (worker.handlers, worker.stream_handlers):
            for op in [op for op, handler in handlers.items() if handler == self._close]:
                handlers[op] = worker.close  # whoever asks it to close while it waits for a scheduler ends the wait
        worker.plugin_add = worker.handlers["plugin-add"] = self._plugin_add_once

    @property
    def away(self) -> bool:
        """The scheduler has been lost and has not come back."""
        return self._returning is not None and not self._returning.done()

    async def _close_unless_lost(self, *args: Any, reason: str = "worker-close", **kwargs: Any) -> Any:
        running = self._worker.status.name in ("running", "paused")
        if running and reason == _BROKEN:
            self._lost = True
            if not self.away:
                self._returning = asyncio.get_running_loop().create_task(self._return(), name="headrace-return")
            return None
        if running and reason == _MISSING and self.away:
            return None  # a new scheduler does not know us yet
        if self._returning is not None and self._returning is not asyncio.current_task():
            self._returning.cancel()
        return await self._close(*args, reason=reason, **kwargs)

    async def _plugin_add_once(self, plugin: Any, name: str | None = None, **kwargs: Any) -> Any:
        if name == self._plugin and name in self._worker.plugins:
            return {"status": "OK"}
        return await self._plugin_add(plugin=plugin, name=name, **kwargs)

    async def _return(self) -> None:
        worker = self._worker
        lost = time.monotonic()
        log.warning("%s lost the scheduler %s: it stays up and waits for it", worker.address, worker.scheduler.address)
        try:
            async with asyncio.timeout(self._patience):
                while self._lost:
                    self._lost = False
                    await self._register()
                    await self._say_so()
            log.warning("%s is back with its scheduler after %.1f s", worker.address, time.monotonic() - lost)
        except TimeoutError:
            log.error("%s saw no scheduler for %g s and ends", worker.address, self._patience)
            await self._close(reason="headrace-no-scheduler")
        except Exception:
            log.exception("%s cannot return to its scheduler and ends", worker.address)
            await self._close(reason="headrace-cannot-return")

    async def _say_so(self) -> None:
        while not self._lost:
            try:
                return await self._returned()
            except (OSError, HeadraceError) as error:
                log.warning("%s: the scheduler does not take it back yet: %s", self._worker.address, error)
                await asyncio.sleep(_PAUSE)

    async def _register(self) -> None:
        from distributed.batched import BatchedSend
        from distributed.comm.core import connect
        from distributed.worker_state_machine import FreeKeysEvent

        worker = self._worker
        for name in ("heartbeat", "keep-alive"):
            worker.periodic_callbacks[name].stop()
        # Tasks were the old scheduler's; Dask registers no worker that holds any.
        while worker.state.tasks or worker.data:
            keys = {*worker.state.tasks, *worker.data}
            worker.handle_stimulus(FreeKeysEvent(keys=list(keys), stimulus_id=f"headrace-return-{time.time()}"))
            await asyncio.sleep(_PAUSE)
        # Dask would try more and more seldom, for as long as its connect timeout (30 s by default) allows.
        while True:
            try:
                comm = await connect(  # type: ignore[no-untyped-call]
                    worker.scheduler.address, timeout=_TRY_SECONDS, **worker.connection_args
                )
            except OSError:
                await asyncio.sleep(_PAUSE)
            else:
                comm.abort()
                break
        worker.batched_stream.abort()
        worker.batched_stream = BatchedSend(  # type: ignore[no-untyped-call]
            interval="2ms", loop=worker.loop
        )
        await worker._register_with_scheduler()
