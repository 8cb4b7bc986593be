"""Clients of all kinds that read at all levels, and write now and then, while things break; all is written down.

Each has a connection of its own, and so a session of its own: what one has been shown binds nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import headrace
from benchmarks.fault_reads import vector
from benchmarks.fault_stage import DIM, IDS, Stage
from tests.history.recorded import AsyncRecorded, Recorded

__all__ = ["LEVELS", "Clients"]

LEVELS: tuple[Any, ...] = ("strong", "session", headrace.bounded(500), "eventual")
DEADLINE = 30.0
_PAUSE = 0.03
_OWN = 8
_EVERYTHING = 100_000


class Call(NamedTuple):
    """What is called next: a method of a `Recorded`, with its arguments."""

    method: str
    given: Any
    options: dict[str, Any]


class Clients:
    """Two that wait in threads and one that awaits, each by turns at every level: gets, searches, exhaustive searches.

    Parameters
    ----------
    stage : Stage
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.calls = 0
        self.errors: list[str] = []
        self.broken: Exception | None = None

    def _next(self, client: str, chosen: random.Random, number: int) -> Call:
        """The client's call of this number; every sixteenth writes, so that its session has something to promise."""
        level = LEVELS[number % len(LEVELS)]
        options: dict[str, Any] = {"consistency": level, "deadline": DEADLINE}
        if number % 16 == 15:
            ids = [f"{client}-{chosen.randrange(_OWN)}" for _ in range(2)]
            if number % 64 == 63:
                return Call("delete", ids[:1], {"deadline": DEADLINE})
            rows = [{"id": id_, "vector": self._anything(chosen), "n": number} for id_ in dict.fromkeys(ids)]
            return Call("upsert", rows, {"deadline": DEADLINE})
        kind = (number // len(LEVELS)) % 4
        if kind < 2:
            own = [f"{client}-{which}" for which in range(_OWN)]
            return Call("get", [*own, *(f"w{chosen.randrange(IDS)}" for _ in range(20))], options)
        if kind == 2:
            return Call("search", self._anything(chosen), {**options, "limit": 10})
        return Call("search", self._anything(chosen), {**options, "limit": _EVERYTHING, "exhaustive": True})

    def _anything(self, chosen: random.Random) -> Any:
        return vector(self._stage.seed, chosen.randrange(1 << 30), DIM, still=False)

    def _count(self, error: headrace.HeadraceError | None = None) -> None:
        with self._lock:
            self.calls += 1
            if error is not None:
                self.errors.append(f"{type(error).__name__}: {error}")

    def _sync(self, client: str) -> None:
        chosen, number = random.Random(f"{self._stage.seed} {client}"), 0
        with headrace.connect(self._stage.db.address, timeout=DEADLINE) as db:
            recorded: Recorded = self._stage.recorder.wrap(db.collection(self._stage.name), client)
            while not self._stop.wait(_PAUSE):
                call = self._next(client, chosen, number)
                try:
                    getattr(recorded, call.method)(call.given, **call.options)
                    self._count()
                except headrace.HeadraceError as error:  # written down, and judged with the rest
                    self._count(error)
                number += 1

    async def _async(self, client: str) -> None:
        chosen, number = random.Random(f"{self._stage.seed} {client}"), 0
        async with headrace.connect_async(self._stage.db.address, timeout=DEADLINE) as db:
            collection = await db.collection(self._stage.name)
            recorded: AsyncRecorded = self._stage.recorder.wrap_async(collection, client)
            while not self._stop.is_set():
                call = self._next(client, chosen, number)
                try:
                    await getattr(recorded, call.method)(call.given, **call.options)
                    self._count()
                except headrace.HeadraceError as error:
                    self._count(error)
                number += 1
                await asyncio.sleep(_PAUSE)

    def _run(self, client: str, awaits: bool) -> None:
        try:
            if awaits:
                asyncio.run(self._async(client))
            else:
                self._sync(client)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            self.broken = error

    @contextlib.contextmanager
    def running(self) -> Iterator[Clients]:
        """Call while the block runs; what is no error of Headrace's is raised at its end."""
        kinds = {"thread-1": False, "thread-2": False, "async": True}
        threads = [threading.Thread(target=self._run, args=kind, name=kind[0]) for kind in kinds.items()]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self.broken is not None:
            raise self.broken
