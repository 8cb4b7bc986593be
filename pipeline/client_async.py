"""The client, asynchronous: the one that does the work. `client` is the same calls for people who do not await.

A collection's reads go straight from here to the workers' handlers; the scheduler only says who they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from numbers import Integral
from typing import Any

import dask
import numpy as np
import numpy.typing as npt

from headrace.cluster.calls import Call, call
from headrace.cluster.state import CollectionSpec
from headrace.cluster.wire import (
    floats_from_wire,
    floats_to_wire,
    offsets_from_wire,
    offsets_to_wire,
    rows_from_wire,
)
from headrace.gpu.errors import (
    ClusterError,
    CollectionError,
    CollectionNotFound,
    ConfigError,
    ConsistencyTimeout,
    HeadraceError,
    SnapshotError,
)
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.store import StoredRow
from headrace.pipeline import config, snapshot_client
from headrace.pipeline.arguments import check_ids, index_spec, seconds, share, snapshot_url
from headrace.pipeline.clocks import ahead
from headrace.pipeline.queries import best, texts_in, vectors_in
from headrace.pipeline.reads import Router
from headrace.pipeline.results import (
    Consistency,
    Hit,
    Hits,
    Restoration,
    Row,
    Rows,
    Snapshot,
    Verification,
    Write,
    bounded,
)
from headrace.pipeline.rows_in import Record, delete_records, upsert_records
from headrace.pipeline.specs import check_new, make_spec
from headrace.pipeline.summary import summarise
from headrace.pipeline.verifying import Verifier
from headrace.streams.producer import RecordProducer
from headrace.streams.topics import Offsets

__all__ = ["AsyncCollection", "AsyncDatabase"]

log = logging.getLogger("headrace.pipeline")

Vectors = npt.NDArray[np.float32]


class AsyncDatabase:
    """All collections of one cluster. Belongs to the event loop of `dask_client`."""

    def __init__(self, dask_client: Any, *, owns: Sequence[Any] = ()) -> None:
        self.dask = dask_client
        self._owns = owns
        # Dask's client gives a worker as long as it gave the scheduler: a read would wait for one that is dead.
        dask_client.rpc.timeout = dask.config.get("distributed.comm.timeouts.connect")
        self._open: dict[str, AsyncCollection] = {}

    @property
    def address(self) -> str:
        """The scheduler's address, for `connect` in another process."""
        return str(self.dask.scheduler.address)

    @property
    def dashboard(self) -> str:
        """Where Dask's dashboard can be seen."""
        scheduler = self.dask.scheduler_info(n_workers=0)
        host = self.address.partition("://")[2].rpartition(":")[0] if "tcp" in self.address else "127.0.0.1"
        return f"http://{host}:{scheduler['services']['dashboard']}/status"

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if self.dask.status == "connecting" and address == self.address:
            # It would take the whole connect timeout to learn what Dask's client has seen already.
            raise ClusterError(f"the scheduler {address} is lost ('{op}'): waiting for one to take its place")
        return await call(self.dask.rpc, address, op, deadline=deadline, **message)

    async def _scheduler(self, op: str, deadline: float = 30.0, **message: Any) -> dict[str, Any]:
        return await call(self.dask.rpc, self.address, op, deadline=deadline, **message)

    async def create_collection(
        self,
        name: str,
        *,
        dim: int | None = None,
        metric: str = "cosine",
        encoder: str | None = None,
        cells: int | None = None,
        replicas: int | None = None,
        ids: str = "string",
        attributes: Mapping[str, str] | None = None,
        index: str | IndexSpec | Mapping[str, Any] | None = None,
        dtype: str | None = None,
        recall_target: float | None = None,
    ) -> AsyncCollection:
        """Make a collection; see `Database.create_collection`."""
        spec = make_spec(name, dim, metric, encoder, cells, replicas, ids, attributes)
        spec = replace(spec, index=index_spec(spec.dim, index, dtype, recall_target))
        await self._scheduler("create", spec=spec.to_wire())
        if attributes:
            await self._scheduler("learn", collection=name, schema=dict(attributes))
        return await self.collection(name)

    async def collection(self, name: str) -> AsyncCollection:
        """Open a collection that exists; raises `CollectionNotFound`."""
        if opened := self._open.get(name):
            try:
                await opened.still_there()
            except CollectionNotFound:
                del self._open[name]
                await opened.close()
        if name not in self._open:
            router = Router(name, self.call, self.address)
            state = await router.state(newest=True)
            self._open[name] = AsyncCollection(self.call, self.address, router, state.spec)
        return self._open[name]

    async def collections(self) -> list[str]:
        return list((await self._scheduler("collections"))["names"])

    async def workers(self) -> dict[str, int]:
        """Workers that are ready: address to process id."""
        return dict((await self._scheduler("collections"))["workers"])

    async def drain(
        self,
        worker: str,
        *,
        undo: bool = False,
        deadline: float = 600.0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Have all that `worker` holds go to the others; see `Database.drain`."""
        until = time.monotonic() + seconds("deadline", deadline, 600.0)
        await self._scheduler("drain", worker=worker, undo=undo)
        while not undo:
            states = [await (await self.collection(name)).status() for name in await self.collections()]
            shares = [share for state in states for share in state["workers"] if share["address"] == worker]
            left = sum(share.get("rows", 0) for share in shares)
            if progress is not None:
                progress(left)
            if not left and not any(state["moving"] for state in states):
                return
            if time.monotonic() >= until:
                raise ClusterError(
                    f"{worker} still holds {left} rows after {deadline:g} s; it goes on: ask again, or call it off "
                    "with undo=True"
                )
            await asyncio.sleep(0.2)

    async def snapshots(self, url: str) -> list[Snapshot]:
        """Snapshots at a place, oldest first; see `Database.snapshots`."""
        return snapshot_client.shown(await snapshot_client.listed(self._scheduler, url), url)

    async def restore(
        self,
        url: str,
        name: str | None = None,
        *,
        snapshot: str | None = None,
        replicas: int | None = None,
        ingest: bool = True,
        deadline: float = 3600.0,
    ) -> Restoration:
        """Make a collection from a snapshot; see `Database.restore`."""
        until = time.monotonic() + seconds("deadline", deadline, 3600.0)
        told = snapshot_client.newest(await snapshot_client.listed(self._scheduler, url), str(url), snapshot)
        check_new(told["collection"] if name is None else name, replicas)
        await snapshot_client.check_encoder(self.call, list(await self.workers()), told["collection"], told["encoder"])
        if ingest:
            await asyncio.to_thread(snapshot_client.check_topic, told)
        loaded = await self._scheduler(
            "restore",
            deadline=max(0.001, until - time.monotonic()),
            url=snapshot_url(url),
            name=name,
            snapshot=snapshot,
            replicas=replicas,
            follow=ingest,
        )
        name = told["collection"] if name is None else name
        collection = await self.collection(name)
        caught_up = await collection.caught_up(offsets_from_wire(loaded["offsets"]), until)
        return snapshot_client.restoration(loaded, name, *caught_up)

    async def drop_collection(self, name: str) -> None:
        """Forget a collection and its rows; the topic in Kafka stays as it is."""
        await self._scheduler("drop", collection=name)
        if opened := self._open.pop(name, None):
            opened.look_again()
            await opened.close()

    async def status(self) -> dict[str, Any]:
        names = await self.collections()
        collections = {name: await (await self.collection(name)).status() for name in names}
        return {"address": self.address, "workers": await self.workers(), "collections": collections}

    async def disconnect(self, *, end_cluster: bool) -> None:
        """Close the connections to Kafka, and have the scheduler let go of the collections if the cluster ends."""
        for opened in self._open.values():
            await opened.close()
        self._open.clear()
        if end_cluster:
            try:
                await self._scheduler("shutdown", deadline=5.0)
            except ClusterError as error:
                log.info("the scheduler did not answer while the cluster was ended: %s", error)

    async def close(self) -> None:
        """Disconnect; a cluster that `connect_async` started ends."""
        await self.disconnect(end_cluster=bool(self._owns))
        for thing in (self.dask, *self._owns):
            await thing.close()

    async def __aenter__(self) -> AsyncDatabase:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class AsyncCollection:
    """One collection: writes go to its Kafka topic, reads to the workers. See `Collection` for what each call does."""

    def __init__(self, call: Call, scheduler: str, router: Router, spec: CollectionSpec) -> None:
        self.name, self.spec = spec.name, spec
        self._call, self._scheduler, self._router = call, scheduler, router
        self._producer: RecordProducer | None = None
        self._producing = asyncio.Lock()
        self._session: dict[int, int] = {}  # written, or shown to this client
        self._wrote: dict[int, int] = {}
        self._session_of = ""

    # -- writing -------------------------------------------------------------------------------------------------------

    async def ingest(self, bootstrap: str, topic: str | None = None, *, format: str = "json") -> None:
        topic = topic or self.name
        if not isinstance(topic, str):
            raise ConfigError(f"topic={topic!r} cannot be: give a topic's name")
        if not isinstance(bootstrap, str) or not bootstrap.strip():
            raise ConfigError(f"bootstrap={bootstrap!r} cannot be: give a broker's address, such as 'localhost:9092'")
        if format not in ("json", "binary"):
            raise ConfigError(f"record format {format!r} is not known: use 'json' or 'binary'")

        def look() -> tuple[int, dict[int, int], str]:
            offsets = Offsets(bootstrap, topic, settings=config.kafka_settings())
            return offsets.partitions, offsets.earliest(), offsets.topic_id()

        partitions, origins, topic_id = await asyncio.to_thread(look)
        await self._call(
            self._scheduler,
            "ingest",
            deadline=30.0,
            collection=self.name,
            source={
                "bootstrap": bootstrap,
                "topic": topic,
                "partitions": partitions,
                "format": format,
                "origins": offsets_to_wire(origins),
                "topic_id": topic_id,
            },
        )
        await self._reading(partitions)

    async def _reading(self, partitions: int, deadline: float = 60.0) -> None:
        """Return once every topic partition is read: the workers load their encoder first, which takes a second."""
        until = time.monotonic() + deadline
        while True:
            answers = await self._router.ask_all("ingest_status", deadline)
            if {tp for answer in answers for tp in answer["reading"]} == set(range(partitions)):
                return
            if time.monotonic() >= until:
                raise ClusterError(
                    f"collection {self.name!r}: not all {partitions} topic partitions were being read after "
                    f"{deadline:g} s; the workers' logs say why"
                )
            await asyncio.sleep(0.02)

    async def upsert(self, frame: Any, *, wait: str | None = None, deadline: float = 10.0) -> Write:
        schema = (await self._router.state()).schema
        return await self._write(upsert_records(frame, self.spec, schema), wait, deadline)

    async def delete(self, ids: Iterable[str | int], *, wait: str | None = None, deadline: float = 10.0) -> Write:
        return await self._write(delete_records(ids, self.spec), wait, deadline)

    async def _write(self, records: list[Record], wait: str | None, deadline: float) -> Write:
        if wait not in (None, "searchable"):
            raise ConfigError(f"wait={wait!r} is not known: use 'searchable', or None to return on Kafka's word")
        deadline = seconds("deadline", deadline, 10.0)
        until = time.monotonic() + deadline
        if not records:
            return Write({}, 0, ())
        await self._router.state()  # at most a second old: nothing is written for a collection that was dropped
        producer = await self._producer_of_topic(deadline)
        delivered = await asyncio.to_thread(producer.write, records, deadline)
        session = self._written()
        for tp, offset in delivered.offsets.items():
            session[tp] = max(session.get(tp, 0), offset)
            self._wrote[tp] = max(self._wrote.get(tp, 0), offset)
        if wait == "searchable":
            left = max(0.001, until - time.monotonic())
            await self._router.wait_everywhere(delivered.offsets, left)
        acks = tuple((self._id(key), tp, offset) for key, tp, offset in delivered.acks)
        return Write(delivered.offsets, delivered.count, acks)

    def _written(self) -> dict[int, int]:
        """How far this client has written into the topic that there is; what went into one before it is gone."""
        if self._session_of != (now := self._router.topic_id):
            if self._session_of:
                self._session, self._wrote = {}, {}
            self._session_of = now
        return self._session

    def _saw(
        self, session: dict[int, int], answers: Iterable[Mapping[str, Any]], rows: Iterable[Row | Hit | None]
    ) -> None:
        """What this client has been shown it is not to miss in its session later, whichever copy it asks then."""
        if session is not self._written():
            return  # the answers were of a topic that is gone
        seen = [pair for answer in answers for pair in offsets_from_wire(answer["applied"]).items()]
        # A copy may hold rows above what it claims, because batches end in any order.
        seen += [(row.topic_partition, row.offset + 1) for row in rows if row is not None]
        for tp, offset in seen:
            session[tp] = max(session.get(tp, 0), offset)

    def _id(self, key: bytes | None) -> str | int:
        text = (key or b"").decode()
        return int(text) if self.spec.ids == "integer" else text

    async def _producer_of_topic(self, deadline: float) -> RecordProducer:
        async with self._producing:
            if self._producer is None:
                source = (await self._router.state()).source or (await self._router.state(newest=True)).source
                if source is None:
                    raise CollectionError(
                        f"collection {self.name!r} has no topic yet: call "
                        f"ingest('localhost:9092', topic='{self.name}') first"
                    )
                self._producer = await asyncio.to_thread(
                    RecordProducer, source.bootstrap, source.topic, settings=config.kafka_settings(), deadline=deadline
                )
            return self._producer

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
        session = self._written()
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
        )
        applied = _lowest(answers)
        hits = [
            Hits(best([(a["rows"][at], a["scores"][at]) for a in answers], limit, self.spec.metric), applied)
            for at in range(len(vectors))
        ]
        self._saw(session, answers, chain.from_iterable(hits))
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
        session = self._written()
        required = await self._router.required(consistency, session, deadline)
        left = max(0.001, until - time.monotonic())
        waits = consistency != "eventual"
        answers = await self._router.ask_cover("get", left, required, ids=wanted, vectors=vectors, waits=waits)
        rows: list[Row | None] = []
        for copies in zip(*(rows_from_wire(answer["rows"]) for answer in answers), strict=True):
            there = [row for row in copies if row is not None]
            rows.append(_row(max(there, key=lambda row: row.offset)) if there else None)
        self._saw(session, answers, rows)
        return Rows(rows, _lowest(answers))

    async def count(
        self, *, filter: str | None = None, consistency: Consistency = "session", deadline: float | None = None
    ) -> int:
        deadline = seconds("deadline", deadline, config.get("search.deadline"))
        until = time.monotonic() + deadline
        required = await self._router.required(consistency, self._written(), deadline)
        where = await self._router.filter(filter, required, deadline)
        left = max(0.001, until - time.monotonic())
        answers = await self._router.ask_cover("count", left, required, where=where and where.to_wire())
        sizes: dict[int, int] = {}
        for answer in answers:
            for cell, rows in answer["cell_sizes"]:
                sizes[cell] = max(sizes.get(cell, 0), rows)
        return sum(sizes.values())

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
                cells = plan.setdefault(state.serving[cell][0], [])
                assert cells is not None
                cells.append(cell)
        for address, cells in plan.items():
            cursor: str | None = None
            while True:
                answer = await self._call(
                    address,
                    "scan",
                    deadline=30.0,
                    collection=self.name,
                    cursor=cursor,
                    cells=cells,
                    vectors=vectors,
                )
                for row in rows_from_wire(answer["rows"]):
                    if row is not None:
                        yield _row(row)
                cursor = answer["cursor"]
                if cursor is None:
                    break

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

    async def snapshots(self, url: str | None = None) -> list[Snapshot]:
        if url is None:
            known = (await self._router.state(newest=True)).snapshots
            url = known.url or known.last_url
            if not url:
                raise SnapshotError(f"collection {self.name!r} has no snapshot yet: say where, or take one first")
        return snapshot_client.shown(await snapshot_client.listed(self._of_scheduler, url), url)

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
        verifier = Verifier(self._call, self._router, self.name, deep=deep)
        deadline = seconds("deadline", deadline, 10.0)
        found = await verifier.verify(repair=repair, deadline=deadline)
        if found.repaired:
            # A version that no log has may have been shown to this client: its session is not to wait for that.
            ends = await self._router.required(bounded(0), {}, deadline)
            session = self._written()
            for tp, offset in session.items():
                session[tp] = min(offset, max(ends.get(tp, 0), self._wrote.get(tp, 0)))
        return found

    async def close(self) -> None:
        """Close the connection to Kafka, and ask the scheduler for nothing any more."""
        self._router.close()
        if self._producer is not None:
            await asyncio.to_thread(self._producer.close)
            self._producer = None


def _lowest(answers: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    low: dict[int, int] = {}
    for answer in answers:
        for tp, offset in offsets_from_wire(answer["applied"]).items():
            low[tp] = min(low.get(tp, offset), offset)
    return low


def _row(row: StoredRow) -> Row:
    return Row(row.id, row.topic_partition, row.offset, row.timestamp, row.cell, row.attributes, row.vector)
