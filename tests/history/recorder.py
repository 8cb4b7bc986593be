"""Writes down what a test does to a collection and what it is answered, from any number of threads."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.gpu.errors import HeadraceError
from tests.history.events import (
    Answer,
    Committed,
    DeadLettered,
    Event,
    FaultMark,
    FinalState,
    FirstVisible,
    History,
    Id,
    Origin,
    Placement,
    Produced,
    Read,
    Stored,
    Verified,
    WatermarkSample,
)

ACTIVE = "active"  # the state of a worker that the placement counts on, in Collection.status()


def value_digest(attributes: Mapping[str, Any]) -> str:
    """Digest of a row's attributes: absent and null are the same, and so are 1 and 1.0 (a column decides which)."""
    plain = {
        name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in attributes.items()
        if name not in ("id", "vector") and value is not None and value == value
    }
    text = json.dumps(plain, sort_keys=True, default=lambda scalar: scalar.item())
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Recorder:
    """Collects events; every method may be called from any thread, and takes any object with a Collection's calls.

    Parameters
    ----------
    seed, command
        Printed with every violation, so that the run can be repeated.
    """

    def __init__(self, *, seed: int | None = None, command: str = "") -> None:
        self._lock = threading.Lock()
        self._origin = Origin(seed, command, time.time(), time.monotonic())
        self._events: list[Event] = [self._origin]

    def now(self) -> float:
        """Seconds since the epoch as of the start, and the monotonic clock since: a stepped clock changes nothing."""
        return self._origin.wall + time.monotonic() - self._origin.monotonic

    def note(self, *events: Event) -> None:
        with self._lock:
            self._events.extend(events)

    def history(self) -> History:
        with self._lock:
            return History(tuple(self._events))

    def save(self, path: str | Path) -> None:
        self.history().save(path)

    def wrap(self, collection: Any, client: str = "") -> Recorded:
        """The collection as `client` uses it; give every `Collection` object its own name, for it is one session."""
        return Recorded(self, collection, client)

    @contextmanager
    def fault(self, what: str) -> Iterator[None]:
        """A fault that begins and is healed within the block."""
        self.note(FaultMark(self.now(), what))
        try:
            yield
        finally:
            self.note(FaultMark(self.now(), what, healed=True))

    def dead_letter(self, topic_partition: int, offset: int, reason: str = "") -> None:
        self.note(DeadLettered(topic_partition, offset, reason))

    def sample(self, collection: Any, committed: Callable[[], Mapping[int, int]] | None = None) -> None:
        """Note the committed offsets, then the watermark of every worker that tells one."""
        if committed is not None:
            started = self.now()
            offsets = dict(committed())
            self.note(Committed(self.now(), offsets, started))
        started = self.now()
        workers = collection.status()["workers"]
        for worker in workers:
            if (marks := worker.get("watermarks")) is not None:
                active = worker.get("state", ACTIVE) == ACTIVE
                incarnation = str(worker.get("incarnation", ""))
                self.note(WatermarkSample(self.now(), worker["address"], dict(marks), incarnation, active, started))

    @contextmanager
    def sampling(
        self, collection: Any, committed: Callable[[], Mapping[int, int]] | None = None, every: float = 0.05
    ) -> Iterator[None]:
        """`sample` every so many seconds while the block runs; what cannot be reached in a fault is not sampled."""
        stop = threading.Event()
        failures: list[Exception] = []

        def loop() -> None:
            while not stop.wait(every):
                try:
                    self.sample(collection, committed)
                except HeadraceError:
                    continue
                except Exception as error:  # noqa: BLE001 - raised again below, in the thread of the test
                    failures.append(error)
                    return

        thread = threading.Thread(target=loop, name="history-sampler", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]

    def final_state(
        self,
        collection: Any,
        *,
        placement: Mapping[int, Sequence[str]] | None = None,
        replicas: int | None = None,
    ) -> None:
        """Scan every active worker, once quiet. Without a `placement` a cell is held to be where it is found, so give
        `replicas` then, or a copy that lost all of a cell goes unseen."""
        status = collection.status()
        cells = placement if placement is not None else status.get("placement", {})
        self.note(Placement({int(cell): tuple(workers) for cell, workers in cells.items()}, replicas))
        for worker in status["workers"]:
            if worker.get("state", ACTIVE) != ACTIVE:
                continue
            rows = tuple(
                Stored(row.id, int(row.topic_partition), int(row.offset), int(row.cell), value_digest(row.attributes))
                for row in collection.scan(worker=worker["address"])
            )
            marks = dict(worker.get("watermarks") or {})
            self.note(FinalState(worker["address"], rows, marks, self.now(), str(worker.get("incarnation", ""))))
        verification = collection.verify()
        self.note(Verified(bool(verification.ok), tuple(map(str, verification.differences))))


class Recorded:
    """One client's collection: calls go through unchanged, and are noted; so are their errors, which are raised."""

    def __init__(self, recorder: Recorder, collection: Any, client: str) -> None:
        self._recorder, self._collection, self._client = recorder, collection, client

    def upsert(self, rows: Any, **options: Any) -> Any:
        """`rows` is a frame or an iterable of mappings with an ``id``."""
        frame = hasattr(rows, "to_dict")
        plain: list[Mapping[str, Any]] = rows.to_dict("records") if frame else list(rows)
        written = [(row["id"], value_digest(row)) for row in plain]
        return self._write(
            lambda: self._collection.upsert(rows if frame else plain, **options), written, False, options
        )

    def delete(self, ids: Iterable[Id], **options: Any) -> Any:
        ids = list(ids)
        return self._write(lambda: self._collection.delete(ids, **options), [(id, "") for id in ids], True, options)

    def get(self, ids: Sequence[Id], **options: Any) -> Any:
        return self._read("get", lambda: self._collection.get(ids, **options), options, tuple(ids))

    def search(self, query: Any, *, exhaustive: bool = False, **options: Any) -> Any:
        """`exhaustive` says that the limit and the probes leave nothing out, so that absence can be judged."""
        return self._read(
            "scan" if exhaustive else "search", lambda: self._collection.search(query, **options), options
        )

    def _write(
        self, call: Callable[[], Any], written: list[tuple[Id, str]], deleted: bool, options: Mapping[str, Any]
    ) -> Any:
        note, sent = self._recorder.note, self._recorder.now()
        places: dict[Id, list[tuple[int, int]]] = defaultdict(list)
        acked_at: float | None = None
        visible: list[FirstVisible] = []
        try:
            write = call()
            acked_at = self._recorder.now()
            for id, partition, offset in write.acks:
                places[id].append((int(partition), int(offset)))
            if options.get("wait") == "searchable":
                visible = [FirstVisible(*place, acked_at) for found in places.values() for place in found]
            return write
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

    def _read(self, kind: str, call: Callable[[], Any], options: Mapping[str, Any], asked: tuple[Id, ...] = ()) -> Any:
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

        try:
            answer = call()
        except HeadraceError as error:
            noted((), None, f"{type(error).__name__}: {error}")
            raise
        # a batch of queries gives a plain list of Hits; Hits and a get's rows are one answer
        for one in answer if kind != "get" and not hasattr(answer, "offsets") else [answer]:
            noted(one, getattr(one, "offsets", None))
        return answer
