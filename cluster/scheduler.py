"""The scheduler's half: a plugin that keeps a `Coordinator` per collection and answers clients and workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from headrace.cluster.calls import answering, call
from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.recovery import recovered
from headrace.cluster.retiring import Retiring
from headrace.cluster.roles import BOTH, may_hold
from headrace.cluster.snapshot_calls import SnapshotCalls
from headrace.cluster.state import CollectionSpec, CollectionState, Source
from headrace.gpu.errors import ClusterError, CollectionExists, CollectionNotFound

__all__ = ["HeadraceScheduler"]

log = logging.getLogger("headrace.cluster")

_PATIENCE = 5.0
_PAUSE = 0.05
_TAKEN_UP = 30.0


class HeadraceScheduler(SnapshotCalls, Retiring, SchedulerPlugin):
    """Registered once per scheduler; a second registration is ignored.

    Parameters
    ----------
    settings : CoordinatorSettings, optional
    worker : bytes, optional
        The pickled worker plugin, for workers that come later; whoever registers both has no need of it.
    """

    name = "headrace"
    idempotent = True

    def __init__(self, settings: CoordinatorSettings | None = None, worker: bytes | None = None) -> None:
        self._settings, self._worker_plugin = settings or CoordinatorSettings(), worker
        self._coordinators: dict[str, Coordinator] = {}
        self._dropped: dict[str, CollectionState] = {}
        self._ready: dict[str, str] = {}
        self._pids: dict[str, int] = {}
        self._roles: dict[str, str] = {}
        self._going: set[str] = set()
        self.drain_deadline = self._settings.drain
        self._returning: dict[str, dict[str, CollectionState]] = {}
        self._recoveries: set[asyncio.Task[None]] = set()

    def hand_out(self, worker: bytes) -> None:
        """Have every worker that comes set up this pickled plugin."""
        self._worker_plugin = worker

    async def start(self, scheduler: Any) -> None:
        self._scheduler, self._began = scheduler, time.monotonic()
        if self._worker_plugin is not None:
            scheduler.worker_plugins.setdefault(self.name, self._worker_plugin)
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
                    "topic_found",
                    "suspect",
                    "learn",
                    "alarm",
                    "await_state",
                    "shutdown",
                    *self.calls,
                    *self.retiring_calls,
                )
            }
        )
        self.hear_of_retirement()

    async def close(self) -> None:
        for task in self._recoveries:
            task.cancel()
        for coordinator in self._coordinators.values():
            await coordinator.close()

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        self._roles.pop(worker, None)
        self._going.discard(worker)
        if self._ready.pop(worker, None) is not None:
            for coordinator in self._coordinators.values():
                coordinator.worker_left(worker)

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def hello(
        self, address: str, instance: str, pid: int, holds: Sequence[Mapping[str, Any]] = (), role: str = BOTH
    ) -> dict[str, Any]:
        """A worker is ready; another instance at the same address is another worker, with nothing in it.

        One that `holds` collections has been parted from this scheduler, or from the one before it. Where it has been
        a member all the time it goes on; what it holds of others is out of date and must be wiped first.
        """
        known = self._ready.get(address)
        if known not in (None, instance):
            for coordinator in self._coordinators.values():
                coordinator.worker_left(address)
            await asyncio.sleep(0)
        held = {state.spec.name: state for state in map(CollectionState.from_wire, holds)}
        while outdated := [name for name, state in held.items() if not self._continues(address, state)]:
            for name in outdated:
                log.warning("collection %r: %s missed something and begins anew", name, address)
                await self._call(address, "reset", deadline=_PATIENCE, collection=name)
                del held[name]
        for name, state in held.items():
            self._reported(name, address, state)
        self._ready[address] = instance
        self._pids[address] = pid
        self._roles[address] = role
        for coordinator in self._coordinators.values():
            coordinator.worker_joined(address)
        return {"workers": len(self._ready)}

    def _continues(self, address: str, state: CollectionState) -> bool:
        """Whether what a worker holds is still part of its collection."""
        name = state.spec.name
        if name not in self._coordinators:
            dropped = self._dropped.get(name)
            return dropped is None or dropped.spec.uid != state.spec.uid
        now = self._coordinators[name].state
        return now.spec.uid == state.spec.uid and (name in self._returning or address in now.members)

    def _reported(self, name: str, address: str, state: CollectionState) -> None:
        """Take up a collection that a scheduler before this one looked after."""
        if name not in self._coordinators:
            log.warning("collection %r: found on %s; waiting for its other workers", name, address)
            self._returning[name] = {}
            self._coordinators[name] = Coordinator(state.spec, self._call, self._settings, roles=self._roles)
            task = asyncio.get_running_loop().create_task(self._recover(name), name=f"headrace-recover-{name}")
            self._recoveries.add(task)
            task.add_done_callback(self._recoveries.discard)
        if name in self._returning:
            self._returning[name][address] = state
            # Who asks meanwhile is told what a worker knows; nothing is changed before all have come.
            self._coordinators[name].state = max(self._returning[name].values(), key=lambda state: state.epoch)

    async def _recover(self, name: str) -> None:
        until = time.monotonic() + self._settings.grace
        held, coordinator = self._returning[name], self._coordinators[name]
        while set(coordinator.state.members) - self._ready.keys() and time.monotonic() < until:
            await asyncio.sleep(_PAUSE)
        coordinator.state, incomplete = recovered(held)
        members = coordinator.state.members
        # One that has come back with nothing is no member any more, whatever the others think.
        emptied = {worker for worker in self._ready if members.get(worker) == "active" and worker not in held}
        del self._returning[name]
        log.warning(
            "collection %r: goes on with %d of %d workers", name, len(set(members) & self._ready.keys()), len(members)
        )
        self._going.update(worker for worker in coordinator.state.leaving if worker in self._ready)
        coordinator.resume(set(self._ready), incomplete | emptied)

    async def create(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        wanted = CollectionSpec.from_wire({**spec, "uid": uuid.uuid4().hex})
        await self._until_free(wanted.name)
        after = self._dropped.pop(wanted.name, None)
        self._coordinators[wanted.name] = coordinator = self._coordinator_of(wanted, after)
        coordinator.start(set(self._ready))
        until = time.monotonic() + _TAKEN_UP
        while not coordinator.ready.is_set():
            if self._coordinators.get(wanted.name) is not coordinator:
                raise CollectionNotFound(f"collection {wanted.name!r} was dropped while it was made")
            if time.monotonic() >= until:
                raise ClusterError(
                    f"collection {wanted.name!r} is made, but not all workers have taken it up after {_TAKEN_UP:g} s: "
                    "look at its status, or drop it"
                )
            with contextlib.suppress(TimeoutError):  # a tick
                await asyncio.wait_for(coordinator.ready.wait(), _PAUSE)
        return {"epoch": coordinator.state.epoch}

    def _coordinator_of(self, spec: CollectionSpec, after: CollectionState | None) -> Coordinator:
        """Of a new collection: workers that are to go are given nothing of it."""
        coordinator = Coordinator(spec, self._call, self._settings, after=after, roles=self._roles)
        for worker in self._going:
            coordinator.drain(worker)
        return coordinator

    async def _until_free(self, name: str) -> None:
        """Return when there are workers for a new collection; raises where there is one of this name."""
        self._check_free(name)
        # Workers of a new cluster need a moment; those that return to a new scheduler may hold it already.
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and not (self._ready and self._scheduler.workers.keys() <= self._ready.keys()):
            await asyncio.sleep(_PAUSE)
        if not may_hold(self._ready, self._roles):
            raise ClusterError(
                "no worker is ready to hold a collection; start workers of the role 'search' or 'both' and try again"
            )
        self._check_free(name)

    def _check_free(self, name: str) -> None:
        if name in self._coordinators:
            raise CollectionExists(
                f"collection {name!r} exists already; open it with collection({name!r}) or drop it first"
            )

    async def drop(self, collection: str) -> dict[str, Any]:
        coordinator = await self._settled(collection)
        await self._forget(collection, coordinator)
        await coordinator.snapshots.end()
        return {}

    async def _forget(self, name: str, coordinator: Coordinator) -> None:
        """Take a collection from the workers; nothing happens where it is no longer the one of this name."""
        if self._coordinators.get(name) is not coordinator:
            return
        del self._coordinators[name]
        self._dropped[name] = coordinator.state
        await coordinator.close()
        if name not in self._coordinators:
            self._dropped[name] = coordinator.state
        uid = coordinator.state.spec.uid  # another of this name may have been made meanwhile
        calls = (self._call(worker, "drop", deadline=5.0, collection=name, uid=uid) for worker in self._ready)
        await asyncio.gather(*calls, return_exceptions=True)

    async def shutdown(self) -> dict[str, Any]:
        """The cluster is about to end: workers stop reading, and those that leave now are not missed."""
        names = list(self._coordinators)
        for task in self._recoveries:
            task.cancel()
        self._returning.clear()
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
            "roles": [[address, self._roles[address]] for address in sorted(self._ready)],
        }

    async def describe(self, collection: str, epoch: int = -1) -> dict[str, Any]:
        """The newest state; None if that is the caller's own `epoch`."""
        coordinator = self._coordinator(collection)
        state = coordinator.state
        return {
            "state": None if state.epoch == epoch else state.to_wire(),
            **state.told(),  # this changes without a new epoch
        }

    async def await_state(self, collection: str, epoch: int, patience: float) -> dict[str, Any]:
        """For workers: the working state as soon as it is newer than `epoch`."""
        state = await self._coordinator(collection).newer_than(epoch, patience)
        return {"state": state.to_wire()}

    async def ingest(self, collection: str, source: Mapping[str, Any]) -> dict[str, Any]:
        coordinator = await self._settled(collection)
        await coordinator.attach(_source(source))
        return {"epoch": coordinator.state.epoch}

    async def topic_found(self, collection: str, known: str, source: Mapping[str, Any]) -> dict[str, Any]:
        """A worker has found the topic under another id than `known`."""
        coordinator = await self._settled(collection)
        await coordinator.topic_found(known, _source(source))
        return {"epoch": coordinator.state.epoch}

    async def suspect(self, collection: str, worker: str, epoch: int, why: str) -> dict[str, Any]:
        coordinator = self._coordinator(collection)
        if coordinator.state.epoch == epoch:
            coordinator.suspect(worker, why)
        return {}

    async def learn(self, collection: str, schema: Mapping[str, str]) -> dict[str, Any]:
        return {"schema": await (await self._settled(collection)).learn(schema)}

    async def alarm(self, collection: str, text: str) -> dict[str, Any]:
        (await self._settled(collection)).alarm(text)
        return {}

    async def _call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        return await call(self._scheduler.rpc, address, op, deadline=deadline, **message)

    async def _settled(self, collection: str) -> Coordinator:
        """The collection's coordinator, once its workers have returned to a new scheduler."""
        while collection in self._returning:
            await asyncio.sleep(_PAUSE)
        return self._coordinator(collection)

    def _coordinator(self, collection: str) -> Coordinator:
        try:
            return self._coordinators[collection]
        except KeyError:
            if self._worker_plugin is not None and time.monotonic() - self._began < self._settings.grace:
                raise ClusterError("this scheduler has just begun, and workers may still return to it") from None
            known = ", ".join(sorted(self._coordinators)) or "none yet"
            raise CollectionNotFound(f"there is no collection {collection!r} (there are: {known})") from None


def _source(wire: Mapping[str, Any]) -> Source:
    origins = {partition: offset for partition, offset in wire["origins"]}  # noqa: C416 (pairs arrive as tuples)
    return Source(**{**wire, "origins": origins})
