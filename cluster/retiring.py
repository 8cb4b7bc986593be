"""Workers that are to go: what they hold is taken over by the others first.

By `drain`, which a person asks for; and where Dask closes workers in order (`cluster.scale`, `Client.retire_workers`,
an adaptive cluster, a worker's lifetime): all these ask the scheduler to retire the workers, and wait for its answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from headrace.cluster.coordinator import Coordinator
from headrace.gpu.errors import ClusterError

__all__ = ["Retiring"]

log = logging.getLogger("headrace.cluster")

_LOOK = 0.05


class Retiring:
    """The part of `HeadraceScheduler` that empties workers. Belongs to the scheduler's event loop.

    Attributes
    ----------
    drain_deadline : float
        Seconds that a worker which is closed in order goes on until it is empty; 0: it goes at once.
    """

    retiring_calls: tuple[str, ...] = ("drain", "retire")
    drain_deadline: float
    _scheduler: Any
    _coordinators: dict[str, Coordinator]
    _ready: dict[str, str]
    _going: set[str]
    """Workers that are being emptied: collections that are made meanwhile give them nothing."""

    def hear_of_retirement(self) -> None:
        """Stand in the way of Dask's `retire_workers`, by which whatever closes workers in order says which."""
        scheduler = self._scheduler
        retire = scheduler.retire_workers
        if getattr(retire, "empties", False):
            return  # it is started twice where Dask starts it, too

        async def retire_workers(workers: Any = None, *, names: Any = None, **options: Any) -> Any:
            if workers is None and names is None:
                # Dask chooses; it would choose again once these have been emptied.
                chosen = {"memory_ratio", "n", "key", "minimum", "target", "attribute"}
                about = {name: options.pop(name) for name in list(options) if name in chosen}
                workers = scheduler.workers_to_close(**about)
            await self.retire(_addresses(scheduler, workers or (), names or ()))
            return await retire(**({"workers": workers} if names is None else {"names": names}), **options)

        retire_workers.empties = True  # type: ignore[attr-defined]
        scheduler.retire_workers = retire_workers  # who runs in its process calls this, all others the handler
        scheduler.handlers["retire_workers"] = retire_workers

    async def drain(self, worker: str, undo: bool = False) -> dict[str, Any]:
        """Empty a worker in all collections; they say when it is done by its rows."""
        if worker not in self._ready:
            raise ClusterError(f"{worker!r} is no worker here; they are {', '.join(sorted(self._ready)) or 'none yet'}")
        if not undo:
            for coordinator in self._coordinators.values():
                coordinator.check_drain(worker)
        (self._going.discard if undo else self._going.add)(worker)
        for coordinator in self._coordinators.values():
            coordinator.drain(worker, undo=undo)
        return {}

    async def retire(self, workers: Sequence[str]) -> dict[str, Any]:
        """Empty workers that are about to end, and answer when they may: when the others have what they held, or there
        are no others, or `drain_deadline` has passed.
        """
        going = [worker for worker in workers if worker in self._ready]
        coordinators = [coordinator for coordinator in self._coordinators.values() if coordinator.can_do_without(going)]
        if not going or not coordinators or self.drain_deadline <= 0:
            return {}
        log.info("%s are to go: what they hold goes to the others first", ", ".join(going))
        self._going.update(going)
        for coordinator in coordinators:
            for worker in going:
                coordinator.drain(worker)
        until = time.monotonic() + self.drain_deadline
        while left := [each for each in coordinators if not all(map(each.has_emptied, going))]:
            left = [each for each in left if each in self._coordinators.values()]  # others were dropped meanwhile
            if not left:
                break
            if time.monotonic() >= until:
                names = ", ".join(repr(each.state.spec.name) for each in left)
                log.warning(
                    "%s go although they hold what others lack of %s: it took longer than headrace.worker.drain (%g s)",
                    ", ".join(going), names, self.drain_deadline,
                )  # fmt: skip
                break
            await asyncio.sleep(_LOOK)
        return {}


def _addresses(scheduler: Any, workers: Iterable[Any], names: Iterable[Any]) -> list[str]:
    """The workers that are meant; Dask's clusters give their own names of them for addresses, too."""
    named = {str(state.name): address for address, state in scheduler.workers.items()}
    given = (worker if worker in scheduler.workers else named.get(str(worker)) for worker in (*workers, *names))
    return [address for address in given if address is not None]
