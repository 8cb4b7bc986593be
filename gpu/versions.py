"""Versions as columns: where in the log each row's record was, and which of two is newer.

One id normally comes from one topic partition, and its versions compare by offset. An id that came from two is decided
by Kafka's timestamp, then by the number of the topic partition, so that all copies decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.gpu.buffers import Buffer

__all__ = ["VersionBuffer", "Versions", "compare"]


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of some rows.

    Attributes
    ----------
    topic_partitions : int32 (n,)
    offsets : int64 (n,)
    timestamps : int64 (n,), ms since the epoch
    """

    topic_partitions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def nbytes(self) -> int:
        return self.topic_partitions.nbytes + self.offsets.nbytes + self.timestamps.nbytes

    def take(self, rows: npt.NDArray[np.int64]) -> Versions:
        """A copy of some rows, in that order."""
        return Versions(self.topic_partitions[rows], self.offsets[rows], self.timestamps[rows])

    def put(self, rows: npt.NDArray[np.int64], versions: Versions) -> None:
        """Write `versions` at `rows`; only for arrays that nobody else reads."""
        self.topic_partitions[rows] = versions.topic_partitions
        self.offsets[rows] = versions.offsets
        self.timestamps[rows] = versions.timestamps

    def to_tuples(self) -> list[tuple[int, int, int]]:
        """Topic partition, offset, timestamp of each row."""
        columns = self.topic_partitions.tolist(), self.offsets.tolist(), self.timestamps.tolist()
        return list(zip(*columns, strict=True))

    @staticmethod
    def unknown(count: int) -> Versions:
        """Room for `count` versions, all zero."""
        return Versions(
            np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        )

    @staticmethod
    def concatenate(parts: Sequence[Versions]) -> Versions:
        return Versions(
            np.concatenate([part.topic_partitions for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.timestamps for part in parts]),
        )


class VersionBuffer:
    """Versions that are appended to; see `Buffer` for who may do what."""

    def __init__(self, expected: int) -> None:
        self._partitions = Buffer(np, np.int32, expected=expected)
        self._offsets = Buffer(np, np.int64, expected=expected)
        self._timestamps = Buffer(np, np.int64, expected=expected)

    def append(self, versions: Versions) -> None:
        self._partitions.append(versions.topic_partitions)
        self._offsets.append(versions.offsets)
        self._timestamps.append(versions.timestamps)

    @property
    def all(self) -> Versions:
        """All rows, without a copy."""
        return Versions(self._partitions.first(), self._offsets.first(), self._timestamps.first())

    @property
    def nbytes(self) -> int:
        return self._partitions.nbytes + self._offsets.nbytes + self._timestamps.nbytes

    def growth(self, more: int) -> int:
        return sum(column.growth(more) for column in (self._partitions, self._offsets, self._timestamps))


def compare(left: Versions, right: Versions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row by row: -1, 0, 1 as `left` is older, the same, newer; and whether two topic partitions met."""
    crossed = left.topic_partitions != right.topic_partitions
    by_offset = np.sign(left.offsets - right.offsets)
    by_time = np.sign(left.timestamps - right.timestamps)
    by_partition = np.sign(left.topic_partitions.astype(np.int64) - right.topic_partitions)
    return np.where(crossed, np.where(by_time != 0, by_time, by_partition), by_offset), crossed
