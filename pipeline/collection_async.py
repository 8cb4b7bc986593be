"""One collection, asynchronous: writes go to its Kafka topic, reads straight to the workers' handlers.

The scheduler only says who they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.calls import Call
from headrace.cluster.state import CollectionSpec
from headrace.cluster.wire import floats_from_wire, floats_to_wire, rows_from_wire
from headrace.gpu.errors import ClusterError, ConfigError, ConsistencyTimeout, HeadraceError, SnapshotError
from headrace.pipeline import config, snapshot_client
from headrace.pipeline.answers import all_found, hits_of, nothing_near, row_of, rows_of, size_of
from headrace.pipeline.arguments import check_ids, seconds, share
from headrace.pipeline.attaching import described, until_read
from headrace.pipeline.clocks import ahead
from headrace.pipeline.queries import texts_in, vectors_in
from headrace.pipeline.reads import Router
from headrace.pipeline.results import Consistency, Hits, Row, Rows, Snapshot, Verification, Write, bounded
from headrace.pipeline.rows_in import delete_records, upsert_records
from headrace.pipeline.session import Session
from headrace.pipeline.summary import summarise
from headrace.pipeline.verifying import Verifier
from headrace.pipeline.writing import Writer

__all__ = ["AsyncCollection"]

log = logging.getLogger("headrace.pipeline")

Vectors = npt.NDArray[np.float32]


class AsyncCollection:
    """One collection: writes go to its Kafka topic, reads to the workers. See `Collection` for what each call does."""

    def __init__(self, call: Call, scheduler: str, router: Router, spec: CollectionSpec) -> None:
        self.name, self.spec = spec.name, spec
        self._call, self._scheduler, self._router = call, scheduler, router
        self._session = Session()
        self._writer = Writer(spec, router, self._session)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def ingest(self, bootstrap: str, topic: str | None = None, *, format: str = "json") -> None:
        source = await described(bootstrap, topic or self.name, format)
        await self._of_scheduler("ingest", deadline=30.0, collection=self.name, source=source)
        await until_read(self._router, source["partitions"])

    async def upsert(self, frame: Any, *, wait: str | None = None, deadline: float = 10.0) -> Write:
        schema = (await self._router.state()).schema
        return await self._writer.write(upsert_records(frame, self.spec, schema), wait, deadline)

    async def delete(self, ids: Iterable[str | int], *, wait: str | None = None, deadline: float = 10.0) -> Write:
        return await self._writer.write(delete_records(ids, self.spec), wait, deadline)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def search(
        self,
        query: Any,
        *,
        limit: int = 10,
        filter: str | None = None,
        recall_target: float | None = None,
        consistency: Consistency = "session",
        deadline: float | None = None,
    ) -> Hits | list[Hits]:
        asked: Any = limit
        if isinstance(asked, bool) or not isinstance(asked, Integral) or not 1 <= int(asked) < 1 << 31:
            raise ConfigError(f"limit={limit!r} cannot be: ask for a whole number, 1 or more")
        limit = int(asked)
        recall_target = share("recall_target", recall_target)
        if isinstance(query, list | tuple) and not query:
            return []  # an empty batch
        deadline = seconds("deadline", deadline, config.get("search.deadline"))
        until = time.monotonic() + deadline
        session = self._session.of(self._router.topic_id)
        needed = asyncio.ensure_future(self._router.required(consistency, session, deadline))
        try:
            vectors, single = await self._queries(query, deadline)
            required = await needed
        finally:
            needed.cancel()
        where = await self._router.filter(filter, required, max(0.001, until - time.monotonic()))
        answers = await self._router.ask_cover(
            "search",
            max(0.001, until - time.monotonic()),
            required,
            queries=floats_to_wire(vectors),
            limit=limit,
            where=where and where.to_wire(),
            recall_target=recall_target,
            waits=consistency != "eventual",
            complete=nothing_near,
        )
        hits = hits_of(answers, len(vectors), limit, self.spec.metric)
        self._session.saw(self._router.topic_id, session, answers, chain.from_iterable(hits))
        return hits[0] if single else hits

    async def _queries(self, query: Any, deadline: float) -> tuple[Vectors, bool]:
        """Query vectors, float32 (q, dim), normalised for cosine; and whether one was asked."""
        texts = texts_in(query, self.spec)
        if texts is None:
            return vectors_in(query, self.spec)
        answer = await self._router.ask_any("encode", deadline, encoder=self.spec.encoder, texts=texts)
        return floats_from_wire(answer["vectors"]), isinstance(query, str)

    async def get(
        self,
        ids: Sequence[str | int],
        *,
        vectors: bool = False,
        consistency: Consistency = "session",
        deadline: float | None = None,
    ) -> Rows:
        deadline = seconds("deadline", deadline, config.get("search.deadline"))
        wanted = check_ids(ids, self.spec.ids, self.name)
        until = time.monotonic() + deadline
        session = self._session.of(self._router.topic_id)
        required = await self._router.required(consistency, session, deadline)
        left = max(0.001, until - time.monotonic())
        waits = consistency != "eventual"
        answers = await self._router.ask_cover(
            "get", left, required, ids=wanted, vectors=vectors, waits=waits, complete=all_found
        )
        rows = rows_of(answers)
        self._session.saw(self._router.topic_id, session, answers, rows)
        return rows

    async def count(
        self, *, filter: str | None = None, consistency: Consistency = "session", deadline: float | None = None
    ) -> int:
        deadline = seconds("deadline", deadline, config.get("search.deadline"))
        until = time.monotonic() + deadline
        required = await self._router.required(consistency, self._session.of(self._router.topic_id), deadline)
        where = await self._router.filter(filter, required, deadline)
        left = max(0.001, until - time.monotonic())
        waits = consistency != "eventual"
        answers = await self._router.ask_cover("count", left, required, where=where and where.to_wire(), waits=waits)
        return size_of(answers)

    async def scan(self, *, worker: str | None = None, vectors: bool = False) -> AsyncIterator[Row]:
        state = await self._router.state(newest=True)
        if worker is not None:
            if worker not in state.members:
                raise ClusterError(
                    f"{worker!r} holds nothing of collection {self.name!r}; its workers are {', '.join(state.members)}"
                )
            plan: dict[str, list[int] | None] = {worker: None}
        else:
            plan = {}
            for cell in state.cells:
                if not state.serving.get(cell):
                    raise ClusterError(f"cell {cell} of collection {self.name!r} has no copy to be read at the moment")
                cells = plan.setdefault(state.serving[cell][0], [])
                assert cells is not None
                cells.append(cell)
        for address, cells in plan.items():
            asked = {"collection": self.name, "cells": cells, "vectors": vectors}
            cursor: str | None = None
            try:
                while True:
                    answer = await self._call(address, "scan", deadline=30.0, cursor=cursor, **asked)
                    cursor = answer["cursor"]
                    for row in rows_from_wire(answer["rows"]):
                        if row is not None:
                            yield row_of(row)
                    if cursor is None:
                        break
            finally:
                if cursor is not None:  # whoever reads it has had enough
                    with contextlib.suppress(ClusterError):  # the worker has ended, and the scan with it
                        await self._call(address, "scan", deadline=2.0, cursor=cursor, end=True, **asked)

    async def still_there(self) -> None:
        """Raise `CollectionNotFound` if the collection was dropped, or another was made under its name."""
        await self._router.state(newest=True)

    def look_again(self) -> None:
        """Believe nothing that was known of the collection's state."""
        self._router.forget()

    # -- looking after it ----------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        state = await self._router.state(newest=True)

        async def ask(worker: str, op: str) -> dict[str, Any] | None:
            try:
                return await self._call(worker, op, deadline=2.0, collection=self.name)
            except HeadraceError as error:
                return {"address": worker, "state": f"not answering: {error}"} if op == "status" else None

        clocks: dict[str, float] = {}

        async def ask_ingest(worker: str) -> dict[str, Any] | None:
            asked = time.time()
            if answer := await ask(worker, "ingest_status"):
                clocks[worker] = ahead(answer["clock"], asked, time.time())
            return answer

        workers = await asyncio.gather(*(ask(worker, "status") for worker in state.members))
        ingests = await asyncio.gather(*map(ask_ingest, state.members))
        return summarise(state, [w for w in workers if w], [i["ingest"] for i in ingests if i and i["ingest"]], clocks)

    async def snapshot(
        self, url: str, *, every: float | None = None, keep: int | None = None, deadline: float = 3600.0
    ) -> Snapshot:
        return await snapshot_client.take(
            self._of_scheduler, self.name, url, every, keep, seconds("deadline", deadline, 3600.0)
        )

    async def snapshots(self, url: str | None = None, *, check: bool = False) -> list[Snapshot]:
        if url is None:
            known = (await self._router.state(newest=True)).snapshots
            url = known.url or known.last_url
            if not url:
                raise SnapshotError(f"collection {self.name!r} has no snapshot yet: say where, or take one first")
        return snapshot_client.shown(await snapshot_client.listed(self._of_scheduler, url, check), url)

    async def _of_scheduler(self, op: str, *, deadline: float, **message: Any) -> dict[str, Any]:
        return await self._call(self._scheduler, op, deadline=deadline, **message)

    async def caught_up(self, offsets: Mapping[int, int], until: float) -> tuple[int, float | None]:
        """For `restore`: how far the log went on behind the `offsets`, and the seconds until that had been read; None
        for these if it was not by `until` (monotonic), or there is no log.
        """
        began = time.monotonic()
        behind = 0
        if (await self._router.state(newest=True)).source is None:
            return 0, None
        try:
            ends = await self._router.required("strong", {}, max(0.001, min(10.0, until - began)))
            behind = sum(max(0, end - offsets.get(tp, 0)) for tp, end in ends.items())
            await self._router.wait_everywhere(ends, max(0.001, until - time.monotonic()))
        except (ConsistencyTimeout, ClusterError) as error:
            log.warning("collection %r: restored, but it has not read all of its topic yet: %s", self.name, error)
            return behind, None
        return behind, time.monotonic() - began

    async def verify(self, *, repair: bool = False, deep: bool = False, deadline: float = 10.0) -> Verification:
        verifier = Verifier(self._call, self._router, deep=deep)
        deadline = seconds("deadline", deadline, 10.0)
        found = await verifier.verify(repair=repair, deadline=deadline)
        if found.repaired:
            ends = await self._router.required(bounded(0), {}, deadline)
            self._session.repaired(self._router.topic_id, ends)
        return found

    async def close(self) -> None:
        """Close the connection to Kafka, and ask the scheduler for nothing any more."""
        self._router.close()
        await self._writer.close()
