"""The public client: `connect`, `Database`, `Collection`; and `connect_async` for programs that await.

Every call here runs the asynchronous one of the same name on the Dask client's event loop and waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from headrace.cluster.state import CollectionSpec
from headrace.gpu.errors import BackendError, ClusterError
from headrace.pipeline import config
from headrace.pipeline.client_async import AsyncCollection, AsyncDatabase
from headrace.pipeline.launch import cluster_options, plugins_from_config
from headrace.pipeline.results import Consistency, Row, Rows, Verification, Write

__all__ = ["AsyncCollection", "AsyncDatabase", "Collection", "Database", "connect", "connect_async"]

_CONNECT_SECONDS = 10.0


def connect(
    address: str | None = None,
    *,
    workers: int = 2,
    processes: bool = False,
    backend: str | None = None,
    dashboard: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout: float = _CONNECT_SECONDS,
) -> Database:
    """Connect to a cluster, or start one.

    Parameters
    ----------
    address : str, optional
        ``"tcp://host:8786"`` of a running Dask scheduler; Headrace is put on it if it is not there yet. Without one, a
        cluster is started that ends with this program.
    workers : int
        Of a cluster that is started.
    processes : bool
        Start workers as processes of their own, which Dask's nannies restart if they die; otherwise they live in
        this process.
    backend : {"auto", "host", "rapids"}, optional
    dashboard : str, optional
        ``":8787"`` for Dask's dashboard (needs bokeh).
    host, port
        Where the scheduler listens when `processes` is true; other hosts than the loopback need TLS.
    timeout : float
        Seconds to wait for a scheduler at `address`.

    Raises
    ------
    ClusterError
        No scheduler answers at `address`.
    ConfigError
        An option cannot be.
    """
    import distributed

    config.check()
    config.apply_dask_defaults()
    if backend not in (None, "auto", "host", "rapids"):
        raise BackendError(f"unknown backend {backend!r}: use 'auto', 'host' or 'rapids'")
    owns: list[Any] = []
    if address is None:
        options = cluster_options(workers, processes=processes, dashboard=dashboard, host=host, port=port)
        try:
            owns.append(distributed.LocalCluster(**options))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ClusterError(
                f"no cluster could be started at {host}:{port} ({error.__cause__ or error}): is the port taken?"
            ) from error
    try:
        dask_client = distributed.Client(  # type: ignore[no-untyped-call]
            owns[0] if owns else address, direct_to_workers=True, timeout=timeout, set_as_default=False
        )
    except (OSError, ValueError, TimeoutError) as error:
        for thing in owns:
            thing.close()
        raise _no_scheduler(address, error) from error
    scheduler_plugin, worker_plugin = plugins_from_config(workers if owns else 1, backend)
    try:
        dask_client.register_plugin(scheduler_plugin)
        dask_client.register_plugin(worker_plugin)
    except BaseException:
        for thing in (dask_client, *owns):
            thing.close()
        raise
    return Database(AsyncDatabase(dask_client), owns)


async def connect_async(
    address: str | None = None,
    *,
    workers: int = 2,
    processes: bool = False,
    backend: str | None = None,
    dashboard: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout: float = _CONNECT_SECONDS,
) -> AsyncDatabase:
    """As `connect`, for programs that await: everything runs on the calling event loop."""
    import distributed

    config.check()
    config.apply_dask_defaults()
    if backend not in (None, "auto", "host", "rapids"):
        raise BackendError(f"unknown backend {backend!r}: use 'auto', 'host' or 'rapids'")
    owns: list[Any] = []
    if address is None:
        options = cluster_options(workers, processes=processes, dashboard=dashboard, host=host, port=port)
        owns.append(await distributed.LocalCluster(**options, asynchronous=True))  # type: ignore[no-untyped-call]
    try:
        dask_client = await distributed.Client(  # type: ignore[no-untyped-call]
            owns[0] if owns else address,
            direct_to_workers=True,
            timeout=timeout,
            set_as_default=False,
            asynchronous=True,
        )
    except (OSError, ValueError, TimeoutError) as error:
        for thing in owns:
            await thing.close()
        raise _no_scheduler(address, error) from error
    scheduler_plugin, worker_plugin = plugins_from_config(workers if owns else 1, backend)
    try:
        await dask_client.register_plugin(scheduler_plugin)
        await dask_client.register_plugin(worker_plugin)
    except BaseException:
        for thing in (dask_client, *owns):
            await thing.close()
        raise
    return AsyncDatabase(dask_client, owns=owns)


def _no_scheduler(address: str | None, error: Exception) -> ClusterError:
    return ClusterError(
        f"no Dask scheduler answers at {address} ({type(error).__name__}: {error}): start one with 'headrace up', "
        "or check the address"
    )


class Database:
    """All collections of one cluster. Thread-safe. Use it as a context manager, or `close` it."""

    def __init__(self, asynchronous: AsyncDatabase, owns: Sequence[Any] = ()) -> None:
        self._async, self._owns, self._closed = asynchronous, owns, False

    def _sync(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self._async.dask.sync(function, *args, **kwargs)

    @property
    def address(self) -> str:
        """The scheduler's address, for `connect` in another process."""
        return self._async.address

    @property
    def dashboard(self) -> str:
        """Where Dask's dashboard can be seen."""
        return self._async.dashboard

    @property
    def dask(self) -> Any:
        """The `distributed.Client` underneath."""
        return self._async.dask

    @property
    def workers(self) -> dict[str, int]:
        """Workers that are ready: address to process id."""
        return self._sync(self._async.workers)  # type: ignore[no-any-return]

    def create_collection(
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
    ) -> Collection:
        """Make a collection.

        Parameters
        ----------
        name : str
        dim : int, optional
            Length of the vectors; not needed with an encoder.
        metric : {"cosine", "ip", "l2"}
        encoder : str, optional
            "minilm": records may carry texts. Without one they carry vectors.
        cells, replicas : int, optional
            Cells of the codebook, and copies of each cell; defaults from the configuration (64 and 2).
        ids : {"string", "integer"}
        attributes : mapping of str to str, optional
            Kinds ("int", "float", "bool", "str") of attributes known beforehand; others take the kind of their first
            value.

        Raises
        ------
        CollectionExists, ConfigError, EncoderError, ClusterError
        """
        made = self._sync(
            self._async.create_collection,
            name,
            dim=dim,
            metric=metric,
            encoder=encoder,
            cells=cells,
            replicas=replicas,
            ids=ids,
            attributes=attributes,
        )
        return Collection(made, self._async.dask)

    def collection(self, name: str) -> Collection:
        """Open a collection that exists; raises `CollectionNotFound`."""
        return Collection(self._sync(self._async.collection, name), self._async.dask)

    def collections(self) -> list[str]:
        """Names of all collections."""
        return self._sync(self._async.collections)  # type: ignore[no-any-return]

    def drop_collection(self, name: str) -> None:
        """Forget a collection and its rows; the topic in Kafka stays as it is."""
        self._sync(self._async.drop_collection, name)

    def status(self) -> dict[str, Any]:
        """Workers, and the status of every collection."""
        return self._sync(self._async.status)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Disconnect; a cluster that `connect` started ends. Again changes nothing."""
        if self._closed:
            return
        self._closed = True
        self._sync(self._async.disconnect, end_cluster=bool(self._owns))
        self._async.dask.close()
        for thing in self._owns:
            thing.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Collection:
    """One collection: writes go to its Kafka topic, reads straight to the workers. Thread-safe."""

    def __init__(self, asynchronous: AsyncCollection, dask_client: Any) -> None:
        self._async, self._dask = asynchronous, dask_client

    def _sync(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self._dask.sync(function, *args, **kwargs)

    @property
    def name(self) -> str:
        return self._async.name

    @property
    def spec(self) -> CollectionSpec:
        return self._async.spec

    def ingest(self, bootstrap: str, topic: str | None = None, *, format: str = "json") -> None:
        """Begin to take in a Kafka topic, from its first record on; calling it again with the same topic changes
        nothing.

        Parameters
        ----------
        bootstrap : str
            ``host:port`` of one or more brokers, as the workers reach them.
        topic : str, optional
            The collection's name if left out.
        format : {"json", "binary"}
            Of records that have no ``headrace-format`` header.

        Raises
        ------
        BrokerError, TopicError, CollectionError
        """
        self._sync(self._async.ingest, bootstrap, topic, format=format)

    def upsert(self, frame: Any, *, wait: str | None = None, deadline: float = 10.0) -> Write:
        """Write records to the topic: a pandas or cuDF frame, or mappings, with ``id`` and ``text`` or ``vector``.

        Parameters
        ----------
        frame : DataFrame, mapping, or iterable of mappings
            All other columns are attributes.
        wait : {None, "searchable"}
            Return once Kafka has them, or once every copy has applied them.
        deadline : float
            Seconds.

        Raises
        ------
        RecordError
            A row cannot be written; nothing was.
        ProduceError, BrokerError, ConsistencyTimeout
        """
        return self._sync(self._async.upsert, frame, wait=wait, deadline=deadline)  # type: ignore[no-any-return]

    def delete(self, ids: Iterable[str | int], *, wait: str | None = None, deadline: float = 10.0) -> Write:
        """Write a tombstone for each id; arguments and errors as `upsert`."""
        return self._sync(self._async.delete, ids, wait=wait, deadline=deadline)  # type: ignore[no-any-return]

    def search(
        self, query: Any, *, limit: int = 10, consistency: Consistency = "session", deadline: float | None = None
    ) -> Any:
        """The nearest rows to a text, a vector (dim,), or a batch of either.

        Parameters
        ----------
        query : str, array of float32 (dim,), list of str, or array (q, dim)
        limit : int
        consistency : {"strong", "session", "bounded", "eventual"} or `bounded`
            What the answer must have applied: everything in Kafka now; this client's own writes; everything up to some
            milliseconds ago; or nothing in particular.
        deadline : float, optional
            Seconds.

        Returns
        -------
        Hits, or a list of Hits for a batch

        Raises
        ------
        ConsistencyTimeout
            What was asked for had not been applied in time; says what was missing.
        RecordError
            The query is of another dimension, or not finite.
        ClusterError
            No copies answered.
        """
        return self._sync(self._async.search, query, limit=limit, consistency=consistency, deadline=deadline)

    def get(
        self,
        ids: Sequence[str | int],
        *,
        vectors: bool = False,
        consistency: Consistency = "session",
        deadline: float | None = None,
    ) -> Rows:
        """Rows by id, None for an id that is not there; consistency and errors as `search`."""
        return self._sync(  # type: ignore[no-any-return]
            self._async.get, ids, vectors=vectors, consistency=consistency, deadline=deadline
        )

    def count(self, *, consistency: Consistency = "session", deadline: float | None = None) -> int:
        """Live rows. While rows move between workers, a row that has two places may be counted twice."""
        return self._sync(self._async.count, consistency=consistency, deadline=deadline)  # type: ignore[no-any-return]

    def scan(self, *, worker: str | None = None, vectors: bool = False) -> Iterator[Row]:
        """All live rows, one copy of each cell; or every row that one `worker` (an address) holds.

        Waits for nothing: rows are those of the moment the scan begins on each worker.
        """
        rows = self._async.scan(worker=worker, vectors=vectors)

        async def chunk() -> list[Row]:
            found = []
            async for row in rows:
                found.append(row)
                if len(found) == 1024:
                    break
            return found

        while found := self._sync(chunk):
            yield from found

    def status(self) -> dict[str, Any]:
        """State, rows, copies, ingest figures, alarms."""
        return self._sync(self._async.status)  # type: ignore[no-any-return]

    def verify(self, *, deadline: float = 10.0) -> Verification:
        """Compare all copies of every cell, once they have applied the same offsets."""
        return self._sync(self._async.verify, deadline=deadline)  # type: ignore[no-any-return]
