"""Carrying out what `planning` decides, for one collection, one change at a time.

Runs on the scheduler's event loop and talks to workers through a function handed in, so tests need no Dask. A change is
published to all members and answered by each only when it has finished what it had begun under the older epoch; only
then do clients see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Collection, Mapping
from typing import Any, TypeVar

from headrace.cluster import planning
from headrace.cluster.calls import Call
from headrace.cluster.coordinator_settings import CoordinatorSettings
from headrace.cluster.snapshot_loading import Loading
from headrace.cluster.snapshotting import Taking
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.cluster.watching import watch
from headrace.cluster.wire import floats_from_wire, offsets_from_wire, offsets_to_wire
from headrace.gpu.errors import ClusterError, CollectionError, HeadraceError, StaleEpoch, TopicError
from headrace.streams.topic_identity import another

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
    ) -> None:
        self.state = CollectionState(spec=spec, codebook=first_codebook(spec.dim))
        if after is not None:
            # A collection of this name was dropped: what is still under way for it must not be taken for this one's.
            self.state = self.state.with_(epoch=after.epoch, incarnation=after.incarnation + 1)
        self._call, self._settings = call, settings or CoordinatorSettings()
        self._live: set[str] = set()
        self._suspects: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._rows: dict[int, int] = {}
        self._surveyed = time.monotonic()
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
        self._live = set(live)
        loop, name = asyncio.get_running_loop(), self.state.spec.name
        self._tasks = [
            loop.create_task(self._run(), name=f"headrace-{name}"),
            loop.create_task(self._watch(), name=f"headrace-watch-{name}"),
            loop.create_task(self.snapshots.run(), name=f"headrace-snapshots-{name}"),
        ]
        self._wake.set()

    def resume(self, live: set[str], incomplete: Collection[str]) -> None:
        """Go on from a state that is the workers' own; `incomplete` ones must begin anew."""
        self._leaving = set(self.state.leaving)
        self._suspects |= dict.fromkeys(incomplete, "it lacks rows")
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

    def worker_joined(self, address: str) -> None:
        self._suspects.pop(address, None)
        self._live.add(address)
        self._wake.set()

    def worker_left(self, address: str) -> None:
        self._suspects.pop(address, None)
        self._leaving.discard(address)
        self._live.discard(address)
        self._wake.set()

    def check_drain(self, address: str) -> None:
        """Raise `ClusterError` if `address` cannot be emptied."""
        name, members = self.state.spec.name, self.state.members
        if address not in members:
            raise ClusterError(f"{address!r} is no worker of collection {name!r}; they are {', '.join(members)}")
        if set(members) <= self._leaving | {address}:
            raise ClusterError(
                f"{address} is the last worker that holds collection {name!r}: start another before this one is drained"
            )

    def drain(self, address: str, *, undo: bool = False) -> None:
        """Have a worker's cells go to the others, or let it have some again; it goes on answering meanwhile."""
        if undo:
            self._leaving.discard(address)
        else:
            self._leaving.add(address)
        self._wake.set()

    def suspect(self, address: str, why: str) -> None:
        """A worker did not answer one of its peers: it leaves the placement until it answers again, and then joins
        anew.
        """
        if address not in self.state.members or address in self._suspects:
            return
        if address in self._live and (address,) in self.state.serving.values():
            # Without it rows would be gone: writes wait until it answers, or Dask says that it is dead.
            log.warning(
                "collection %r: waiting for %s, which holds last copies: %s", self.state.spec.name, address, why
            )
        else:
            log.warning("collection %r: %s leaves the placement: %s", self.state.spec.name, address, why)
            self._suspects[address] = why
            self._wake.set()

    async def topic_found(self, known: str, source: Source) -> None:
        """A worker that took the topic to be the one with the id `known` has found it to be that of `source`."""
        async with self._lock:
            if self.state.source is None or known != self.state.source.topic_id or known == source.topic_id:
                return  # another worker was first, or it is more than one topic behind
            await self._take_up(source)

    async def _take_up(self, source: Source) -> None:
        wanted = planning.topic_found(self.state, source)
        if wanted.incarnation != self.state.incarnation:
            log.error("collection %r: %s", wanted.spec.name, wanted.alarms[-1])
            self._rows = {}
        await self._publish(wanted)

    async def attach(self, source: Source) -> None:
        """Read records from `source`; the same source again changes nothing, but for a topic that was made anew.

        Raises
        ------
        CollectionError
            The collection reads from another topic.
        TopicError
            The topic has another number of topic partitions than when the collection was made.
        """
        async with self._lock:
            self.loading.check_source()
            old = self.state.source
            same = old and (old.bootstrap, old.topic, old.format) == (source.bootstrap, source.topic, source.format)
            if old and same and another(old.topic_id, source.topic_id):
                await self._take_up(source)
                return
            if old and (old.bootstrap, old.topic, old.format, old.partitions) == (
                source.bootstrap,
                source.topic,
                source.format,
                source.partitions,
            ):
                return
            if old and old.topic == source.topic and old.partitions != source.partitions:
                raise TopicError(
                    f"topic {source.topic!r} has {source.partitions} topic partitions and the collection was built on "
                    f"{old.partitions}: ids would map to others; build a new collection from the topic instead"
                )
            if old:
                raise CollectionError(
                    f"collection {self.state.spec.name!r} reads topic {old.topic!r} from {old.bootstrap} already; "
                    "one topic feeds one collection: create another collection for another topic"
                )
            await self._publish(planning.attach_source(self.state, source))

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

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """What `work` gives, which may take long; given up when a member is lost, for then writes wait for a change.

        Raises
        ------
        ClusterError
            A member is lost.
        """
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=self._settings.tick))[0]:
                if lost := [a for a in self.state.members if a in self._suspects or a not in self._live]:
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
        live = self._live - set(self._suspects)
        if self.state.restoring and live.issuperset(self.state.members) and self.state.members:
            live = set(self.state.members)  # those that come while a snapshot is loaded join when it has been
        wanted = planning.membership(self.state, live, self._rows, self._leaving)
        if wanted is not self.state or self._anew:
            if wanted.members and planning.lost_cells(self.state, live):
                instead = await self.loading.instead(self.state, wanted, self._leaving)
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
            base = await (self.loading.load() if self.state.restoring else self._move())
            if base is None:
                return bool(self._suspects) or self._anew
            await self._publish(planning.settle(self.state), base)
            return True
        return await self._even_out_if_due() or await self._train_if_due()

    async def _publish(self, state: CollectionState, base: Mapping[str, Mapping[int, int]] | None = None) -> None:
        self.state = state
        self.loading.most = max(self.loading.most, len(state.members))
        async with self._changed:
            self._changed.notify_all()
        wire = state.to_wire()

        async def tell(worker: str) -> None:
            try:
                await self._call(
                    worker,
                    "state",
                    deadline=self._settings.publish_deadline,
                    state=wire,
                    base=offsets_to_wire((base or {}).get(worker, {})),
                )
            except HeadraceError as error:
                self.suspect(worker, str(error))

        # Those that joined know that they are complete before others drop rows, should this scheduler be lost between.
        await asyncio.gather(*(tell(worker) for worker in state.members if worker in (base or {})))
        await asyncio.gather(*(tell(worker) for worker in state.members if worker not in (base or {})))
        if not any(worker in self._suspects for worker in state.members):
            self.ready.set()

    async def _move(self) -> dict[str, dict[int, int]] | None:
        """Have the rows sent on; the offsets below which joining workers are complete, or None if it must be tried
        again.
        """
        work = planning.moves(self.state)
        epoch, name = self.state.epoch, self.state.spec.name
        if work:
            log.info("collection %r: %d workers send rows on", name, len(work))
        # Workers with nothing to send still say how far they are: no joining worker may claim more than its peers have.
        everyone = {worker: work.get(worker, []) for worker in self.state.active}
        sending = asyncio.gather(
            *(
                self._call(
                    worker, "move", deadline=self._settings.move_deadline, collection=name, epoch=epoch, cells=cells
                )
                for worker, cells in everyone.items()
            ),
            return_exceptions=True,
        )
        try:
            answers = await self.unless_lost(sending)
        except ClusterError as error:
            log.info("collection %r: rows are sent on again later: %s", name, error)
            return None
        low: dict[int, int] | None = None
        for worker, answer in zip(everyone, answers, strict=True):
            if isinstance(answer, StaleEpoch):
                return None  # overtaken by a newer change
            if isinstance(answer, ClusterError):
                if worker not in self._live:
                    return None
                self.suspect(worker, str(answer))
                return None
            if isinstance(answer, BaseException):
                raise answer
            if answer["failed"]:
                for peer, why in answer["failed"]:
                    self.suspect(peer, why)
                return None
            marks = offsets_from_wire(answer["watermarks"])
            low = marks if low is None else {tp: min(low.get(tp, 0), mark) for tp, mark in marks.items()}
        joining = [worker for worker, role in self.state.members.items() if role == "joining"]
        return {worker: low or {} for worker in joining}

    async def _even_out_if_due(self) -> bool:
        state, settings = self.state, self._settings
        if time.monotonic() - self._surveyed < settings.survey:
            return False
        self._surveyed = time.monotonic()
        asking = asyncio.gather(
            *(
                self._call(worker, "status", deadline=settings.publish_deadline, collection=state.spec.name)
                for worker in state.active
            ),
            return_exceptions=True,  # who does not answer is noticed by `_watch`
        )
        answers = await self.unless_lost(asking)
        rows: dict[int, int] = {}
        for answer in answers:
            for cell, count in answer.get("cell_sizes", ()) if isinstance(answer, dict) else ():
                rows[cell] = max(rows.get(cell, 0), count)
        self._rows = rows
        if state is not self.state or sum(rows.values()) < settings.rebalance_rows:
            return False
        wanted = planning.rebalanced(state, rows)
        if wanted is state:
            return False
        log.info("collection %r: %d cells change workers for balance", state.spec.name, len(wanted.surplus))
        await self._publish(wanted)
        return True

    async def _train_if_due(self) -> bool:
        state, settings = self.state, self._settings
        if state.codebook.generation or state.spec.cells < 2 or state.source is None or not state.active:
            return False
        trainer = state.serving[state.codebook.first][0]
        status = await self._ask(trainer, "status", deadline=settings.publish_deadline, collection=state.spec.name)
        if status["rows"] < settings.min_rows:
            return False
        answer = await self.unless_lost(
            self._ask(
                trainer,
                "train",
                deadline=settings.move_deadline,
                collection=state.spec.name,
                cells=state.spec.cells,
                sample_rows=settings.sample_rows,
                iterations=settings.iterations,
            )
        )
        centroids = floats_from_wire(answer["centroids"])
        log.info(
            "collection %r: codebook of %d cells trained on %d rows", state.spec.name, len(centroids), answer["rows"]
        )
        await self._publish(planning.adopt_codebook(self.state, centroids))
        return True

    async def _ask(self, worker: str, op: str, *, deadline: float, **message: Any) -> dict[str, Any]:
        try:
            return await self._call(worker, op, deadline=deadline, **message)
        except ClusterError as error:
            self.suspect(worker, str(error))
            raise

    async def _recall_suspects(self) -> None:
        """A suspect that answers again has wiped its copy and joins as a new worker would."""
        gone = [worker for worker in self._suspects if worker not in self.state.members and worker in self._live]
        for worker in gone:
            try:
                await self._call(worker, "reset", deadline=0.25, collection=self.state.spec.name)
            except HeadraceError:
                continue  # still away; the next tick asks again
            self._suspects.pop(worker, None)
