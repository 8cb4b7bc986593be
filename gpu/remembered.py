"""Deletions that are remembered, so that a late or repeated record does not bring a row back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from headrace.gpu.ids import IdColumn
from headrace.gpu.places import Directory, places_of
from headrace.gpu.rows import Id
from headrace.gpu.versions import VersionBuffer, Versions

__all__ = ["REMEMBERED", "Remembered"]

REMEMBERED = 0
"""The serial number by which `headrace.gpu.places` knows a remembered deletion; segments begin at 1."""

_FEW = 4096

_Ints = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]


class Remembered:
    """Ids that are not here and the newest versions of them that were heard of; as if they were a segment's rows.

    To be called under the store's lock.

    Parameters
    ----------
    kind : {"string", "integer"}
        Of the ids.
    directory : Directory
        Told of rows that change their place.
    """

    def __init__(self, kind: str, directory: Directory) -> None:
        self._kind, self._directory = kind, directory
        self._limit = _FEW
        self._begin()

    def _begin(self) -> None:
        self.ids = IdColumn(self._kind)
        self._versions = VersionBuffer(1024)
        self._used = np.empty(0, dtype=np.bool_)
        self.count = 0

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self._versions.nbytes + self._used.nbytes

    def versions(self, rows: _Ints) -> Versions:
        return self._versions.all.take(rows)

    def add(self, ids: Sequence[Id], hashes: _Hashes, versions: Versions) -> _Ints:
        """Remember ids that are not remembered yet; returns their places for the directory."""
        first = len(self.ids)
        last = first + len(ids)
        self.ids.append(ids, hashes)
        self._versions.append(versions)
        if last > len(self._used):
            used = np.zeros(max(last, 2 * len(self._used), 1024), dtype=np.bool_)
            used[:first] = self._used[:first]
            self._used = used
        self._used[first:last] = True
        self.count += len(ids)
        return places_of(REMEMBERED, np.arange(first, last))

    def growth(self, ids: Sequence[Id]) -> int:
        """Bytes that `add` of these ids would add to `nbytes`."""
        flags = len(self._used) + 1024 if len(self.ids) + len(ids) > len(self._used) else 0
        return self.ids.growth(ids) + self._versions.growth(len(ids)) + flags

    def renew(self, rows: _Ints, versions: Versions) -> None:
        """A newer version of ids that are remembered."""
        self._versions.all.put(rows, versions)

    def release(self, rows: _Ints) -> None:
        """These ids have rows again; their entries in the directory have been changed already."""
        self._used[rows] = False
        self.count -= len(rows)
        if len(self.ids) > 2 * max(self.count, _FEW):
            self._keep(np.flatnonzero(self._used[: len(self.ids)]))

    def forget(self, stable: Mapping[int, int], *, now: bool = False) -> None:
        """Drop what is below `stable`; seldom, because all are looked at, or `now`, because memory is short."""
        if self.count < self._limit and not (now and self.count):
            return
        rows = np.flatnonzero(self._used[: len(self.ids)])
        versions = self.versions(rows)
        kept = np.ones(len(rows), dtype=np.bool_)
        for partition, offset in stable.items():
            kept &= (versions.topic_partitions != partition) | (versions.offsets >= offset)
        gone = rows[~kept]
        if not len(gone):
            self._limit = max(self._limit, 2 * self.count)
            return
        self._directory.forget(self.ids.hashes(gone), places_of(REMEMBERED, gone))
        self._keep(rows[kept])
        self._limit = max(_FEW, 2 * self.count)

    def _keep(self, rows: _Ints) -> None:
        """Let go of the memory of all others."""
        ids, hashes, versions = self.ids.to_list(rows), self.ids.hashes(rows), self.versions(rows)
        self._begin()
        self._directory.change(hashes, places_of(REMEMBERED, rows), self.add(ids, hashes, versions))
