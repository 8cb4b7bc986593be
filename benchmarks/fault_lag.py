"""How long the workers' event loops stand still: measured on the loops themselves, by a clock that should tick."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import headrace

__all__ = ["Lags", "loop_lags"]

_TICK = 0.01
_SLICE = 0.5


class Lags:
    """Stalls of the event loops of all workers, seconds."""

    def __init__(self, db: headrace.Database) -> None:
        self._db = db
        self._stop = threading.Event()
        self._counting = False
        self._seen: list[float] = []
        self.longest = 0.0
        self.error: Exception | None = None

    def calm(self, seconds: float) -> list[float]:
        """What is seen in so many seconds without a fault."""
        begin = len(self._seen)
        time.sleep(seconds + _SLICE)
        return self._seen[begin:] or [float("inf")]

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """`longest` is of the time of this block."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def loop(self) -> None:
        """Ask all workers, a slice of time after the other, until told to stop."""
        try:
            while not self._stop.is_set():
                counted = self._counting
                found = self._db.dask.run(_lag, _SLICE)
                self._seen += found.values()
                if counted and self._counting:
                    self.longest = max(self.longest, *found.values())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that measures
            self.error = error

    def stop(self) -> None:
        self._stop.set()


@contextlib.contextmanager
def loop_lags(db: headrace.Database) -> Iterator[Lags]:
    """Measure while the block runs."""
    lags = Lags(db)
    thread = threading.Thread(target=lags.loop, name="lags")
    thread.start()
    try:
        yield lags
    finally:
        lags.stop()
        thread.join()
    if lags.error is not None:
        raise lags.error


async def _lag(seconds: float) -> float:
    """The longest time by which this event loop woke up late, for so many seconds."""
    loop, longest = asyncio.get_running_loop(), 0.0
    until = loop.time() + seconds
    while (now := loop.time()) < until:
        await asyncio.sleep(_TICK)
        longest = max(longest, loop.time() - now - _TICK)
    return longest
