"""A collection under writes and reads that are written down, on which a fault can be played and judged."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orjson
from confluent_kafka import Consumer, TopicPartition

import headrace
from benchmarks.fault_reads import Asked, vector
from headrace.streams.clients import KafkaLog
from headrace.streams.topics import Offsets
from tests.history.checker import Report, check_all
from tests.history.events import Produced
from tests.history.recorder import Recorded, Recorder

__all__ = ["Stage", "Writer", "until"]

DIM = 32
TOPIC_PARTITIONS = 4
BASE_ROWS = 5000
CELLS = 16
IDS = 400


class Stage:
    """One collection on a cluster that may be broken; a context manager that drops it at the end.

    Parameters
    ----------
    db : Database
        A cluster of worker processes that this program has started.
    broker : EmbeddedBroker
    name : str
        Of the collection and its topic, which is created.
    seed : int
    command : str
        What runs this again, shown with every violation.
    base : int
        Rows that are there from the start and never change.
    cells : int, optional
        By default one for few rows; more need a cluster that trains on as few as `base`.
    index : str
        Kind of index. Only "flat" misses nothing: what is missing there was lost, and is no matter of recall.
    """

    def __init__(
        self,
        db: headrace.Database,
        broker: headrace.EmbeddedBroker,
        name: str,
        *,
        seed: int,
        command: str,
        base: int = BASE_ROWS,
        cells: int | None = None,
        index: str = "graph",
    ) -> None:
        self._cells = cells or (CELLS if base >= BASE_ROWS else 1)
        self._index = index
        self.exact = index == "flat"
        self._ends: Offsets | None = None
        self.db, self.broker, self.name, self.seed, self.base = db, broker, name, seed, base
        self.recorder = Recorder(seed=seed, command=command)

    def __enter__(self) -> Stage:
        self.broker.create_topic(self.name, TOPIC_PARTITIONS)
        self.collection = self.db.create_collection(
            self.name, dim=DIM, cells=self._cells, replicas=2, index=self._index
        )
        self.collection.ingest(self.broker.bootstrap)
        self.recorded: Recorded = self.recorder.wrap(self.collection, "writer")
        for begin in range(0, self.base, 1000):
            self.recorded.upsert(
                [
                    {"id": f"still-{number}", "vector": vector(self.seed, number, DIM, still=True)}
                    for number in range(begin, min(begin + 1000, self.base))
                ],
                wait="searchable",
                deadline=60.0,
            )
        until("the codebook is there", lambda: self._cells == 1 or self.collection.status()["codebook"] == 1)
        self.quiet()
        return self

    def __exit__(self, *exc: object) -> None:
        self.db.drop_collection(self.name)

    def asked(self, rate: float) -> Asked:
        """Reads of the rows that never change."""
        return Asked(self.db.address, self.name, rate, self.base, DIM, self.seed)

    def whole(self, workers: int | None = None) -> bool:
        """All copies are there and active, and nothing is on its way; on `workers` workers if that is said."""
        status = self.collection.status()
        active = [worker for worker in status["workers"] if worker["state"] == "active"]
        return (
            len(active) == len(status["workers"]) == (workers or len(active))
            and not status["notes"]
            and not status["moving"]
        )

    def quiet(self, workers: int | None = None, deadline: float = 90.0) -> None:
        """Return once the collection is `whole` and nothing waits in Kafka."""
        until("all is quiet", lambda: self.whole(workers) and not self.collection.status()["ingest"]["lag"], deadline)

    def searchable(self, number: int, deadline: float = 60.0) -> float:
        """Seconds from handing in a record to every copy's having it."""
        began = time.monotonic()
        row = {"id": f"probe-{number}", "vector": vector(self.seed, number, DIM, still=False), "n": number}
        self.recorded.upsert([row], wait="searchable", deadline=deadline)
        return time.monotonic() - began

    def ends(self) -> dict[int, int]:
        """How far the topic goes; `BrokerError` while the broker is away."""
        if self._ends is None:
            self._ends = Offsets(self.broker.bootstrap, self.name, settings={}, deadline=1.0)
        return self._ends.latest(1.0)

    def judge(self, *, lost_copies: bool = False) -> Report:
        """Look at everything by get, by exhaustive search and by scanning every copy; then ask the checker.

        `lost_copies` says that the log may have been read again from its start, so that watermarks may fall.
        """
        events = self.recorder.history().events
        ids = sorted({str(event.id) for event in events if isinstance(event, Produced)})
        self.recorded.get(ids, consistency="strong", deadline=60.0)
        for _ in range(4):  # by turns on different copies
            self.recorded.search(
                vector(self.seed, 0, DIM, still=True),
                limit=len(ids) + 10,
                consistency="strong",
                deadline=60.0,
                exhaustive=True,
            )
        self.recorder.final_state(self.collection, replicas=2)
        required = ["I1", "I2", "I3", "promise"] + ([] if lost_copies else ["I5"])
        return check_all(self.recorder.history(), freshness_ms=None, required=required)

    def log(self) -> list[tuple[str, int]]:
        """Id and number of every upsert of the `Writer` in the topic, in the order of the log."""
        consumer = Consumer(
            {"bootstrap.servers": self.broker.bootstrap, "group.id": "nobody", "enable.partition.eof": "true"},
            logger=KafkaLog(),
        )
        consumer.assign([TopicPartition(self.name, number, 0) for number in range(TOPIC_PARTITIONS)])
        found: list[tuple[str, int]] = []
        ends = 0
        try:
            while ends < TOPIC_PARTITIONS:
                message = consumer.poll(10.0)
                if message is None:
                    raise headrace.BrokerError(f"topic {self.name!r} was not read to its end within 10 s")
                if message.error() is not None:
                    ends += 1
                elif message.value() is not None and (id_ := bytes(message.key() or b"").decode()).startswith("w"):
                    attributes = orjson.loads(dict(message.headers() or ())["headrace-attributes"] or b"{}")
                    found.append((id_, int(attributes["n"])))
        finally:
            consumer.close()
        return found


