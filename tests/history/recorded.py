"""A collection as one client uses it, sync or async: calls go through unchanged, and are noted with their answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headrace.gpu.errors import HeadraceError
from tests.history.digests import value_digest
from tests.history.events import Answer, FirstVisible, Id, Produced, Read

if TYPE_CHECKING:
    from tests.history.recorder import Recorder


class _Call:
    """One call; `done` is what it gave."""

    def __init__(self) -> None:
        self.done: Any = None


class Noting:
    """What is noted of one client's calls; errors are noted too, and raised.

    Parameters
    ----------
    recorder : Recorder
    collection : object
        With a collection's calls.
    client : str
        One session: give every collection object a name of its own.
    """

    def __init__(self, recorder: Recorder, collection: Any, client: str) -> None:
        self._recorder, self._collection, self._client = recorder, collection, client

    @contextmanager
    def _write(self, written: list[tuple[Id, str]], deleted: bool, options: Mapping[str, Any]) -> Iterator[_Call]:
        note, sent = self._recorder.note, self._recorder.now()
        places: dict[Id, list[tuple[int, int]]] = defaultdict(list)
        acked_at: float | None = None
        visible: list[FirstVisible] = []
        call = _Call()
        try:
            yield call
            acked_at = self._recorder.now()
            for id, partition, offset in call.done.acks:
                places[id].append((int(partition), int(offset)))
            if options.get("wait") == "searchable":
                visible = [FirstVisible(*place, acked_at) for found in places.values() for place in found]
        finally:
            # one id's records keep the order in which they were handed in, so its lowest offset is the first;
            # a record that was not acknowledged is noted all the same: it may be in Kafka
            queues = {id: sorted(found) for id, found in places.items()}
            for id, digest in written:
                partition, offset = queues[id].pop(0) if queues.get(id) else (None, None)
                acked = None if offset is None else acked_at
                # the producer stamps a record after this moment, so freshness is never flattered
                note(Produced(id, partition, offset, int(sent * 1000), deleted, digest, acked, sent, self._client))
            note(*visible)

    @contextmanager
    def _read(self, kind: str, options: Mapping[str, Any], asked: tuple[Id, ...] = ()) -> Iterator[_Call]:
        consistency = options.get("consistency", "session")
        if not isinstance(consistency, str):
            consistency = f"bounded:{consistency.staleness}"
        started = self._recorder.now()

        def noted(answer: Iterable[Any], applied: Mapping[int, int] | None, error: str = "") -> None:
            rows = tuple(
                Answer(
                    row.id,
                    getattr(row, "topic_partition", None),
                    getattr(row, "offset", None),
                    getattr(row, "score", None),
                    value_digest(row.attributes) if kind == "get" else "",  # hits may carry a choice of attributes
                )
                for row in answer
                if row is not None
            )
            times = (started, self._recorder.now())
            offsets = None if applied is None else dict(applied)
            self._recorder.note(Read(kind, consistency, *times, {}, offsets, rows, asked, self._client, error=error))

        call = _Call()
        try:
            yield call
        except HeadraceError as error:
            noted((), None, f"{type(error).__name__}: {error}")
            raise
        # a batch of queries gives a plain list of Hits; Hits and a get's rows are one answer
        for one in call.done if kind != "get" and not hasattr(call.done, "offsets") else [call.done]:
            noted(one, getattr(one, "offsets", None))


class Recorded(Noting):
    """A client that waits for its answers."""

    def upsert(self, rows: Any, **options: Any) -> Any:
        """`rows` is a frame or an iterable of mappings with an ``id``."""
        given, written = _rows_of(rows)
        with self._write(written, False, options) as call:
            call.done = self._collection.upsert(given, **options)
        return call.done

    def delete(self, ids: Iterable[Id], **options: Any) -> Any:
        ids = list(ids)
        with self._write([(id, "") for id in ids], True, options) as call:
            call.done = self._collection.delete(ids, **options)
        return call.done

    def get(self, ids: Sequence[Id], **options: Any) -> Any:
        with self._read("get", options, tuple(ids)) as call:
            call.done = self._collection.get(ids, **options)
        return call.done

    def search(self, query: Any, *, exhaustive: bool = False, **options: Any) -> Any:
        """`exhaustive` says that the limit and the probes leave nothing out, so that absence can be judged."""
        with self._read("scan" if exhaustive else "search", options) as call:
            call.done = self._collection.search(query, **options)
        return call.done


class AsyncRecorded(Noting):
    """A client that awaits its answers; the calls of `Recorded`."""

    async def upsert(self, rows: Any, **options: Any) -> Any:
        given, written = _rows_of(rows)
        with self._write(written, False, options) as call:
            call.done = await self._collection.upsert(given, **options)
        return call.done

    async def delete(self, ids: Iterable[Id], **options: Any) -> Any:
        ids = list(ids)
        with self._write([(id, "") for id in ids], True, options) as call:
            call.done = await self._collection.delete(ids, **options)
        return call.done

    async def get(self, ids: Sequence[Id], **options: Any) -> Any:
        with self._read("get", options, tuple(ids)) as call:
            call.done = await self._collection.get(ids, **options)
        return call.done

    async def search(self, query: Any, *, exhaustive: bool = False, **options: Any) -> Any:
        with self._read("scan" if exhaustive else "search", options) as call:
            call.done = await self._collection.search(query, **options)
        return call.done


def _rows_of(rows: Any) -> tuple[Any, list[tuple[Id, str]]]:
    """What to hand on, and each row's id with the digest of its value."""
    frame = hasattr(rows, "to_dict")
    plain: list[Mapping[str, Any]] = rows.to_dict("records") if frame else list(rows)
    return rows if frame else plain, [(row["id"], value_digest(row)) for row in plain]
