"""The scheduler's half: a plugin that keeps a `Coordinator` per collection and answers clients and workers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from headrace.cluster.calls import answering, call
from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.state import CollectionSpec, CollectionState, Source
from headrace.gpu.errors import ClusterError, CollectionExists, CollectionNotFound

__all__ = ["HeadraceScheduler"]


class HeadraceScheduler(SchedulerPlugin):
    """Registered once per scheduler; a second registration is ignored."""

    name = "headrace"
    idempotent = True

    def __init__(self, settings: CoordinatorSettings | None = None) -> None:
        self._settings = settings or CoordinatorSettings()
        self._coordinators: dict[str, Coordinator] = {}
        self._dropped: dict[str, CollectionState] = {}
        self._ready: dict[str, str] = {}
        self._pids: dict[str, int] = {}

    async def start(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler.handlers.update(
            {
                f"headrace_{op}": answering(getattr(self, op))
                for op in (
                    "hello",
                    "create",
                    "drop",
                    "collections",
                    "describe",
                    "ingest",
                    "drain",
                    "suspect",
                    "learn",
                    "alarm",
                    "await_state",
                    "shutdown",
                )
            }
        )

    async def close(self) -> None:
        for coordinator in self._coordinators.values():
            await coordinator.close()

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        if self._ready.pop(worker, None) is not None:
            for coordinator in self._coordinators.values():
                coordinator.worker_left(worker)

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def hello(self, address: str, instance: str, pid: int) -> dict[str, Any]:
        """A worker is ready; another instance at the same address is another worker, with nothing in it."""
        known = self._ready.get(address)
        if known not in (None, instance):
            for coordinator in self._coordinators.values():
                coordinator.worker_left(address)
            await asyncio.sleep(0)
        self._ready[address] = instance
        self._pids[address] = pid
        for coordinator in self._coordinators.values():
            coordinator.worker_joined(address)
        return {"workers": len(self._ready)}

    async def create(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        wanted = CollectionSpec.from_wire({**spec, "uid": uuid.uuid4().hex})
        if wanted.name in self._coordinators:
            raise CollectionExists(
                f"collection {wanted.name!r} exists already; open it with collection({wanted.name!r}) or drop it first"
            )
        for _ in range(100):  # workers of a cluster that has just been started need a moment
            if self._ready:
                break
            await asyncio.sleep(0.05)
        else:
            raise ClusterError("no worker is ready to hold a collection; start workers and try again")
        coordinator = Coordinator(wanted, self._call, self._settings, after=self._dropped.pop(wanted.name, None))
        self._coordinators[wanted.name] = coordinator
        coordinator.start(set(self._ready))
        await asyncio.wait_for(coordinator.ready.wait(), 30.0)
        return {"epoch": coordinator.state.epoch}

    async def drop(self, collection: str) -> dict[str, Any]:
        coordinator = self._coordinator(collection)
        del self._coordinators[collection]
        await coordinator.close()
        self._dropped[collection] = coordinator.state
        calls = (self._call(worker, "drop", deadline=5.0, collection=collection) for worker in self._ready)
        await asyncio.gather(*calls, return_exceptions=True)
        return {}

    async def shutdown(self) -> dict[str, Any]:
        """The cluster is about to end: workers stop reading, and those that leave now are not missed."""
        names = list(self._coordinators)
        for coordinator in self._coordinators.values():
            await coordinator.close()
        self._coordinators.clear()
        calls = (self._call(worker, "drop", deadline=3.0, collection=name) for worker in self._ready for name in names)
        await asyncio.gather(*calls, return_exceptions=True)
        return {}

    async def collections(self) -> dict[str, Any]:
        return {
            "names": sorted(self._coordinators),
            "workers": [[address, self._pids[address]] for address in sorted(self._ready)],
        }

    async def describe(self, collection: str, epoch: int = -1) -> dict[str, Any]:
        """The newest state; None if that is the caller's own `epoch`."""
        coordinator = self._coordinator(collection)
        state = coordinator.state
        return {
            "state": None if state.epoch == epoch else state.to_wire(),
            "schema": dict(state.schema),  # these two change without a new epoch
            "alarms": list(state.alarms),
        }

    async def await_state(self, collection: str, epoch: int, patience: float) -> dict[str, Any]:
        """For workers: the working state as soon as it is newer than `epoch`."""
        state = await self._coordinator(collection).newer_than(epoch, patience)
        return {"state": state.to_wire()}

    async def ingest(self, collection: str, source: Mapping[str, Any]) -> dict[str, Any]:
        coordinator = self._coordinator(collection)
        origins = {partition: offset for partition, offset in source["origins"]}  # noqa: C416 (pairs arrive as tuples)
        await coordinator.attach(Source(**{**source, "origins": origins}))
        return {"epoch": coordinator.state.epoch}

    async def drain(self, worker: str, undo: bool = False) -> dict[str, Any]:
        """Empty a worker in all collections; they say when it is done by its rows."""
        if worker not in self._ready:
            raise ClusterError(f"{worker!r} is no worker here; they are {', '.join(sorted(self._ready)) or 'none yet'}")
        if not undo:
            for coordinator in self._coordinators.values():
                coordinator.check_drain(worker)
        for coordinator in self._coordinators.values():
            coordinator.drain(worker, undo=undo)
        return {}

    async def suspect(self, collection: str, worker: str, epoch: int, why: str) -> dict[str, Any]:
        coordinator = self._coordinator(collection)
        if coordinator.state.epoch == epoch:
            coordinator.suspect(worker, why)
        return {}

    async def learn(self, collection: str, schema: Mapping[str, str]) -> dict[str, Any]:
        return {"schema": await self._coordinator(collection).learn(schema)}

    async def alarm(self, collection: str, text: str) -> dict[str, Any]:
        self._coordinator(collection).alarm(text)
        return {}

    async def _call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        return await call(self._scheduler.rpc, address, op, deadline=deadline, **message)

    def _coordinator(self, collection: str) -> Coordinator:
        try:
            return self._coordinators[collection]
        except KeyError:
            known = ", ".join(sorted(self._coordinators)) or "none yet"
            raise CollectionNotFound(f"there is no collection {collection!r} (there are: {known})") from None
