"""Writes down what a test does to a collection and what it is answered, from any number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.gpu.errors import HeadraceError
from tests.history.digests import value_digest
from tests.history.events import (
    Committed,
    DeadLettered,
    Event,
    FaultMark,
    FinalState,
    History,
    Origin,
    Placement,
    Stored,
    TopicEnds,
    Verified,
    WatermarkSample,
)
from tests.history.recorded import AsyncRecorded, Recorded

__all__ = ["ACTIVE", "AsyncRecorded", "Recorded", "Recorder"]

ACTIVE = "active"  # the state of a worker that the placement counts on, in Collection.status()


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

    def wrap_async(self, collection: Any, client: str = "") -> AsyncRecorded:
        """As `wrap`, for an `AsyncCollection`."""
        return AsyncRecorded(self, collection, client)

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

    def sample(
        self,
        collection: Any,
        committed: Callable[[], Mapping[int, int]] | None = None,
        ends: Callable[[], Mapping[int, int]] | None = None,
    ) -> None:
        """Note how far the topic goes, the committed offsets, then the watermark of every worker that tells one."""
        if ends is not None:
            offsets = dict(ends())
            self.note(TopicEnds(self.now(), offsets))
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
        self,
        collection: Any,
        committed: Callable[[], Mapping[int, int]] | None = None,
        every: float = 0.05,
        ends: Callable[[], Mapping[int, int]] | None = None,
    ) -> Iterator[None]:
        """`sample` every so many seconds while the block runs; what cannot be reached in a fault is not sampled."""
        stop = threading.Event()
        failures: list[Exception] = []

        def loop() -> None:
            while not stop.wait(every):
                try:
                    self.sample(collection, committed, ends)
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
