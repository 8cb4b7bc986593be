"""What the parts of a worker have in common: the replicas that it holds, its peers, and threads to read on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from headrace.cluster.calls import call
from headrace.cluster.replica import Replica
from headrace.gpu.backend import Backend
from headrace.gpu.errors import ClusterError, CollectionNotFound, StaleEpoch

__all__ = ["Holding"]

T = TypeVar("T")

_LOOKS, _PAUSE = 100, 0.005


class Holding:
    """Holds replicas; each part of `WorkerNode` adds what is asked of them. Belongs to the worker's event loop.

    Attributes
    ----------
    worker : distributed.Worker
    address : str
        The worker's own.
    backend : Backend
    replicas : dict of str to Replica
        By the collection's name.
    """

    worker: Any
    address: str
    backend: Backend
    replicas: dict[str, Replica]
    _ended = False

    def start_holding(self, worker: Any, backend: Backend) -> None:
        self.worker, self.address, self.backend = worker, worker.address, backend
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="headrace-read")

    def stop_holding(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    def replica(self, collection: str) -> Replica:
        """What this worker holds of a collection.

        Raises
        ------
        CollectionNotFound
            Nothing.
        ClusterError
            It is ending.
        """
        if self._ended:  # it has let go of everything; the collection is there, on other workers
            raise ClusterError(f"{self.address} is ending")
        try:
            return self.replicas[collection]
        except KeyError:
            raise CollectionNotFound(f"{self.address} holds no collection {collection!r}") from None

    def _at(self, collection: str, epoch: int) -> Replica:
        """The replica, if it is at this very epoch and nothing moves: only then do cell and holders say the same."""
        replica = self.replica(collection)
        if replica.state.epoch != epoch or replica.state.moving:
            raise StaleEpoch(
                f"{self.address} is at epoch {replica.state.epoch} of {collection!r}, not settled at {epoch}"
            )
        return replica

    async def _begun(self, collection: str, incarnation: int) -> Replica | None:
        """The replica; a sender may have heard of it a moment before this worker has."""
        for _ in range(_LOOKS):
            replica = self.replicas.get(collection)
            if replica is not None and replica.state.incarnation >= incarnation:
                return replica
            await asyncio.sleep(_PAUSE)
        return None

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Run something that reads or computes off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        """Ask another worker; see `headrace.cluster.calls.call`."""
        return await call(self.worker.rpc, address, op, deadline=deadline, **message)

    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
        return await self.call(self.worker.scheduler.address, op, deadline=deadline, **message)

    async def release(self, name: str) -> None:
        """Forget a collection."""
        if (replica := self.replicas.pop(name, None)) is not None:
            replica.close(ClusterError(f"{self.address} is ending") if self._ended else None)
