"""Micro-batches to every copy: again until all have them, in smaller parts where there is no room for the whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from headrace.cluster.fanout import Header, Outcome, fan_out, part_for
from headrace.cluster.replica import Replica
from headrace.cluster.routing import Router
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import ClusterError, CollectionNotFound, StaleEpoch, StoreFull
from headrace.pipeline.ingest_settings import IngestSettings, Node
from headrace.pipeline.micro_batch import MicroBatch
from headrace.pipeline.portions import Next, Portion, judge, part_of
from headrace.streams.batches import RawBatch, Refusal

__all__ = ["Sender", "no_offsets_of"]

log = logging.getLogger("headrace.pipeline")

_PEERS = 1.0
"""Seconds that another worker may take to say which state it has."""

Ranges = Mapping[int, tuple[int, int]]
Refuse = Callable[[RawBatch, list[Refusal]], Awaitable[None]]


class Sender:
    """Applies one collection's micro-batches on all its workers. Belongs to the worker's event loop.

    Parameters
    ----------
    node : Node
    replica : Replica
        This worker's own.
    settings : IngestSettings
    stable : mapping of int to int
        Topic partition to the offset below which everything is applied everywhere, as it is now: looked at with each
        send.
    refuse : async callable
        Writes records to the dead letters.
    """

    def __init__(
        self, node: Node, replica: Replica, settings: IngestSettings, stable: Mapping[int, int], refuse: Refuse
    ) -> None:
        self._node, self._replica, self._settings, self._stable = node, replica, settings, stable
        self._refuse = refuse
        self._incarnation = replica.state.incarnation
        self._router = Router(replica.state.codebook, node.backend)
        self._under_way: dict[int, int] = {}
        self._ended = asyncio.Condition()
        self._waiting: dict[str, set[asyncio.Timeout]] = {}
        self.full: set[str] = set()
        """Workers that have no room for the record that comes next."""
        self.foreign = 0
        """Records on this worker that were decided by timestamp."""

    async def everywhere(self, batch: MicroBatch, ranges: Ranges) -> None:
        """Apply a batch to all workers of the newest state; whoever does not answer leaves the placement, and it is
        done again.

        Where a worker has no room for all of it, what there is room for is applied (`portions`); the rest waits, the
        worker stays a member, and the lag grows in Kafka. What the batch deletes has gone with the first attempt. A
        record that an empty worker had no room for is the exception, or nothing behind it would ever be read: it goes
        to the dead letters, which name its place, and its id counts as deleted (`MicroBatch.header`). The record itself
        stays in the topic, whole, and can be written again under a higher limit.

        Parameters
        ----------
        ranges : mapping of int to (int, int)
            Offsets that count as applied when all records are.

        Raises
        ------
        CollectionNotFound
            The collection has begun anew.
        """
        assert batch.decoded is not None
        count, epoch, pause = len(batch.decoded.ids), -1, self._settings.retry_delay
        while True:
            state = self._replica.state
            if state.incarnation != self._incarnation:
                # These records may be of a topic that is no more: they have no place among the new one's.
                raise CollectionNotFound(f"collection {state.spec.name!r} has begun anew")
            if state.epoch != epoch:
                # From its beginning: who is new among the workers has none of what the others were sent before.
                epoch, header, portion = state.epoch, self._header(batch, state), Portion.whole(count)
            outcome = await self._send(
                state, part_of(header, portion), ranges if portion.last else no_offsets_of(ranges)
            )
            what_next = Next.ASK if outcome is None else judge(portion, outcome.values())
            if what_next is Next.GO_ON:
                if portion.last:
                    self.full = set()
                    return
                portion, pause = portion.after(), self._settings.retry_delay
            elif what_next is Next.HALVE:
                portion = portion.halved()
            elif what_next is Next.ASK:
                await self._newer_state(state, outcome or {})
            elif what_next is Next.GIVE_UP and portion.low not in batch.given_up:
                await self._give_up(batch, portion.low, outcome or {})
                header = self._header(batch, state)
            else:
                self._no_room(outcome or {})
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._settings.retry_delay_max)

    async def drained(self, epoch: int) -> None:
        """Return when nothing that was sent under an older epoch is under way.

        Who has left the placement is not waited for: the reason may be that it is dead, and to connect to where nobody
        listens any more takes a second to fail.
        """
        for worker in self._waiting.keys() - self._replica.state.members.keys():
            for waiting in self._waiting[worker]:
                waiting.reschedule(asyncio.get_running_loop().time())
        async with self._ended:
            await self._ended.wait_for(lambda: not any(count for old, count in self._under_way.items() if old < epoch))

    def local(self, *args: Any) -> Any:
        """`Replica.apply` of this worker."""
        try:
            applied = self._replica.apply(*args)
        finally:  # also where there was no room: tidying up makes some
            self._node.maintain(self._replica)
        if applied is not None:
            self.foreign += applied.foreign
        return applied

    def _header(self, batch: MicroBatch, state: CollectionState) -> Header:
        if self._router.codebook is not state.codebook:
            self._router = Router(state.codebook, self._node.backend)
        return batch.header(self._router)

    async def _send(self, state: CollectionState, part: Header, ranges: Ranges) -> dict[str, Outcome] | None:
        """The workers' answers; None if one of them knows a newer state."""
        self._under_way[state.epoch] = self._under_way.get(state.epoch, 0) + 1
        try:
            return await fan_out(
                self._ask,
                state,
                {worker: part_for(part, worker, state) for worker in state.members},
                me=self._node.address,
                local=self.local,
                deadline=self._settings.apply_deadline,
                ranges=ranges,
                stable=self._stable,
            )
        except StaleEpoch:
            return None
        finally:
            self._under_way[state.epoch] -= 1
            if not self._under_way[state.epoch]:
                del self._under_way[state.epoch]
            async with self._ended:
                self._ended.notify_all()

    async def _ask(self, worker: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        """As `Node.call`, until the worker leaves the placement."""
        asked = self._waiting.setdefault(worker, set())
        try:
            async with asyncio.timeout(None) as waiting:
                asked.add(waiting)
                try:
                    return await self._node.call(worker, op, deadline=deadline, **message)
                finally:
                    asked.discard(waiting)
                    if not asked:
                        self._waiting.pop(worker, None)
        except TimeoutError as error:
            raise ClusterError(f"{worker} left the placement before it answered '{op}'") from error

    async def _give_up(self, batch: MicroBatch, at: int, outcome: Mapping[str, Outcome]) -> None:
        assert batch.decoded is not None
        reason = next(str(answer) for answer in outcome.values() if isinstance(answer, StoreFull))
        await self._refuse(batch.raw, [Refusal(int(batch.decoded.rows[at]), f"too large to be held: {reason}")])
        batch.given_up.append(at)

    def _no_room(self, outcome: Mapping[str, Outcome]) -> None:
        name = self._replica.state.spec.name
        full = {worker: answer for worker, answer in outcome.items() if isinstance(answer, StoreFull)}
        for worker in full.keys() - self.full:
            log.warning("collection %r: %s: %s; records wait in Kafka", name, worker, full[worker])
            self._node.alarm(
                name,
                f"{worker} reached its store.memory-limit and took no more rows: records waited in Kafka, deletes "
                "behind them too; add a worker or raise the limit",
            )
        self.full = set(full)

    async def _newer_state(self, state: CollectionState, outcome: Mapping[str, Outcome]) -> None:
        """Report who did not answer, and have the state that comes of it."""
        silent = {worker for worker, answer in outcome.items() if isinstance(answer, ClusterError)}
        if silent and self._replica.state.epoch > state.epoch and not silent & self._replica.state.members.keys():
            return  # it is here already
        name = state.spec.name
        for worker, answer in outcome.items():
            if isinstance(answer, ClusterError):
                log.warning("collection %r: %s", name, answer)
                await self._node.call_scheduler(
                    "suspect", collection=name, worker=worker, epoch=state.epoch, why=str(answer)
                )
        try:
            told = await self._node.call_scheduler("await_state", collection=name, epoch=state.epoch, patience=1.0)
            newer = CollectionState.from_wire(told["state"])
        except ClusterError:
            newer = await self._newest_of_peers(state)
            if newer is state:
                raise
            log.warning("collection %r: epoch %d is taken over from another worker", name, newer.epoch)
        if newer.epoch > self._replica.state.epoch:
            # In a task of its own: adopting waits for batches to finish that may include this one.
            self._node.adopt_soon(newer)
        await asyncio.sleep(0.005)

    async def _newest_of_peers(self, state: CollectionState) -> CollectionState:
        """The newest state that another worker has been told, or this one: a scheduler may be lost while it tells, and
        whoever takes its place goes on from that one.
        """
        asked = {"collection": state.spec.name, "epoch": state.epoch}
        calls = (
            self._node.call(worker, "describe", deadline=_PEERS, **asked)
            for worker in state.members
            if worker != self._node.address
        )
        answers = await asyncio.gather(*calls, return_exceptions=True)
        told = [answer["state"] for answer in answers if isinstance(answer, dict)]
        known = [CollectionState.from_wire(each) for each in told if each is not None]
        return max([state, *(each for each in known if _follows(state, each))], key=lambda each: each.epoch)


def _follows(state: CollectionState, newer: CollectionState) -> bool:
    """Whether a worker may go on from one state to the other although not all may have been told of it.

    Not where a worker that joined is to be read: it is told before those that then drop what it has taken over, and it
    may be the one that was not. Nor where everything begins anew.
    """
    return (
        (newer.spec.uid, newer.incarnation) == (state.spec.uid, state.incarnation)
        and newer.epoch > state.epoch
        and all(state.members.get(worker) == "active" for worker in newer.active)
    )


def no_offsets_of(ranges: Ranges) -> dict[int, tuple[int, int]]:
    """Ranges for records of which no offset counts yet: they still tell a worker whether older ones may come."""
    return {tp: (low, low) for tp, (low, _) in ranges.items()}
