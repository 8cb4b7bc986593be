"""Where a row is: its segment's serial number and its row there, in one integer; and the way from an id to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from headrace.gpu.id_map import IdMap
from headrace.gpu.rows import Id

__all__ = ["Directory", "Forwarding", "by_segment", "places_of", "rows_of", "serials_of", "weakly"]

_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1

T = TypeVar("T")
_Ints = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]


def places_of(serial: int, rows: _Ints) -> _Ints:
    """Int64 (n,), never negative."""
    return rows | np.int64(serial << _ROW_BITS)


def rows_of(places: _Ints) -> _Ints:
    """Row numbers within their segments, int64 (n,)."""
    return places & _ROW_MASK


def serials_of(places: _Ints) -> _Ints:
    """Serial numbers of the segments, int64 (n,); -1 for a place of -1."""
    return places >> _ROW_BITS


def by_segment(places: _Ints) -> Iterator[tuple[int, _Ints]]:
    """Serial number of each segment that has any of `places` (none negative), and their positions in `places`."""
    if not len(places):
        return
    serials = serials_of(places)
    if (serials == serials[0]).all():
        yield int(serials[0]), np.arange(len(places))
        return
    for serial in np.unique(serials).tolist():
        yield serial, np.flatnonzero(serials == serial)


def weakly(method: Callable[..., T]) -> Callable[..., T]:
    """A bound method as what its object hands to its own parts: without a circle, memory is free as soon as it is let
    go, and not when the collector comes by.
    """
    known = weakref.WeakMethod(method)

    def call(*args: Any) -> T:
        found = known()
        assert found is not None  # its parts are gone with it
        return found(*args)

    return call


class Directory:
    """From ids to places, through an `IdMap`, and through a forwarding table while a merge is being entered.

    Entering millions of new places takes longer than a lock may be held. So a merge leaves the old places in the map
    and says here where those rows are now; the entries are changed piece by piece afterwards. To be called under the
    store's lock.

    Parameters
    ----------
    same : callable
        ``same(serial, rows, ids)``: do these rows of that segment have these ids? Bool (n,).
    """

    def __init__(self, same: Callable[[int, _Ints, Sequence[Id]], npt.NDArray[np.bool_]]) -> None:
        self._same_rows = same
        self._map = IdMap(weakly(self._same))
        self._moving: Forwarding | None = None
        self._live: Callable[[], npt.NDArray[np.bool_]] = lambda: np.empty(0, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._map)

    @property
    def nbytes(self) -> int:
        return self._map.nbytes

    def find(self, hashes: _Hashes, ids: Sequence[Id]) -> tuple[_Ints, _Ints]:
        """Each id's entry in the map, by which `change` knows it, and its place; both int64 (n,), -1 if unknown."""
        entries = self._map.find(hashes, ids)
        return entries, self._resolve(entries)

    def change(self, hashes: _Hashes, entries: _Ints, places: _Ints) -> None:
        """Enter new places for ids that `find` has just told the entries of."""
        known = entries >= 0
        if known.all():
            self._map.move(hashes, entries, places)
            return
        self._map.add(hashes[~known], places[~known])
        if known.any():
            self._map.move(hashes[known], entries[known], places[known])

    def forget(self, hashes: _Hashes, entries: _Ints) -> None:
        """Delete entries."""
        self._map.remove(hashes, entries)

    def forward(self, forwarding: Forwarding, live: Callable[[], npt.NDArray[np.bool_]]) -> None:
        """Rows have new places, all at once. `step` enters them in the map.

        `live` tells which of these rows are alive: only they still have an entry with their old place.
        """
        self.finish()
        self._moving, self._live = forwarding, live

    def step(self, count: int) -> bool:
        """Enter the next `count` places of the last `forward`; False when none are left."""
        moving = self._moving
        if moving is None:
            return False
        first, last = moving.done, min(moving.done + count, len(moving.old))
        rows = first + np.flatnonzero(self._live()[first:last])
        self._map.move(moving.hashes[rows], moving.old[rows], moving.new[rows])
        moving.done = last
        if last == len(moving.old):
            self._moving = None
        return self._moving is not None

    def finish(self) -> None:
        """Enter all places that are left."""
        while self.step(1 << 20):
            pass

    def _resolve(self, entries: _Ints) -> _Ints:
        if self._moving is None:
            return entries
        return self._moving.resolve(entries)

    def _same(self, entries: _Ints, ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
        places = self._resolve(entries)
        groups = list(by_segment(places))
        if len(groups) == 1:
            return self._same_rows(groups[0][0], rows_of(places), ids)
        same = np.zeros(len(places), dtype=np.bool_)
        for serial, positions in groups:
            theirs = [ids[position] for position in positions.tolist()]
            same[positions] = self._same_rows(serial, rows_of(places[positions]), theirs)
        return same


class Forwarding:
    """Where the rows of segments that are merged will be; made without the lock, before they are.

    Parameters
    ----------
    old, new : int64 (n,)
        Places.
    hashes : uint64 (n,)
        Of the rows' ids.
    """

    def __init__(self, old: _Ints, new: _Ints, hashes: _Hashes) -> None:
        self.old, self.new, self.hashes, self.done = old, new, hashes, 0
        self._targets: dict[int, _Ints] = {}
        for serial, positions in by_segment(old):
            rows = rows_of(old[positions])
            targets = np.full(int(rows.max()) + 1, -1, dtype=np.int64)
            targets[rows] = new[positions]
            self._targets[serial] = targets

    def resolve(self, entries: _Ints) -> _Ints:
        """Places of the map's entries, int64 (n,)."""
        places = entries.copy()
        known = np.flatnonzero(entries >= 0)
        for serial, positions in by_segment(entries[known]):
            targets = self._targets.get(serial)
            if targets is not None:
                at = known[positions]
                places[at] = targets[rows_of(entries[at])]
        return places