class Writer:
    """Upserts and deletes from a thread of its own, which are written down.

    Parameters
    ----------
    stage : Stage
    rows : int
        Upserts in one call; a tenth as many deletes follow.
    pause : float
        Seconds between calls; 0 writes as fast as it goes.
    deadline : float
        Of one call.
    """

    def __init__(self, stage: Stage, *, rows: int = 20, pause: float = 0.05, deadline: float = 120.0) -> None:
        self._stage, self._rows, self._pause, self._deadline = stage, rows, pause, deadline
        self._random = np.random.default_rng(stage.seed)
        self._stop = threading.Event()
        self.error: Exception | None = None
        self.calls = 0
        self.upserts = 0
        self.longest = 0.0
        self.last = 0.0

    def _write(self) -> None:
        recorded, seed = self._stage.recorded, self._stage.seed
        try:
            while not self._stop.wait(self._pause):
                chosen = self._random.integers(0, IDS, self._rows).tolist()
                numbers = range(self.upserts, self.upserts + len(chosen))
                rows = [
                    {"id": f"w{which}", "vector": vector(seed, number, DIM, still=False), "n": number}
                    for which, number in zip(chosen, numbers, strict=True)
                ]
                began = time.monotonic()
                self.upserts += len(rows)
                recorded.upsert(rows, deadline=self._deadline)
                recorded.delete([f"w{which}" for which in chosen[:: max(2, self._rows // 2)]], deadline=self._deadline)
                self.last = time.monotonic()
                self.longest = max(self.longest, self.last - began)
                self.calls += 1
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            self.error = error

    @contextlib.contextmanager
    def running(self) -> Iterator[Writer]:
        """Write while the block runs; what went wrong is raised at its end."""
        thread = threading.Thread(target=self._write, name="writer")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
        if self.error is not None:
            raise self.error

    def more(self, calls: int, deadline: float = 60.0) -> float:
        """Wait for so many more calls; the seconds that it took."""
        began, before = time.monotonic(), self.calls
        until(f"{calls} more writes", lambda: self.calls >= before + calls or self.error is not None, deadline)
        return time.monotonic() - began


def until(what: str, condition: Callable[[], Any], deadline: float = 60.0, every: float = 0.02) -> float:
    """Wait for `condition`; the seconds that it took.

    Raises
    ------
    ClusterError
        It was not true within `deadline` seconds.
    """
    began = time.monotonic()
    while True:
        with contextlib.suppress(headrace.HeadraceError):  # what cannot be asked is not there yet
            if condition():
                return time.monotonic() - began
        if time.monotonic() > began + deadline:
            raise headrace.ClusterError(f"after {deadline:g} s still not: {what}")
        time.sleep(every)
