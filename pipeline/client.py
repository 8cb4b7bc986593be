"""The public `Database`, and `Collection` with it.

Every call here runs the asynchronous one of the same name on the Dask client's event loop and waits for it.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # what is registered last is called first
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.gpu.index_spec import IndexSpec
from headrace.pipeline.client_async import AsyncDatabase
from headrace.pipeline.collection import Collection, run
from headrace.pipeline.dask_client import connections_may_close
from headrace.pipeline.results import Restoration, Snapshot

__all__ = ["Collection", "Database"]


_open: set[Database] = set()


def _close_all() -> None:
    """A program that ends without `close` would otherwise take the workers apart in the middle of what they do."""
    for database in list(_open):
        database.close()


# Before the pools of threads end, which closing needs; `atexit` comes after that. CPython has had this for them, and
# without a public name, since 3.9.
getattr(threading, "_register_atexit", atexit.register)(_close_all)


class Database:
    """All collections of one cluster. Thread-safe. Use it as a context manager, or `close` it."""

    def __init__(self, asynchronous: AsyncDatabase, owns: Sequence[Any] = ()) -> None:
        self._async, self._owns, self._closed = asynchronous, owns, False
        _open.add(self)

    def _sync(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self._async.dask, function, *args, **kwargs)

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

    def drain(
        self,
        worker: str,
        *,
        undo: bool = False,
        deadline: float = 600.0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Empty a worker, so that it can be stopped and nothing is missed; reads and writes go on meanwhile.

        Parameters
        ----------
        worker : str
            Its address, one of `workers`.
        undo : bool
            Let it have cells again.
        deadline : float
            Seconds to wait until it holds nothing.
        progress : callable, optional
            Told how many rows it still holds, a few times a second.

        Raises
        ------
        ClusterError
            There is no such worker, it is the last one that holds a collection, or it still holds rows at the deadline
            (moving goes on then).
        """
        self._sync(self._async.drain, worker, undo=undo, deadline=deadline, progress=progress)

    def scale(self, workers: int, *, deadline: float = 600.0) -> None:
        """Have as many workers, in a cluster that `connect` started; reads and writes go on meanwhile.

        Returns once those that came hold their share and are read, or those that go have been emptied and have ended:
        the newest ones go, and no copy is missed.

        Parameters
        ----------
        workers : int
        deadline : float
            Seconds to wait for that.

        Raises
        ------
        ConfigError
            `workers` is not at least 1.
        ClusterError
            This program did not start the cluster; those that are to go are the last that may hold rows or read a
            topic; or it took longer, and nobody was ended.
        """
        self._sync(self._async.scale, workers, deadline=deadline)

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
        index: str | IndexSpec | Mapping[str, Any] | None = None,
        dtype: str | None = None,
        recall_target: float | None = None,
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
            value. A filter may use them before the first record has come.
        index : {"graph", "flat", "ivf_pq"}, IndexSpec or dict of its fields, optional
            What finds the rows that have settled: a graph (HNSW or CAGRA); an exact scan; or compressed codes, scored
            once more by the vectors that they stand for. "graph" if left out.
        dtype : {"float32", "float16"}, optional
            How vectors are kept; float16 takes half the memory.
        recall_target : float, optional
            Recall at 10 that a search must reach, above 0 and at most 1; 0.95 if left out. A search may ask for
            another; one above both this and 0.99 is exact.

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
            index=index,
            dtype=dtype,
            recall_target=recall_target,
        )
        return Collection(made, self._async.dask)

    def snapshots(self, url: str, *, check: bool = False) -> list[Snapshot]:
        """Snapshots of a collection at a folder or URL, oldest first; those that are damaged say so.

        Parameters
        ----------
        url : str
            As it was given to `Collection.snapshot`.
        check : bool
            Read every file and compare checksums; `Snapshot.problem` names what is not whole. The scheduler does it,
            and it takes as long as reading all that is there. Else only manifests are read.

        Raises
        ------
        SnapshotError
            The place cannot be read.
        """
        return self._sync(self._async.snapshots, url, check=check)  # type: ignore[no-any-return]

    def restore(
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
        """Make a collection from a snapshot, on the workers there are, and read its topic from where that ended.

        Parameters
        ----------
        url : str
            As it was given to `Collection.snapshot`.
        name : str, optional
            Of the collection; by default the one it had.
        snapshot : str, optional
            Which one; by default the newest that is not damaged.
        replicas : int, optional
            Copies of each cell, if not as many as before.
        ingest : bool
            False restores the rows alone. The collection answers reads then, and can never read a topic.
        take_over : bool
            Its snapshots go to the same place from now on. The collection that has written them is refused there then,
            should it live on in another cluster. Not needed where it was dropped in this one.
        deadline : float
            Seconds; if they pass, it goes on all the same: `Collection.status` says when it is done.

        Raises
        ------
        ClusterError
            The deadline is over before the rows are loaded.
        CollectionExists
            There is a collection of this name.
        CollectionNotFound
            It was dropped meanwhile.
        SnapshotError
            There is no snapshot that can be used.
        TopicError
            The topic was made anew since, or is gone: what it holds does not fit the rows.
        EncoderError
            A worker lacks the collection's encoder.
        StoreFull
            The workers have no room for it.
        """
        return self._sync(  # type: ignore[no-any-return]
            self._async.restore,
            url,
            name,
            snapshot=snapshot,
            replicas=replicas,
            ingest=ingest,
            take_over=take_over,
            deadline=deadline,
        )

    def collection(self, name: str) -> Collection:
        """Open a collection that exists; raises `CollectionNotFound`."""
        return Collection(self._sync(self._async.collection, name), self._async.dask)

    def collections(self) -> list[str]:
        """Names of all collections."""
        return self._sync(self._async.collections)  # type: ignore[no-any-return]

    def drop_collection(self, name: str) -> None:
        """Forget a collection and its rows; its topic in Kafka stays as it is, and so do its snapshots."""
        self._sync(self._async.drop_collection, name)

    def status(self) -> dict[str, Any]:
        """Workers, and the status of every collection."""
        return self._sync(self._async.status)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Disconnect; a cluster that `connect` started ends. Again changes nothing."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        self._sync(self._async.disconnect, end_cluster=bool(self._owns))
        with connections_may_close():
            self._async.dask.close()
            for thing in self._owns:
                thing.close()

    def end_cluster(self) -> None:
        """Have the workers stop reading, because they are about to be ended; what they hold is gone then."""
        self._sync(self._async.disconnect, end_cluster=True)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
