"""The worker's half: a plugin that holds this worker's replicas, from its first hello to its end.

What is asked of them is answered by its parts: `Writing`, `Reading`, `Comparing` and `Snapshotting`. Handlers run on
the worker's event loop; whatever takes longer than a small apply goes to executors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from distributed.diagnostics.plugin import WorkerPlugin
from distributed.protocol.pickle import dumps

from headrace.cluster.calls import answering
from headrace.cluster.comparing import Comparing
from headrace.cluster.coordinator import CoordinatorSettings
from headrace.cluster.replica import Replica
from headrace.cluster.roles import BOTH
from headrace.cluster.scheduler import HeadraceScheduler
from headrace.cluster.snapshot_worker import Snapshotting
from headrace.cluster.state import CollectionState
from headrace.cluster.staying import Staying, unsupported
from headrace.cluster.wire import offsets_from_wire, offsets_to_wire
from headrace.cluster.worker_reads import Reading
from headrace.cluster.worker_writes import Writing
from headrace.gpu.backend import resolve
from headrace.gpu.budget import Budget
from headrace.gpu.gather import GatherSettings
from headrace.gpu.store import StoreSettings

__all__ = ["WorkerNode"]

log = logging.getLogger("headrace.cluster")

_DROP_ROWS = 8192


class WorkerNode(Writing, Reading, Comparing, Snapshotting, WorkerPlugin):
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
    role = BOTH
    """What this worker is there for (`roles`); whoever knows sets it before `setup`."""
    calls: tuple[str, ...] = (
        "state", "drop", "reset", "describe", "told", "watermarks", "status",
        *Writing.calls, *Reading.calls, *Comparing.calls, *Snapshotting.calls,
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
        self.apply_deadline, self.move_rate = apply_deadline, move_rate
        self.replicas = {}

    # -- its life ------------------------------------------------------------------------------------------------------

    async def setup(self, worker: Any) -> None:
        if not hasattr(self, "_seed"):
            self._seed = self.seeded()
        self.instance = uuid.uuid4().hex
        settings = self._store_settings
        backend = resolve(self._backend_name)
        backend.memory.start(settings.memory_limit)
        self._budget = Budget(settings.memory_limit, settings.maintenance_memory)
        self.start_holding(worker, backend)
        self.start_reading(self._gather_settings)
        self.start_snapshots()
        self.start_upkeep()
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
            role=self.role,
            deadline=30.0,
        )

    async def teardown(self, worker: Any) -> None:
        self._ended = True
        if not hasattr(self, "_tidying"):
            return  # its setup failed, and has said why
        self.stop_tidying()
        for name in list(self.replicas):
            await self.release(name)
        self.stop_holding()
        self.stop_reading()
        self.stop_upkeep()
        self.stop_snapshots()

    # -- state ---------------------------------------------------------------------------------------------------------

    async def on_state(self, state: Mapping[str, Any], base: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Take over a state; answers once nothing that was begun under an older one is under way."""
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

    async def state_adopted(self, replica: Replica) -> None:
        """For subclasses. A replica has a newer state; returns when nothing begun under the older one is under way."""

    async def on_drop(self, collection: str, uid: str | None = None) -> dict[str, Any]:
        """The collection is no more; with `uid`, that one of its name."""
        replica = self.replicas.get(collection)
        if uid is None or replica is None or replica.state.spec.uid == uid:
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

    async def on_watermarks(self, collection: str) -> dict[str, Any]:
        """How far this copy has applied each topic partition."""
        return {"watermarks": offsets_to_wire(self.replica(collection).watermarks)}

    async def on_status(self, collection: str) -> dict[str, Any]:
        """What `Collection.status` shows of this copy."""
        replica = self.replica(collection)
        return {
            **replica.status(),
            "cell_sizes": [list(pair) for pair in replica.store.cell_sizes().items()],
            "ends_with_scheduler": self.ends_with_scheduler,
        }
