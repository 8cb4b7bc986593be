"""Memory: what the stores of one worker hold, what maintenance works on, and what may still be added.

What is counted is what the stores have allocated for rows, indexes and ids, measured by each structure itself; not the
interpreter, the libraries, nor batches under way.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from headrace.gpu.errors import StoreFull
from headrace.gpu.index_spec import BuildParams

__all__ = ["Budget", "job_bytes"]

_KEPT_SHARE = 8
_PER_ROW = 128


class Budget:
    """Bytes shared by the stores of one worker. Thread-safe.

    Parameters
    ----------
    limit : int or None
        Bytes held at most; None is without a limit.
    maintenance : int
        Bytes that all sealing and merging together may take meanwhile.
    """

    def __init__(self, limit: int | None, maintenance: int) -> None:
        self.limit, self.maintenance = limit, maintenance
        # Reentrant: a store may be collected, and so leave `_held`, while this thread is in here.
        self._lock = threading.RLock()
        self._held: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._working = 0

    @property
    def held(self) -> int:
        """Bytes that the stores said they hold."""
        with self._lock:
            return sum(self._held.values())

    @property
    def working(self) -> int:
        """Bytes that maintenance has taken."""
        return self._working

    @property
    def kept(self) -> int:
        """Bytes of the limit that rows may not take, because making room takes room."""
        return 0 if self.limit is None else self.limit // _KEPT_SHARE

    @property
    def largest_job(self) -> int:
        """Bytes that one piece of maintenance can always count on while it runs alone."""
        return self.maintenance if self.limit is None else min(self.maintenance, self.kept)

    @property
    def room(self) -> int:
        """Bytes that maintenance may take now."""
        free = self.maintenance - self._working
        if self.limit is not None:
            free = min(free, self.limit - self.held - self._working)
        return max(0, free)

    def holds(self, store: object, size: int) -> None:
        """A store says what it holds now; it is forgotten with the store itself."""
        with self._lock:
            self._held[store] = size

    def admit(self, more: int) -> None:
        """Raise `StoreFull` if `more` bytes of rows would not leave what is kept for maintenance."""
        if self.limit is None:
            return
        held = self.held
        if held + more > self.limit - self.kept:
            raise StoreFull(
                f"no room for {more:,} more bytes of rows: {held:,} of store.memory-limit {self.limit:,} are held, and "
                f"{self.kept:,} are kept for merging; add a worker or raise the limit"
            )

    @contextlib.contextmanager
    def job(self, size: int) -> Iterator[bool]:
        """Take `size` bytes for a piece of maintenance while the context lasts; False if there is no room."""
        with self._lock:
            granted = size <= self.room
            if granted:
                self._working += size
        try:
            yield granted
        finally:
            if granted:
                with self._lock:
                    self._working -= size


def job_bytes(params: BuildParams, rows: int, dim: int, columns: int) -> int:
    """Bytes that writing `rows` rows anew takes, from gathering them to the swap.

    The gathered vectors, the index with its own copy of them, float32 copies that libraries make of float16, what a
    quantiser is trained on, and the other columns, which take `columns` bytes.
    """
    number = 2 if params.dtype == "float16" else 4
    row = dim * 2 * number + _PER_ROW
    once = 0
    if params.kind == "graph":
        # HNSW's lowest level has twice the links; CAGRA's first graph has more than its last one.
        row += 12 * params.graph_degree
    if number == 2 and params.kind != "flat":
        row += dim * 4
    if params.kind == "ivf_pq":
        row += params.pq_dim * params.pq_bits // 8
        once = dim * 4 * (params.lists + min(rows, 256 * params.lists))
    return rows * row + once + columns
