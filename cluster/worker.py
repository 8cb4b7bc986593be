"""The worker's half: a plugin that holds this worker's replicas and answers applies, reads and moves.

Handlers run on the worker's event loop. An apply of a few hundred rows takes well under a millisecond there and is
done in place; searches, index builds, scans and training go to executors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from distributed.diagnostics.plugin import WorkerPlugin

from headrace.cluster.calls import answering, call
from headrace.cluster.fanout import Header, fan_out, part_for
from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionState
from headrace.cluster.wire import (
    batch_from_wire,
    floats_from_wire,
    floats_to_wire,
    offsets_from_wire,
    offsets_to_wire,
    rows_to_wire,
)
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.errors import ClusterError, CollectionNotFound, StaleEpoch
from headrace.gpu.store import StoredRow, StoreSettings

__all__ = ["WorkerNode"]

log = logging.getLogger("headrace.cluster")

T = TypeVar("T")

_MOVE_ROWS = 256


class WorkerNode(WorkerPlugin):
    """Holds replicas. `pipeline.node` adds the ingest graph and the encoders.

    Parameters
    ----------
    backend : str
        Name for `gpu.backend.resolve`, resolved once when the plugin is set up on its worker.
    store : StoreSettings, optional
    apply_deadline : float
        Seconds that a peer may take to answer an apply.
    """

    name = "headrace"
    idempotent = True
    calls: tuple[str, ...] = (
        "state", "drop", "reset", "apply", "search", "get", "count", "wait",
        "watermarks", "status", "digests", "scan", "move", "train",
    )  # fmt: skip

    def __init__(
        self, backend: str = "auto", store: StoreSettings | None = None, *, apply_deadline: float = 2.0
    ) -> None:
        self._backend_name, self._store_settings = backend, store or StoreSettings()
        self.apply_deadline = apply_deadline
        self.replicas: dict[str, Replica] = {}

    async def setup(self, worker: Any) -> None:
        self.worker = worker
        self.address: str = worker.address
        self.instance = uuid.uuid4().hex
        self.backend: Backend = resolve(self._backend_name)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="headrace-read")
        self._builders = ThreadPoolExecutor(1, thread_name_prefix="headrace-build", initializer=_step_back)
        self._building: set[str] = set()
        self._scans: dict[str, Any] = {}
        worker.handlers.update({f"headrace_{op}": answering(getattr(self, f"on_{op}")) for op in self.calls})
        await self.call_scheduler("hello", address=self.address, instance=self.instance, pid=os.getpid())

    async def teardown(self, worker: Any) -> None:
        for name in list(self.replicas):
            await self.release(name)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._builders.shutdown(wait=False, cancel_futures=True)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    async def state_adopted(self, replica: Replica) -> None:
        """A replica has a newer state; returns when nothing begun under the older one is under way."""

    async def release(self, name: str) -> None:
        """Forget a collection."""
        self.replicas.pop(name, None)

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        return await call(self.worker.rpc, address, op, deadline=deadline, **message)

    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
        return await self.call(self.worker.scheduler.address, op, deadline=deadline, **message)

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Run something that reads or computes off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    def replica(self, collection: str) -> Replica:
        try:
            return self.replicas[collection]
        except KeyError:
            raise CollectionNotFound(f"{self.address} holds no collection {collection!r}") from None

    def maintain(self, replica: Replica) -> None:
        """Seal and merge in the background if there is something to do."""
        name = replica.state.spec.name
        if name in self._building or not replica.store.wants_maintenance():
            return
        self._building.add(name)
        done = asyncio.get_running_loop().run_in_executor(self._builders, replica.store.maintain)

        def finished(future: asyncio.Future[bool]) -> None:
            self._building.discard(name)
            if future.cancelled():
                return
            if error := future.exception():
                log.error("collection %r: building an index failed", name, exc_info=error)
            elif self.replicas.get(name) is replica:
                self.maintain(replica)

        done.add_done_callback(finished)

    # -- state ---------------------------------------------------------------------------------------------------------

    async def on_state(self, state: Mapping[str, Any], base: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        new = CollectionState.from_wire(state)
        await self.adopt(new, offsets_from_wire(base))
        return {"epoch": new.epoch}

    async def adopt(self, new: CollectionState, base: Mapping[int, int] | None = None) -> None:
        """Take over a state, whether it was sent or fetched."""
        name = new.spec.name
        if self.address not in new.members:
            await self.release(name)
            return
        replica = self.replicas.get(name)
        if replica is None:
            replica = self.replicas[name] = Replica(new, self.address, self.backend, self._store_settings)
            log.info("collection %r: this worker takes part (%s)", name, new.members[self.address])
        else:
            replica.adopt(new, base)
        await self.state_adopted(replica)

    async def on_drop(self, collection: str) -> dict[str, Any]:
        await self.release(collection)
        return {}

    async def on_reset(self, collection: str) -> dict[str, Any]:
        """This worker had stopped answering: what it holds may be behind, so it begins again from its peers."""
        await self.release(collection)
        return {}

    # -- writing -------------------------------------------------------------------------------------------------------

    async def on_apply(
        self,
        collection: str,
        epoch: int,
        incarnation: int,
        batch: Mapping[str, Any] | None,
        ranges: Sequence[Sequence[int]],
        stable: Sequence[Sequence[int]],
    ) -> dict[str, Any]:
        replica = await self._begun(collection, incarnation)
        if replica is None or incarnation < replica.state.incarnation:
            raise StaleEpoch(f"{self.address} has no part in epoch {epoch} of collection {collection!r}")
        applied = replica.apply(
            None if batch is None else batch_from_wire(batch),
            {partition: (low, high) for partition, low, high in ranges},
            offsets_from_wire(stable),
            epoch,
        )
        if applied is None:
            raise StaleEpoch(f"epoch {epoch} of collection {collection!r}: {self.address} is at {replica.fence}")
        self.maintain(replica)
        return {"missing": list(applied.missing)}

    async def _begun(self, collection: str, incarnation: int) -> Replica | None:
        """The replica; a sender may have heard of it a moment before this worker has."""
        for _ in range(100):
            replica = self.replicas.get(collection)
            if replica is not None and replica.state.incarnation >= incarnation:
                return replica
            await asyncio.sleep(0.005)
        return None

    async def on_move(self, collection: str, epoch: int, cells: Sequence[int]) -> dict[str, Any]:
        """Send all rows of `cells` on to whoever must hold them now, with their own versions."""
        replica = self.replica(collection)
        state = replica.state
        if state.epoch != epoch:
            raise StaleEpoch(f"{self.address} is at epoch {state.epoch} of {collection!r}, not {epoch}")
        watermarks = offsets_to_wire(replica.watermarks)
        moved = 0
        failed: dict[str, str] = {}
        for rows in replica.store.scan(frozenset(cells), vectors=True, batch=_MOVE_ROWS):
            header = await self.read(_header_of_rows, rows, state, self.backend)
            for cell_rows, had in _by_holders(rows, state):
                part = _take_rows(header, cell_rows)
                failed |= await self._send_on(replica, state, part, had)
            if failed:
                break
            moved += len(rows)
            await asyncio.sleep(0)  # applies and searches come first
        self.maintain(replica)
        return {"moved": moved, "watermarks": watermarks, "failed": [[worker, why] for worker, why in failed.items()]}

    async def _send_on(
        self, replica: Replica, state: CollectionState, header: Header, had: frozenset[str]
    ) -> dict[str, str]:
        resend = False
        parts = {worker: part for worker in state.members if (part := part_for(header, worker, state, had=had))}
        failed: dict[str, str] = {}
        while parts:
            outcome = await fan_out(
                self.call, state, parts, me=self.address, local=replica.apply, deadline=self.apply_deadline
            )
            failed |= {worker: str(answer) for worker, answer in outcome.items() if isinstance(answer, ClusterError)}
            lacking = [worker for worker, answer in outcome.items() if isinstance(answer, tuple) and answer]
            if resend or not lacking:
                break
            # A peer lacks rows it should have had, or has let go of them for newer ones: versions decide there.
            resend = True
            parts = {
                worker: part
                for worker in lacking
                if worker != self.address and (part := part_for(header, worker, state, had=had, resend=True))
            }
        return failed

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _caught_up(
        self, collection: str, epoch: int, required: Sequence[Sequence[int]], deadline: float
    ) -> Replica:
        replica = self.replica(collection)
        if epoch < replica.state.epoch:
            raise StaleEpoch(f"{self.address} is at epoch {replica.state.epoch} of {collection!r}, the read at {epoch}")
        if required:
            await replica.wait(offsets_from_wire(required), deadline)
        return replica

    async def on_search(
        self,
        collection: str,
        epoch: int,
        queries: Mapping[str, Any],
        limit: int,
        required: Sequence[Sequence[int]],
        deadline_s: float,
    ) -> dict[str, Any]:
        replica = await self._caught_up(collection, epoch, required, deadline_s)
        found = await self.read(replica.store.search, floats_from_wire(queries), limit)
        return {
            "rows": [rows_to_wire(rows) for rows in found.rows],
            "scores": found.scores,
            "applied": offsets_to_wire(found.stamp),
        }

    async def on_get(
        self,
        collection: str,
        epoch: int,
        ids: Sequence[Any],
        vectors: bool,
        required: Sequence[Sequence[int]],
        deadline_s: float,
    ) -> dict[str, Any]:
        replica = await self._caught_up(collection, epoch, required, deadline_s)
        rows, stamp = replica.store.get(ids, vectors=vectors)
        return {"rows": rows_to_wire(rows), "applied": offsets_to_wire(stamp)}

    async def on_count(
        self, collection: str, epoch: int, required: Sequence[Sequence[int]], deadline_s: float
    ) -> dict[str, Any]:
        replica = await self._caught_up(collection, epoch, required, deadline_s)
        sizes = replica.store.cell_sizes()
        return {"cell_sizes": [list(pair) for pair in sizes.items()], "applied": offsets_to_wire(replica.watermarks)}

    async def on_wait(self, collection: str, required: Sequence[Sequence[int]], deadline_s: float) -> dict[str, Any]:
        await self.replica(collection).wait(offsets_from_wire(required), deadline_s)
        return {}

    async def on_watermarks(self, collection: str) -> dict[str, Any]:
        return {"watermarks": offsets_to_wire(self.replica(collection).watermarks)}

    async def on_status(self, collection: str) -> dict[str, Any]:
        replica = self.replica(collection)
        return {**replica.status(), "cell_sizes": [list(pair) for pair in replica.store.cell_sizes().items()]}

    async def on_digests(self, collection: str) -> dict[str, Any]:
        replica = self.replica(collection)
        sums, stamp = await self.read(replica.store.digests)
        return {
            "digests": [[cell, count, str(total)] for cell, (count, total) in sums.items()],
            "applied": offsets_to_wire(stamp),
            "epoch": replica.state.epoch,
        }

    async def on_scan(
        self, collection: str, cursor: str | None, cells: Sequence[int] | None, vectors: bool = False
    ) -> dict[str, Any]:
        """Rows of one moment, a chunk a call; `cursor` is what the call before returned."""
        if cursor is None:
            wanted = None if cells is None else frozenset(cells)
            cursor = uuid.uuid4().hex
            self._scans[cursor] = self.replica(collection).store.scan(wanted, vectors=vectors)
            while len(self._scans) > 16:  # scans that nobody finished
                self._scans.pop(next(iter(self._scans)))
        if cursor not in self._scans:
            raise ClusterError(f"the scan {cursor} is no longer known to {self.address}; begin it again")
        rows: list[StoredRow] = await self.read(next, self._scans[cursor], [])
        if not rows:
            del self._scans[cursor]
            return {"rows": [], "cursor": None}
        return {"rows": rows_to_wire(rows), "cursor": cursor}

    async def on_train(self, collection: str, cells: int, sample_rows: int, iterations: int) -> dict[str, Any]:
        """Centroids trained on a sample of this worker's rows."""
        store = self.replica(collection).store
        backend = self.backend

        def train() -> tuple[Any, int]:
            sample = store.sample(sample_rows)
            trained = backend.kmeans.train(backend.xp.asarray(sample), cells, seed=0, iterations=iterations)
            return trained.get() if hasattr(trained, "get") else trained, len(sample)

        centroids, rows = await asyncio.get_running_loop().run_in_executor(self._builders, train)
        return {"centroids": floats_to_wire(centroids), "rows": rows}


