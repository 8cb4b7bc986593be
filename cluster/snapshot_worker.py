"""A worker's half of snapshots: it writes one moment of its store, and loads the parts that hold its cells.

Both run on threads of their own, one each for the whole worker: they stand in nobody's way, and two writes of one
worker never meet.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from distributed.threadpoolexecutor import ThreadPoolExecutor as DaemonThreads

from headrace.cluster.holding import Holding
from headrace.cluster.stepping_back import stepping_back
from headrace.gpu import snapshot_parts
from headrace.gpu.errors import StaleEpoch
from headrace.gpu.snapshot_parts import Part
from headrace.gpu.snapshot_place import Place

__all__ = ["Snapshotting"]

T = TypeVar("T")


class Snapshotting(Holding):
    """The part of `WorkerNode` that writes and loads snapshots."""

    calls: tuple[str, ...] = ("snapshot", "load")
    storage_options: Mapping[str, Any]

    def start_snapshots(self) -> None:
        """To be called once the worker is there; a worker that is to end waits for neither thread."""
        self._snapshot_threads: dict[str, Any] = {
            name: DaemonThreads(1, thread_name_prefix=f"headrace-{name}")  # type: ignore[no-untyped-call]
            for name in ("snapshot", "load")
        }

    def stop_snapshots(self) -> None:
        for threads in self._snapshot_threads.values():
            threads.shutdown(wait=False)

    async def on_snapshot(self, collection: str, epoch: int, url: str, snapshot: str, part: str) -> dict[str, Any]:
        """Write what this worker holds at this moment; answers the `Part`.

        Raises
        ------
        StaleEpoch
            The worker is at another epoch, or rows are moving: some cells might be in nobody's part.
        SnapshotError
            It cannot be written.
        """
        # The view is taken here and now; what becomes of the epoch while it is written does not matter.
        store = self._at(collection, epoch).store
        view = store.view

        def write() -> Part:
            return snapshot_parts.write(store, Place(url, self.storage_options), snapshot, part, view=view)

        written = await self._on_thread("snapshot", functools.partial(stepping_back, write))
        return {"part": written.to_wire()}

    async def on_load(
        self, collection: str, epoch: int, url: str, parts: Sequence[tuple[Mapping[str, Any], Sequence[int]]]
    ) -> dict[str, Any]:
        """Take in the rows of some cells of some parts; answers rows, bytes, segments and seconds.

        Raises
        ------
        StaleEpoch
            The worker is at another epoch.
        SnapshotDamaged, SnapshotError, StoreFull
            As `snapshot_parts.read_into`; some rows may have been taken in.
        """
        replica = self.replica(collection)
        if replica.state.epoch != epoch:
            raise StaleEpoch(f"{self.address} is at epoch {replica.state.epoch} of {collection!r}, not {epoch}")
        store, began = replica.store, time.monotonic()
        wanted = [(Part.from_wire(part), frozenset(cells)) for part, cells in parts]

        def load() -> dict[str, Any]:
            place = Place(url, self.storage_options)
            told = dict.fromkeys(("rows", "bytes", "adopted", "rebuilt"), 0)
            for part, cells in wanted:
                if replica.store is not store:
                    raise StaleEpoch(f"{self.address} has begun anew meanwhile")
                loaded = snapshot_parts.read_into(store, place, part, cells)
                for name in told:
                    told[name] += getattr(loaded, name)
            return told

        told = await self._on_thread("load", load)
        return {**told, "seconds": time.monotonic() - began}

    async def _on_thread(self, name: str, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._snapshot_threads[name], work)
