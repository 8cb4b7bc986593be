"""Scans under way on one worker: each is of one moment, and is read chunk by chunk by whoever holds its cursor."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator

from headrace.gpu.errors import ClusterError
from headrace.gpu.store import StoredRow

__all__ = ["Scans"]

Chunks = Iterator[list[StoredRow]]


class Scans:
    """Cursors and what they stand for. Belongs to the worker's event loop.

    A scan keeps its moment's segments in memory, so there is a limit; none that is being read is ended for another.

    Parameters
    ----------
    most : int
        Scans at the same time.
    idle : float
        Seconds for which nobody has asked for a chunk after which a scan counts as given up, where there is need.
    clock : callable, optional
    """

    def __init__(self, most: int = 256, idle: float = 120.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._idle, self._clock = most, idle, clock
        self._open: dict[str, tuple[float, Chunks]] = {}  # the one that has been asked for longest ago is first

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, address: str, chunks: Chunks) -> str:
        """The cursor of a new scan.

        Raises
        ------
        ClusterError
            There are too many, and all are being read; the sentence names `address`.
        """
        if len(self._open) >= self._most:
            oldest, (asked, _) = next(iter(self._open.items()))
            if self._clock() - asked < self._idle:
                raise ClusterError(
                    f"{self._most} scans are under way on {address}, which is as many as it takes: read some to their "
                    "end or close them, and try again"
                )
            del self._open[oldest]
        cursor = uuid.uuid4().hex
        self._open[cursor] = self._clock(), chunks
        return cursor

    def chunks(self, address: str, cursor: str) -> Chunks:
        """What a cursor stands for.

        Raises
        ------
        ClusterError
            Nothing any more.
        """
        if cursor not in self._open:
            raise ClusterError(
                f"the scan {cursor} is not known to {address} any more: nobody went on with it for more than "
                f"{self._idle:g} s, or the worker was started again; begin the scan again"
            )
        _, chunks = self._open.pop(cursor)
        self._open[cursor] = self._clock(), chunks
        return chunks

    def end(self, cursor: str) -> None:
        """Let go of a scan; one that is not known is passed over."""
        self._open.pop(cursor, None)
