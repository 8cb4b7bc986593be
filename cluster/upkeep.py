"""What a worker does in the background for the collections that it holds: it builds indexes, and trains codebooks."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

from distributed.threadpoolexecutor import ThreadPoolExecutor as DaemonThreads

from headrace.cluster.holding import Holding
from headrace.cluster.replica import Replica
from headrace.cluster.stepping_back import stepping_back
from headrace.cluster.wire import floats_to_wire
from headrace.gpu.ending import Ending

__all__ = ["Upkeep"]

log = logging.getLogger("headrace.cluster")

_TIDY = 1.0
_JOBS = 2
"""At a time for one collection: a merge, and a seal that does not wait for it (see `headrace.gpu.maintenance`)."""


class Upkeep(Holding):
    """The part of `WorkerNode` that works for seconds at a time, on threads that step back for whoever asks."""

    calls: tuple[str, ...] = ("train",)

    def start_upkeep(self) -> None:
        # Dask's threads are daemons: a worker that is to end does not wait for an index that nobody will need.
        self._builders = DaemonThreads(_JOBS, thread_name_prefix="headrace-build")  # type: ignore[no-untyped-call]
        self._building: Counter[str] = Counter()
        self._tidying = asyncio.get_running_loop().create_task(self._tidy(), name="headrace-tidy")

    def stop_tidying(self) -> None:
        self._tidying.cancel()

    def stop_upkeep(self) -> None:
        self._builders.shutdown(wait=False)  # type: ignore[no-untyped-call]

    async def _tidy(self) -> None:
        """Ask now and then, for a store that rests is asked by nobody else."""
        while True:
            await asyncio.sleep(_TIDY)
            for name in list(self.replicas):
                self.replicas[name].moments.tidy()
                self.replicas[name].departed.tidy()
                self.maintain(self.replicas[name])  # no name of its own would keep the last one until the next comes

    def maintain(self, replica: Replica) -> None:
        """Seal and merge in the background if there is something to do."""
        name = replica.state.spec.name
        if self._building[name] >= _JOBS or not replica.store.wants_maintenance():
            return
        self._building[name] += 1
        done = asyncio.get_running_loop().run_in_executor(self._builders, stepping_back, replica.store.maintain)

        def finished(future: asyncio.Future[bool]) -> None:
            self._building[name] -= 1
            if future.cancelled():
                return
            error = future.exception()
            if isinstance(error, Ending):
                return
            if error:
                log.error("collection %r: building an index failed", name, exc_info=error)
            elif self.replicas.get(name) is replica:
                replica.moments.clear()  # they keep the segments that were merged
                self.maintain(replica)

        done.add_done_callback(finished)

    async def on_train(self, collection: str, cells: int, sample_rows: int, iterations: int) -> dict[str, Any]:
        """Centroids trained on a sample of this worker's rows."""
        store = self.replica(collection).store
        backend = self.backend

        def train() -> tuple[Any, int]:
            sample = store.sample(sample_rows)
            trained = backend.kmeans.train(backend.xp.asarray(sample), cells, seed=0, iterations=iterations)
            return trained.get() if hasattr(trained, "get") else trained, len(sample)

        centroids, rows = await asyncio.get_running_loop().run_in_executor(self._builders, stepping_back, train)
        return {"centroids": floats_to_wire(centroids), "rows": rows}
