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
_TIGHT_SHARE = 3
"""What is free of the limit, in shares of `Budget.kept`, before room is no longer short once rows were refused."""
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
        self._refused = 0

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

    def forget(self, store: object) -> None:
        """A store has been let go of."""
        with self._lock:
            self._held.pop(store, None)

    @property
    def lacking(self) -> bool:
        """Would the rows that were refused last be refused again?"""
        return self.limit is not None and bool(self._refused) and self.held + self._refused > self.limit - self.kept

    @property
    def tight(self) -> bool:
        """Were rows refused, with less than three eighths of the limit free ever since?"""
        if self._refused and self.limit is not None and self.held <= self.limit - _TIGHT_SHARE * self.kept:
            self._refused = 0
        return bool(self._refused)

    def admit(self, rows: int, deletions: int = 0) -> None:
        """Raise `StoreFull` if there is no room for so many more bytes.

        Parameters
        ----------
        rows : int
            Of rows; they leave alone what is kept for maintenance.
        deletions : int
            Of deletions to remember: they may take that too, because Kafka is read in order, and records that make
            room may lie behind them. By themselves they are forgotten again as soon as all workers have applied them.
        """
        if self.limit is None:
            return
        held = self.held
        # A job that was granted when less was held may take more than is kept for it: then rows wait for its end.
        working = max(0, self._working - self.kept)
        if rows and held + rows + deletions <= self.limit - self.kept < held + working + rows + deletions:
            raise StoreFull(
                f"no room for {rows + deletions:,} more bytes of rows until segments are merged, which takes "
                f"{self._working:,} now: {held:,} of store.memory-limit {self.limit:,} are held"
            )
        if rows and held + rows + deletions > self.limit - self.kept:
            if rows + deletions <= self.limit - self.kept:  # else tidying up does not help: they are to come in parts
                self._refused = rows + deletions
            raise StoreFull(
                f"no room for {rows + deletions:,} more bytes of rows: {held:,} of store.memory-limit {self.limit:,} "
                f"are held, and {self.kept:,} are kept for merging; add a worker or raise the limit"
            )
        if deletions and held + deletions > self.limit:
            raise StoreFull(
                f"no room to remember deletions, {deletions:,} more bytes: {held:,} of store.memory-limit "
                f"{self.limit:,} are held; they are forgotten when no rows move any more; raise the limit if that lasts"
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

    @contextlib.contextmanager
    def load(self, size: int) -> Iterator[None]:
        """Take `size` bytes for what is read from files while the context lasts; `StoreFull` if there is no room.

        What is kept for maintenance may be used: it is given back at once.
        """
        with self._lock:
            held = self.held + self._working
            if self.limit is not None and held + size > self.limit:
                raise StoreFull(
                    f"no room to read {size:,} bytes: {held:,} of store.memory-limit {self.limit:,} are taken; add a "
                    "worker or raise the limit"
                )
            self._working += size
        try:
            yield
        finally:
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
