"""Sealing and merging beside what is measured, and the builds that they did."""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from typing import Any

from headrace.cluster.stepping_back import stepping_back
from headrace.gpu.backend import Backend
from headrace.gpu.store import Store

__all__ = ["Counted", "Maintainer", "counting"]


class Maintainer:
    """Two threads that seal and merge, as a worker's do, while the caller applies and searches.

    Like a worker's they take only the processor time that others leave.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._stop = store, threading.Event()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=stepping_back, args=(self._run,), name=f"maintainer-{number}", daemon=True)
            for number in range(2)
        ]

    def __enter__(self) -> Maintainer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until nothing is left to be sealed or merged, and nothing is being."""
        while self._store.wants_maintenance() or self._store.statistics()["rewriting"]:
            self.check()
            time.sleep(0.005)

    def keep_up(self, most: int = 3) -> None:
        """Back-pressure: wait while more than `most` segments are without an index, the growing one among them."""
        while sum(one["kind"] != "sealed" for one in self._store.statistics()["segments"]) > most:
            self.check()
            time.sleep(0.005)

    def _run(self) -> None:
        try:
            # Its own thread, its own number of OpenMP threads: the store sets what a build may use.
            while not self._stop.is_set():
                if not (self._store.wants_maintenance() and self._store.maintain()):
                    self._stop.wait(0.005)
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            self._error = error


@dataclass
class Counted:
    """Builds that a backend did: how many, over how many rows, in how many seconds.

    Where an index was extended, the rows that were added.
    """

    builds: int = 0
    rows: int = 0
    seconds: float = 0.0


def counting(backend: Backend) -> tuple[Backend, Counted]:
    """The same backend with its index builds counted, from outside: the store does not know."""
    counted = Counted()
    kinds = {name: _CountedKind(kind, counted) for name, kind in backend.kinds.items()}
    return dataclasses.replace(backend, kinds=kinds), counted


class _CountedKind:
    def __init__(self, kind: Any, counted: Counted) -> None:
        self._kind, self._counted = kind, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)

    def build(self, vectors: Any, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        index = self._kind.build(vectors, *args, **options)
        self._count(began, len(vectors))
        return index

    def extension(self, index: Any) -> Any:
        extended = self._kind.extension(index)
        if extended is None:
            return None

        def counted(vectors: Any, **options: Any) -> Any:
            began = time.perf_counter()
            larger = extended(vectors, **options)
            self._count(began, len(vectors))
            return larger

        return counted

    def _count(self, began: float, rows: int) -> None:
        self._counted.builds += 1
        self._counted.rows += rows
        self._counted.seconds += time.perf_counter() - began
