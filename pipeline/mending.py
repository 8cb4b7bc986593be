"""Mending copies: the rightful records of some ids are read from the log once more and applied where they are lacking.

It is the write path again: the ingest graph's own steps decode, encode and route, and `fan_out` applies. Only two
things are added. A worker is told which wrong version gives way (`Batch.instead`), because a version that is too high
would win otherwise; and all workers are asked to forget no deletion meanwhile, because the record that is read may have
been deleted by the time it arrives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from headrace.cluster.compare import Heard, heard_from_wire
from headrace.cluster.correcting import batch_of, header_without_rows, no_longer_in_the_log, told
from headrace.cluster.fanout import Header, fan_out
from headrace.cluster.moving import header_of_rows
from headrace.cluster.routing import Router
from headrace.cluster.state import CollectionState
from headrace.cluster.wire import rows_from_wire
from headrace.gpu.errors import ClusterError, StoreFull
from headrace.gpu.rows import Id
from headrace.pipeline.ingest import Ingest
from headrace.pipeline.ingest_settings import Node
from headrace.pipeline.micro_batch import route
from headrace.streams.encode import encode_key
from headrace.streams.lookup import Looked, look_up
from headrace.streams.topics import Offsets

__all__ = ["Mender"]

log = logging.getLogger("headrace.pipeline")

Blocking = Callable[..., Awaitable[Any]]


class Mender:
    """Mends some ids once, on a worker that reads the topic. Belongs to the worker's event loop.

    Parameters
    ----------
    node : Node
        The worker.
    ingest : Ingest
        Its graph of this collection.
    state : CollectionState
        With which the copies were compared.
    blocking : async callable
        Runs a function that waits for Kafka off the event loop.
    deadline : float
        Seconds.
    """

    def __init__(self, node: Node, ingest: Ingest, state: CollectionState, blocking: Blocking, deadline: float) -> None:
        self._node, self._ingest, self._state, self._blocking = node, ingest, state, blocking
        self._until = time.monotonic() + deadline
        self._heard: dict[str, list[Heard | None]] = {}

    async def mend(self, ids: Sequence[Id], anew: Sequence[bool]) -> dict[str, str]:
        """Give every copy what the log has of `ids`.

        Parameters
        ----------
        ids : sequence of str or int
        anew : sequence of bool
            Send the row to all its holders, although they have its version: their contents differ.

        Returns
        -------
        dict of id to str
            Ids that could not be mended, and why.

        Raises
        ------
        StaleEpoch
            The placement has changed: compare again.
        ClusterError, BrokerError, StoreFull
        """
        await self._everyone("remember", seconds=self._left() + 1.0)
        answers = await self._everyone("heard", ids=list(ids), required=[], deadline_s=1.0)
        self._heard = {worker: heard_from_wire(answer["heard"]) for worker, answer in answers.items()}
        begins, ends = await self._blocking(self._bounds)
        where = {row_id: at for at, row_id in enumerate(ids)}
        found, undecided = await self._records(ids, begins, ends)
        rest = [row_id for row_id in ids if row_id not in undecided and row_id not in set(found.ids)]
        known = {row_id: no_longer_in_the_log(self._of(where[row_id]), begins) for row_id in rest}
        again = {row_id for row_id, wanted in zip(ids, anew, strict=True) if wanted}
        for row_id in [row_id for row_id, best in known.items() if best is not None and row_id in again]:
            undecided[row_id] = "the log no longer has its record, so nobody knows which copy is right"
            del known[row_id]
        headers = [found]
        if rows := [row_id for row_id, best in known.items() if best is not None and best.live]:
            headers.append(await self._from_copies(rows, [known[row_id] for row_id in rows], where))
        if gone := [row_id for row_id, best in known.items() if best is None or not best.live]:
            headers.append(header_without_rows(gone, [known[row_id] for row_id in gone], self._state.spec.dim))
        for header in headers:
            if len(header.ids):
                await self._send(header, where, again, ends)
        return {str(row_id): why for row_id, why in undecided.items()}

    def _left(self) -> float:
        return max(0.05, self._until - time.monotonic())

    def _of(self, at: int) -> list[Heard | None]:
        return [heard[at] for heard in self._heard.values()]

    async def _everyone(self, op: str, **message: Any) -> dict[str, dict[str, Any]]:
        state, deadline = self._state, self._left()
        calls = (
            self._node.call(worker, op, deadline=deadline, collection=state.spec.name, epoch=state.epoch, **message)
            for worker in state.members
        )
        return dict(zip(state.members, await asyncio.gather(*calls), strict=True))

    def _bounds(self) -> tuple[dict[int, int], dict[int, int]]:
        """Where the log begins and ends; it ends above all that any copy had applied."""
        source = self._state.source
        assert source is not None
        offsets = Offsets(
            source.bootstrap, source.topic, settings=dict(self._ingest.reader_settings.kafka), deadline=self._left()
        )
        return offsets.earliest(self._left()), offsets.latest(self._left())

    # -- what is right -------------------------------------------------------------------------------------------------

    async def _records(
        self, ids: Sequence[Id], begins: Mapping[int, int], ends: Mapping[int, int]
    ) -> tuple[Header, dict[Id, str]]:
        """The last good record of each id that has one in the log; and ids of which that cannot be told."""
        keys = {encode_key(row_id): row_id for row_id in ids}
        low = dict(ends)
        for heard in self._heard.values():
            for one in heard:
                if one is not None and (tp := one.topic_partition) in low:
                    low[tp] = min(low[tp], max(one.offset, begins[tp]))
        newer = await self._look(keys, {tp: (low[tp], ends[tp]) for tp in ends})
        header = await self._header(newer)
        undecided = self._cut(newer, keys, header)
        # Mostly that is all. An id of which no copy has the rightful version may lie further back.
        have = set(header.ids)
        missing = {key: row_id for key, row_id in keys.items() if row_id not in have and row_id not in undecided}
        if missing and any(begins[tp] < low[tp] for tp in ends):
            older = await self._look(missing, {tp: (begins[tp], low[tp]) for tp in ends})
            second = await self._header(older)
            undecided |= self._cut(older, missing, second)
            header = _joined(header, second)
        return header, undecided

    async def _look(self, keys: Mapping[bytes, Id], spans: Mapping[int, tuple[int, int]]) -> Looked:
        source = self._state.source
        assert source is not None
        looked: Looked = await self._blocking(
            look_up, source.bootstrap, source.topic, set(keys), spans, self._ingest.reader_settings, self._left()
        )
        return looked

    @staticmethod
    def _cut(looked: Looked, keys: Mapping[bytes, Id], header: Header) -> dict[Id, str]:
        have = set(header.ids)
        return {
            keys[key]: "its last records in the log cannot be used, and there are too many to look through"
            for key in looked.cut
            if keys[key] not in have
        }

    async def _header(self, looked: Looked) -> Header:
        batch = await self._ingest.made_of(looked.raw)
        assert batch.decoded is not None
        assert batch.vectors is not None
        router = Router(self._state.codebook, self._node.backend)
        return await self._blocking(route, looked.raw, batch.decoded, batch.vectors, router)  # type: ignore[no-any-return]

    async def _from_copies(self, ids: Sequence[Id], best: Sequence[Heard | None], where: Mapping[Id, int]) -> Header:
        """Rows whose records the log no longer has, from a copy that has the highest version."""
        state, rows = self._state, []
        by_worker: dict[str, list[Id]] = {}
        for row_id, wanted in zip(ids, best, strict=True):
            for worker, heard in self._heard.items():
                one = heard[where[row_id]]
                if one is not None and wanted is not None and one.live and one.same_version(wanted):
                    by_worker.setdefault(worker, []).append(row_id)
                    break
        for worker, some in by_worker.items():
            answer = await self._node.call(
                worker,
                "get",
                deadline=self._left(),
                collection=state.spec.name,
                epoch=state.epoch,
                ids=some,
                vectors=True,
                required=[],
                deadline_s=1.0,
            )
            rows += [row for row in rows_from_wire(answer["rows"]) if row is not None]
        if not rows:
            return header_without_rows([], [], state.spec.dim)
        return await self._blocking(header_of_rows, rows, state, self._node.backend)  # type: ignore[no-any-return]

    # -- applying ------------------------------------------------------------------------------------------------------

    async def _send(self, header: Header, where: Mapping[Id, int], again: set[Id], ends: Mapping[int, int]) -> None:
        state = self._state
        anew = [row_id in again for row_id in header.ids]
        parts = {}
        for worker, heard in self._heard.items():
            here = [heard[where[row_id]] for row_id in header.ids]
            if rows := told(header, worker, here, anew, ends, state):
                parts[worker] = batch_of(header, rows)
        outcome = await fan_out(
            self._node.call,
            state,
            parts,
            me=self._node.address,
            local=self._ingest.local,
            deadline=self._left(),
        )
        for worker, answer in outcome.items():
            log.info("collection %r: %d rows mended on %s", state.spec.name, len(parts[worker]), worker)
            if isinstance(answer, ClusterError | StoreFull):
                raise answer


def _joined(first: Header, second: Header) -> Header:
    """Both, one after the other."""
    if not len(second.ids):
        return first
    count = len(first.vectors)
    names = {**first.attributes, **second.attributes}

    def column(header: Header, name: str) -> list[Any]:
        return list(header.attributes.get(name, [None] * len(header.ids)))

    return Header(
        ids=[*first.ids, *second.ids],
        topic_partitions=np.concatenate([first.topic_partitions, second.topic_partitions]),
        offsets=np.concatenate([first.offsets, second.offsets]),
        timestamps=np.concatenate([first.timestamps, second.timestamps]),
        cells=np.concatenate([first.cells, second.cells]),
        vectors=np.concatenate([first.vectors, second.vectors]),
        vector_at=np.concatenate([first.vector_at, second.vector_at + count]),
        attributes={name: column(first, name) + column(second, name) for name in names},
    )
