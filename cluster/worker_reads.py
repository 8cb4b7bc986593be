"""A worker's half of reading: it waits until it has applied what a read requires, and answers from one view.

Ids are looked up on the event loop; searches, scans and filtered counts go to executors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.departed import Departed, highest
from headrace.cluster.holding import Holding
from headrace.cluster.replica import Replica
from headrace.cluster.scans import Scans
from headrace.cluster.wire import floats_from_wire, offsets_from_wire, offsets_to_wire, rows_to_wire
from headrace.gpu.errors import StaleEpoch
from headrace.gpu.filters import Filter
from headrace.gpu.gather import Gatherer, GatherSettings
from headrace.gpu.store import Store, StoredRow, View

__all__ = ["Reading"]

_MOST_HASHES = 1 << 20
"""Of rows' ids, in one answer: 8 MB."""


class Reading(Holding):
    """The part of `WorkerNode` that answers reads.

    Each read names the epoch and the incarnation that its reader goes by, the offsets that must have been applied, and
    the seconds that it waits for them. Searches and counts may name a `cut` as well, offsets that other workers have
    applied: then the answer is of the last moment before a record behind them took a row away from here, where such a
    moment is still kept.
    """

    calls: tuple[str, ...] = ("search", "get", "count", "wait", "scan")

    def start_reading(self, settings: GatherSettings) -> None:
        # Threads of their own: a scan or a digest never stands in a search's way.
        self._searchers = ThreadPoolExecutor(settings.at_once, thread_name_prefix="headrace-search")
        self._gatherer = Gatherer(self._searched, settings)
        self._scans = Scans()

    def stop_reading(self) -> None:
        self._searchers.shutdown(wait=False, cancel_futures=True)

    async def _caught_up(
        self, collection: str, epoch: int, incarnation: int, required: Sequence[Sequence[int]], deadline: float
    ) -> Replica:
        replica = self.replica(collection)
        self._check_epoch(replica, epoch)
        if replica.state.incarnation < incarnation:
            # Its offsets are of another log, or of what was lost: they do not say what has been applied of this one.
            begun = await self._begun(collection, incarnation)
            if begun is None:
                raise StaleEpoch(f"{self.address} has not begun incarnation {incarnation} of {collection!r} yet")
            replica = begun
        if required and not _has_no_log(replica):
            await replica.wait(offsets_from_wire(required), deadline)
            self._check_epoch(replica, epoch)
        return replica

    def _check_epoch(self, replica: Replica, epoch: int) -> None:
        """Raise `StaleEpoch` where rows may have gone that a read of `epoch` looks for here.

        Not only by a newer state: a record that was routed by one takes rows away before this worker has heard of it.
        """
        if epoch < replica.readable_from:
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
        incarnation: int = 0,
        cut: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Any]:
        """The nearest rows for each query, their scores, and the moment (`View`) that they are of."""
        replica = await self._caught_up(collection, epoch, incarnation, required, deadline_s)
        store = replica.store
        # The client has read the filter by the newest schema and sends the kinds along: this worker's may be older.
        wanted = None if where is None else Filter.from_wire(where)
        sought = _Sought(store, replica.departed, limit, wanted, recall_target)
        before = _moment(replica, epoch, cut, required)
        if before is None:
            answers = await self._gatherer.search(sought, floats_from_wire(queries))
        else:  # hardly two go back to the same one
            answers = await self._searched(replace(sought, view=before), floats_from_wire(queries))
        self._check_epoch(replica, epoch)  # while the search waited its turn, rows may have gone that others hold now
        moment: _Answer | View = answers[0] if answers else before or store.view
        return {
            "rows": [answer.rows for answer in answers],
            "scores": [answer.scores for answer in answers],
            "applied": offsets_to_wire(moment.stamp),
            "moved": _moved(replica, moment.moved),
            "near": _moved(replica, highest(*(answer.near for answer in answers))),
            "epoch": replica.state.epoch,
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
        incarnation: int = 0,
    ) -> dict[str, Any]:
        """Rows by id, None where an id is not here, and the moment."""
        replica = await self._caught_up(collection, epoch, incarnation, required, deadline_s)
        rows, view = replica.store.get(ids, vectors=vectors)
        return {
            "rows": rows_to_wire(rows),
            "applied": offsets_to_wire(view.stamp),
            "moved": _moved(replica, view.moved),
            "epoch": replica.state.epoch,
        }

    async def on_count(
        self,
        collection: str,
        epoch: int,
        required: Sequence[Sequence[int]],
        deadline_s: float,
        where: Mapping[str, Any] | None = None,
        incarnation: int = 0,
        cut: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Any]:
        """Rows by cell, and the moment.

        While rows get the cells of another codebook, a row may be in a new cell here and in an old one there: then, if
        they are not too many, the ids' hashes tell which are the same.
        """
        replica = await self._caught_up(collection, epoch, incarnation, required, deadline_s)
        store, state = replica.store, replica.state
        before = _moment(replica, epoch, cut, required)
        ids = state.previous is not None and store.view.rows <= _MOST_HASHES
        if where is None and not ids:
            sizes, hashes, view = store.counted(view=before)
        else:
            wanted = None if where is None else Filter.from_wire(where)
            sizes, hashes, view = await self.read(partial(store.counted, ids=ids, view=before), wanted)
            self._check_epoch(replica, epoch)  # rows may have gone meanwhile that others hold now
        return {
            # Rows in other cells are about to be dropped.
            "cell_sizes": [[cell, rows] for cell, rows in sizes.items() if cell in state.copies],
            "ids": None if hashes is None else hashes.astype("<u8").tobytes(),
            "applied": offsets_to_wire(view.stamp),
            "moved": _moved(replica, view.moved),
            "epoch": replica.state.epoch,
        }

    async def on_wait(self, collection: str, required: Sequence[Sequence[int]], deadline_s: float) -> dict[str, Any]:
        """Answer once all this has been applied here."""
        await self.replica(collection).wait(offsets_from_wire(required), deadline_s)
        return {}

    async def on_scan(
        self, collection: str, cursor: str | None, cells: Sequence[int] | None, vectors: bool = False, end: bool = False
    ) -> dict[str, Any]:
        """Rows of one moment, a chunk a call; `cursor` is what the call before returned. `end` gives none."""
        if cursor is not None and end:
            self._scans.end(cursor)
            return {"rows": [], "cursor": None}
        if cursor is None:
            wanted = None if cells is None else frozenset(cells)
            cursor = self._scans.begin(self.address, self.replica(collection).store.scan(wanted, vectors=vectors))
        rows: list[StoredRow] = await self.read(next, self._scans.chunks(self.address, cursor), [])
        if not rows:
            self._scans.end(cursor)
            return {"rows": [], "cursor": None}
        return {"rows": rows_to_wire(rows), "cursor": cursor}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one query is answered: rows and scores as they are sent, the moment (`View`), and `Departed.near`."""

    rows: list[Any]
    scores: list[float]
    stamp: Mapping[int, int]
    moved: Mapping[int, int]
    near: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Sought:
    """What searches must have in common to be one."""

    store: Store
    departed: Departed
    limit: int
    where: Filter | None
    recall_target: float | None
    view: View | None = field(default=None, compare=False)

    def search(self, queries: npt.NDArray[np.float32]) -> list[_Answer]:
        found = self.store.search(
            queries, self.limit, where=self.where, recall_target=self.recall_target, view=self.view
        )
        near = self.departed.near(found.moved, queries, found.scores, self.limit, found.rows)
        return [
            _Answer(rows_to_wire(rows), scores, found.stamp, found.moved, close)
            for rows, scores, close in zip(found.rows, found.scores, near, strict=True)
        ]


def _moment(
    replica: Replica, epoch: int, cut: Sequence[Sequence[int]] | None, required: Sequence[Sequence[int]]
) -> View | None:
    return None if cut is None else replica.moment(epoch, offsets_from_wire(cut), offsets_from_wire(required))


def _moved(replica: Replica, moved: Mapping[int, int]) -> list[list[int]]:
    """`View.moved` for the client; nothing where no log is read."""
    return offsets_to_wire({} if _has_no_log(replica) else moved)


def _has_no_log(replica: Replica) -> bool:
    """Whether the rows were restored without their topic: what else lies in it will never be applied here."""
    return replica.state.source is None and replica.state.snapshots.detached
