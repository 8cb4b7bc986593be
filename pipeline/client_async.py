"""The client, asynchronous: the one that does the work. `client` is the same calls for people who do not await."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import dask

from headrace.cluster.calls import call
from headrace.cluster.wire import offsets_from_wire
from headrace.gpu.errors import ClusterError, CollectionNotFound
from headrace.gpu.index_spec import IndexSpec
from headrace.pipeline import scaling, snapshot_client
from headrace.pipeline.arguments import index_spec, seconds, snapshot_url
from headrace.pipeline.collection_async import AsyncCollection
from headrace.pipeline.dask_client import connections_may_close
from headrace.pipeline.reads import Router
from headrace.pipeline.results import Restoration, Snapshot
from headrace.pipeline.specs import check_new, make_spec

__all__ = ["AsyncCollection", "AsyncDatabase"]

log = logging.getLogger("headrace.pipeline")


class AsyncDatabase:
    """All collections of one cluster. Belongs to the event loop of `dask_client`."""

    def __init__(self, dask_client: Any, *, owns: Sequence[Any] = ()) -> None:
        self.dask = dask_client
        self._owns = owns
        # Dask's client gives a worker as long as it gave the scheduler: a read would wait for one that is dead.
        dask_client.rpc.timeout = dask.config.get("distributed.comm.timeouts.connect")
        self._open: dict[str, AsyncCollection] = {}
        self._answered = 0  # so many times the scheduler had been lost when it answered last

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
        if self.dask.status == "connecting" and address == self.address and self._answered != self.dask.losses:
            # It would take the whole connect timeout to learn what Dask's client has seen already. But the next one may
            # have answered before that client has found it.
            raise ClusterError(f"the scheduler {address} is lost ('{op}'): waiting for one to take its place")
        return await call(self.dask.rpc, address, op, deadline=deadline, **message)

    async def _scheduler(self, op: str, deadline: float = 30.0, **message: Any) -> dict[str, Any]:
        losses = self.dask.losses
        answer = await call(self.dask.rpc, self.address, op, deadline=deadline, **message)
        self._answered = losses
        return answer

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
            left = scaling.still_held(await self._states(), [worker])
            if progress is not None:
                progress(left or 0)
            if left is None:
                return
            if time.monotonic() >= until:
                raise ClusterError(
                    f"{worker} still holds {left} rows after {deadline:g} s; it goes on: ask again, or call it off "
                    "with undo=True"
                )
            await asyncio.sleep(0.2)

    async def scale(self, workers: int, *, deadline: float = 600.0) -> None:
        """Have as many workers; see `Database.scale`."""
        cluster, until = self.dask.cluster, time.monotonic() + seconds("deadline", deadline, 600.0)
        workers = scaling.check(cluster, workers)
        if names := scaling.to_close(cluster, workers):
            known = (await self.dask.scheduler.identity(n_workers=-1))["workers"]
            going = [address for address, worker in known.items() if worker["name"] in names]
            try:
                for address in going:
                    await self._scheduler("drain", worker=address)
                while (left := scaling.still_held(await self._states(), going)) is not None:
                    if time.monotonic() >= until:
                        raise ClusterError(
                            f"{', '.join(going)} still hold {left} rows after {deadline:g} s, so they stay: scale with "
                            "a longer deadline"
                        )
                    await asyncio.sleep(0.2)
            except BaseException:
                for address in set(going) & set(await self.workers()):
                    await self._scheduler("drain", worker=address, undo=True)
                raise
            await cluster.scale_down(names)
        else:
            cluster.scale(workers)
        await scaling.until_scaled(self.workers, self._states, workers, until)

    async def _states(self) -> list[dict[str, Any]]:
        return [await (await self.collection(name)).status() for name in await self.collections()]

    async def snapshots(self, url: str, *, check: bool = False) -> list[Snapshot]:
        """Snapshots at a place, oldest first; see `Database.snapshots`."""
        return snapshot_client.shown(await snapshot_client.listed(self._scheduler, url, check), url)

    async def restore(
        self,
        url: str,
        name: str | None = None,
        *,
        snapshot: str | None = None,
        replicas: int | None = None,
        ingest: bool = True,
        take_over: bool = False,
        deadline: float = 3600.0,
    ) -> Restoration:
        """Make a collection from a snapshot; see `Database.restore`."""
        until = time.monotonic() + seconds("deadline", deadline, 3600.0)
        told = snapshot_client.newest(await snapshot_client.listed(self._scheduler, url), str(url), snapshot)
        check_new(told["collection"] if name is None else name, replicas)
        await snapshot_client.check_encoder(self.call, list(await self.workers()), told["collection"], told["encoder"])
        if ingest:
            await asyncio.to_thread(snapshot_client.check_topic, told)
        loaded = await snapshot_client.load(
            self._scheduler,
            told["collection"] if name is None else name,
            until,
            url=snapshot_url(url),
            name=name,
            snapshot=snapshot,
            replicas=replicas,
            follow=ingest,
            take_over=take_over,
        )
        name = told["collection"] if name is None else name
        collection = await self.collection(name)
        caught_up = await collection.caught_up(offsets_from_wire(loaded["offsets"]), until)
        return snapshot_client.restoration(loaded, name, *caught_up)

    async def drop_collection(self, name: str) -> None:
        """Forget a collection and its rows; its topic in Kafka stays as it is, and so do its snapshots."""
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
        with connections_may_close():
            for thing in (self.dask, *self._owns):
                await thing.close()

    async def __aenter__(self) -> AsyncDatabase:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
