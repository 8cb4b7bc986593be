"""The public `Collection`.

Every call here runs the asynchronous one of the same name on the Dask client's event loop and waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from headrace.cluster.state import CollectionSpec
from headrace.gpu.errors import ClusterError
from headrace.pipeline.collection_async import AsyncCollection
from headrace.pipeline.results import Consistency, Row, Rows, Snapshot, Verification, Write

__all__ = ["Collection", "run"]


def run(dask_client: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """What an asynchronous call answers, from the Dask client's event loop.

    Raises
    ------
    ClusterError
        The connection has been closed.
    """
    if dask_client.status in ("closing", "closed"):
        raise ClusterError("this connection has been closed: connect again")
    return dask_client.sync(function, *args, **kwargs)


class Collection:
    """One collection: writes go to its Kafka topic, reads straight to the workers. Thread-safe."""

    def __init__(self, asynchronous: AsyncCollection, dask_client: Any) -> None:
        self._async, self._dask = asynchronous, dask_client

    def _sync(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self._dask, function, *args, **kwargs)

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
        self,
        query: Any,
        *,
        limit: int = 10,
        filter: str | None = None,
        recall_target: float | None = None,
        consistency: Consistency = "session",
        deadline: float | None = None,
    ) -> Any:
        """The nearest rows to a text, a vector (dim,), or a batch of either.

        Parameters
        ----------
        query : str, array of float32 (dim,), list of str, or array (q, dim)
        limit : int
        filter : str, optional
            Only rows whose attributes pass, such as ``"price < 50 and brand in ['a', 'b'] and not sold"``; its
            language is told in `headrace.gpu.filters`. A row without the attribute passes only ``is None``. A column
            that no record has brought yet, and `attributes` did not name, is an error, in an empty collection too: a
            name that was typed wrong would find nothing for ever.
        recall_target : float, optional
            Of this search, instead of the collection's: above 0 and at most 1; above both that one and 0.99 the search
            is exact.
        consistency : {"strong", "session", "bounded", "eventual"} or `bounded`
            What the answer must have applied: everything in Kafka now; this client's own writes; everything up to some
            milliseconds ago; or nothing in particular.
        deadline : float, optional
            Seconds. The error comes up to half a second later, since a worker is given the time to say what is missing.

        Returns
        -------
        Hits, or a list of Hits for a batch

        Raises
        ------
        ConsistencyTimeout
            What was asked for had not been applied in time; says what was missing.
        FilterError
            The filter cannot be read, or does not fit the columns; shows the place.
        RecordError
            The query is of another dimension, or not finite.
        ClusterError
            No copies answered.
        """
        return self._sync(
            self._async.search,
            query,
            limit=limit,
            filter=filter,
            recall_target=recall_target,
            consistency=consistency,
            deadline=deadline,
        )

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

    def count(
        self, *, filter: str | None = None, consistency: Consistency = "session", deadline: float | None = None
    ) -> int:
        """Live rows, or those that pass a filter; filter, consistency and errors as `search`.

        While rows move between workers, a row that has two places may be counted twice.
        """
        return self._sync(  # type: ignore[no-any-return]
            self._async.count, filter=filter, consistency=consistency, deadline=deadline
        )

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
        """State, rows, copies, ingest figures, alarms.

        Counters of ``ingest`` (records, deletes, batches, foreign, dead letters) begin at 0 with each reader of a topic
        partition: after a worker has died or moved they count from then on.
        """
        return self._sync(self._async.status)  # type: ignore[no-any-return]

    def snapshot(
        self, url: str, *, every: float | None = None, keep: int | None = None, deadline: float = 3600.0
    ) -> Snapshot:
        """Write the collection to a folder or an object store; reads and writes go on.

        What has settled is written once: the next snapshot at the same place adds only what is new.

        Parameters
        ----------
        url : str
            A folder, or what fsspec knows, such as "s3://bucket/docs", of this collection alone. The scheduler and all
            workers must reach it; what it asks for is configured as ``headrace.snapshots.options``.
        every : float, optional
            From now on one is taken by itself every so many seconds; 0 ends that. Not where no topic is read: rows that
            were restored without one never change.
        keep : int, optional
            How many are kept at the place, the newest ones; all if left out. With `every`, of those to come, too.
        deadline : float
            Seconds.

        Raises
        ------
        SnapshotError
            It cannot be written there, or one is being taken; those from before are as they were.
        CollectionError
            It is to be taken again and again, though the rows can never change.
        ClusterError
        """
        return self._sync(  # type: ignore[no-any-return]
            self._async.snapshot, url, every=every, keep=keep, deadline=deadline
        )

    def snapshots(self, url: str | None = None, *, check: bool = False) -> list[Snapshot]:
        """As `Database.snapshots`; by default where the last ones of this collection went."""
        return self._sync(self._async.snapshots, url, check=check)  # type: ignore[no-any-return]

    def verify(self, *, repair: bool = False, deep: bool = False, deadline: float = 10.0) -> Verification:
        """Compare all copies of every cell, at offsets that all of them have applied; reads and writes go on.

        Parameters
        ----------
        repair : bool
            Mend what differs: the topic is read once more for the ids concerned, and what its log has of them is
            applied wherever it is lacking. Where the log no longer reaches back so far, the highest version that any
            copy knows is taken.
        deep : bool
            Compare vectors and attributes too, not only ids and versions. Takes some microseconds a row.
        deadline : float
            Seconds; a repair may read all of the topic.

        Returns
        -------
        Verification

        Raises
        ------
        BrokerError
            A repair could not read the log.
        ClusterError
        """
        return self._sync(  # type: ignore[no-any-return]
            self._async.verify, repair=repair, deep=deep, deadline=deadline
        )
