"""The worker's half: a plugin that holds this worker's replicas and answers applies, reads and moves.

Handlers run on the worker's event loop. An apply of a few hundred rows takes well under a millisecond there and is
done in place; searches, index builds, scans and training go to executors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.protocol.pickle import dumps
from distributed.threadpoolexecutor import ThreadPoolExecutor as DaemonThreads

from headrace.cluster.calls import answering, call
from headrace.cluster.comparing import Comparing
from headrace.cluster.coordinator import CoordinatorSettings
from headrace.cluster.moving import header_of_rows, send_on
from headrace.cluster.replica import Replica
from headrace.cluster.scheduler import HeadraceScheduler
from headrace.cluster.snapshot_worker import Snapshotting
from headrace.cluster.state import CollectionState
from headrace.cluster.staying import Staying, unsupported
from headrace.cluster.stepping_back import stepping_back
from headrace.cluster.wire import (
    batch_from_wire,
    floats_from_wire,
    floats_to_wire,
    offsets_from_wire,
    offsets_to_wire,
    rows_to_wire,
)
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.budget import Budget
from headrace.gpu.ending import Ending
from headrace.gpu.errors import ClusterError, CollectionNotFound, StaleEpoch
from headrace.gpu.filters import Filter
from headrace.gpu.gather import Gatherer, GatherSettings
from headrace.gpu.store import Store, StoredRow, StoreSettings, View

__all__ = ["WorkerNode"]

log = logging.getLogger("headrace.cluster")

T = TypeVar("T")

_MOVE_ROWS = 256
_DROP_ROWS = 8192
_TIDY = 1.0
_JOBS = 2
"""At a time for one collection: a merge, and a seal that does not wait for it (see `headrace.gpu.maintenance`)."""


class WorkerNode(Comparing, Snapshotting, WorkerPlugin):
    """Holds replicas. `pipeline.node` adds the ingest graph and the encoders.

    Parameters
    ----------
    backend : str
        Name for `gpu.backend.resolve`, resolved once when the plugin is set up on its worker.
    store : StoreSettings, optional
    apply_deadline : float
        Seconds that a peer may take to answer an apply.
    gather : GatherSettings, optional
        How searches of many callers are put together.
    move_rate : float
        Rows a second that this worker sends to others when cells move.
    coordinator : CoordinatorSettings, optional
        For a scheduler that takes the place of one that was lost.
    patience : float
        Seconds that this worker waits for one, and answers reads, before it ends.
    """

    name = "headrace"
    idempotent = True
    calls: tuple[str, ...] = (
        "state", "drop", "reset", "apply", "search", "get", "count", "wait",
        "watermarks", "status", "scan", "move", "train", *Comparing.calls, *Snapshotting.calls, "told", "describe",
    )  # fmt: skip

    def __init__(
        self,
        backend: str = "auto",
        store: StoreSettings | None = None,
        *,
        apply_deadline: float = 2.0,
        gather: GatherSettings | None = None,
        move_rate: float = 20_000.0,
        coordinator: CoordinatorSettings | None = None,
        patience: float = 3600.0,
    ) -> None:
        self._coordinator_settings, self._patience = coordinator or CoordinatorSettings(), patience
        self.storage_options = self._coordinator_settings.snapshots.options
        self._backend_name, self._store_settings = backend, store or StoreSettings()
        self._gather_settings = gather or GatherSettings()
        self.apply_deadline, self._move_rate = apply_deadline, move_rate
        self.replicas: dict[str, Replica] = {}
        self._ended = False

    async def setup(self, worker: Any) -> None:
        if not hasattr(self, "_seed"):
            self._seed = self.seeded()
        self.worker = worker
        self.address: str = worker.address
        self.instance = uuid.uuid4().hex
        self.backend: Backend = resolve(self._backend_name)
        settings = self._store_settings
        self.backend.memory.start(settings.memory_limit)
        self._budget = Budget(settings.memory_limit, settings.maintenance_memory)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="headrace-read")
        # Threads of their own: a scan or a digest never stands in a search's way.
        self._searchers = ThreadPoolExecutor(self._gather_settings.at_once, thread_name_prefix="headrace-search")
        self._gatherer = Gatherer(self._searched, self._gather_settings)
        # Dask's threads are daemons: a worker that is to end does not wait for an index that nobody will need.
        self._builders = DaemonThreads(_JOBS, thread_name_prefix="headrace-build")  # type: ignore[no-untyped-call]
        self.start_snapshots()
        self._building: Counter[str] = Counter()
        self._scans: dict[str, Any] = {}
        self._tidying = asyncio.get_running_loop().create_task(self._tidy(), name="headrace-tidy")
        worker.handlers.update({f"headrace_{op}": answering(getattr(self, f"on_{op}")) for op in self.calls})
        self.ends_with_scheduler = unsupported(worker)
        if self.ends_with_scheduler:
            log.warning("%s would end if the scheduler did: %s", self.address, self.ends_with_scheduler)
        elif not self.address.startswith("inproc://"):
            Staying(worker, self.name, self._returned, patience=self._patience)
        await self._hello()

    def seeded(self) -> bytes:
        """This plugin as it was registered, for a scheduler that has none; to be called before `setup`."""
        return bytes(dumps(self))  # type: ignore[no-untyped-call]

    async def _returned(self) -> None:
        """The scheduler may be one that has never heard of Headrace."""
        plugin = HeadraceScheduler(self._coordinator_settings, worker=self._seed)
        sent = dumps(plugin)  # type: ignore[no-untyped-call]
        await self.worker.scheduler.register_scheduler_plugin(plugin=sent, name=plugin.name, idempotent=True)
        await self._hello()

    async def _hello(self) -> None:
        await self.call_scheduler(
            "hello",
            address=self.address,
            instance=self.instance,
            pid=os.getpid(),
            holds=[replica.state.to_wire() for replica in self.replicas.values()],
            deadline=30.0,
        )

    async def teardown(self, worker: Any) -> None:
        self._ended = True
        if not hasattr(self, "_tidying"):
            return  # its setup failed, and has said why
        self._tidying.cancel()
        for name in list(self.replicas):
            await self.release(name)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._searchers.shutdown(wait=False, cancel_futures=True)
        self._builders.shutdown(wait=False)  # type: ignore[no-untyped-call]
        self.stop_snapshots()

    # -- for subclasses ------------------------------------------------------------------------------------------------

    async def state_adopted(self, replica: Replica) -> None:
        """A replica has a newer state; returns when nothing begun under the older one is under way."""

    async def release(self, name: str) -> None:
        """Forget a collection."""
        if (replica := self.replicas.pop(name, None)) is not None:
            replica.close(ClusterError(f"{self.address} is ending") if self._ended else None)

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        return await call(self.worker.rpc, address, op, deadline=deadline, **message)

    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
        return await self.call(self.worker.scheduler.address, op, deadline=deadline, **message)

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Run something that reads or computes off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    def replica(self, collection: str) -> Replica:
        if self._ended:  # it has let go of everything; the collection is there, on other workers
            raise ClusterError(f"{self.address} is ending")
        try:
            return self.replicas[collection]
        except KeyError:
            raise CollectionNotFound(f"{self.address} holds no collection {collection!r}") from None

    async def _tidy(self) -> None:
        """Ask now and then, for a store that rests is asked by nobody else."""
        while True:
            await asyncio.sleep(_TIDY)
            for replica in list(self.replicas.values()):
                self.maintain(replica)

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
        if self._ended or self.address not in new.members:
            await self.release(name)
            return
        replica = self.replicas.get(name)
        if replica is None:
            replica = self.replicas[name] = Replica(new, self.address, self.backend, self._store_settings, self._budget)
            log.info("collection %r: this worker takes part (%s)", name, new.members[self.address])
        else:
            replica.adopt(new, base)
            await self._let_go(replica)
        await self.state_adopted(replica)

    async def _let_go(self, replica: Replica) -> None:
        """Drop step by step what others hold now: all at once, a million rows would hold up applies and reads."""
        step, total = max(_DROP_ROWS, replica.store.view.rows // 32), 0
        while dropped := replica.let_go(step):
            total += dropped
            await asyncio.sleep(0)
        if total:
            log.info("collection %r: dropped %d rows that others hold now", replica.state.spec.name, total)

    async def on_drop(self, collection: str) -> dict[str, Any]:
        await self.release(collection)
        return {}

    async def on_reset(self, collection: str) -> dict[str, Any]:
        """This worker had stopped answering: what it holds may be behind, so it begins again from its peers."""
        await self.release(collection)
        return {}

    async def on_describe(self, collection: str, epoch: int = -1) -> dict[str, Any]:
        """As the scheduler's call of this name, for clients that cannot reach it."""
        state = self.replica(collection).state
        return {
            "state": None if state.epoch == epoch else state.to_wire(),
            **state.told(),
        }

    async def on_told(self, collection: str, **told: Any) -> dict[str, Any]:
        """What changes without a new epoch, to be remembered should the scheduler be lost."""
        replica = self.replica(collection)
        schema = {**replica.state.schema, **told["schema"]}
        replica.state = replica.state.hearing({**told, "schema": schema})
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
        try:
            applied = replica.apply(
                None if batch is None else batch_from_wire(batch),
                {partition: (low, high) for partition, low, high in ranges},
                offsets_from_wire(stable),
                epoch,
            )
        finally:  # also where there was no room: tidying up makes some
            self.maintain(replica)
        if applied is None:
            raise StaleEpoch(f"epoch {epoch} of collection {collection!r}: {self.address} is at {replica.fence}")
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
        """Send all rows of `cells` on to whoever must hold them now, with their own versions.

        Who holds a row already hears of its number only, so a move that was interrupted costs little to do again.
        """
        replica = self.replica(collection)
        state = replica.state
        if state.epoch != epoch:
            raise StaleEpoch(f"{self.address} is at epoch {state.epoch} of {collection!r}, not {epoch}")
        watermarks = offsets_to_wire(replica.watermarks)
        moved = 0
        failed: dict[str, str] = {}
        began = time.monotonic()
        scan = replica.store.scan(frozenset(cells), vectors=True, batch=_MOVE_ROWS)
        while rows := await self.read(next, scan, []):
            header = await self.read(header_of_rows, rows, state, self.backend)
            failed = await send_on(
                self.call, state, header, me=self.address, local=replica.apply, deadline=self.apply_deadline
            )
            if failed:
                break
            moved += len(rows)
            # Applies and searches come first, here and where the rows go.
            await asyncio.sleep(max(0.0, began + moved / self._move_rate - time.monotonic()))
        self.maintain(replica)
        return {"moved": moved, "watermarks": watermarks, "failed": [[worker, why] for worker, why in failed.items()]}

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _caught_up(
        self, collection: str, epoch: int, required: Sequence[Sequence[int]], deadline: float
    ) -> Replica:
        replica = self.replica(collection)
        self._check_epoch(replica, epoch)
        if required:
            await replica.wait(offsets_from_wire(required), deadline)
            self._check_epoch(replica, epoch)
        return replica

    def _check_epoch(self, replica: Replica, epoch: int) -> None:
        """Raise `StaleEpoch` where rows may have gone that a read of `epoch` looks for here.

        Not only by a newer state: a record that was routed by one takes rows away before this worker has heard of it.
        """
        if epoch < replica.fence:
            name = replica.state.spec.name
            raise StaleEpoch(f"{self.address} is at epoch {replica.fence} of {name!r}, the read at {epoch}")

    async def on_search(
        self,
        collection: str,
        epoch: int,
        queries: Mapping[str, Any],
        limit: int,
        required: Sequence[Sequence[int]],
        deadline_s: float,
        where: Mapping[str, Any] | None = None,
        recall_target: float | None = None,
    ) -> dict[str, Any]:
        replica = await self._caught_up(collection, epoch, required, deadline_s)
        store = replica.store
        # The client has read the filter by the newest schema and sends the kinds along: this worker's may be older.
        wanted = None if where is None else Filter.from_wire(where)
        sought = _Sought(store, limit, wanted, recall_target)
        answers = await self._gatherer.search(sought, floats_from_wire(queries))
        self._check_epoch(replica, epoch)  # while the search waited its turn, rows may have gone that others hold now
        moment: _Answer | View = answers[0] if answers else store.view
        return {
            "rows": [answer.rows for answer in answers],
            "scores": [answer.scores for answer in answers],
            "applied": offsets_to_wire(moment.stamp),
            "moved": offsets_to_wire(moment.moved),
        }

    async def _searched(self, sought: _Sought, queries: npt.NDArray[np.float32]) -> list[_Answer]:
        """One search for all that were gathered."""
        return await asyncio.get_running_loop().run_in_executor(self._searchers, sought.search, queries)

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
        rows, view = replica.store.get(ids, vectors=vectors)
        return {
            "rows": rows_to_wire(rows),
            "applied": offsets_to_wire(view.stamp),
            "moved": offsets_to_wire(view.moved),
        }

    async def on_count(
        self,
        collection: str,
        epoch: int,
        required: Sequence[Sequence[int]],
        deadline_s: float,
        where: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        replica = await self._caught_up(collection, epoch, required, deadline_s)
        if where is None:
            sizes = replica.store.cell_sizes()
        else:
            sizes = await self.read(replica.store.cell_sizes, Filter.from_wire(where))
        return {"cell_sizes": [list(pair) for pair in sizes.items()], "applied": offsets_to_wire(replica.watermarks)}

    async def on_wait(self, collection: str, required: Sequence[Sequence[int]], deadline_s: float) -> dict[str, Any]:
        await self.replica(collection).wait(offsets_from_wire(required), deadline_s)
        return {}

    async def on_watermarks(self, collection: str) -> dict[str, Any]:
        return {"watermarks": offsets_to_wire(self.replica(collection).watermarks)}

    async def on_status(self, collection: str) -> dict[str, Any]:
        replica = self.replica(collection)
        return {
            **replica.status(),
            "cell_sizes": [list(pair) for pair in replica.store.cell_sizes().items()],
            "ends_with_scheduler": self.ends_with_scheduler,
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

        centroids, rows = await asyncio.get_running_loop().run_in_executor(self._builders, stepping_back, train)
        return {"centroids": floats_to_wire(centroids), "rows": rows}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one query is answered: rows and scores as they are sent, and the moment (`View`)."""

    rows: list[Any]
    scores: list[float]
    stamp: Mapping[int, int]
    moved: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Sought:
    """What searches must have in common to be one."""

    store: Store
    limit: int
    where: Filter | None
    recall_target: float | None

    def search(self, queries: npt.NDArray[np.float32]) -> list[_Answer]:
        found = self.store.search(queries, self.limit, where=self.where, recall_target=self.recall_target)
        return [
            _Answer(rows_to_wire(rows), scores, found.stamp, found.moved)
            for rows, scores in zip(found.rows, found.scores, strict=True)
        ]