def _step_back() -> None:
    """Let this thread use only the processor time that applies and searches leave (Linux counts niceness by thread)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _header_of_rows(rows: Sequence[StoredRow], state: CollectionState, backend: Backend) -> Header:
    """Stored rows as a header, their cells by the state's codebook."""
    vectors = np.stack([row.vector for row in rows if row.vector is not None])
    cells = np.array([row.cell for row in rows], dtype=np.int32)
    if state.previous is not None:
        labels, _ = backend.kmeans.assign(backend.xp.asarray(vectors), backend.xp.asarray(state.codebook.centroids))
        labels = labels.get() if hasattr(labels, "get") else labels
        old = np.isin(cells, list(state.previous.cells))
        cells = np.where(old, labels + state.codebook.first, cells).astype(np.int32)
    names = {name for row in rows for name in row.attributes}
    return Header(
        ids=[row.id for row in rows],
        topic_partitions=np.array([row.topic_partition for row in rows], dtype=np.int32),
        offsets=np.array([row.offset for row in rows], dtype=np.int64),
        timestamps=np.array([row.timestamp for row in rows], dtype=np.int64),
        cells=cells,
        vectors=vectors,
        vector_at=np.arange(len(rows), dtype=np.int64),
        attributes={name: [row.attributes.get(name) for row in rows] for name in names},
    )


def _by_holders(rows: Sequence[StoredRow], state: CollectionState) -> list[tuple[list[int], frozenset[str]]]:
    """Positions of rows grouped by the workers that have them all already: those that serve the row's present cell."""
    groups: dict[frozenset[str], list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(frozenset(state.serving.get(row.cell, ())), []).append(position)
    return [(positions, had) for had, positions in groups.items()]


def _take_rows(header: Header, rows: list[int]) -> Header:
    return Header(
        ids=[header.ids[row] for row in rows],
        topic_partitions=header.topic_partitions[rows],
        offsets=header.offsets[rows],
        timestamps=header.timestamps[rows],
        cells=header.cells[rows],
        vectors=header.vectors[rows],
        vector_at=np.arange(len(rows), dtype=np.int64),
        attributes={name: [values[row] for row in rows] for name, values in header.attributes.items()},
    )
