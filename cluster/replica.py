"""One worker's copy of one collection: a store, the offsets it has applied, and who may write to it.

Everything here runs on the worker's event loop, except what is said to run in an executor.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

from headrace.cluster.departed import Departed
from headrace.cluster.going_on import goes_on
from headrace.cluster.moments import Moments
from headrace.cluster.state import CollectionState
from headrace.gpu.backend import Backend
from headrace.gpu.budget import Budget
from headrace.gpu.errors import ClusterError, CollectionNotFound, ConsistencyTimeout, HeadraceError, StoreFull
from headrace.gpu.rows import Batch
from headrace.gpu.store import Applied, Store, StoreSettings, View
from headrace.streams.watermark import Watermark

__all__ = ["Replica"]

log = logging.getLogger("headrace.cluster")


class Replica:
    """A materialised view of the log, restricted to the cells that this worker holds.

    Parameters
    ----------
    state : CollectionState
    address : str
        This worker's own.
    backend, settings, budget
        Handed to the `Store`.
    """

    def __init__(
        self,
        state: CollectionState,
        address: str,
        backend: Backend,
        settings: StoreSettings,
        budget: Budget | None = None,
    ) -> None:
        self.address = address
        self._backend, self._settings, self._budget = backend, settings, budget
        self._waiters: list[tuple[Mapping[int, int], asyncio.Future[None]]] = []
        self._fence = 0
        self._remembering_until = float("-inf")
        self.moments = Moments()
        self._begin(state)

    def _begin(self, state: CollectionState) -> None:
        self.state = state
        self.moments.clear()
        self._incarnation = uuid.uuid4().hex[:12]
        self.store = self._empty_store()
        self.departed = Departed(state.spec.metric)
        self._watermarks: dict[int, Watermark] = {}
        self._read_from_origins(state)
        self._readable_from = self._fence = max(self._fence, state.epoch)
        self._filling = self._is_filled(state)

    def _empty_store(self) -> Store:
        spec = self.state.spec
        return Store(
            self._backend, spec.dim, spec.metric, self._settings, index=spec.index, ids=spec.ids, budget=self._budget
        )

    def _is_filled(self, state: CollectionState) -> bool:
        """Are rows on their way here that are older than what comes live?"""
        mine = (cell for cell, copies in state.copies.items() if self.address in copies)
        return any(self.address not in state.serving.get(cell, ()) for cell in mine)

    def _read_from_origins(self, state: CollectionState) -> None:
        # A joining worker has not applied what lies before it: it gets its start from the peers it is filled from.
        joining = state.members.get(self.address) == "joining"
        if state.source is not None:
            for partition in range(state.source.partitions):
                origin = 0 if joining else state.source.origins.get(partition, 0)
                self._watermarks.setdefault(partition, Watermark(origin))
            self.store.stamp(self.watermarks)

    @property
    def watermarks(self) -> dict[int, int]:
        """Topic partition to the first offset that has not been applied here."""
        return {partition: mark.value for partition, mark in self._watermarks.items()}

    @property
    def fence(self) -> int:
        """The newest epoch seen; a write of an older one is refused."""
        return self._fence

    @property
    def readable_from(self) -> int:
        """The oldest epoch by which this copy may be read (`goes_on`); a read of an older one is refused.

        Where a record has come of an epoch whose state has not, nobody knows yet what that takes away from here.
        """
        return self._fence if self._fence > self.state.epoch else self._readable_from

    def adopt(self, state: CollectionState, base: Mapping[int, int] | None = None) -> None:
        """Take over a newer state; `base` are offsets below which peers have filled this worker completely."""
        if state.epoch < self.state.epoch:
            return
        if state.incarnation != self.state.incarnation:
            log.warning("collection %r: this worker begins anew, with nothing", state.spec.name)
            self.store.close()
            self._begin(state)
            return
        if not goes_on(self.state, state, self.address):
            self._readable_from = state.epoch
        self.state = state
        self.moments.clear()  # a copy that is complete now was not then
        self._filling = self._is_filled(state)
        self._fence = max(self._fence, state.epoch)
        self._read_from_origins(state)
        if base:
            for partition, offset in base.items():
                self._watermarks.setdefault(partition, Watermark()).raise_to(offset)
            self.store.stamp(self.watermarks)
            self._wake()

    def let_go(self, at_most: int | None = None) -> int:
        """Drop rows that others hold now, at most so many; how many, and 0 when none is left or while rows move.

        In no hurry: headers go to everybody, so what is still here is no older than what its holders have.
        """
        if self.state.moving:
            return 0
        mine = frozenset(cell for cell, holders in self.state.copies.items() if self.address in holders)
        return self.store.drop_cells(mine, at_most)

    def apply(
        self, batch: Batch | None, ranges: Mapping[int, tuple[int, int]], stable: Mapping[int, int], epoch: int
    ) -> Applied | None:
        """Apply one header and account for its offsets; None if `epoch` is older than what this worker knows.

        Raises
        ------
        StoreFull
            The memory limit is reached: no row has been written, and the offsets do not count as applied. What the
            batch deletes has gone.
        ClusterError
            The batch mends (`Batch.instead`), and deletions may have been forgotten since it was thought out.
        """
        if epoch < self._fence:
            return None
        if batch is not None and batch.instead is not None and not self._remembering:
            raise ClusterError(
                f"collection {self.state.spec.name!r}: {self.address} was not asked in time to remember deletions, so "
                "it takes no mended rows: verify again"
            )
        marks = {partition: self._watermarks.setdefault(partition, Watermark()) for partition in ranges}
        stamp = self.watermarks | {partition: marks[partition].after(*span) for partition, span in ranges.items()}
        if batch is None or not len(batch):
            self.store.stamp(stamp)
            applied = Applied(0, 0, 0, ())
        else:
            gaps = self._filling or any(low > marks[partition].value for partition, (low, _) in ranges.items())
            before = self.store.view
            try:
                applied = self.store.apply(batch, stamp, gaps=gaps)
            except StoreFull:
                self._forget(stable, epoch)  # perhaps it is remembered deletions that take the room
                raise
            if (now := self.store.view.moved) is not before.moved:
                self.departed.note(batch, applied.left, before.moved, now, before.stamp)
        # Not before: should the store refuse the batch, its offsets have not been applied.
        for partition, span in ranges.items():
            marks[partition].add(*span)
        if epoch > self._fence or (batch is not None and batch.instead is not None):
            self.moments.clear()  # it is another placement's, or was wrong
        self._fence = epoch
        self.moments.note(self.store.view)
        self._forget(stable, epoch)
        self._wake()
        return applied

    def moment(self, epoch: int, cut: Mapping[int, int], required: Mapping[int, int]) -> View | None:
        """What a read of `epoch` was to be answered before any record at or above `cut` had taken a row away from here,
        but with `required` applied; None if that is not known any more.

        Only a moment since this worker heard of that epoch: a copy that it reads may have been incomplete before.
        """
        return self.moments.before(cut, required) if epoch <= self.state.epoch else None

    def _forget(self, stable: Mapping[int, int], epoch: int) -> None:
        # A sender with a newer state than ours may already be moving rows.
        if epoch == self.state.epoch and not self.state.moving and not self._remembering:
            self.store.forget(stable)

    def remember(self, seconds: float) -> None:
        """Forget no deletion for some time: copies are being compared, and a mended row carries an old version."""
        self._remembering_until = max(self._remembering_until, time.monotonic() + seconds)

    @property
    def _remembering(self) -> bool:
        return time.monotonic() < self._remembering_until

    async def wait(self, required: Mapping[int, int], deadline: float) -> None:
        """Return once every offset below `required` has been applied here.

        Raises
        ------
        ConsistencyTimeout
            After `deadline` seconds; names the topic partitions and offsets that were missing.
        """
        if self._reached(required):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (required, waiter)
        self._waiters.append(entry)
        try:
            await asyncio.wait_for(waiter, deadline)
        except TimeoutError:
            marks = self.watermarks
            missing = ", ".join(
                f"topic partition {partition}: {marks.get(partition, 0)} of {offset}"
                for partition, offset in sorted(required.items())
                if marks.get(partition, 0) < offset
            )
            raise ConsistencyTimeout(
                f"collection {self.state.spec.name!r}: {self.address} had not applied everything asked for within "
                f"{deadline:g} s ({missing}); wait longer (deadline=) or ask for less (consistency='eventual')"
            ) from None
        finally:
            if entry in self._waiters:
                self._waiters.remove(entry)

    def close(self, why: HeadraceError | None = None) -> None:
        """Nothing comes here any more: whoever waits is told so at once; by default that the collection is gone."""
        gone = why or CollectionNotFound(f"{self.address} holds no collection {self.state.spec.name!r} any more")
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(gone)
        # Reads that are under way end with the rows they see; who still knows this replica keeps no rows by it.
        self._fence = sys.maxsize
        self.moments.clear()
        self.store.close()
        self.store = self._empty_store()

    def _reached(self, required: Mapping[int, int]) -> bool:
        stamp = self.store.view.stamp
        return all(stamp.get(partition, 0) >= offset for partition, offset in required.items())

    def _wake(self) -> None:
        if not self._waiters:
            return
        for required, waiter in self._waiters:
            if not waiter.done() and self._reached(required):
                waiter.set_result(None)

    def status(self) -> dict[str, Any]:
        """What `Collection.status` shows of this copy; plain msgpack types."""
        return {
            "address": self.address,
            "state": self.state.members.get(self.address, "out"),
            "epoch": self.state.epoch,
            "incarnation": self._incarnation,  # another one began empty, and its watermarks with it
            "watermarks": [[partition, offset] for partition, offset in self.watermarks.items()],
            "device_memory": self._backend.memory.statistics(),
            **self.store.statistics(),
        }
