"""From an id to its row's place, for whole batches.

Own code, because there is no library to lean on: the tables inside pandas (khash, private) and hirola never remove,
pandas' indexes and the joins of pyarrow and polars are built anew for each set of keys, and the bindings of C++ tables
(getpy, phashmap) have long been left alone and are compiled on the spot. A Python dictionary is as quick for small
batches, but takes some 150 bytes an id, its key's object included, and while it grows the whole process stands still.

The entries are in a `BucketTable`; what is here makes it grow by and by, keeps the few entries for which it has no
room in a dictionary, and tells ids apart that share a hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from headrace.gpu.bucket_table import SLOTS, BucketTable
from headrace.gpu.rows import Id

__all__ = ["IdMap", "Same"]

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

Same = Callable[[Places, Sequence[Id]], npt.NDArray[np.bool_]]
"""Tells of places, int64 (m,), and as many ids: does the row at that place have that id? Bool (m,)."""

_LEAST_BUCKETS = 512
_FULL = 0.8  # entries per slot at which the table grows; by then 1 entry in 5,000 has found both buckets full
_EARLY = 0.7  # entries per slot at which the larger table is made ready
_GROWTH = 2
_SPARSE = 0.25  # entries per slot below which the table shrinks
_STEP = 128  # buckets of an old table that are moved over in one go
_CHUNK = 16_384  # ids looked at in one go: what is gathered for them stays in the processor's cache


class IdMap:
    """Hashes and places; the ids themselves stay in the segments, and `same` looks there.

    An entry is a pair of hash and place. Several entries may have one hash: `find` asks `same` about each candidate,
    and `move` and `remove` name an entry by hash and place, so they need no ids.

    It takes 16 bytes a slot: 20 to 40 bytes an entry, 27 on average. Before it must grow, each change makes a piece of
    a larger table ready, and afterwards each moves a few buckets over, so that no call waits for all of them; until
    that is done both tables are held (at most 69 bytes an entry), and a lookup reads both.

    Parameters
    ----------
    same : callable
        `Same`; called by `find` (and by nothing else), only with places that are in the map.
    capacity : int
        Entries to make room for at once.

    Notes
    -----
    Not thread-safe: every call, `find` too, under the store's lock.
    """

    def __init__(self, same: Same, capacity: int = 0) -> None:
        self._same = same
        self._table = BucketTable(_buckets(capacity))
        self._table.make_ready(self._table.buckets)
        self._next: BucketTable | None = None  # being made ready
        self._old: BucketTable | None = None  # being emptied into `_table`
        self._moved = 0  # steps of that done
        self._spilled: dict[int, list[int]] = {}  # hash to places
        self._count = 0

    def __len__(self) -> int:
        """Entries."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the tables; the few entries outside count with what they take as Python objects."""
        tables = sum(table.nbytes for table in (self._table, self._old, self._next) if table is not None)
        return tables + 200 * len(self._spilled)

    def find(self, hashes: Hashes, ids: Sequence[Id]) -> Places:
        """Places of `ids`, whose `hash_ids` are `hashes`; int64 (n,), -1 where an id is not here."""
        found = np.full(len(hashes), -1, dtype=np.int64)
        for start in range(0, len(hashes), _CHUNK):
            which, places = self._candidates(hashes[start : start + _CHUNK])
            if not len(which):
                continue
            which += start
            if len(which) == len(ids) and (which == np.arange(len(ids))).all():
                asked = ids
            else:
                asked = _select(ids, which.tolist())
            good = self._same(places, asked)
            found[which[good]] = places[good]
        return found

    def add(self, hashes: Hashes, places: Places) -> None:
        """Enter ids that are not here (as `find` has just said, or after `remove`), each at most once.

        Parameters
        ----------
        hashes : uint64 (n,)
        places : int64 (n,)
            At least 0, none twice.
        """
        self._make_room(len(hashes))
        self._enter(hashes, places)
        self._count += len(hashes)
        self._go_on(len(hashes))

    def move(self, hashes: Hashes, places: Places, targets: Places) -> None:
        """The entries ``(hashes[i], places[i])`` get the place ``targets[i]``.

        For merges: the hashes come from `IdColumn.hashes`, no id is looked at.

        Raises
        ------
        KeyError
            One of them is not there; nothing has been changed.
        """
        for table, which, slots in self._locate(hashes, places):
            if table is not None:
                table.places.reshape(-1)[slots] = targets[which]
                continue
            for at in which.tolist():
                spilled = self._spilled[int(hashes[at])]
                spilled[spilled.index(int(places[at]))] = int(targets[at])

    def remove(self, hashes: Hashes, places: Places) -> None:
        """Delete the entries ``(hashes[i], places[i])``, each named once.

        Raises
        ------
        KeyError
            One of them is not there; nothing has been changed.
        """
        for table, which, slots in self._locate(hashes, places):
            if table is not None:
                table.hashes.reshape(-1)[slots] = 0
                continue
            for at in which.tolist():
                spilled = self._spilled[int(hashes[at])]
                spilled.remove(int(places[at]))
                if not spilled:
                    del self._spilled[int(hashes[at])]
        self._count -= len(hashes)
        if self._count < _SPARSE * self._table.slots:
            self._next = None
            if self._old is None and self._table.buckets > _LEAST_BUCKETS:
                self._switch(BucketTable(_buckets(self._count)))
        self._go_on(len(hashes))

    # -- looking up ----------------------------------------------------------------------------------------------------

    def _candidates(self, hashes: Hashes) -> tuple[Places, Places]:
        """Which of `hashes` has an entry, rising, and that entry's place; a hash may come up several times."""
        which, slots = self._table.slots_of(hashes)
        places = self._table.places.reshape(-1)[slots]
        spilled = self._spilled.keys() & hashes.tolist() if self._spilled else None
        if self._old is None and not spilled:
            return which, places
        more = [(which, places)]
        if self._old is not None:
            which, slots = self._old.slots_of(hashes)
            more.append((which, self._old.places.reshape(-1)[slots]))
        if spilled:
            pairs = [(at, place) for at, key in enumerate(hashes.tolist()) for place in self._spilled.get(key, ())]
            more.append((np.array([at for at, _ in pairs]), np.array([place for _, place in pairs])))
        which = np.concatenate([part for part, _ in more])
        order = np.argsort(which, kind="stable")
        return which[order], np.concatenate([part for _, part in more])[order]

    def _locate(self, hashes: Hashes, places: Places) -> list[tuple[BucketTable | None, Places, Places]]:
        """Where the entries are: for each table, and None for `_spilled`, which of them and their slots."""
        located: list[tuple[BucketTable | None, Places, Places]] = []
        left = np.arange(len(hashes))
        for table in (self._table, self._old):
            if table is None:
                continue
            for start in range(0, len(left), _CHUNK):
                asked = left[start : start + _CHUNK]
                which, slots = table.slots_of(hashes[asked])
                good = table.places.reshape(-1)[slots] == places[asked[which]]
                located.append((table, asked[which[good]], slots[good]))
            if sum(len(which) for _, which, _ in located) == len(hashes):
                return located
            left = np.setdiff1d(left, np.concatenate([which for _, which, _ in located]), assume_unique=True)
        for at in left.tolist():
            if int(places[at]) not in self._spilled.get(int(hashes[at]), ()):
                raise KeyError(f"no entry with hash {int(hashes[at]):#018x} and place {int(places[at])} in the id map")
        return [*located, (None, left, left)]

    # -- room ----------------------------------------------------------------------------------------------------------

    def _enter(self, hashes: Hashes, places: Places) -> None:
        for start in range(0, len(hashes), _CHUNK):
            some, theirs = hashes[start : start + _CHUNK], places[start : start + _CHUNK]
            for at in self._table.insert(some, theirs).tolist():
                self._spilled.setdefault(int(some[at]), []).append(int(theirs[at]))

    def _make_room(self, more: int) -> None:
        rows = self._count + more
        if rows <= _FULL * self._table.slots:
            return
        while self._old is not None:
            self._go_on(_CHUNK)
        if self._next is None or rows > _FULL * self._next.slots:
            self._next = BucketTable(max(_buckets(rows), self._table.buckets * _GROWTH))
        self._switch(self._next)
        self._next = None

    def _switch(self, table: BucketTable) -> None:
        """Use `table` from now on, and begin to empty the one until now into it."""
        table.make_ready(table.buckets)
        self._old, self._table, self._moved = self._table, table, 0
        spilled, self._spilled = self._spilled, {}
        pairs = [(key, place) for key, places in spilled.items() for place in places]
        if pairs:
            keys, places = zip(*pairs, strict=True)
            self._enter(np.array(keys, dtype=np.uint64), np.array(places, dtype=np.int64))

    def _go_on(self, changes: int) -> None:
        """Do a piece of what growing takes: enough to be done before the table is full.

        A table of n slots is prepared for being replaced while it takes 0.1 n entries: 2 n slots, so 4 buckets for each
        change are more than enough. Afterwards it has n / 8 buckets, so that at one bucket for two changes it is empty
        after n / 4 of them, while the new one takes 0.8 n.
        """
        if self._old is None and self._count > _EARLY * self._table.slots:
            self._next = self._next or BucketTable(self._table.buckets * _GROWTH)
            self._next.make_ready(max(_STEP, 4 * changes))
        for _ in range(max(1, changes // (2 * _STEP))):
            old = self._old
            if old is None:
                return
            # Buckets far from each other: neighbours' entries would meet in the same buckets of the new table.
            stride = -(-old.buckets // _STEP)
            hashes, places = old.hashes[self._moved :: stride], old.places[self._moved :: stride]
            used = hashes != 0
            moving, theirs = hashes[used], places[used]
            hashes[:] = 0
            self._moved += 1
            self._enter(moving, theirs)
            if self._moved == stride:
                self._old = None


def _buckets(entries: int) -> int:
    """Buckets for as many entries and some more."""
    return max(_LEAST_BUCKETS, int(entries / (_FULL / _GROWTH) / SLOTS) + 1)


def _select(ids: Sequence[Id], at: list[int]) -> Sequence[Id]:
    return itemgetter(*at)(ids) if len(at) > 1 else [ids[at[0]]]
