"""Carrying out what `planning` decides, for one collection, one change at a time.

Runs on the scheduler's event loop and talks to workers through a function handed in, so tests need no Dask. A change is
published to all members and answered by each only when it has finished what it had begun under the older epoch; only
then do clients see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Collection, Mapping
from typing import Any, TypeVar

from headrace.cluster import planning
from headrace.cluster.attendance import Attendance
from headrace.cluster.calls import Call
from headrace.cluster.coordinator_settings import CoordinatorSettings
from headrace.cluster.rounds import Rounds
from headrace.cluster.snapshot_loading import Loading
from headrace.cluster.snapshotting import Taking
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.cluster.watching import watch
from headrace.cluster.wire import offsets_to_wire
from headrace.gpu.errors import ClusterError, HeadraceError

__all__ = ["Coordinator", "CoordinatorSettings"]

log = logging.getLogger("headrace.cluster")

T = TypeVar("T")


class Coordinator:
    """Keeps one collection's state in line with the workers there are. Everything runs on one event loop."""

    def __init__(
        self,
        spec: CollectionSpec,
        call: Call,
        settings: CoordinatorSettings | None = None,
        *,
        after: CollectionState | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        self.state = CollectionState(spec=spec, codebook=first_codebook(spec.dim))
        if after is not None:
            # A collection of this name was dropped: what is still under way for it must not be taken for this one's.
            self.state = self.state.with_(epoch=after.epoch, incarnation=after.incarnation + 1)
        self._call, self._settings = call, settings or CoordinatorSettings()
        self._workers = Attendance(roles)
        self._rounds = Rounds(self, call, self._settings, self._workers)
        self._rows: dict[int, int] = {}
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self.ready = asyncio.Event()
        self._lock = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._anew = False
        self.snapshots = Taking(self, call, self._settings.snapshots)
        self.loading = Loading(self, call, self._settings.snapshots)

    # -- events --------------------------------------------------------------------------------------------------------

    def start(self, live: set[str]) -> None:
        self._workers.live = set(live)
        loop, name = asyncio.get_running_loop(), self.state.spec.name
        self._tasks = [
            loop.create_task(self._run(), name=f"headrace-{name}"),
            loop.create_task(self._watch(), name=f"headrace-watch-{name}"),
            loop.create_task(self.snapshots.run(), name=f"headrace-snapshots-{name}"),
        ]
        self._wake.set()

    def resume(self, live: set[str], incomplete: Collection[str]) -> None:
        """Go on from a state that is the workers' own; `incomplete` ones must begin anew."""
        self._workers.leaving = set(self.state.leaving)
        self._workers.suspects |= dict.fromkeys(incomplete, "it lacks rows")
        self._anew = True
        self.start(live)

    def again(self) -> None:
        """Have everybody told once more, although nothing has changed."""
        self._anew = True
        self._wake.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.loading.close()

    def worker_joined(self, address: str) -> None:
        self._workers.came(address)
        self._wake.set()

    def worker_left(self, address: str) -> None:
        self._workers.went(address)
        self._wake.set()

    def check_drain(self, address: str) -> None:
        """Raise `ClusterError` if `address` cannot be emptied."""
        self._workers.check_drain(self.state, address)

    def drain(self, address: str, *, undo: bool = False) -> None:
        """Have a worker's cells go to the others, or let it have some again; it goes on answering meanwhile."""
        (self._workers.leaving.discard if undo else self._workers.leaving.add)(address)
        self._wake.set()

    def can_do_without(self, going: Collection[str]) -> bool:
        """Whether others can hold what the `going` workers do."""
        return self._workers.can_do_without(self.state, going)

    def has_emptied(self, address: str) -> bool:
        """Whether nothing is missed if a worker that was to be emptied ends now."""
        return not self._lock.locked() and self._workers.has_emptied(self.state, address)

    def suspect(self, address: str, why: str) -> None:
        """A worker did not answer one of its peers; see `Attendance.suspects`."""
        if self._workers.suspect(self.state, address, why):
            self._wake.set()

    async def topic_found(self, known: str, source: Source) -> None:
        """A worker that took the topic to be the one with the id `known` has found it to be that of `source`."""
        async with self._lock:
            old = self.state.source
            # Else another worker was first, or it is more than one topic behind.
            if old is not None and known == old.topic_id != source.topic_id:
                await self._take_up(planning.topic_found(self.state, source))

    async def _take_up(self, wanted: CollectionState) -> None:
        if wanted is self.state:
            return
        if wanted.incarnation != self.state.incarnation:
            log.error("collection %r: %s", wanted.spec.name, wanted.alarms[-1])
            self._rows = {}
        await self._publish(wanted)

    async def attach(self, source: Source) -> None:
        """Read records from `source`; the same source again changes nothing, but for a topic that was made anew.

        Raises
        ------
        CollectionError, TopicError
            As `planning.attached`.
        """
        async with self._lock:
            self.loading.check_source()
            await self._take_up(planning.attached(self.state, source))

    async def learn(self, schema: Mapping[str, str]) -> dict[str, str]:
        """Take up attributes that a worker has met for the first time; whoever comes first decides their kind."""
        merged = {**schema, **self.state.schema}
        if merged != self.state.schema:
            # No new epoch: a schema only grows, and a worker that does not know a column yet asks here.
            self.state = self.state.with_(schema=merged)
            await self.tell()
        return merged

    def alarm(self, text: str) -> None:
        """Something a person should know; shown by status until the collection is dropped."""
        if text not in self.state.alarms:
            log.error("collection %r: %s", self.state.spec.name, text)
            self.state = self.state.with_(alarms=(*self.state.alarms, text))
            self._tasks.append(asyncio.get_running_loop().create_task(self.tell()))

    async def tell(self) -> None:
        """Have the workers remember what changes without an epoch, should this scheduler be lost."""
        state, deadline = self.state, self._settings.silence
        told = {"collection": state.spec.name, **state.told()}
        calls = (self._call(worker, "told", deadline=deadline, **told) for worker in state.members)
        await asyncio.gather(*calls, return_exceptions=True)

    async def newer_than(self, epoch: int, patience: float) -> CollectionState:
        """The working state as soon as it is newer than `epoch`, or after `patience` seconds as it is."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):  # the caller looks at the epoch
                await asyncio.wait_for(self._changed.wait_for(lambda: self.state.epoch > epoch), patience)
        return self.state

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):  # a tick
                async with asyncio.timeout(self._settings.tick):
                    await self._wake.wait()
            self._wake.clear()
            try:
                async with self._lock:
                    while await self._step():
                        pass
            except HeadraceError as error:
                log.warning("collection %r: %s; trying again", self.state.spec.name, error)
            except Exception:
                log.exception("collection %r: looking after it failed; trying again", self.state.spec.name)

    async def _watch(self) -> None:
        def ask(worker: str, seconds: float) -> Awaitable[Any]:
            return self._call(worker, "watermarks", deadline=seconds, collection=self.state.spec.name)

        every, patience = self._settings.watch, self._settings.silence
        await watch(lambda: self.state.members, ask, self.suspect, every=every, patience=patience)

    async def unless_lost(self, work: Awaitable[T], of: Collection[str] | None = None) -> T:
        """What `work` gives, which may take long; given up when a worker `of` these is lost, by default any that is a
        member now: then writes wait for a change.

        Raises
        ------
        ClusterError
            A member is lost.
        """
        task = asyncio.ensure_future(work)
        needed = tuple(self.state.members if of is None else of)  # a suspect is soon no member any more
        try:
            while not (await asyncio.wait({task}, timeout=self._settings.tick))[0]:
                if lost := self._workers.lost(needed):
                    raise ClusterError(f"{', '.join(lost)} was lost meanwhile")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                task.cancelled() or task.exception()

    async def _step(self) -> bool:
        """One change; True if there may be more to do at once."""
        await self._recall_suspects()
        live = self._workers.counted_on
        if self.state.restoring and live.issuperset(self.state.members) and self.state.members:
            live = set(self.state.members)  # those that come while a snapshot is loaded join when it has been
        wanted = planning.membership(self.state, live, self._rows, self._workers.leaving, self._workers.roles)
        if wanted is not self.state or self._anew:
            if wanted.members and planning.lost_cells(self.state, live):
                before = self.state.with_(roles=wanted.roles)
                instead = await self.loading.instead(before, wanted, self._workers.leaving)
                if instead is None:
                    return False
                wanted = instead
            self._anew = False
            if not wanted.members:
                self.state = wanted
                return False
            log.info(
                "collection %r: %d workers (%d joining), epoch %d",
                wanted.spec.name,
                len(wanted.members),
                sum(role == "joining" for role in wanted.members.values()),
                wanted.epoch,
            )
            await self._publish(wanted)
            return True
        if self.state.moving:
            base = await (self.loading.load() if self.state.restoring else self._rounds.send_rows_on())
            if base is None:
                return bool(self._workers.suspects) or self._anew
            await self._publish(planning.settle(self.state), base)
            return True
        return await self._even_out_if_due() or await self._train_if_due()

    async def _publish(self, state: CollectionState, base: Mapping[str, Mapping[int, int]] | None = None) -> None:
        self.state = state
        self.loading.most = max(self.loading.most, len(state.members))
        async with self._changed:
            self._changed.notify_all()
        wire, deadline = state.to_wire(), self._settings.publish_deadline

        async def tell(worker: str) -> None:
            try:
                complete = offsets_to_wire((base or {}).get(worker, {}))
                await self._call(worker, "state", deadline=deadline, state=wire, base=complete)
            except HeadraceError as error:
                self.suspect(worker, str(error))

        # Those that joined know that they are complete before others drop rows, should this scheduler be lost between.
        await asyncio.gather(*(tell(worker) for worker in state.members if worker in (base or {})))
        await asyncio.gather(*(tell(worker) for worker in state.members if worker not in (base or {})))
        if not any(worker in self._workers.suspects for worker in state.members):
            self.ready.set()

    async def _even_out_if_due(self) -> bool:
        state = self.state
        rows = await self._rounds.count_rows()
        if rows is None:
            return False
        self._rows = rows
        if state is not self.state or sum(rows.values()) < self._settings.rebalance_rows:
            return False
        wanted = planning.rebalanced(state, rows)
        if wanted is state:
            return False
        log.info("collection %r: %d cells change workers for balance", state.spec.name, len(wanted.surplus))
        await self._publish(wanted)
        return True

    async def _train_if_due(self) -> bool:
        centroids = await self._rounds.train()
        if centroids is None:
            return False
        await self._publish(planning.adopt_codebook(self.state, centroids))
        return True

    async def _recall_suspects(self) -> None:
        """A suspect that answers again has wiped its copy and joins as a new worker would."""
        for worker in self._workers.out(self.state):
            try:
                await self._call(worker, "reset", deadline=0.25, collection=self.state.spec.name)
            except HeadraceError:
                continue  # still away; the next tick asks again
            self._workers.suspects.pop(worker, None)
