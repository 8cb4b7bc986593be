"""A hash table of buckets in two NumPy arrays, asked and changed by the batch.

The method is balanced allocation with two choices: a hash names two buckets of eight slots, an entry goes into the
emptier one (Azar, Broder, Karlin and Upfal, Balanced allocations, 1999; with buckets of several slots Dietzfelbinger
and Weidling, Balanced allocation and dictionaries with tightly packed constant size bins, 2007). So a lookup reads
exactly two cache lines of hashes whatever the load, which is what vectorised code wants, and removing an entry empties
its slot: no probing, no tombstones. The rare entry whose buckets are both full is handed back.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["SLOTS", "BucketTable"]

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

SLOTS = 8
"""Of a bucket: as many hashes as a cache line holds."""


class BucketTable:
    """Buckets of eight slots: a hash (0 where the slot is empty) and a place each."""

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self.slots = buckets * SLOTS
        self.hashes = np.empty((buckets, SLOTS), dtype=np.uint64)
        self.places = np.empty((buckets, SLOTS), dtype=np.int64)
        self.nbytes = self.hashes.nbytes + self.places.nbytes
        self._ready = 0

    def make_ready(self, buckets: int) -> None:
        """Empty so many buckets more; the table can be used when all are.

        The system hands out memory when it is first written to, which takes most of a second for a table of ten million
        entries, and as entries lie anywhere, the first hundred of them would wait for all of it.
        """
        end = min(self.buckets, self._ready + buckets)
        self.hashes[self._ready : end] = 0
        self.places[self._ready : end] = 0
        self._ready = end

    def _choices(self, hashes: Hashes) -> Places:
        """The two buckets of each hash, never the same, int64 (n, 2): its halves, scaled to the number of buckets."""
        halves = np.empty((len(hashes), 2), dtype=np.uint64)
        np.right_shift(hashes, 32, out=halves[:, 0])
        np.bitwise_and(hashes, 0xFFFF_FFFF, out=halves[:, 1])
        halves *= np.uint64(self.buckets)
        halves >>= np.uint64(32)
        chosen = halves.view(np.int64)
        chosen[:, 1] += chosen[:, 0] == chosen[:, 1]
        chosen[:, 1] %= self.buckets
        return chosen

    def slots_of(self, hashes: Hashes) -> tuple[Places, Places]:
        """All slots with these hashes: which hash, rising, and the slot's number; int64 (m,) each."""
        keys = np.maximum(hashes, 1)
        chosen = self._choices(keys).reshape(-1)
        held = self.hashes.take(chosen, axis=0).reshape(len(keys), 2 * SLOTS)
        hits = np.flatnonzero(held == keys[:, None])
        return hits >> 4, chosen[hits >> 3] * SLOTS + (hits & 7)

    def insert(self, hashes: Hashes, places: Places) -> Places:
        """Put entries into the emptier of their buckets; returns those left over because both are full, int64 (m,)."""
        keys = np.maximum(hashes, 1)
        flat_hashes, flat_places = self.hashes.reshape(-1), self.places.reshape(-1)
        left = np.arange(len(keys))
        chosen = self._choices(keys)
        full: list[Places] = []
        while len(left):
            free = self.hashes.take(chosen.reshape(-1), axis=0) == 0
            room = np.bitwise_count(free.view(np.uint64)).reshape(-1, 2)  # eight bools are one word
            second = room[:, 1] > room[:, 0]
            pick = np.arange(0, 2 * len(left), 2) + second
            free = free.take(pick, axis=0)
            slots = chosen.reshape(-1).take(pick) * SLOTS + free.argmax(axis=1)
            fits = free.any(axis=1)
            if not fits.all():
                full.append(left[~fits])
                left, chosen, slots = left[fits], chosen[fits], slots[fits]
            # Entries that meet in one slot: the place that was written last is there, the others try again.
            wanted = places[left]
            flat_places[slots] = wanted
            lost = flat_places.take(slots) != wanted
            if not lost.any():
                flat_hashes[slots] = keys[left]
                break
            flat_hashes[slots[~lost]] = keys[left[~lost]]
            left, chosen = left[lost], chosen[lost]
        return np.concatenate(full) if full else np.empty(0, dtype=np.int64)
