"""The demo's stream: how fast it may go, what Kafka acknowledged of it, and who searches meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.gpu.errors import HeadraceError
from headrace.pipeline.demo_checks import Expected

if TYPE_CHECKING:
    from headrace.pipeline.client import Collection
    from headrace.pipeline.results import Write

__all__ = ["Ledger", "MemoryPeak", "Pacer", "Searcher", "applied", "stream"]

FEWEST, MOST = 16, 48
"""Records on their way at once. Fewer leave the encoders idle now and then, more only wait their turn before them."""
WAIT = 0.12
"""Seconds that a record may wait: on a slow or busy machine fewer are on their way, down to `FEWEST`."""
TICK = 0.02
LOOK_EVERY = 0.2
"""Seconds between two writes, and between two looks at what was applied."""
MOST_AT_ONCE = 256
SEARCH_EVERY = 0.2
PROBE_EVERY = 5
"""Every so many searches one must find the newest document."""


class Pacer:
    """How many records may be sent now.

    With a `rate`, so many a second. Without one, a bounded number is kept on its way: what was applied is known only at
    every look, so between two looks it is taken to go on as it went before, a little slower to be safe.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._began: float | None = None
        self._seen_at = 0.0
        self._seen = 0
        self.speed = 0.0

    def look(self, now: float, applied: int) -> None:
        """So many had been applied by `now` (seconds on any clock)."""
        if self._seen_at and now > self._seen_at:
            latest = (applied - self._seen) / (now - self._seen_at)
            self.speed = latest if not self.speed else 0.7 * self.speed + 0.3 * latest
        self._seen_at, self._seen = now, applied

    def allow(self, now: float, sent: int) -> int:
        """How many more may follow the `sent` ones."""
        if self._rate is not None:
            if self._began is None:
                self._began = now - sent / self._rate
            return max(0, min(MOST_AT_ONCE, int((now - self._began) * self._rate) + 1 - sent))
        likely = min(float(sent), self._seen + 0.9 * self.speed * (now - self._seen_at))
        outstanding = min(max(FEWEST, self.speed * WAIT), MOST)
        return max(0, min(MOST_AT_ONCE, int(outstanding - (sent - likely))))


@dataclass
class Ledger:
    """What Kafka has acknowledged: what must be there, and what must not. Written by one thread, read by any."""

    expected: dict[str, Expected] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    sent: int = 0
    newest: tuple[str, Expected] | None = None

    def upserted(self, write: Write, texts: Mapping[str, str]) -> None:
        """Documents were acknowledged."""
        for id_, topic_partition, offset in write.acks:
            name = str(id_)
            self.expected[name] = Expected(topic_partition, offset, texts[name])
            self.newest = name, self.expected[name]
        self.sent += write.count

    def removed(self, write: Write) -> None:
        """Deletes were acknowledged."""
        for id_, _, _ in write.acks:
            self.expected.pop(str(id_), None)
            self.deleted.add(str(id_))
        self.sent += write.count


def applied(state: Mapping[str, Any]) -> int:
    """Records that every copy has applied, of a topic that began empty: the sum of the lowest watermarks."""
    marks = [dict(worker["watermarks"]) for worker in state["workers"] if worker["state"] == "active"]
    places = {place for mark in marks for place in mark}
    return sum(min(int(mark.get(place, 0)) for mark in marks) for place in places)


def stream(
    collection: Collection,
    items: Sequence[Any],
    write: Callable[[Sequence[Any]], None],
    ledger: Ledger,
    pacer: Pacer,
    show: Callable[[int, Mapping[str, Any]], None],
) -> float:
    """Send `items` as fast as `pacer` allows, and wait until every copy has applied them.

    Parameters
    ----------
    write : callable
        Writes some of the items and enters them into the ledger.
    show : callable
        Told at every look: items sent so far, and the collection's status.

    Returns
    -------
    float
        Seconds from the first record to the last one applied everywhere.
    """
    began = looked = time.monotonic()
    before, sent = ledger.sent, 0
    pacer.look(began, before)
    while True:
        now = time.monotonic()
        if now - looked >= LOOK_EVERY or (sent == len(items) and now - looked >= TICK):
            state = collection.status()
            looked = now = time.monotonic()
            pacer.look(now, applied(state))
            show(sent, state)
            if sent == len(items) and applied(state) >= ledger.sent:
                return now - began
        if some := items[sent : sent + pacer.allow(now, ledger.sent)]:
            write(some)
            sent += len(some)
        time.sleep(TICK)


class Searcher:
    """Asks while the stream runs, from a thread of its own: five times a second, timed.

    Now and then it looks for the newest document that Kafka has acknowledged, with session consistency: that one must
    be found.
    """

    def __init__(self, collection: Collection, questions: Sequence[str], ledger: Ledger) -> None:
        self._collection, self._questions, self._ledger = collection, questions, ledger
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="headrace-demo-search")
        self.took: list[float] = []
        self.session_took: list[float] = []
        self.misses: list[str] = []
        self.errors: list[str] = []

    def __enter__(self) -> Searcher:
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._running.result()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(SEARCH_EVERY):
            number += 1
            try:
                if number % PROBE_EVERY == 0:
                    self._probe()
                else:
                    began = time.perf_counter()
                    self._collection.search(self._questions[number % len(self._questions)], consistency="eventual")
                    self.took.append((time.perf_counter() - began) * 1e3)
            except HeadraceError as error:
                self.errors.append(str(error))

    def _probe(self) -> None:
        if self._ledger.newest is None:
            return
        name, wanted = self._ledger.newest
        began = time.perf_counter()
        hits = self._collection.search(wanted.text, consistency="session")
        self.session_took.append((time.perf_counter() - began) * 1e3)
        # What was overwritten or deleted in this very moment need not be found as it was.
        if all(hit.id != name for hit in hits) and self._ledger.expected.get(name) == wanted:
            self.misses.append(name)


class MemoryPeak:
    """The most memory that this process and its children held together, looked at twice a second.

    It is the sum of their resident sets, so what they share is counted more than once: an upper bound.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-demo-memory", daemon=True)
        self.peak = 0

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue  # it has just ended
            self.peak = max(self.peak, total)
